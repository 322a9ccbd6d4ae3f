#include "row_energy.hpp"

#include <cmath>

#include "elementwise.hpp"
#include "gemm.hpp"

namespace safr {
namespace {

constexpr int64_t kTokenTasks = 64;              // at most, that the half Gram matrix of one sequence is cut into
constexpr int64_t kSharedOperand = 4 << 20;      // bytes of a packed operand that is made once, not block by block
constexpr int64_t kStoredGram = 1024;            // tokens up to which (α_i + α_j) G_ij is stored
constexpr int64_t kShallow = 64;                 // depth of the triangular product: what lies below it is left out
constexpr double kMostFlagged = 0.03;

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
  int64_t rows_at_once(int64_t bytes = 1 << 20) const {
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

// hᵀ as the right operand of Gram products: packed once where it is small, else for one block of tokens after another.
class GramRight {
 public:
  GramRight(const Tokens& tokens, Workspace& workspace) : tokens_(tokens) {
    const int64_t bytes = tokens.count * tokens.width * tokens.product.right_bytes;
    if (bytes > kSharedOperand) return;
    shared_.emplace_back(tokens.product, Side::right, workspace, tokens.count, tokens.width);
    tokens.crew.each(divide_up(tokens.count, tokens.side()), [&](int64_t index) {
      const Range js = block(index, tokens.side(), tokens.count);
      shared_[0].pack(transposed(tokens.h), js.begin, js, {0, tokens.width});
    });
  }

  // Calls body(operand, columns of it) for the tokens js, which are a block.
  template <typename Body>
  void with(Range js, const Body& body) const {
    if (!shared_.empty()) return body(shared_[0], js);
    Workspace& workspace = Workspace::own();
    const Workspace::Mark mark(workspace);
    const Operand own(tokens_.product, Side::right, workspace, js.size(), tokens_.width);
    own.pack(transposed(tokens_.h), js.begin, js.size());
    body(own, Range{0, js.size()});
  }

 private:
  const Tokens& tokens_;
  std::vector<Operand> shared_;
};

// R of every token from half of the Gram matrix: each pair counts for its row and, mirrored, for its column.
void token_energy(const Tokens& t, float* energy) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const int64_t side = t.side();
  const int64_t task_rows = round_up(divide_up(t.count, kTokenTasks), side);
  const int64_t tasks = divide_up(t.count, task_rows);
  float* partial = workspace.take<float>(tasks * t.count);
  const GramRight right(t, workspace);

  t.crew.each(tasks, [&](int64_t task) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range task_is = block(task, task_rows, t.count);
    float* sums = partial + task * t.count;
    std::fill(sums + task_is.begin, sums + t.count, 0.0f);
    const int64_t stride = row_stride(t.product, side);
    float* gram = own.take<float>(buffer_size(t.product, side, side));
    const Operand left(t.product, Side::left, own, side, t.width);
    for (int64_t i0 = task_is.begin; i0 < task_is.end; i0 += side) {
      const Range is = {i0, std::min(i0 + side, task_is.end)};
      left.pack(t.h, is.begin, is.size());
      for (int64_t j0 = i0; j0 < t.count; j0 += side) {
        const Range js = {j0, std::min(j0 + side, t.count)};
        right.with(js, [&](const Operand& columns, Range cols) {
          multiply(left, {0, is.size()}, columns, cols, {0, t.width}, gram, stride, false, is.begin - js.begin + cols.begin);
        });
        t.pass.square_sums(gram, stride, is.size(), js.size(), is.begin - js.begin + 1, sums + is.begin,
                           sums + js.begin);
      }
    }
  });

