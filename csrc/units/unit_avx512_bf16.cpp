// AVX-512 BF16: float32 products as AVX-512 has them, and products of bfloat16 pairs with float32 sums, twice as fast.
// For each 32 steps of depth a panel holds 16 steps of pairs; a step is a word of 32 bits for each line.
#include "vector16.hpp"

#include "../passes.hpp"
#include "denormals.hpp"
#include "fma.hpp"
#include "pairs.hpp"

namespace safr {
namespace {

constexpr int kDepth = 32, kSteps = 16;

struct MultiplyAddPairs {
  static constexpr int depth = 2;
  static Vec apply(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

// 16 pairs of what lies at `low` and at `high`.
inline Pairs pairs_at(const float* low, const float* high) { return round_pairs(load(low), load(high)); }
inline Pairs pairs_at(const Float16* low, const Float16* high) { return round_pairs(load(low), load(high)); }
inline Pairs pairs_at(const BFloat16* low, const BFloat16* high) {
  const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1));
}

// 32 steps of depth of 16 lines that lie along the depth: a row of pairs comes of each line, and is turned.
template <typename T>
inline void lines_along(const Operand<T>& a, int64_t first, int64_t across, int64_t k0, int64_t depth,
                        Pairs (&block)[kSteps]) {
  const Chunk low(a.depth, k0, depth, kLanes), high(a.depth, k0 + kLanes, depth - kLanes, kLanes);
  const auto line = [&](int i) { return a.data + a.across.offset(first + i); };
  if (across >= kSteps && low.is_vector(kLanes) && high.is_vector(kLanes)) {
#pragma GCC unroll 16
    for (int i = 0; i < kSteps; ++i) block[i] = pairs_at(line(i) + low.start, line(i) + high.start);
  } else {
    for (int i = 0; i < kSteps; ++i)
      block[i] = i < across ? round_pairs(load_chunk(line(i), a.depth, low), load_chunk(line(i), a.depth, high))
                            : _mm512_setzero_si512();
  }
  transpose(block);
}

// 32 steps of depth of 16 lines that lie across: a row of pairs comes of each two steps.
template <typename T>
inline void lines_across(const Operand<T>& a, int64_t first, int64_t across, int64_t k0, int64_t depth,
                         Pairs (&block)[kSteps]) {
  const Chunk chunk(a.across, first, across, kLanes);
  const auto step = [&](int p) { return a.data + a.depth.offset(k0 + p); };
  if (depth >= kDepth && chunk.is_vector(kLanes)) {
#pragma GCC unroll 16
    for (int p = 0; p < kSteps; ++p) block[p] = pairs_at(step(p) + chunk.start, step(p + 16) + chunk.start);
  } else {
    const auto part = [&](int p) { return p < depth ? load_chunk(step(p), a.across, chunk) : zero(); };
    for (int p = 0; p < kSteps; ++p) block[p] = round_pairs(part(p), part(p + 16));
  }
}

// A panel is Width words for each pair of steps; where Width is less than a vector, a block fills several panels.
template <int Width>
inline void store_block(const Pairs (&block)[kSteps], char* panel, int64_t line, int64_t panel_bytes) {
  float* out = reinterpret_cast<float*>(panel) + line % Width;
#pragma GCC unroll 16
  for (int p = 0; p < kSteps; ++p) {
    const Vec words = _mm512_castsi512_ps(block[p]);
    if constexpr (Width >= kLanes) {
      store(out + p * Width, words);
    } else {
      float* next = reinterpret_cast<float*>(panel + panel_bytes);
      _mm256_storeu_ps(out + p * Width, _mm512_castps512_ps256(words));
      _mm256_storeu_ps(next + p * Width, _mm512_extractf32x8_ps(words, 1));
    }
  }
}

template <int Width>
inline void pack_pairs(const View& v, Direction across, Direction depth, int64_t first, int64_t n, int64_t k0,
                       int64_t k, char* out) {
  static_assert(Width == 8 || Width % kLanes == 0, "a block of 16 lines fills whole panels");
  const bool along_depth = depth.stride == 1 && across.stride != 1;
  const int64_t panel_bytes = round_up(k, kDepth) * Width * 2, lines = round_up(n, Width);
  with_operand(v, across, depth, [&](const auto& a) {
    const auto pack_block = [&](int64_t i, int64_t p) {
      Pairs block[kSteps];
      if (along_depth)
        lines_along(a, first + i, n - i, k0 + p, k - p, block);
      else
        lines_across(a, first + i, n - i, k0 + p, k - p, block);
      char* panel = out + i / Width * panel_bytes + p * Width * 2;
      if (lines - i >= kSteps) return store_block<Width>(block, panel, i, panel_bytes);
      for (int step = 0; step < kSteps; ++step)  // half a block, in a last panel of 8
        _mm256_storeu_ps(reinterpret_cast<float*>(panel) + step * Width,
                         _mm512_castps512_ps256(_mm512_castsi512_ps(block[step])));
    };
    // Memory is read in its own order.
    if (along_depth) {
      for (int64_t i = 0; i < lines; i += kSteps)
        for (int64_t p = 0; p < k; p += kDepth) pack_block(i, p);
    } else {
      for (int64_t p = 0; p < k; p += kDepth)
        for (int64_t i = 0; i < lines; i += kSteps) pack_block(i, p);
    }
  });
}

template <int Width>
void pack_left_pairs(const View& a, int64_t row0, int64_t m, int64_t k0, int64_t k, void* out) {
  pack_pairs<Width>(a, {a.row_stride, a.rows}, {a.col_stride, a.cols}, row0, m, k0, k, static_cast<char*>(out));
}

template <int Width>
void pack_right_pairs(const View& b, int64_t k0, int64_t k, int64_t col0, int64_t n, void* out) {
  pack_pairs<Width>(b, {b.col_stride, b.cols}, {b.row_stride, b.rows}, col0, n, k0, k, static_cast<char*>(out));
}

constexpr int kRows = 8, kVectors = 2, kWidth = kVectors * kLanes;
constexpr Product kFloat32 = fma_product<kRows, kVectors>;
constexpr Product kBFloat16 = {kRows,
                               kWidth,
                               kDepth,
                               2,
                               2,
                               512,
                               pack_left_pairs<kRows>,
                               pack_right_pairs<kWidth>,
                               tiles<MultiplyAddPairs, kRows, kVectors, kRows>(),
                               own_tiles<MultiplyAddPairs, kRows, kVectors>(),
                               nullptr};

}  // namespace

constexpr Kernels kernels_avx512_bf16 = {
    "avx512_bf16", {kFloat32, kFloat32, kBFloat16}, kBFloat16, flush_denormals, restore_denormals, &kElementwise};

}  // namespace safr
