// The passes between products. Their bodies (passes.hpp) are compiled once per unit, over its vector layer.
#pragma once

#include "kernels.hpp"

namespace safr {

// One block of the interaction's Gram matrix: rows i, columns j, and everything that follows from it elementwise.
struct InteractionBlock {
  const float* gram;        // G_ij; a block on the diagonal may hold anything below it
  const float *a_ij, *a_ji;  // A_ij, and the mirrored block: row j, column i
  float* phi;                // φ(G_ij) is written here
  float *m_ij, *m_ji;        // M = φ'(G) ∘ (A + Aᵀ) is written to both places; null where no gradient is needed
  int64_t gram_stride, a_stride, phi_stride, m_stride;
  int64_t rows, cols;
  bool diagonal;  // the block lies on it, i and j start together: only pairs i <= j count
  bool squared, exclude_diagonal;
};

struct Elementwise {
  int lanes;  // of a vector; blocks on a diagonal are handled in squares of that side
  void (*widen)(const void* x, Dtype, int64_t n, float* out);
  // out = scale · x, rounded. In place for float32.
  void (*narrow)(const float* x, float scale, int64_t n, Dtype, void* out);
  float (*dot)(const float* x, const float* y, int64_t n);
  // out = a · x + y + b · z, in place where out is one of them
  void (*combine)(float a, const float* x, const float* y, float b, const float* z, int64_t n, float* out);
  // out (cols × rows) = xᵀ
  void (*transpose)(const float* x, int64_t x_stride, int64_t rows, int64_t cols, float* out, int64_t out_stride);

  // Adds c² to the sums of its row and of its column, right of the diagonal only: row r counts from column r + first.
  void (*square_sums)(const float* c, int64_t stride, int64_t rows, int64_t cols, int64_t first, float* row_sums,
                      float* col_sums);
  // out = (α_i + α_j) G_ij, and its transpose to `mirrored` (unless null). On the diagonal both are the same place, and
  // the part of G below it may hold anything.
  void (*weigh)(const float* gram, int64_t gram_stride, int64_t rows, int64_t cols, bool diagonal, const float* alpha_i,
                const float* alpha_j, float* out, float* mirrored, int64_t out_stride);

  // x = softmax(scale · x)
  void (*softmax)(float* x, float scale, int64_t n);
  // Returns Σ A_ij (1 − φ_ij) over the block and its mirror image.
  double (*interaction)(const InteractionBlock&);
  // p = A ∘ (r − φ − p) scale, with the r that makes the row sum to zero
  void (*softmax_gradient)(const float* a, const float* phi, float scale, int64_t n, float* p);
  // out = 1 − φ − p, in place where out is p
  void (*attention_gradient)(const float* phi, const float* p, int64_t n, float* out);
};

}  // namespace safr
