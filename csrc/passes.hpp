// Bodies of the passes between products. A unit includes this after its vector layer and names kElementwise in its table.
#pragma once

#include "elementwise.hpp"
#include "units/elements.hpp"

namespace safr {
namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));

inline Vec all(float x) { return broadcast(&x); }
inline Vec select(Ints mask, Vec yes, Vec no) { return (Vec)((mask & (Ints)yes) | (~mask & (Ints)no)); }
inline Words select(Ints mask, Words yes, Words no) { return ((Words)mask & yes) | (~(Words)mask & no); }

inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// Lanes that are missing read as zero; a count below 1 means none.
template <typename T>
inline Vec load_lanes(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : count > 0 ? load_part(p, int(count)) : zero();
}

inline void store_lanes(float* p, Vec x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  if (count > 0) store_part(p, x, int(count));
}

template <typename T>
void widen_from(const T* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) store_lanes(out + i, load_lanes(x + i, n - i), n - i);
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

void narrow(const float* x, float scale, int64_t n, Dtype dtype, void* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec scaled = load_lanes(x + i, n - i) * all(scale);
    if (dtype == Dtype::float32) {
      store_lanes(static_cast<float*>(out) + i, scaled, n - i);
      continue;
    }
    const Words bits = dtype == Dtype::bfloat16 ? bfloat16_bits(scaled) : float16_bits(scaled);
    const HalfWords half = __builtin_convertvector(bits, HalfWords);
    __builtin_memcpy(static_cast<uint16_t*>(out) + i, &half, size_t(2 * min(kLanes, n - i)));
  }
}

float dot(const float* x, const float* y, int64_t n) {
  Vec even = zero(), odd = zero();
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    even = multiply_add(load_lanes(x + i, n - i), load_lanes(y + i, n - i), even);
    if (i + kLanes < n)
      odd = multiply_add(load_lanes(x + i + kLanes, n - i - kLanes), load_lanes(y + i + kLanes, n - i - kLanes), odd);
  }
  return sum(even + odd);
}

void add_scaled(const float* x, float scale, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_lanes(y + i, multiply_add(load_lanes(x + i, n - i), all(scale), load_lanes(y + i, n - i)), n - i);
}

// A square of kLanes rows, of which `rows` × `cols` exist.
inline void load_square(const float* x, int64_t stride, int64_t rows, int64_t cols, Vec (&square)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) square[i] = i < rows ? load_lanes(x + i * stride, cols) : zero();
}

inline void store_square(float* out, int64_t stride, int64_t rows, int64_t cols, const Vec (&square)[kLanes]) {
  for (int i = 0; i < kLanes && i < rows; ++i) store_lanes(out + i * stride, square[i], cols);
}

void transpose_block(const float* x, int64_t x_stride, int64_t rows, int64_t cols, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < cols; j += kLanes) {
      Vec square[kLanes];
      load_square(x + i * x_stride + j, x_stride, rows - i, cols - j, square);
      transpose(square);
      store_square(out + j * out_stride + i, out_stride, cols - j, rows - i, square);
    }
}

void square_sums(const float* c, int64_t stride, int64_t rows, int64_t cols, int64_t first, float* row_sums,
                 float* col_sums) {
  for (int64_t r = 0; r < rows; ++r, c += stride) {
    Vec total = zero();
    for (int64_t j = r + first > 0 ? r + first : 0; j < cols; j += kLanes) {
      const Vec x = load_lanes(c + j, cols - j);
      total = multiply_add(x, x, total);
      store_lanes(col_sums + j, multiply_add(x, x, load_lanes(col_sums + j, cols - j)), cols - j);
    }
    row_sums[r] += sum(total);
  }
}