  t.crew.each(divide_up(t.count, task_rows), [&](int64_t index) {
    const Range is = block(index, task_rows, t.count);
    for (int64_t i = is.begin; i < is.end; ++i) {
      double total = 0;
      for (int64_t task = 0; task <= i / task_rows; ++task) total += partial[task * t.count + i];
      energy[i] = float(total);
    }
  });
}

// R of the tokens `some` alone, by their products with every token.
void token_energy_of(const Tokens& t, const std::vector<int32_t>& some, const Tokens& chosen, float* energy) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const int64_t side = t.side(), n = int64_t(some.size());
  const int64_t task_tokens = round_up(divide_up(t.count, kTokenTasks), side);
  const int64_t tasks = divide_up(t.count, task_tokens);
  float* partial = workspace.take<float>(tasks * n);
  const Operand left(t.product, Side::left, workspace, n, t.width);
  left.pack(chosen.h, 0, n);

  t.crew.each(tasks, [&](int64_t task) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range task_js = block(task, task_tokens, t.count);
    float* sums = partial + task * n;
    std::fill(sums, sums + n, 0.0f);
    const int64_t rows_at_once = std::lcm(t.product.mr, t.product.nr), stride = row_stride(t.product, side);
    float* gram = own.take<float>(buffer_size(t.product, rows_at_once, side));
    const Operand right(t.product, Side::right, own, side, t.width);
    for (int64_t j0 = task_js.begin; j0 < task_js.end; j0 += side) {
      const Range js = {j0, std::min(j0 + side, task_js.end)};
      right.pack(transposed(t.h), js.begin, js.size());
      for (int64_t i0 = 0; i0 < n; i0 += rows_at_once) {
        const Range is = {i0, std::min(i0 + rows_at_once, n)};
        multiply(left, is, right, {0, js.size()}, {0, t.width}, gram, stride);
        for (int64_t i = is.begin; i < is.end; ++i) {
          float* row = gram + (i - is.begin) * stride;
          if (some[i] >= js.begin && some[i] < js.end) row[some[i] - js.begin] = 0;
          sums[i] += t.pass.dot(row, row, js.size());
        }
      }
    }
  });

  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t task = 0; task < tasks; ++task) total += partial[task * n + i];
    energy[some[i]] = float(total);
  }
}

// S = Σ_i α_i h_i h_iᵀ (α = 1 where null): the upper triangle, by tiles. Rows are `stride` apart.
void moment(const Tokens& t, const float* alpha, float* s, int64_t stride) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Product& p = t.product;
  const int64_t strip = round_up(t.width >= 1024 ? 256 : 64, p.nr), strips = divide_up(t.width, strip);
  const int64_t left_strip = round_up(64, p.mr), left_strips = divide_up(t.width, left_strip);
  const int64_t affordable = (1 << 20) / (t.width * std::max(p.left_bytes, p.right_bytes)) / p.depth * p.depth;
  const int64_t chunk = std::max<int64_t>(p.depth, affordable);
  const int64_t scaled_stride = round_up(t.width, 16);
  float* scaled = alpha ? workspace.take<float>(std::min(chunk, t.count) * scaled_stride) : nullptr;

  for (int64_t t0 = 0; t0 < t.count; t0 += chunk) {
    const Workspace::Mark chunk_mark(workspace);
    const Range ts = {t0, std::min(t0 + chunk, t.count)};
    View weighted = t.h;
    if (alpha) {
      t.crew.each(divide_up(ts.size(), 64), [&](int64_t index) {
        Workspace& own = Workspace::own();
        const Workspace::Mark own_mark(own);
        float* buffer = own.take<float>(t.width);
        for (int64_t i = ts.begin + index * 64; i < std::min(ts.begin + (index + 1) * 64, ts.end); ++i)
          t.pass.narrow(t.row(i, buffer), alpha[i], t.width, Dtype::float32, scaled + (i - t0) * scaled_stride);
      });
      weighted = {scaled, Dtype::float32, scaled_stride, 1, nullptr, nullptr};
    }
    const Operand left(p, Side::left, workspace, t.width, ts.size());
    const Operand right(p, Side::right, workspace, t.width, ts.size());
    t.crew.each(left_strips + strips, [&](int64_t index) {
      if (index < left_strips) {
        const Range rows = block(index, left_strip, t.width);
        left.pack(transposed(weighted), rows.begin, rows, {0, ts.size()}, alpha ? 0 : t0);
      } else {
        const Range cols = block(index - left_strips, strip, t.width);
        right.pack(t.h, cols.begin, cols, {0, ts.size()}, t0);
      }
    });
    t.crew.each(strips, [&](int64_t index) {
      const Range cols = block(strips - 1 - index, strip, t.width);  // the longest first
      multiply(left, {0, cols.end}, right, cols, {0, ts.size()}, s + cols.begin, stride, t0 > 0, 0);
    });
  }
}

