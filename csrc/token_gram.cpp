#include "token_gram.hpp"

namespace safr {
namespace {

constexpr int64_t kTokenTasks = 64;    // at most, that the half Gram matrix of one sequence is cut into
constexpr int64_t kStoredGram = 1024;  // tokens up to which (α_i + α_j) G_ij is stored

// hᵀ as the right operand of Gram products.
ColumnBlocks gram_columns(const Tokens& t, Workspace& workspace) {
  return {t.product, t.crew, workspace, transposed(t.h), t.count, t.width, ColumnBlocks::For::gram,
          [&](Range) { return Range{0, t.width}; }};
}

// Makes the blocks of columns from `is` on of the rows `is` of a Gram matrix, one after the other, in `gram`, and calls
// finish(columns) for each.
template <typename Finish>
void half_row(const ColumnBlocks& right, Range is, int64_t count, int64_t side, int64_t width, float* gram,
              int64_t stride, const Finish& finish) {
  right.with_rows(is, {0, width}, [&](const Operand& left, Range lines) {
    for (int64_t j0 = is.begin; j0 < count; j0 += side) {
      const Range js = {j0, std::min(j0 + side, count)};
      right.with(js, {0, width}, [&](const Operand& columns, Range cols) {
        multiply(left, lines, columns, cols, {0, width}, gram, stride, false,
                 is.begin - lines.begin - js.begin + cols.begin);
      });
      finish(js);
    }
  });
}

// Gradient by M H with M_ij = 2 (α_i + α_j) G_ij, M_ii = 2 β_i, which is stored whole: half of G is made, and mirrored.
void stored_gradient(const Tokens& t, const float* alpha, const float* beta, const Gradient& gradient) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Product& p = t.product;
  const int64_t side = t.side(), blocks = divide_up(t.count, side), stride = row_stride(p, t.count);
  float* weights = workspace.take<float>(t.count * stride);
  float* twice_alpha = workspace.take<float>(t.count);
  for (int64_t i = 0; i < t.count; ++i) twice_alpha[i] = 2 * alpha[i];
  {
    const Workspace::Mark gram_mark(workspace);
    const ColumnBlocks right = gram_columns(t, workspace);
    t.crew.each(blocks, [&](int64_t index) {
      Workspace& own = Workspace::own();
      const Workspace::Mark own_mark(own);
      const Range is = block(index, side, t.count);
      float* gram = own.take<float>(buffer_size(p, side, side));
      const int64_t gram_stride = row_stride(p, side);
      half_row(right, is, t.count, side, t.width, gram, gram_stride, [&](Range js) {
        t.pass.weigh(gram, gram_stride, is.size(), js.size(), is.begin == js.begin, twice_alpha + is.begin,
                     twice_alpha + js.begin, weights + is.begin * stride + js.begin, weights + js.begin * stride + is.begin,
                     stride);
      });
      for (int64_t i = is.begin; i < is.end; ++i) weights[i * stride + i] = 2 * beta[i];
    });
  }

  const Operand left(p, Side::left, workspace, t.count, t.count);
  const View matrix = {weights, Dtype::float32, 1, stride, nullptr, nullptr};  // symmetric: read along the panels
  t.crew.each(blocks, [&](int64_t index) {
    const Range is = block(index, side, t.count);
    left.pack(matrix, is.begin, is, {0, t.count});
  });
  const bool in_place = gradient.row(0) && t.width % p.nr == 0;
  const int64_t strip = even_share(t.crew, t.width, side, p.nr);
  t.crew.each(divide_up(t.width, strip), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range cols = block(index, strip, t.width);
    const Operand right(p, Side::right, own, cols.size(), t.count);
    right.pack(t.h, cols.begin, cols.size());
    float* product = own.take<float>(buffer_size(p, side, side));
    const int64_t product_stride = row_stride(p, side);
    for (int64_t i0 = 0; i0 < t.count; i0 += side) {
      Range is = {i0, std::min(i0 + side, t.count)};
      if (in_place) {  // whole tiles; the rows left over go the other way
        const Range whole = {is.begin, is.begin + is.size() / p.mr * p.mr};
        multiply(left, whole, right, {0, cols.size()}, {0, t.count}, gradient.row(is.begin) + cols.begin, t.width);
        is.begin = whole.end;
      }
      multiply(left, is, right, {0, cols.size()}, {0, t.count}, product, product_stride);
      for (int64_t i = is.begin; i < is.end; ++i)
        gradient.store(i, product + (i - is.begin) * product_stride, cols.begin, cols.size(), 1.0f);
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
      gradient.store(token(i), total + (i - is.begin) * sum_stride, 0, t.width, 2.0f);
  });
}

}  // namespace

// R of every token from half of the Gram matrix: each pair counts for its row and, mirrored, for its column.
void token_energy(const Tokens& t, float* energy) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const int64_t side = t.side();
  const int64_t task_rows = round_up(divide_up(t.count, kTokenTasks), side);
  const int64_t tasks = divide_up(t.count, task_rows);
  float* partial = workspace.take<float>(tasks * t.count);
  const ColumnBlocks right = gram_columns(t, workspace);

  t.crew.each(tasks, [&](int64_t task) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range task_is = block(task, task_rows, t.count);
    float* sums = partial + task * t.count;
    std::fill(sums + task_is.begin, sums + t.count, 0.0f);
    const int64_t stride = row_stride(t.product, side);
    float* gram = own.take<float>(buffer_size(t.product, side, side));
    for (int64_t i0 = task_is.begin; i0 < task_is.end; i0 += side) {
      const Range is = {i0, std::min(i0 + side, task_is.end)};
      half_row(right, is, t.count, side, t.width, gram, stride, [&](Range js) {
        t.pass.square_sums(gram, stride, is.size(), js.size(), is.begin - js.begin + 1, sums + is.begin,
                           sums + js.begin);
      });
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

void token_energy_of(const Tokens& t, const std::vector<int32_t>& some, const Tokens& chosen, float* energy) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const int64_t side = t.side(), n = int64_t(some.size());
  const int64_t task_tokens = round_up(divide_up(t.count, kTokenTasks), side);
  const int64_t tasks = divide_up(t.count, task_tokens);
  float* partial = workspace.take<float>(tasks * n);
  const Operand left(t.product, Side::left, workspace, n, t.width);
  t.crew.each(1, [&](int64_t) { left.pack(chosen.h, 0, n); });

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

  t.crew.each(1, [&](int64_t) {
    for (int64_t i = 0; i < n; ++i) {
      double total = 0;
      for (int64_t task = 0; task < tasks; ++task) total += partial[task * n + i];
      energy[some[i]] = float(total);
    }
  });
}

void token_gradient(const Tokens& t, const float* alpha, const float* beta, const Gradient& gradient) {
  if (t.count <= kStoredGram) return stored_gradient(t, alpha, beta, gradient);
  streamed_gradient(t, alpha, beta, nullptr, t, gradient);
}

void token_gradient_of(const Tokens& t, const std::vector<int32_t>& some, const Tokens& chosen, const float* alpha,
                       const float* beta, const Gradient& gradient) {
  streamed_gradient(t, alpha, beta, &some, chosen, gradient);
}

}  // namespace safr
