// The vector layer of units with 128-bit registers, in the compiler's own vector types: SSE2 and NEON alike.
#pragma once

#include "elements.hpp"

namespace safr {
namespace {

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t HalfBits __attribute__((vector_size(8)));

inline Vec zero() { return Vec{}; }
inline Vec broadcast(const float* p) { return Vec{*p, *p, *p, *p}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline Bits widen(const void* p) {
  HalfBits half;
  __builtin_memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Bits);
}

inline Vec load(const BFloat16* p) { return (Vec)(widen(p) << 16); }

// As to_float, for all lanes at once.
inline Vec load(const Float16* p) {
  const Bits half = widen(p), magnitude = (half & 0x7fff) << 13, exponent = half & 0x7c00;
  const Bits is_special = (Bits)(exponent == 0x7c00), is_subnormal = (Bits)(exponent == 0);
  const Bits normal = (magnitude + (112u << 23)) | (is_special & 0x7f800000);
  const Bits smallest = Bits{} + (113u << 23);
  const Bits subnormal = (Bits)((Vec)(magnitude + smallest) - (Vec)smallest);
  return (Vec)((half & 0x8000) << 16 | (is_subnormal & subnormal) | (~is_subnormal & normal));
}

inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

template <typename T>
inline Vec load_part(const T* p, int count) {
  Vec v = zero();
  for (int i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}

inline void store_part(float* p, Vec v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}

__attribute__((always_inline)) inline void transpose(Vec (&v)[kLanes]) {
  const Vec low01 = {v[0][0], v[1][0], v[0][1], v[1][1]}, high01 = {v[0][2], v[1][2], v[0][3], v[1][3]};
  const Vec low23 = {v[2][0], v[3][0], v[2][1], v[3][1]}, high23 = {v[2][2], v[3][2], v[2][3], v[3][3]};
  v[0] = Vec{low01[0], low01[1], low23[0], low23[1]};
  v[1] = Vec{low01[2], low01[3], low23[2], low23[3]};
  v[2] = Vec{high01[0], high01[1], high23[0], high23[1]};
  v[3] = Vec{high01[2], high01[3], high23[2], high23[3]};
}

}  // namespace
}  // namespace safr