// The whole of a symmetric matrix from its upper triangle.
void mirror(const Tokens& t, const float* upper, int64_t stride, float* out, int64_t out_stride) {
  const int64_t n = t.width, side = t.side();
  t.crew.each(divide_up(n, side), [&](int64_t index) {
    const Range rows = block(index, side, n);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t c = rows.begin; c < r; ++c) out[r * out_stride + c] = upper[c * stride + r];
      if (out != upper) std::memcpy(out + r * out_stride + r, upper + r * stride + r, size_t(n - r) * sizeof(float));
    }
    t.pass.transpose(upper + rows.begin, stride, rows.begin, rows.size(), out + rows.begin * out_stride, out_stride);
  });
}

// Turns the upper triangle of S into the factor S' of hᵀS'h = hᵀSh: off-diagonal entries doubled, zeros below.
void fold(const Tokens& t, float* s, int64_t stride) {
  for (int64_t r = 0; r < t.width; ++r) {
    float* row = s + r * stride;
    std::fill(row, row + r, 0.0f);
    t.pass.narrow(row + r + 1, 2.0f, t.width - r - 1, Dtype::float32, row + r + 1);
  }
}

// Rounds x to bfloat16 and returns in `rest` what that lost.
void split(const Tokens& t, float* x, float* rest, uint16_t* rounded) {
  t.pass.narrow(x, 1.0f, t.width, Dtype::bfloat16, rounded);
  std::memcpy(rest, x, size_t(t.width) * sizeof(float));
  t.pass.widen(rounded, Dtype::bfloat16, t.width, x);
  t.pass.add_scaled(x, -1.0f, t.width, rest);
}

// R_i = h_iᵀ S' h_i − n2_i², where S' is folded, and is spent.
void quadratic_form(const Tokens& t, float* s, int64_t stride, const float* squared_norm, float* energy) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Product& p = t.product;
  const int64_t strip = round_up(kShallow, p.nr), strips = divide_up(t.width, strip);
  const auto above = [&](Range cols) { return Range{0, std::min(round_up(cols.end, kShallow), t.width)}; };

  std::vector<Operand> parts;
  const auto add_part = [&](const float* matrix) {
    parts.emplace_back(p, Side::right, workspace, t.width, t.width, kShallow);
    t.crew.each(strips, [&](int64_t index) {
      const Range cols = block(index, strip, t.width);
      parts.back().pack({matrix, Dtype::float32, stride, 1, nullptr, nullptr}, cols.begin, cols, above(cols));
    });
  };
  if (p.right_bytes == 2) {
    // Operands are rounded to bfloat16: S' goes in two parts, since R is a small difference of large numbers.
    float* rest = workspace.take<float>(t.width * stride);
    t.crew.each(t.width, [&](int64_t r) {
      Workspace& own = Workspace::own();
      const Workspace::Mark own_mark(own);
      split(t, s + r * stride, rest + r * stride, own.take<uint16_t>(t.width));
    });
    add_part(rest);
  }
  add_part(s);

  const int64_t rows_at_once = t.rows_at_once(), buffer_stride = row_stride(p, t.width);
  t.crew.each(divide_up(t.count, rows_at_once), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range is = block(index, rows_at_once, t.count);
    const Operand left(p, Side::left, own, is.size(), t.width, kShallow);
    left.pack(t.h, is.begin, is.size());
    float* product = own.take<float>(buffer_size(p, is.size(), t.width));
    float* buffer = own.take<float>(t.width);
    for (int64_t strip_index = 0; strip_index < strips; ++strip_index) {
      const Range cols = block(strip_index, strip, t.width);
      for (const Operand& part : parts)
        multiply(left, {0, is.size()}, part, cols, above(cols), product + cols.begin, buffer_stride,
                 &part != &parts.front());
    }
    for (int64_t i = is.begin; i < is.end; ++i) {
      const double form = t.pass.dot(product + (i - is.begin) * buffer_stride, t.row(i, buffer), t.width);
      energy[i] = float(std::max(0.0, form - double(squared_norm[i]) * squared_norm[i]));
    }
  });
}

