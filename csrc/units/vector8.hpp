// The vector layer of units with 256-bit registers: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include "elements.hpp"

namespace safr {
namespace {

constexpr int kLanes = 8;
typedef __m256 Vec;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where either is NaN

inline __m256i lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec widen(BFloat16, __m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec widen(Float16, __m128i bits) { return _mm256_cvtph_ps(bits); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load_part(const float* p, int count) { return _mm256_maskload_ps(p, lanes(count)); }

template <typename Half>
inline Vec load(const Half* p) {
  return widen(Half{}, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <typename Half>
inline Vec load_part(const Half* p, int count) {
  Half part[kLanes] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store_part(float* p, Vec v, int count) { _mm256_maskstore_ps(p, lanes(count), v); }

// v[i][j] becomes v[j][i].
__attribute__((always_inline)) inline void transpose(Vec (&v)[kLanes]) {
  Vec t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
  for (int i = 0; i < kLanes; ++i) v[i] = t[i];
}

}  // namespace
}  // namespace safr
