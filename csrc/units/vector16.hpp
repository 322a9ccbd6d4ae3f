// The vector layer of units with 512-bit registers: AVX-512 F, BW, VL, DQ.
#pragma once

#include <immintrin.h>

#include "elements.hpp"

namespace safr {
namespace {

constexpr int kLanes = 16;
typedef __m512 Vec;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN

inline __mmask16 lanes(int count) { return __mmask16((1u << count) - 1); }
inline Vec widen(BFloat16, __m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec widen(Float16, __m256i bits) { return _mm512_cvtph_ps(bits); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(lanes(count), p); }

template <typename Half>
inline Vec load(const Half* p) {
  return widen(Half{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <typename Half>
inline Vec load_part(const Half* p, int count) {
  return widen(Half{}, _mm256_maskz_loadu_epi16(lanes(count), p));
}

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store_part(float* p, Vec v, int count) { _mm512_mask_storeu_ps(p, lanes(count), v); }

// v[i][j] becomes v[j][i], in four steps that each move blocks half or twice as large.
__attribute__((always_inline)) inline void transpose(__m512i (&v)[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

__attribute__((always_inline)) inline void transpose(Vec (&v)[kLanes]) {
  __m512i bits[kLanes];
  for (int i = 0; i < kLanes; ++i) bits[i] = _mm512_castps_si512(v[i]);
  transpose(bits);
  for (int i = 0; i < kLanes; ++i) v[i] = _mm512_castsi512_ps(bits[i]);
}

}  // namespace
}  // namespace safr
