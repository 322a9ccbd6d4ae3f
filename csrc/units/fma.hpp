// Products by multiply-add, and the packing of float32 ones, over a unit's vector layer. The layer, included before, gives
// kLanes, Vec, zero, load, load_part, broadcast, add, multiply_add, larger, store, store_part and transpose.
#pragma once

#include "elements.hpp"

namespace safr {
namespace {

// Elements that do not lie side by side. Apart, since it is rare and its code is long.
template <typename T>
__attribute__((noinline)) Vec gather_chunk(const T* line, const Direction& d, const Chunk& chunk) {
  float gathered[kLanes] = {};
  for (int i = 0; i < chunk.count; ++i) gathered[i] = to_float(line[d.offset(chunk.first + i)]);
  return load(gathered);
}

// `chunk` of the line that starts at `line`, as float32.
template <typename T>
inline Vec load_chunk(const T* line, const Direction& d, const Chunk& chunk) {
  return chunk.contiguous ? load_part(line + chunk.start, chunk.count) : gather_chunk(line, d, chunk);
}

// A panel is `Width` floats for each step of depth. Where Width is less than a vector, each row's store spills into
// the next row's place, and is made good by it; the last row of a panel must not spill.
template <int Width>
inline void store_row(float* out, Vec row, bool last) {
  if (Width >= kLanes || !last) return store(out, row);
  store_part(out, row, Width);
}

// Elements that lie side by side across the panel are copied row by row: those of steps `begin` to `end` out of k.
template <int Width, typename T>
inline void copy_rows(const Operand<T>& a, int64_t first, int64_t available, int64_t k0, int64_t k, int64_t begin,
                      int64_t end, float* out) {
  for (int group = 0; group < Width; group += kLanes) {
    const Chunk chunk(a.across, first + group, available - group, kLanes);
    const auto copy = [&](const auto& load_line) {
      for (int64_t p = begin; p < end; ++p)
        store_row<Width>(out + p * Width + group, load_line(a.data + a.depth.offset(k0 + p)), p + 1 == k);
    };
    if (chunk.is_vector(kLanes))
      copy([&](const T* line) { return load(line + chunk.start); });
    else
      copy([&](const T* line) { return load_chunk(line, a.across, chunk); });
  }
}

// Elements that lie side by side along the depth are transposed in registers.
template <int Width, typename T>
inline void transpose_panel(const Operand<T>& a, int64_t first, int64_t available, int64_t k0, int64_t k, float* out) {
  const T* line[Width];
  for (int i = 0; i < Width && i < available; ++i) line[i] = a.data + a.across.offset(first + i);
  for (int64_t p = 0; p < k; p += kLanes) {
    const Chunk chunk(a.depth, k0 + p, k - p, kLanes);
    const bool whole = chunk.is_vector(kLanes) && available >= Width;
#pragma GCC unroll 4
    for (int group = 0; group < Width; group += kLanes) {
      Vec block[kLanes];
      if (whole) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = group + i < Width ? load(line[group + i] + chunk.start) : zero();
      } else {
        for (int i = 0; i < kLanes; ++i)
          block[i] = group + i < min(Width, available) ? load_chunk(line[group + i], a.depth, chunk) : zero();
      }
      transpose(block);
      float* row = out + p * Width + group;
      if (whole && p + kLanes < k) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i, row += Width) store(row, block[i]);
      } else {
        for (int i = 0; i < chunk.count; ++i, row += Width) store_row<Width>(row, block[i], p + i + 1 == k);
      }
    }
  }
}

template <int Width>
inline void pack(const View& v, Direction across, Direction depth, int64_t first, int64_t n, int64_t k0, int64_t k,
                 float* out) {
  with_operand(v, across, depth, [&](const auto& a) {
    if (depth.stride == 1 && across.stride != 1) {
      for (int64_t i = 0; i < n; i += Width) transpose_panel<Width>(a, first + i, n - i, k0, k, out + i * k);
    } else {
      constexpr int streams = 16;  // rows read side by side: as many as the processor prefetches
      for (int64_t p = 0; p < k; p += streams)
        for (int64_t i = 0; i < n; i += Width)
          copy_rows<Width>(a, first + i, n - i, k0, k, p, min(p + streams, k), out + i * k);
    }
  });
}

template <int Width>
void pack_left(const View& a, int64_t row0, int64_t m, int64_t k0, int64_t k, void* out) {
  pack<Width>(a, {a.row_stride, a.rows}, {a.col_stride, a.cols}, row0, m, k0, k, static_cast<float*>(out));
}

template <int Width>
void pack_right(const View& b, int64_t k0, int64_t k, int64_t col0, int64_t n, void* out) {
  pack<Width>(b, {b.col_stride, b.cols}, {b.row_stride, b.rows}, col0, n, k0, k, static_cast<float*>(out));
}

// One step of a tile over words of 32 bits: here a word is one float32.
struct MultiplyAdd {
  static constexpr int depth = 1;  // k that a word holds
  static Vec apply(Vec a, Vec b, Vec sum) { return multiply_add(a, b, sum); }
};

// Rows × (Vectors · kLanes) sums stay in registers: the loops over them must unroll whole. A left panel has LeftWidth
// rows; of a right panel of RightWidth columns those from First on take part.
template <typename Step, int Rows, int Vectors, int LeftWidth, int RightWidth, int First>
void multiply_panels(int64_t k, const void* left, const void* right, float* c, int64_t ldc, bool accumulate) {
  const float* a = static_cast<const float*>(left);
  const float* b = static_cast<const float*>(right) + First;
  c += First;
  Vec sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[i][j] = zero();

  for (; k > 0; k -= Step::depth, a += LeftWidth, b += RightWidth) {
    Vec row[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) row[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec factor = broadcast(a + i);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] = Step::apply(factor, row[j], sum[i][j]);
    }
  }

#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      float* out = c + i * ldc + j * kLanes;
      store(out, accumulate ? add(load(out), sum[i][j]) : sum[i][j]);
    }
}

template <typename Step, int Rows, int Vectors, int LeftWidth>
constexpr Tiles tiles() {
  constexpr int width = Vectors * kLanes;
  if constexpr (Vectors == 2)
    return {Rows, multiply_panels<Step, Rows, 2, LeftWidth, width, 0>,
            multiply_panels<Step, Rows, 1, LeftWidth, width, kLanes>};
  else
    return {Rows, multiply_panels<Step, Rows, Vectors, LeftWidth, width, 0>, nullptr};
}

template <typename Step, int Rows, int Vectors>
constexpr Tiles own_tiles() {
  static_assert(Vectors * kLanes % Rows == 0);
  return tiles<Step, Rows, Vectors, Vectors * kLanes>();
}

template <int Rows, int Vectors, int OwnRows = Rows>
constexpr Product fma_product = {
    Rows, Vectors * kLanes, 1, sizeof(float), sizeof(float), 256, pack_left<Rows>, pack_right<Vectors * kLanes>,
    tiles<MultiplyAdd, Rows, Vectors, Rows>(), own_tiles<MultiplyAdd, OwnRows, Vectors>(), nullptr};

}  // namespace
}  // namespace safr
