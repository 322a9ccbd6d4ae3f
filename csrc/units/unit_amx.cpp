// AMX: products of bfloat16 tiles with float32 sums. A float32 operand is split into bfloat16 parts of falling size,
// x = x0 + x1 (+ x2), and the products of parts that matter are summed:
//   highest   x2·y0 + x1·y0 + x1·y1 + x0·y1 + x0·y2 + x0·y0     as accurate as float32 multiply-add
//   high      x1·y0 + x0·y0 + x0·y1                             16 bits
//   medium    x0·y0                                              8 bits
// Parts that would be denormal are lost: below 1e-33 in magnitude, numbers keep fewer bits than that. Above 3.39e38 they
// round to infinity.
//
// A panel is 32 wide. For each 32 steps of depth and each part it holds two tiles of 16 rows of 64 bytes. A row is one
// row of the matrix on the left, and a pair of steps of depth on the right. Pairs are formed of steps p and p + 16: two
// plain vectors then make 16 pairs lane by lane, whichever way the matrix lies in memory.
#include "vector16.hpp"

#include "../passes.hpp"
#include "denormals.hpp"
#include "fma.hpp"
#include "pairs.hpp"
#if defined(SAFR_EMULATE_AMX)
#include "emulated_tiles.hpp"
#endif

namespace safr {
namespace {

constexpr int kWidth = 32, kDepth = 32, kTileBytes = 1024, kTileRowBytes = 64;

// Rounds x to a bfloat16 (a tie goes either way: the next part makes it good) and leaves the rest in x.
inline __m512i take_part(Vec& x) {
  const __m512i half = _mm512_set1_epi32(0x8000), mask = _mm512_set1_epi32(int(0xffff0000));
  const __m512i part = _mm512_and_epi32(_mm512_add_epi32(_mm512_castps_si512(x), half), mask);
  x = _mm512_sub_ps(x, _mm512_castsi512_ps(part));
  return part;
}

template <int Parts>
inline void split(Vec low, Vec high, Pairs (&parts)[Parts]) {
#pragma GCC unroll 4
  for (int s = 0; s + 1 < Parts; ++s) {
    const __m512i upper = take_part(high);
    parts[s] = _mm512_or_epi32(_mm512_srli_epi32(take_part(low), 16), upper);
  }
  parts[Parts - 1] = round_pairs(low, high);
}

// Splits 16 rows of pairs, as `pair(row, low, high)` loads them, and stores one row of a tile for each part.
template <int Parts, typename Pair>
inline void split_rows(char* tile, const Pair& pair) {
#pragma GCC unroll 4
  for (int row = 0; row < 16; ++row) {
    Vec low, high;
    Pairs parts[Parts];
    pair(row, low, high);
    split(low, high, parts);
#pragma GCC unroll 4
    for (int s = 0; s < Parts; ++s) _mm512_store_si512(tile + s * 2 * kTileBytes + row * kTileRowBytes, parts[s]);
  }
}

// Transposes words of 32 bits. Loads place the quarters of rows: that spares half of the shuffles, which all wait for
// one port.
inline void transpose_tile(const char* tile, char* out) {
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    const auto rows = [&](int i) {  // i, i + 4, i + 8 and i + 12
      const __m128i* p = reinterpret_cast<const __m128i*>(tile + i * kTileRowBytes) + quarter;
      __m512i v = _mm512_castsi128_si512(_mm_load_si128(p));
      v = _mm512_mask_broadcast_i32x4(v, 0x00f0, _mm_load_si128(p + 16));
      v = _mm512_mask_broadcast_i32x4(v, 0x0f00, _mm_load_si128(p + 32));
      return _mm512_mask_broadcast_i32x4(v, 0xf000, _mm_load_si128(p + 48));
    };
    const __m512i v[4] = {rows(0), rows(1), rows(2), rows(3)};
    const __m512i low[2] = {_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpacklo_epi32(v[2], v[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[2], v[3])};
    char* target = out + quarter * 4 * kTileRowBytes;
    _mm512_store_si512(target, _mm512_unpacklo_epi64(low[0], low[1]));
    _mm512_store_si512(target + kTileRowBytes, _mm512_unpackhi_epi64(low[0], low[1]));
    _mm512_store_si512(target + 2 * kTileRowBytes, _mm512_unpacklo_epi64(high[0], high[1]));
    _mm512_store_si512(target + 3 * kTileRowBytes, _mm512_unpackhi_epi64(high[0], high[1]));
  }
}

// A tile of a left panel is the transpose, in words of 32 bits, of the right panel's at the same place.
void turn(const void* panels, int64_t bytes, void* out) {
  for (int64_t i = 0; i < bytes; i += kTileBytes)
    transpose_tile(static_cast<const char*>(panels) + i, static_cast<char*>(out) + i);
}

// 16 lines that lie along the depth, at 32 steps of it: a row of pairs comes of each line.
template <int Parts, typename T>
inline void pack_lines(const Operand<T>& a, int64_t first, int64_t across, int64_t k0, int64_t depth, char* tile) {
  const Chunk low(a.depth, k0, depth, kLanes), high(a.depth, k0 + kLanes, depth - kLanes, kLanes);
  const auto line = [&](int i) { return a.data + a.across.offset(first + i); };
  if (across >= 16 && low.is_vector(kLanes) && high.is_vector(kLanes)) {
    split_rows<Parts>(tile, [&](int i, Vec& x, Vec& y) {
      x = load(line(i) + low.start), y = load(line(i) + high.start);
    });
  } else {
    split_rows<Parts>(tile, [&](int i, Vec& x, Vec& y) {
      x = i < across ? load_chunk(line(i), a.depth, low) : zero();
      y = i < across ? load_chunk(line(i), a.depth, high) : zero();
    });
  }
}

// 32 steps of depth, of lines that lie across: a row of pairs comes of each two steps.
template <int Parts, typename T>
inline void pack_steps(const Operand<T>& a, int64_t first, int64_t across, int64_t k0, int64_t depth, char* tile) {
  const Chunk chunk(a.across, first, across, kLanes);
  const auto line = [&](int p) { return a.data + a.depth.offset(k0 + p); };
  if (depth >= kDepth && chunk.is_vector(kLanes)) {
    split_rows<Parts>(tile, [&](int p, Vec& x, Vec& y) {
      x = load(line(p) + chunk.start), y = load(line(p + 16) + chunk.start);
    });
  } else {
    split_rows<Parts>(tile, [&](int p, Vec& x, Vec& y) {
      x = p < depth ? load_chunk(line(p), a.across, chunk) : zero();
      y = p + 16 < depth ? load_chunk(line(p + 16), a.across, chunk) : zero();
    });
  }
}

template <int Parts, bool Left>
inline void pack_tiles(const View& v, Direction across, Direction depth, int64_t first, int64_t n, int64_t k0,
                       int64_t k, void* out) {
  constexpr int64_t block_bytes = Parts * 2 * kTileBytes;
  const bool along_depth = depth.stride == 1 && across.stride != 1;
  const int64_t panel_bytes = (k + kDepth - 1) / kDepth * block_bytes;
  with_operand(v, across, depth, [&](const auto& a) {
    const bool turned = along_depth != Left;
    alignas(64) char other_side[block_bytes];
    const auto pack_tile = [&](int64_t i, int64_t p) {
      char* block = static_cast<char*>(out) + i / kWidth * panel_bytes + p / kDepth * block_bytes;
      char* place = block + i % kWidth / 16 * kTileBytes;
      char* tile = turned ? other_side : place;
      if (along_depth)
        pack_lines<Parts>(a, first + i, n - i, k0 + p, k - p, tile);
      else
        pack_steps<Parts>(a, first + i, n - i, k0 + p, k - p, tile);
      for (int s = 0; turned && s < Parts; ++s) transpose_tile(tile + s * 2 * kTileBytes, place + s * 2 * kTileBytes);
    };
    const int64_t width = round_up(n, kWidth);
    // Memory is read in its own order.
    if (along_depth) {
      for (int64_t i = 0; i < width; i += 16)
        for (int64_t p = 0; p < k; p += kDepth) pack_tile(i, p);
    } else {
      for (int64_t p = 0; p < k; p += kDepth)
        for (int64_t i = 0; i < width; i += 16) pack_tile(i, p);
    }
  });
}

template <int Parts>
void pack_left_tiles(const View& a, int64_t row0, int64_t m, int64_t k0, int64_t k, void* out) {
  pack_tiles<Parts, true>(a, {a.row_stride, a.rows}, {a.col_stride, a.cols}, row0, m, k0, k, out);
}

template <int Parts>
void pack_right_tiles(const View& b, int64_t k0, int64_t k, int64_t col0, int64_t n, void* out) {
  pack_tiles<Parts, false>(b, {b.col_stride, b.cols}, {b.row_stride, b.rows}, col0, n, k0, k, out);
}

// Tile registers: 0 to 3 are the sums, 4 and 5 hold a part of the left operand, 6 and 7 of the right one. Loads stand
// just before the products that use them. Left panels pass by once for each right panel, and streaming loads keep them
// from pushing it out of the first-level cache.
inline void load_right(const char* right) {
  _tile_loadd(6, right, kTileRowBytes);
  _tile_loadd(7, right + kTileBytes, kTileRowBytes);
}

// A new left part times the right part in registers.
inline void multiply_left(const char* left) {
  _tile_stream_loadd(4, left, kTileRowBytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stream_loadd(5, left + kTileBytes, kTileRowBytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// The left part in registers times a new right part.
inline void multiply_right(const char* right) {
  _tile_loadd(6, right, kTileRowBytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(7, right + kTileBytes, kTileRowBytes);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

// Successive products share an operand where they can.
template <int Parts>
inline void multiply_block(const char* left, const char* right) {
  constexpr int part = 2 * kTileBytes;
  load_right(right);
  if constexpr (Parts == 3) {
    multiply_left(left + 2 * part);
    multiply_left(left + part);
    multiply_right(right + part);
    multiply_left(left);
    multiply_right(right + 2 * part);
    multiply_right(right);
  } else {
    if constexpr (Parts == 2) multiply_left(left + part);
    multiply_left(left);
    if constexpr (Parts == 2) multiply_right(right + part);
  }
}

// The compiler does not know that tile loads read memory (GCC 12): all that was written must be written before them.
inline void settle_memory() { asm volatile("" ::: "memory"); }

template <int Parts>
void multiply_panels(int64_t k, const void* left, const void* right, float* c, int64_t ldc, bool accumulate) {
  const size_t stride = ldc * sizeof(float);
  float* lower = c + 16 * ldc;
  settle_memory();
  if (accumulate) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 16, stride);
    _tile_loadd(2, lower, stride);
    _tile_loadd(3, lower + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // Products wait for the sums that they add to: those of the tile below, the likely next, are fetched meanwhile.
  // Where none are added to, the lines that this tile will be stored in are.
  const int64_t blocks = k / kDepth, rows_a_block = blocks > 0 ? (kWidth + blocks - 1) / blocks : 0;
  const char* next = reinterpret_cast<const char*>(accumulate ? c + kWidth * ldc : c);

  const char* a = static_cast<const char*>(left);
  const char* b = static_cast<const char*>(right);
  constexpr int block_bytes = Parts * 2 * kTileBytes;
  for (int64_t i = 0; i < blocks; ++i, a += block_bytes, b += block_bytes) {
    for (int64_t row = 0; row < rows_a_block; ++row, next += stride) {
      __builtin_prefetch(next, 1);
      __builtin_prefetch(next + 64, 1);
    }
    multiply_block<Parts>(a, b);
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  _tile_stored(2, lower, stride);
  _tile_stored(3, lower + 16, stride);
  settle_memory();
}

// Of three parts a right panel fills the first-level cache, whole: halves of 512 are faster than thirds that fit.
template <int Parts>
constexpr Product amx_product = {
    kWidth, kWidth, kDepth, 2 * Parts, 2 * Parts, Parts == 1 ? 512 : 256, pack_left_tiles<Parts>,
    pack_right_tiles<Parts>, {kWidth, multiply_panels<Parts>, nullptr}, {0, nullptr, nullptr}, turn};

static_assert(amx_product<3>.mr == amx_product<3>.nr && amx_product<3>.left_bytes == amx_product<3>.right_bytes,
              "panels can be turned");

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Other libraries of the process release or change the configuration, so every entry loads it.
void enter(ThreadState* state) {
  flush_denormals(state);
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = kTileRowBytes, config.rows[i] = 16;
  settle_memory();
  _tile_loadconfig(&config);
}

void leave(const ThreadState* state) {
  _tile_release();
  restore_denormals(state);
}

}  // namespace

constexpr Kernels kernels_amx = {
    "amx", {amx_product<3>, amx_product<2>, amx_product<1>}, amx_product<1>, enter, leave, &kElementwise};

}  // namespace safr
