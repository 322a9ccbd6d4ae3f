// Primitive 2: Σ_ij A_ij (1 − φ(G_ij)), G = A Aᵀ, and its gradient, from attention weights or from queries and keys.
#pragma once

#include "kernels.hpp"
#include "sequences.hpp"

namespace safr {

struct Formula {
  bool squared, exclude_diagonal;
};

// Batch × heads × tokens × (tokens or width), elements of dtype, the last dimension contiguous.
struct Heads {
  const void* data;
  Dtype dtype;
  int64_t sample_stride, head_stride, token_stride;
};

// Writes total (sequences, heads) and, unless null, the gradient of total in the shape and dtype of the attention,
// contiguous. Every sequence is a sample.
void interaction(const Kernels& kernels, Precision precision, int threads, const Heads& attention, int64_t heads,
                 const Layout& layout, Formula formula, float* total, void* grad);

// The same from queries and keys; query head h uses key head h / group. Gradients are float32, and grad_k is that of
// each query head by itself: both have the shape of q: (samples, heads, tokens, width), or (tokens, heads, width) where
// packed, contiguous.
void interaction_from_qk(const Kernels& kernels, Precision precision, int threads, const Heads& q, const Heads& k,
                         int64_t heads, int64_t group, int64_t width, const Layout& layout, float scale, bool causal,
                         Formula formula, float* total, float* grad_q, float* grad_k);

// Gradients of `samples` × `heads` matrices of `size` numbers each, close together, and the factor of each.
struct HeadGradients {
  const void* data;
  Dtype dtype;
  int64_t samples, heads, size;
  const float* factor;
  int64_t factor_sample_stride, factor_head_stride;
};

// out (samples, heads / group, size) = factor · gradient, summed over the `group` heads that share one. In place where
// group is 1 and the dtype the same.
void scale_gradients(const Kernels& kernels, int threads, const HeadGradients& gradients, int64_t group, Dtype dtype,
                     void* out);

}  // namespace safr
