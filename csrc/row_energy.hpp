// Primitive 1: R_i = Σ_{j≠i} (h_i · h_j)² and n2_i = h_i · h_i, forward and backward.
#pragma once

#include <functional>

#include "kernels.hpp"
#include "sequences.hpp"

namespace safr {

// Hidden representations: samples × tokens × width, or packed tokens × width.
struct Hidden {
  View h;                 // rows are tokens; a sample's rows begin sample_stride after the last one's
  int64_t sample_stride;  // in elements
  int64_t width;
  Layout layout;
  int64_t threshold;  // real tokens from which on a sequence takes the feature path
};

// A float32 array over the tokens with any strides.
struct TokenArray {
  const float* data;
  int64_t sample_stride, token_stride;

  float at(int64_t sample, int64_t token) const { return data[sample * sample_stride + token * token_stride]; }
};

// Writes energy and squared norm of every token, 0 where there is none. `moments`, unless null, receives hᵀh of each
// sequence that is long enough for the feature path: (slots, width, width).
void row_energy(const Kernels& kernels, Precision precision, int threads, const Hidden& hidden, float* energy,
                float* squared_norm, float* moments, int64_t slots);

// The loss's gradients by a token's energy and squared norm.
struct RowGradient {
  float energy, squared_norm;
};
// The same of the token at a position of a sample.
using RowGradients = std::function<RowGradient(int64_t sample, int64_t position)>;

// Writes the gradient of every token, contiguous and in the dtype of h, from what the forward pass gave.
void row_energy_backward(const Kernels& kernels, Precision precision, int threads, const Hidden& hidden,
                         const float* energy, const float* squared_norm, const float* moments, int64_t slots,
                         const RowGradients& gradients, void* grad);

}  // namespace safr