// Tokens whose R the feature path cannot tell from rounding: R is a difference of numbers the size of n2² and of
// n2 · tr(S) / width, in single precision.
std::vector<int32_t> flagged(const Tokens& t, const float* energy, const float* squared_norm) {
  const double least = t.product.right_bytes == 2 ? 5e-2 : 1e-2;
  double trace = 0;
  for (int64_t i = 0; i < t.count; ++i) trace += squared_norm[i];
  std::vector<int32_t> some;
  for (int64_t i = 0; i < t.count; ++i) {
    const double n2 = squared_norm[i];
    if (energy[i] < least * n2 * std::max(n2, trace / double(t.width))) some.push_back(int32_t(i));
  }
  return some;
}

bool too_many(const std::vector<int32_t>& some, const Tokens& t) { return double(some.size()) > kMostFlagged * double(t.count); }

// The tokens `some` of `t` as tokens of their own, over `rows`, which it fills.
Tokens choose(const Tokens& t, const std::vector<int32_t>& some, std::vector<int32_t>& rows) {
  for (int32_t i : some) rows.push_back(t.h.rows ? t.h.rows[i] : i);
  return t.subset(rows.data(), int64_t(rows.size()));
}

void feature_energy(const Tokens& t, const float* squared_norm, float* energy, float* saved) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const int64_t stride = row_stride(t.product, t.width);
  float* s = workspace.take<float>(buffer_size(t.product, t.width, t.width));
  moment(t, nullptr, s, stride);
  if (saved) mirror(t, s, stride, saved, t.width);
  fold(t, s, stride);
  quadratic_form(t, s, stride, squared_norm, energy);

  const std::vector<int32_t> some = flagged(t, energy, squared_norm);
  if (too_many(some, t)) return token_energy(t, energy);
  if (some.empty()) return;
  std::vector<int32_t> rows;
  token_energy_of(t, some, choose(t, some, rows), energy);
}

// Where the gradient of each token goes.
struct Gradient {
  const Elementwise& pass;
  char* data;
  Dtype dtype;
  int64_t width;
  const Sequence& sequence;

  // Row i = 2 x, or its columns from `column` on.
  void store(int64_t i, const float* x, int64_t column, int64_t n) const {
    const int64_t offset = sequence.position(i) * width + column;
    pass.narrow(x, 2.0f, n, dtype, data + offset * element_size(dtype));
  }
};

