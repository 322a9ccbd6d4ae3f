// Bodies of the passes between products. A unit includes this after its vector layer, and names kElementwise in its
// table.
#pragma once

#include "elementwise.hpp"
#include "units/elements.hpp"

namespace safr {
namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));

inline Vec all(float x) { return broadcast(&x); }

template <typename Vector>
inline Vector select(Ints mask, Vector yes, Vector no) {
  return mask ? yes : no;
}

// The lanes of x, or of a part of it, brought together: halves first, so that they stay in registers.
template <typename Vector, typename Operation>
inline float reduce(Vector x, const Operation& operation) {
  if constexpr (sizeof(Vector) == 2 * sizeof(float)) {
    return operation(x[0], x[1]);
  } else {
    typedef float Half __attribute__((vector_size(sizeof(Vector) / 2)));
    Half halves[2];
    __builtin_memcpy(halves, &x, sizeof x);
    return reduce(operation(halves[0], halves[1]), operation);
  }
}

inline float sum(Vec x) {
  return reduce(x, [](auto a, auto b) { return a + b; });
}

// How many lanes of a vector exist. Missing ones read as zero and are not written.
struct Full {};
struct Part {
  int count;
};

template <typename T>
inline Vec load_lanes(const T* p, Full) {
  return load(p);
}
template <typename T>
inline Vec load_lanes(const T* p, Part part) {
  return load_part(p, part.count);
}
inline void store_lanes(float* p, Vec x, Full) { store(p, x); }
inline void store_lanes(float* p, Vec x, Part part) { store_part(p, x, part.count); }

// x, with `fill` in lanes that do not exist.
inline Vec fill_tail(Vec x, Full, float) { return x; }
inline Vec fill_tail(Vec x, Part part, float fill) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return select(lane < Ints{} + part.count, x, all(fill));
}

// Calls body(i, lanes) for each vector of n elements.
template <typename Body>
inline void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Full{});
  if (i < n) body(i, Part{int(n - i)});
}

template <typename T>
void widen_from(const T* x, int64_t n, float* out) {
  for_lanes(n, [&](int64_t i, auto lanes) { store_lanes(out + i, load_lanes(x + i, lanes), lanes); });
}

void widen(const void* x, Dtype dtype, int64_t n, float* out) {
  switch (dtype) {
    case Dtype::float32: return widen_from(static_cast<const float*>(x), n, out);
    case Dtype::bfloat16: return widen_from(static_cast<const BFloat16*>(x), n, out);
    case Dtype::float16: return widen_from(static_cast<const Float16*>(x), n, out);
  }
}