void weigh(const float* gram, int64_t gram_stride, int64_t rows, int64_t cols, bool diagonal, const float* alpha_i,
           const float* alpha_j, float* out, float* mirrored, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = diagonal ? i : 0; j < cols; j += kLanes) {
      Vec square[kLanes];
      load_square(gram + i * gram_stride + j, gram_stride, rows - i, cols - j, square);
      const Vec alpha = load_lanes(alpha_j + j, cols - j);
      for (int r = 0; r < kLanes && i + r < rows; ++r) square[r] = square[r] * (all(alpha_i[i + r]) + alpha);
      store_square(out + i * out_stride + j, out_stride, rows - i, cols - j, square);
      if (!mirrored || (diagonal && i == j)) continue;
      transpose(square);
      store_square(mirrored + j * out_stride + i, out_stride, cols - j, rows - i, square);
    }
}

// x, with `fill` where it has no more than `count` lanes.
inline Vec fill_tail(Vec x, int64_t count, float fill) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return count >= kLanes ? x : select(lane < Ints{} + int32_t(count), x, all(fill));
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
  const float lowest = -__builtin_inff();
  Vec largest = all(lowest);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec scaled = fill_tail(load_lanes(x + i, n - i) * all(scale), n - i, lowest);
    largest = select((Ints)(scaled > largest), scaled, largest);
  }
  float top = lowest;
  for (int i = 0; i < kLanes; ++i) top = largest[i] > top ? largest[i] : top;

  Vec total = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec e = exponential(multiply_add(load_lanes(x + i, n - i), all(scale), all(-top)));
    store_lanes(x + i, e, n - i);
    total = total + fill_tail(e, n - i, 0);
  }
  narrow(x, 1.0f / sum(total), n, Dtype::float32, x);
}

double interaction(const InteractionBlock& b) {
  double loss = 0;
  for (int64_t i = 0; i < b.rows; i += kLanes) {
    Vec strip_loss = zero();
    for (int64_t j = b.diagonal ? i : 0; j < b.cols; j += kLanes) {
      const bool on_diagonal = b.diagonal && i == j;
      const int64_t rows = b.rows - i, cols = b.cols - j;
      Vec square[kLanes];
      load_square(b.a_ji + j * b.a_stride + i, b.a_stride, cols, rows, square);
      transpose(square);
      for (int r = 0; r < kLanes && r < rows; ++r) {
        const Vec g = load_lanes(b.gram + (i + r) * b.gram_stride + j, cols);
        const Vec a = load_lanes(b.a_ij + (i + r) * b.a_stride + j, cols);
        const Vec both = a + square[r];
        Vec phi = b.squared ? g * g : g, m = b.squared ? (g + g) * both : both;
        if (on_diagonal && b.exclude_diagonal) phi[r] = m[r] = 0;
        strip_loss = multiply_add(on_diagonal ? a : both, all(1.0f) - phi, strip_loss);
        square[r] = m;
        if (b.m_ij) store_lanes(b.phi + (i + r) * b.phi_stride + j, phi, cols);
      }
      if (!b.m_ij) continue;
      store_square(b.m_ij + i * b.m_stride + j, b.m_stride, rows, cols, square);
      if (on_diagonal) continue;
      transpose(square);
      store_square(b.m_ji + j * b.m_stride + i, b.m_stride, cols, rows, square);
    }
    loss += sum(strip_loss);
  }
  return loss;
}

void softmax_gradient(const float* a, const float* phi, float scale, int64_t n, float* p) {
  Vec total = zero(), weighted = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec weight = load_lanes(a + i, n - i);
    total = total + weight;
    weighted = multiply_add(weight, load_lanes(phi + i, n - i) + load_lanes(p + i, n - i), weighted);
  }
  const Vec mean = all(sum(weighted) / sum(total));
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec deviation = mean - (load_lanes(phi + i, n - i) + load_lanes(p + i, n - i));
    store_lanes(p + i, load_lanes(a + i, n - i) * deviation * all(scale), n - i);
  }
}

void attention_gradient(const float* phi, int64_t n, float* p) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_lanes(p + i, all(1.0f) - load_lanes(phi + i, n - i) - load_lanes(p + i, n - i), n - i);
}

constexpr Elementwise kElementwise = {
    kLanes,       widen, narrow,  dot,         add_scaled,       transpose_block,
    square_sums,  weigh, softmax, interaction, softmax_gradient, attention_gradient};

}  // namespace
}  // namespace safr