// Gradient by M H with M_ij = (α_i + α_j) G_ij, M_ii = β_i, which is stored whole: half of G is made, and mirrored.
void stored_gradient(const Tokens& t, const float* alpha, const float* beta, const Gradient& gradient) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Product& p = t.product;
  const int64_t side = t.side(), blocks = divide_up(t.count, side), stride = row_stride(p, t.count);
  float* weights = workspace.take<float>(t.count * stride);
  {
    const Workspace::Mark gram_mark(workspace);
    const GramRight right(t, workspace);
    t.crew.each(blocks, [&](int64_t index) {
      Workspace& own = Workspace::own();
      const Workspace::Mark own_mark(own);
      const Range is = block(index, side, t.count);
      const Operand left(p, Side::left, own, is.size(), t.width);
      left.pack(t.h, is.begin, is.size());
      float* gram = own.take<float>(buffer_size(p, side, side));
      const int64_t gram_stride = row_stride(p, side);
      for (int64_t j0 = is.begin; j0 < t.count; j0 += side) {
        const Range js = {j0, std::min(j0 + side, t.count)};
        right.with(js, [&](const Operand& columns, Range cols) {
          multiply(left, {0, is.size()}, columns, cols, {0, t.width}, gram, gram_stride, false,
                   is.begin - js.begin + cols.begin);
        });
        t.pass.weigh(gram, gram_stride, is.size(), js.size(), is.begin == js.begin, alpha + is.begin,
                     alpha + js.begin, weights + is.begin * stride + js.begin, weights + js.begin * stride + is.begin,
                     stride);
      }
      for (int64_t i = is.begin; i < is.end; ++i) weights[i * stride + i] = beta[i];
    });
  }

  const Operand left(p, Side::left, workspace, t.count, t.count);
  const View matrix = {weights, Dtype::float32, stride, 1, nullptr, nullptr};
  t.crew.each(blocks, [&](int64_t index) {
    const Range is = block(index, side, t.count);
    left.pack(matrix, is.begin, is, {0, t.count});
  });
  t.crew.each(divide_up(t.width, side), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range cols = block(index, side, t.width);
    const Operand right(p, Side::right, own, cols.size(), t.count);
    right.pack(t.h, cols.begin, cols.size());
    float* product = own.take<float>(buffer_size(p, side, side));
    const int64_t product_stride = row_stride(p, side);
    for (int64_t i0 = 0; i0 < t.count; i0 += side) {
      const Range is = {i0, std::min(i0 + side, t.count)};
      multiply(left, is, right, {0, cols.size()}, {0, t.count}, product, product_stride);
      for (int64_t i = is.begin; i < is.end; ++i)
        gradient.store(i, product + (i - is.begin) * product_stride, cols.begin, cols.size());
    }
  });
}

// The same for the tokens `some` (those of `chosen`), or for all where it is null, block by block with nothing stored.
void streamed_gradient(const Tokens& t, const float* alpha, const float* beta, const std::vector<int32_t>* some,
                       const Tokens& chosen, const Gradient& gradient) {
  const Product& p = t.product;
  const int64_t side = t.side(), step = std::lcm(p.mr, p.nr);
  const int64_t rows = std::min(side, round_up(divide_up(chosen.count, 4), step));
  t.crew.each(divide_up(chosen.count, rows), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range is = block(index, rows, chosen.count);
    const auto token = [&](int64_t i) { return some ? int64_t((*some)[i]) : i; };
    float* own_alpha = own.take<float>(is.size());
    for (int64_t i = is.begin; i < is.end; ++i) own_alpha[i - is.begin] = alpha[token(i)];

    const int64_t gram_stride = row_stride(p, side), sum_stride = row_stride(p, t.width);
    float* gram = own.take<float>(buffer_size(p, is.size(), side));
    float* total = own.take<float>(buffer_size(p, is.size(), t.width));
    const Operand left(p, Side::left, own, is.size(), t.width);
    left.pack(chosen.h, is.begin, is.size());
    const Operand gram_right(p, Side::right, own, side, t.width);
    for (int64_t j0 = 0; j0 < t.count; j0 += side) {
      const Workspace::Mark block_mark(own);
      const Range js = {j0, std::min(j0 + side, t.count)};
      gram_right.pack(transposed(t.h), js.begin, js.size());
      multiply(left, {0, is.size()}, gram_right, {0, js.size()}, {0, t.width}, gram, gram_stride);
      t.pass.weigh(gram, gram_stride, is.size(), js.size(), false, own_alpha, alpha + js.begin, gram, nullptr,
                   gram_stride);
      for (int64_t i = is.begin; i < is.end; ++i)
        if (token(i) >= js.begin && token(i) < js.end)
          gram[(i - is.begin) * gram_stride + token(i) - js.begin] = beta[token(i)];
      const Operand weights(p, Side::left, own, is.size(), js.size());
      weights.pack({gram, Dtype::float32, gram_stride, 1, nullptr, nullptr}, 0, is.size());
      const Operand right(p, Side::right, own, t.width, js.size());
      right.pack(t.h, 0, {0, t.width}, {0, js.size()}, js.begin);
      multiply(weights, {0, is.size()}, right, {0, t.width}, {0, js.size()}, total, sum_stride, j0 > 0);
    }
    for (int64_t i = is.begin; i < is.end; ++i)
      gradient.store(token(i), total + (i - is.begin) * sum_stride, 0, t.width);
  });
}