inline Words bfloat16_bits(Vec x) {
  const Words bits = (Words)x;
  const Ints is_nan = (Ints)((bits & 0x7fffffffu) > 0x7f800000u);
  return select(is_nan, bits >> 16 | 0x40u, (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline Words float16_bits(Vec x) {
  const Words bits = (Words)x, magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 0.5 leaves what float16's subnormals keep in the low bits, rounded.
  const Words subnormal = (Words)((Vec)magnitude + all(0.5f)) - 0x3f000000u;
  const Words special = 0x7c00u | (Words)(magnitude > 0x7f800000u) >> 31 << 9;
  const Words finite = select((Ints)(magnitude < 113u << 23), subnormal, normal);
  return select((Ints)(magnitude >= 0x477ff000u), special, finite) | (bits >> 16 & 0x8000u);
}

template <typename Bits>
void narrow_to(const float* x, Vec scale, int64_t n, uint16_t* out, const Bits& bits) {
  for_lanes(n, [&](int64_t i, auto lanes) {
    const HalfWords half = __builtin_convertvector(bits(load_lanes(x + i, lanes) * scale), HalfWords);
    __builtin_memcpy(out + i, &half, size_t(2 * min(kLanes, n - i)));
  });
}

void narrow(const float* x, float scale, int64_t n, Dtype dtype, void* out) {
  const Vec factor = all(scale);
  float* same = static_cast<float*>(out);
  switch (dtype) {
    case Dtype::float32:
      return for_lanes(n, [&](int64_t i, auto lanes) {
        store_lanes(same + i, load_lanes(x + i, lanes) * factor, lanes);
      });
    case Dtype::bfloat16:
      return narrow_to(x, factor, n, static_cast<uint16_t*>(out), [](Vec v) { return bfloat16_bits(v); });
    case Dtype::float16:
      return narrow_to(x, factor, n, static_cast<uint16_t*>(out), [](Vec v) { return float16_bits(v); });
  }
}

float dot(const float* x, const float* y, int64_t n) {
  Vec total[4] = {zero(), zero(), zero(), zero()};  // chains that need not wait for one another
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j)
      total[j] = multiply_add(load(x + i + j * kLanes), load(y + i + j * kLanes), total[j]);
  for_lanes(n - i, [&](int64_t j, auto lanes) {
    total[0] = multiply_add(load_lanes(x + i + j, lanes), load_lanes(y + i + j, lanes), total[0]);
  });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

void combine(float a, const float* x, const float* y, float b, const float* z, int64_t n, float* out) {
  for_lanes(n, [&](int64_t i, auto lanes) {
    const Vec weighted = multiply_add(load_lanes(x + i, lanes), all(a), load_lanes(y + i, lanes));
    store_lanes(out + i, multiply_add(load_lanes(z + i, lanes), all(b), weighted), lanes);
  });
}

// A square of kLanes rows, of which `rows` exist, and of columns as `lanes` says. Loops over a
// whole one unroll, so that it can stay in registers.
template <typename Lanes>
inline void load_square(const float* x, int64_t stride, int64_t rows, Lanes lanes, Vec (&square)[kLanes]) {
  if (rows >= kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = load_lanes(x + i * stride, lanes);
  } else {
    for (int i = 0; i < kLanes; ++i) square[i] = i < rows ? load_lanes(x + i * stride, lanes) : zero();
  }
}

template <typename Lanes>
inline void store_square(float* out, int64_t stride, int64_t rows, Lanes lanes, const Vec (&square)[kLanes]) {
  if (rows >= kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_lanes(out + i * stride, square[i], lanes);
  } else {
    for (int i = 0; i < rows; ++i) store_lanes(out + i * stride, square[i], lanes);
  }
}

template <typename Body>
inline void with_lanes(int64_t count, const Body& body) {
  if (count >= kLanes) return body(Full{});
  body(Part{int(count)});
}

void transpose_block(const float* x, int64_t x_stride, int64_t rows, int64_t cols, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for_lanes(cols, [&](int64_t j, auto lanes) {
      Vec square[kLanes];
      load_square(x + i * x_stride + j, x_stride, rows - i, lanes, square);
      transpose(square);
      with_lanes(rows - i, [&](auto turned) {
        store_square(out + j * out_stride + i, out_stride, cols - j, turned, square);
      });
    });
}

void square_sums(const float* c, int64_t stride, int64_t rows, int64_t cols, int64_t first, float* row_sums,
                 float* col_sums) {
  for (int64_t r = 0; r < rows; ++r, c += stride) {
    Vec total = zero();
    const int64_t start = r + first > 0 ? r + first : 0;
    for_lanes(cols - start, [&](int64_t i, auto lanes) {
      const Vec x = load_lanes(c + start + i, lanes), squared = x * x;
      total = total + squared;
      store_lanes(col_sums + start + i, load_lanes(col_sums + start + i, lanes) + squared, lanes);
    });
    row_sums[r] += sum(total);
  }
}

void weigh(const float* gram, int64_t gram_stride, int64_t rows, int64_t cols, bool diagonal, const float* alpha_i,
           const float* alpha_j, float* out, float* mirrored, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t start = diagonal ? i : 0;
    for_lanes(cols - start, [&](int64_t offset, auto lanes) {
      const int64_t j = start + offset;
      Vec square[kLanes];
      load_square(gram + i * gram_stride + j, gram_stride, rows - i, lanes, square);
      const Vec alpha = load_lanes(alpha_j + j, lanes);
      for (int r = 0; r < kLanes && i + r < rows; ++r) square[r] = square[r] * (all(alpha_i[i + r]) + alpha);
      store_square(out + i * out_stride + j, out_stride, rows - i, lanes, square);
      if (!mirrored || (diagonal && i == j)) return;
      transpose(square);
      with_lanes(rows - i, [&](auto turned) {
        store_square(mirrored + j * out_stride + i, out_stride, cols - j, turned, square);
      });
    });
  }
}

// eˣ for x <= 0, relative error below 2e-7; 0 where the result would be denormal.
inline Vec exponential(Vec x) {
  const Ints vanishes = (Ints)(x < all(-87.0f));
  const Vec magic = all(12582912.0f);  // 1.5 · 2²³: adding it rounds to a whole number, which the low bits then hold
  const Vec shifted = multiply_add(select(vanishes, zero(), x), all(1.44269504f), magic);
  const Vec whole = shifted - magic;
  Vec rest = multiply_add(whole, all(-0.693359375f), x);
  rest = multiply_add(whole, all(2.12194440e-4f), rest);
  Vec p = all(1.9875691500e-4f);
  p = multiply_add(p, rest, all(1.3981999507e-3f));
  p = multiply_add(p, rest, all(8.3334519073e-3f));
  p = multiply_add(p, rest, all(4.1665795894e-2f));
  p = multiply_add(p, rest, all(1.6666665459e-1f));
  p = multiply_add(p, rest, all(5.0000001201e-1f));
  p = multiply_add(p, rest * rest, rest) + all(1.0f);
  return select(vanishes, zero(), p * (Vec)(((Ints)shifted + 127) << 23));
}

void softmax(float* x, float scale, int64_t n) {
  const float lowest = -__builtin_inff(), sign = scale < 0 ? -1.0f : 1.0f;
  Vec largest = all(lowest);
  for_lanes(n, [&](int64_t i, auto lanes) {
    const Vec score = fill_tail(load_lanes(x + i, lanes) * all(sign), lanes, lowest);
    largest = larger(score, largest);
  });
  const float top = reduce(largest, [](auto a, auto b) { return a > b ? a : b; });

  Vec total = zero();
  for_lanes(n, [&](int64_t i, auto lanes) {
    // The difference first: what rounding takes from scaled scores that are huge would be huge.
    const Vec e = exponential((load_lanes(x + i, lanes) * all(sign) - all(top)) * all(sign * scale));
    store_lanes(x + i, e, lanes);
    total = total + fill_tail(e, lanes, 0);
  });
  narrow(x, 1.0f / sum(total), n, Dtype::float32, x);
}

// A square of the block at row i, column j. Adds to `loss` and returns nothing else but what is written.
template <typename Lanes>
inline void interaction_square(const InteractionBlock& b, int64_t i, int64_t j, Lanes lanes, Vec& loss) {
  const bool on_diagonal = b.diagonal && i == j;
  const int64_t rows = b.rows - i, cols = b.cols - j;
  Vec square[kLanes];
  with_lanes(rows, [&](auto turned) { load_square(b.a_ji + j * b.a_stride + i, b.a_stride, cols, turned, square); });
  transpose(square);
  for (int r = 0; r < kLanes && r < rows; ++r) {
    const Vec g = load_lanes(b.gram + (i + r) * b.gram_stride + j, lanes);
    const Vec a = load_lanes(b.a_ij + (i + r) * b.a_stride + j, lanes);
    const Vec both = a + square[r];
    Vec phi = b.squared ? g * g : g, m = b.squared ? (g + g) * both : both;
    if (on_diagonal && b.exclude_diagonal) phi[r] = m[r] = 0;
    loss = multiply_add(on_diagonal ? a : both, all(1.0f) - phi, loss);
    square[r] = m;
    if (b.m_ij) store_lanes(b.phi + (i + r) * b.phi_stride + j, phi, lanes);
  }
  if (!b.m_ij) return;
  store_square(b.m_ij + i * b.m_stride + j, b.m_stride, rows, lanes, square);
  if (on_diagonal) return;
  transpose(square);
  with_lanes(rows, [&](auto turned) { store_square(b.m_ji + j * b.m_stride + i, b.m_stride, cols, turned, square); });
}

double interaction(const InteractionBlock& b) {
  double total = 0;
  for (int64_t i = 0; i < b.rows; i += kLanes) {
    const int64_t start = b.diagonal ? i : 0;
    Vec loss = zero();
    for_lanes(b.cols - start, [&](int64_t offset, auto lanes) {
      interaction_square(b, i, start + offset, lanes, loss);
    });
    total += sum(loss);
  }
  return total;
}

void softmax_gradient(const float* a, const float* phi, float scale, int64_t n, float* p) {
  Vec total = zero(), weighted = zero();
  for_lanes(n, [&](int64_t i, auto lanes) {
    const Vec weight = load_lanes(a + i, lanes);
    total = total + weight;
    weighted = multiply_add(weight, load_lanes(phi + i, lanes) + load_lanes(p + i, lanes), weighted);
  });
  const Vec mean = all(sum(weighted) / sum(total));
  for_lanes(n, [&](int64_t i, auto lanes) {
    const Vec deviation = mean - (load_lanes(phi + i, lanes) + load_lanes(p + i, lanes));
    store_lanes(p + i, load_lanes(a + i, lanes) * deviation * all(scale), lanes);
  });
}

void attention_gradient(const float* phi, const float* p, int64_t n, float* out) {
  for_lanes(n, [&](int64_t i, auto lanes) {
    store_lanes(out + i, all(1.0f) - load_lanes(phi + i, lanes) - load_lanes(p + i, lanes), lanes);
  });
}

constexpr Elementwise kElementwise = {
    kLanes,       widen, narrow,  dot,         combine,          transpose_block,
    square_sums,  weigh, softmax, interaction, softmax_gradient, attention_gradient};

}  // namespace
}  // namespace safr
