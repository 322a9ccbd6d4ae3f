// Pairs of bfloat16, as AMX and AVX-512 BF16 multiply them. A pair is formed of steps p and p + 16 of the depth: two
// plain vectors then make 16 pairs lane by lane, whichever way the matrix lies in memory.
#pragma once

#include "vector16.hpp"

namespace safr {
namespace {

// 16 pairs of bfloat16, one in each 32-bit lane, the first of a pair in the lower half.
typedef __m512i Pairs;

// Pairs of the 16 elements in the lower half and the 16 in the upper one.
inline Pairs interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// Rounds to nearest even, and keeps NaN.
inline Pairs round_pairs(Vec low, Vec high) { return interleave((__m512i)_mm512_cvtne2ps_pbh(high, low)); }

}  // namespace
}  // namespace safr