void token_gradient(const Tokens& t, const float* alpha, const float* beta, const Gradient& gradient) {
  if (t.count <= kStoredGram) return stored_gradient(t, alpha, beta, gradient);
  streamed_gradient(t, alpha, beta, nullptr, t, gradient);
}

// Gradient by moments: α_i S h_i + S_α h_i − 2 α_i n2_i h_i + β_i h_i, twice. Flagged tokens stay out of S_α; their pairs
// are added one by one, and their own rows made from pairs alone.
void feature_gradient(const Tokens& t, const float* s, const float* energy, const float* squared_norm,
                      const float* alpha, const float* beta, const Gradient& gradient) {
  const std::vector<int32_t> some = flagged(t, energy, squared_norm);
  if (too_many(some, t)) return token_gradient(t, alpha, beta, gradient);
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Product& p = t.product;
  const int64_t n = int64_t(some.size()), stride = row_stride(p, t.width);
  std::vector<int32_t> rows;
  const Tokens chosen = choose(t, some, rows);

  float* kept_alpha = workspace.take<float>(t.count);
  std::copy(alpha, alpha + t.count, kept_alpha);
  for (int32_t i : some) kept_alpha[i] = 0;
  float* weighted = workspace.take<float>(buffer_size(p, t.width, t.width));
  moment(t, kept_alpha, weighted, stride);
  mirror(t, weighted, stride, weighted, stride);

  const Operand right(p, Side::right, workspace, t.width, t.width);
  const Operand weighted_right(p, Side::right, workspace, t.width, t.width);
  const Operand pair_gram(p, Side::right, workspace, n, t.width), pair_right(p, Side::right, workspace, t.width, n);
  const int64_t strip = round_up(64, p.nr);
  t.crew.each(divide_up(t.width, strip), [&](int64_t index) {
    const Range cols = block(index, strip, t.width);
    right.pack({s, Dtype::float32, t.width, 1, nullptr, nullptr}, cols.begin, cols, {0, t.width});
    weighted_right.pack({weighted, Dtype::float32, stride, 1, nullptr, nullptr}, cols.begin, cols, {0, t.width});
    pair_right.pack(chosen.h, cols.begin, cols, {0, n});
  });
  pair_gram.pack(transposed(chosen.h), 0, n);
  float* pair_alpha = workspace.take<float>(n);
  for (int64_t i = 0; i < n; ++i) pair_alpha[i] = alpha[some[i]];

  const int64_t rows_at_once = t.rows_at_once();
  t.crew.each(divide_up(t.count, rows_at_once), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range is = block(index, rows_at_once, t.count), own_rows = {0, is.size()};
    const Operand left(p, Side::left, own, is.size(), t.width);
    left.pack(t.h, is.begin, is.size());
    float* total = own.take<float>(buffer_size(p, is.size(), t.width));
    multiply(left, own_rows, right, {0, t.width}, {0, t.width}, total, stride);
    for (int64_t i = is.begin; i < is.end; ++i) {
      float* row = total + (i - is.begin) * stride;
      t.pass.narrow(row, alpha[i], t.width, Dtype::float32, row);
    }
    multiply(left, own_rows, weighted_right, {0, t.width}, {0, t.width}, total, stride, true);

    if (n > 0) {
      float* none = own.take<float>(is.size());
      std::fill(none, none + is.size(), 0.0f);
      const int64_t gram_stride = row_stride(p, n);
      float* gram = own.take<float>(buffer_size(p, is.size(), n));
      multiply(left, own_rows, pair_gram, {0, n}, {0, t.width}, gram, gram_stride);
      t.pass.weigh(gram, gram_stride, is.size(), n, false, none, pair_alpha, gram, nullptr, gram_stride);
      const Operand weights(p, Side::left, own, is.size(), n);
      weights.pack({gram, Dtype::float32, gram_stride, 1, nullptr, nullptr}, 0, is.size());
      multiply(weights, own_rows, pair_right, {0, t.width}, {0, n}, total, stride, true);
    }

    float* buffer = own.take<float>(t.width);
    for (int64_t i = is.begin; i < is.end; ++i) {
      float* row = total + (i - is.begin) * stride;
      t.pass.add_scaled(t.row(i, buffer), float(beta[i] - 2.0 * alpha[i] * squared_norm[i]), t.width, row);
      gradient.store(i, row, 0, t.width);
    }
  });
  if (n > 0) streamed_gradient(t, alpha, beta, &some, chosen, gradient);
}

