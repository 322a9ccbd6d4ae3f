#include "cpu_features.hpp"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace safr {
namespace {

constexpr const char* kVariable = "SAFR_FAST_CPU_ISA";

#if defined(__x86_64__)

bool bit(uint32_t word, int index) { return word >> index & 1; }

struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;  // zeros where the processor has no such leaf
  Cpuid(uint32_t leaf, uint32_t subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

// Whether the operating system saves every register state in `mask`, bits of XCR0.
bool os_saves(uint32_t mask) {
  if (!bit(Cpuid(1, 0).ecx, 27)) return false;  // OSXSAVE: xgetbv may be used
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

bool has_avx2() {
  const uint32_t ecx = Cpuid(1, 0).ecx, ebx = Cpuid(7, 0).ebx;
  const bool fma = bit(ecx, 12), avx = bit(ecx, 28), f16c = bit(ecx, 29), avx2 = bit(ebx, 5);
  return os_saves(0x6) && fma && avx && f16c && avx2;
}

bool has_avx512() {
  const uint32_t ebx = Cpuid(7, 0).ebx;
  const bool f = bit(ebx, 16), dq = bit(ebx, 17), bw = bit(ebx, 30), vl = bit(ebx, 31);
  return has_avx2() && os_saves(0xe6) && f && dq && bw && vl;
}

bool has_avx512_bf16() { return has_avx512() && bit(Cpuid(7, 1).eax, 5); }

#if defined(SAFR_EMULATE_AMX)
bool has_amx() { return has_avx512_bf16(); }
#elif !defined(__linux__)
bool has_amx() { return false; }  // how to ask other systems for the tile registers is unknown here
#else
bool has_amx() {
  const uint32_t edx = Cpuid(7, 0).edx;
  const bool amx_bf16 = bit(edx, 22), amx_tile = bit(edx, 24);
  if (!has_avx512_bf16() || !os_saves(0x600e6) || !amx_bf16 || !amx_tile) return false;
  // Linux gives a process the tile registers on request only, and may refuse.
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

#endif

struct Level {
  const char* name;
  const Kernels* table;  // null where the build has no such unit
  bool supported;        // by processor and operating system
};

// Best first. Asked of the machine once.
const std::vector<Level>& levels() {
#if defined(SAFR_UNIT_AMX)
  constexpr const Kernels* amx = &kernels_amx;
#else
  constexpr const Kernels* amx = nullptr;
#endif
#if defined(SAFR_UNIT_AVX512_BF16)
  constexpr const Kernels* avx512_bf16 = &kernels_avx512_bf16;
#else
  constexpr const Kernels* avx512_bf16 = nullptr;
#endif
#if defined(SAFR_UNIT_AVX512)
  constexpr const Kernels* avx512 = &kernels_avx512;
#else
  constexpr const Kernels* avx512 = nullptr;
#endif
#if defined(SAFR_UNIT_AVX2)
  constexpr const Kernels* avx2 = &kernels_avx2;
#else
  constexpr const Kernels* avx2 = nullptr;
#endif
#if defined(SAFR_UNIT_NEON)
  constexpr const Kernels* neon = &kernels_neon;
#else
  constexpr const Kernels* neon = nullptr;
#endif
#if defined(__x86_64__)
  static const bool has[] = {amx && has_amx(), has_avx512_bf16(), has_avx512(), has_avx2(), false};
#elif defined(__aarch64__)
  static const bool has[] = {false, false, false, false, true};
#else
  static const bool has[] = {false, false, false, false, false};
#endif
  static const std::vector<Level> all = {{"amx", amx, has[0]},
                                         {"avx512_bf16", avx512_bf16, has[1]},
                                         {"avx512", avx512, has[2]},
                                         {"avx2", avx2, has[3]},
                                         {"neon", neon, has[4]},
                                         {"baseline", &kernels_baseline, true}};
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.table && level.supported) names.push_back(level.name);
  return names;
}

const Kernels& select_isa(const char* name) {
  const std::string wanted = name ? name : "";
  for (const Level& level : levels()) {
    const bool usable = level.table && level.supported;
    if (usable && (wanted.empty() || wanted == level.name)) return *level.table;
    if (wanted == level.name) {
      const char* lacking = level.supported ? "this build" : "this machine";
      throw std::runtime_error(std::string(kVariable) + " is \"" + wanted + "\", which " + lacking +
                               " lacks; it has " + joined(available_isas()) + ". Name one of these, or unset " +
                               kVariable + " to use the best.");
    }
  }
  throw std::invalid_argument(std::string(kVariable) + " is \"" + wanted + "\", which is no instruction-set level; " +
                              "this machine has " + joined(available_isas()) + ". Name one of these, or unset " +
                              kVariable + " to use the best.");
}

const Kernels& kernels() { return select_isa(std::getenv(kVariable)); }

}  // namespace safr
