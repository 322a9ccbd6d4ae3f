// What both algorithms of the row energy work on.
#pragma once

#include "elementwise.hpp"
#include "gemm.hpp"
#include "sequences.hpp"

namespace safr {

// Real tokens of one sequence, and how to work on them.
struct Tokens {
  const Elementwise& pass;
  const Product& product;
  const Crew& crew;
  View h;  // row i is the i-th real token
  int64_t count, width;

  int64_t side() const { return block_side(product); }

  // Row i as float32: in place, or in `buffer`.
  const float* row(int64_t i, float* buffer) const {
    const int64_t offset = (h.rows ? h.rows[i] : i) * h.row_stride;
    const void* data = static_cast<const char*>(h.data) + offset * element_size(h.dtype);
    if (h.dtype == Dtype::float32) return static_cast<const float*>(data);
    pass.widen(data, h.dtype, width, buffer);
    return buffer;
  }

  // Rows of buffers that are `width` wide, such that a buffer stays in the second-level cache.
  int64_t rows_at_once(int64_t bytes) const {
    const int64_t rows = bytes / (4 * width) / product.mr * product.mr;
    return std::max<int64_t>(product.mr, std::min(rows, side()));
  }

  Tokens subset(const int32_t* rows, int64_t n) const {
    Tokens some = *this;
    some.h.rows = rows;
    some.count = n;
    return some;
  }
};

// Where the gradient of each token goes.
struct Gradient {
  const Elementwise& pass;
  char* data;
  Dtype dtype;
  int64_t width;
  const Sequence& sequence;

  // Row i = factor · x, or its columns from `column` on.
  void store(int64_t i, const float* x, int64_t column, int64_t n, float factor) const {
    const int64_t offset = sequence.position(i) * width + column;
    pass.narrow(x, factor, n, dtype, data + offset * element_size(dtype));
  }

  // Where row i lies, if tiles can be stored there: float32, and the rows of the sequence one after the other.
  float* row(int64_t i) const {
    if (dtype != Dtype::float32 || sequence.list) return nullptr;
    return reinterpret_cast<float*>(data) + sequence.position(i) * width;
  }
};

}  // namespace safr