// What the feature path costs, or the token path where that is taken: multiply-adds, roughly.
double cost(const Hidden& hidden, const Sequence& sequence) {
  return double(hidden.width) * double(sequence.count) * double(std::min(sequence.count, hidden.threshold));
}

std::vector<double> costs(const Hidden& hidden, const std::vector<Sequence>& sequences) {
  std::vector<double> all;
  for (const Sequence& sequence : sequences) all.push_back(cost(hidden, sequence));
  return all;
}

Tokens tokens_of(const Kernels& kernels, const Product& product, const Crew& crew, const Hidden& hidden,
                 const Sequence& sequence) {
  View h = hidden.h;
  const int64_t offset = sequence.sample * hidden.sample_stride + (sequence.list ? 0 : sequence.first * h.row_stride);
  h.data = static_cast<const char*>(h.data) + offset * element_size(h.dtype);
  h.rows = sequence.list;
  return {*kernels.elementwise, product, crew, h, sequence.count, hidden.width};
}

// The place of each sequence's S among the saved ones; −1 where it takes the token path.
std::vector<int64_t> slots_of(const Hidden& hidden, const std::vector<Sequence>& sequences) {
  std::vector<int64_t> slots;
  int64_t next = 0;
  for (const Sequence& sequence : sequences) {
    const bool eligible = sequence.count >= hidden.threshold;
    slots.push_back(!eligible ? -1 : hidden.layout.cu_seqlens ? next++ : sequence.sample);
  }
  return slots;
}

}  // namespace

