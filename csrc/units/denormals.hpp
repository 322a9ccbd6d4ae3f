// Entering and leaving a state in which denormal numbers count as zero. Nearly one-hot attention is full of them, and
// arithmetic on them is up to ten times slower.
#pragma once

#include "../kernels.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace safr {
namespace {

#if defined(__x86_64__)

constexpr uint32_t kFlushDenormals = 0x8040;  // MXCSR: results to zero, operands as zero
inline uint32_t control_word() { return _mm_getcsr(); }
inline void set_control_word(uint32_t word) { _mm_setcsr(word); }

#elif defined(__aarch64__)

constexpr uint32_t kFlushDenormals = 1u << 24;  // FPCR.FZ
inline uint32_t control_word() {
  uint64_t word;
  asm volatile("mrs %0, fpcr" : "=r"(word));
  return uint32_t(word);
}
inline void set_control_word(uint32_t word) { asm volatile("msr fpcr, %0" : : "r"(uint64_t(word))); }

#else

constexpr uint32_t kFlushDenormals = 0;
inline uint32_t control_word() { return 0; }
inline void set_control_word(uint32_t) {}

#endif

inline void flush_denormals(ThreadState* state) {
  state->control_word = control_word();
  set_control_word(state->control_word | kFlushDenormals);
}

inline void restore_denormals(const ThreadState* state) { set_control_word(state->control_word); }

}  // namespace
}  // namespace safr
