// Reading a View as the panels of a product: element types, index lists, and what is contiguous.
#pragma once

#include "../kernels.hpp"

namespace safr {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

// No step may pass through a denormal float, which kernels flush to zero.
inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits & 0x7c00;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  if (exponent == 0x7c00) return from_bits(sign | 0x7f800000 | magnitude);
  if (exponent != 0) return from_bits(sign | (magnitude + (112u << 23)));
  const float subnormal = from_bits(magnitude + (113u << 23)) - from_bits(113u << 23);
  return sign ? -subnormal : subnormal;
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// One of a matrix's two directions: where the elements of a line lie, and which of them take part.
struct Direction {
  int64_t stride;
  const int32_t* list;

  int64_t offset(int64_t i) const { return (list ? list[i] : i) * stride; }
};

// A matrix as a product reads it: `depth` is the direction it sums over, `across` the one that panels are cut from.
template <typename T>
struct Operand {
  const T* data;
  Direction across, depth;
};

// Up to one vector of consecutive elements of a line.
struct Chunk {
  int64_t first;
  int count;        // lanes that exist, may be 0; the others read as zeros
  bool contiguous;  // in memory, from `start` on
  int64_t start;

  Chunk(const Direction& d, int64_t first, int64_t available, int lanes)
      : first(first), count(available < 0 ? 0 : int(min(available, lanes))), contiguous(d.stride == 1) {
    // Lists leave padding out, so nearly always they run on without a gap.
    for (int i = 1; d.list && i < count; ++i) contiguous &= d.list[first + i] == d.list[first] + i;
    start = count > 0 ? d.offset(first) : 0;
  }

  bool is_vector(int lanes) const { return contiguous && count == lanes; }
};

// Calls pack(Operand<T>) with the element type that the view has.
template <typename Pack>
inline void with_operand(const View& v, Direction across, Direction depth, const Pack& pack) {
  switch (v.dtype) {
    case Dtype::float32: return pack(Operand<float>{static_cast<const float*>(v.data), across, depth});
    case Dtype::bfloat16: return pack(Operand<BFloat16>{static_cast<const BFloat16*>(v.data), across, depth});
    case Dtype::float16: return pack(Operand<Float16>{static_cast<const Float16*>(v.data), across, depth});
  }
}

}  // namespace
}  // namespace safr
