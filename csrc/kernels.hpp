// What an instruction-set unit provides. Algorithms are written once over this table; intrinsics appear in units only.
// Units include no C++ standard headers and keep everything but their table in an anonymous namespace: else the linker
// may pick an AVX-512 copy of an inline function for a machine that has only the baseline.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace safr {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// How float32 operands are multiplied, as torch.get_float32_matmul_precision() names it.
enum class Precision : int { highest = 0, high = 1, medium = 2 };

// A matrix as it lies in memory. Element (r, c) is at data + row(r) * row_stride + col(c) * col_stride, counted in
// elements of dtype, where row(r) = rows ? rows[r] : r and likewise for columns: the index lists leave padding out.
struct View {
  const void* data;
  Dtype dtype;
  int64_t row_stride, col_stride;
  const int32_t* rows;
  const int32_t* cols;
};

// Internal linkage, for the reason above: every unit keeps its own copy.
static inline View transposed(const View& v) { return {v.data, v.dtype, v.col_stride, v.row_stride, v.cols, v.rows}; }

// c (a tile's rows × nr, row stride ldc) = left panel · right panel, added to c where accumulate. k is a multiple of
// k_unit.
using Tile = void (*)(int64_t k, const void* left, const void* right, float* c, int64_t ldc, bool accumulate);

struct Tiles {
  int rows;  // that one of them makes
  Tile whole;
  Tile right_half;  // the right half of its columns alone, at the same place in c; null where a tile is not divided
};

// One way of multiplying matrices: operands are packed into panels, then register tiles run over the panels.
struct Product {
  int mr, nr;       // rows of a left panel, columns of a right one: a register tile, but for own_tiles
  int k_unit;       // packed depth is k rounded up to a multiple of this, filled with zeros
  int left_bytes;   // bytes that one element of a packed left operand takes (splits included)
  int right_bytes;  // the same on the right
  int depth;        // k that suits one call of tile: the right panel then stays in the first-level cache

  // Packs a[row0 : row0 + m, k0 : k0 + k] into ceil(m / mr) panels, one behind the other, each
  // mr * round_up(k, k_unit) * left_bytes long; missing rows are zeros. out is aligned to 64 bytes.
  void (*pack_left)(const View& a, int64_t row0, int64_t m, int64_t k0, int64_t k, void* out);
  // Packs b[k0 : k0 + k, col0 : col0 + n] into ceil(n / nr) panels likewise.
  void (*pack_right)(const View& b, int64_t k0, int64_t k, int64_t col0, int64_t n, void* out);
  Tiles tiles;
  // The same for a left operand that is packed as a right one, so that a matrix times its own transpose is packed once:
  // `left` is where the tile's first row lies in its panel, of which a row takes one word of 32 bits. Their rows divide
  // `nr`. Null where that cannot be.
  Tiles own_tiles;
  // Makes packed panels of one side, whole k_units of them, those of the same lines and k on the other: a matrix times
  // its own transpose is then packed once, too. Panels are alike on both sides, and `out` is not among them. Null where
  // own_tiles serve for that.
  void (*turn)(const void* panels, int64_t bytes, void* out);
};

// State that a thread enters before it runs kernels: denormals flushed, tile registers configured.
struct ThreadState {
  uint32_t control_word;  // of floating point, as the caller had it
};

struct Elementwise;  // elementwise.hpp: the passes between products, compiled once per unit

struct Kernels {
  const char* name;
  Product float32[3];  // by Precision, for operands of any dtype read as float32
  Product bfloat16;    // operands rounded to bfloat16; exact for bfloat16 input
  void (*enter)(ThreadState*);
  void (*leave)(const ThreadState*);
  const Elementwise* elementwise;
};

// One table a unit; which of them are built depends on the architecture and the compiler.
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx, kernels_neon;

}  // namespace safr