void row_energy(const Kernels& kernels, Precision precision, int threads, const Hidden& hidden, float* energy,
                float* squared_norm, float* moments, int64_t slots) {
  const Sequences sequences(hidden.layout);
  const std::vector<int64_t> slot = slots_of(hidden, sequences.all());
  const Product& product = product_for(kernels, hidden.h.dtype, precision);
  const int64_t places = hidden.layout.samples * hidden.layout.tokens;
  std::fill(energy, energy + places, 0.0f);
  std::fill(squared_norm, squared_norm + places, 0.0f);
  if (moments) {
    const int64_t size = hidden.width * hidden.width;
    std::vector<bool> used(size_t(slots), false);
    for (int64_t index : slot)
      if (index >= 0) used[size_t(index)] = true;
    for (int64_t index = 0; index < slots; ++index)
      if (!used[size_t(index)]) std::fill(moments + index * size, moments + (index + 1) * size, 0.0f);
  }

  share_out(kernels, threads, costs(hidden, sequences.all()), [&](int64_t index, const Crew& crew) {
    const Sequence& sequence = sequences.all()[index];
    if (sequence.count == 0 || hidden.width == 0) return;
    const Tokens t = tokens_of(kernels, product, crew, hidden, sequence);
    Workspace& workspace = Workspace::own();
    const Workspace::Mark mark(workspace);
    float* r = workspace.take<float>(t.count);
    float* n2 = workspace.take<float>(t.count);
    crew.each(divide_up(t.count, 256), [&](int64_t part) {
      Workspace& own = Workspace::own();
      const Workspace::Mark own_mark(own);
      float* buffer = own.take<float>(t.width);
      const Range is = block(part, 256, t.count);
      for (int64_t i = is.begin; i < is.end; ++i) {
        const float* row = t.row(i, buffer);
        n2[i] = t.pass.dot(row, row, t.width);
      }
    });

    if (slot[index] < 0)
      token_energy(t, r);
    else
      feature_energy(t, n2, r, moments ? moments + slot[index] * t.width * t.width : nullptr);
    for (int64_t i = 0; i < t.count; ++i) {
      const int64_t place = sequence.sample * hidden.layout.tokens + sequence.position(i);
      energy[place] = r[i];
      squared_norm[place] = n2[i];
    }
  });
}

void row_energy_backward(const Kernels& kernels, Precision precision, int threads, const Hidden& hidden,
                         const float* energy, const float* squared_norm, const float* moments, int64_t slots,
                         TokenArray grad_energy, TokenArray grad_squared_norm, void* grad) {
  const Sequences sequences(hidden.layout);
  const std::vector<int64_t> slot = slots_of(hidden, sequences.all());
  const Product& product = product_for(kernels, hidden.h.dtype, precision);
  const Layout& layout = hidden.layout;
  const int64_t row_bytes = hidden.width * element_size(hidden.h.dtype);
  const auto row = [&](int64_t sample, int64_t token) {
    return static_cast<char*>(grad) + (sample * layout.tokens + token) * row_bytes;
  };

  if (layout.mask) {
    for (int64_t s = 0; s < layout.samples; ++s)
      for (int64_t i = 0; i < layout.tokens; ++i)
        if (!layout.real(s, i)) std::memset(row(s, i), 0, size_t(row_bytes));
  } else if (layout.cu_seqlens) {
    const int64_t end = layout.cu_seqlens[layout.sequences];
    std::memset(row(0, end), 0, size_t((layout.tokens - end) * row_bytes));
  }

  share_out(kernels, threads, costs(hidden, sequences.all()), [&](int64_t index, const Crew& crew) {
    const Sequence& sequence = sequences.all()[index];
    if (sequence.count == 0 || hidden.width == 0) return;
    const Tokens t = tokens_of(kernels, product, crew, hidden, sequence);
    Workspace& workspace = Workspace::own();
    const Workspace::Mark mark(workspace);
    float* columns[4];  // R, n2, α, β of this sequence's tokens
    for (float*& column : columns) column = workspace.take<float>(t.count);
    for (int64_t i = 0; i < t.count; ++i) {
      const int64_t position = sequence.position(i), place = sequence.sample * layout.tokens + position;
      const auto gathered = [&](const TokenArray& a) {
        return a.data[sequence.sample * a.sample_stride + position * a.token_stride];
      };
      columns[0][i] = energy[place];
      columns[1][i] = squared_norm[place];
      columns[2][i] = gathered(grad_energy);
      columns[3][i] = gathered(grad_squared_norm);
    }

    const Gradient gradient = {t.pass, row(sequence.sample, 0), hidden.h.dtype, t.width, sequence};
    if (slot[index] < 0 || slot[index] >= slots)
      token_gradient(t, columns[2], columns[3], gradient);
    else
      feature_gradient(t, moments + slot[index] * t.width * t.width, columns[0], columns[1], columns[2], columns[3],
                       gradient);
  });
}

}  // namespace safr
