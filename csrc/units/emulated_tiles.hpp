// AMX's tile registers in memory, for a build that tests unit_amx.cpp on a machine without AMX. As the processor does,
// it refuses work on tiles that are not configured. Only what the unit uses: palette 1, tiles of 16 rows of 64 bytes.
#pragma once

#include <immintrin.h>

namespace safr {
namespace {

struct EmulatedTiles {
  bool configured;
  alignas(64) char tile[8][1024];
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

inline char* emulated_tile(int t) {
  EmulatedTiles& tiles = emulated_tiles();
  if (!tiles.configured) __builtin_trap();
  return tiles.tile[t];
}

inline void emulated_configure(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  EmulatedTiles& tiles = emulated_tiles();
  if (bytes[0] != 1) __builtin_trap();
  for (int t = 0; t < 8; ++t)
    if (bytes[16 + 2 * t] != 64 || bytes[48 + t] != 16) __builtin_trap();
  __builtin_memset(&tiles, 0, sizeof(tiles));
  tiles.configured = true;
}

inline void emulated_load(int t, const void* base, size_t stride) {
  char* tile = emulated_tile(t);
  for (int row = 0; row < 16; ++row)
    _mm512_store_si512(tile + 64 * row, _mm512_loadu_si512(static_cast<const char*>(base) + row * stride));
}

inline void emulated_store(int t, void* base, size_t stride) {
  const char* tile = emulated_tile(t);
  for (int row = 0; row < 16; ++row)
    _mm512_storeu_si512(static_cast<char*>(base) + row * stride, _mm512_load_si512(tile + 64 * row));
}

// Adds up the products of the lower halves of each pair and those of the upper halves, and both to the sum: the order of
// Intel's manual for TDPBF16PS.
inline void emulated_multiply(int sum, int left, int right) {
  char *c = emulated_tile(sum), *a = emulated_tile(left), *b = emulated_tile(right);
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  for (int row = 0; row < 16; ++row) {
    __m512 lower_sum = _mm512_setzero_ps(), upper_sum = _mm512_setzero_ps();
    for (int k = 0; k < 16; ++k) {
      int pair;
      __builtin_memcpy(&pair, a + 64 * row + 4 * k, 4);
      const __m512i x = _mm512_set1_epi32(pair), y = _mm512_load_si512(b + 64 * k);
      lower_sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                  _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), lower_sum);
      upper_sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, upper)),
                                  _mm512_castsi512_ps(_mm512_and_si512(y, upper)), upper_sum);
    }
    const __m512 total = _mm512_load_ps(c + 64 * row);
    _mm512_store_ps(c + 64 * row, _mm512_add_ps(total, _mm512_add_ps(lower_sum, upper_sum)));
  }
}

}  // namespace
}  // namespace safr

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated_configure(config)
#define _tile_release() (emulated_tiles().configured = false)
#define _tile_zero(t) __builtin_memset(emulated_tile(t), 0, 1024)
#define _tile_loadd(t, base, stride) emulated_load(t, base, stride)
#define _tile_stream_loadd(t, base, stride) emulated_load(t, base, stride)
#define _tile_stored(t, base, stride) emulated_store(t, base, stride)
#define _tile_dpbf16ps(sum, left, right) emulated_multiply(sum, left, right)
