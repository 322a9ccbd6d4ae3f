#include "interaction.hpp"

#include <cmath>

#include "elementwise.hpp"
#include "gemm.hpp"

namespace safr {
namespace {

constexpr int64_t kGroupBlocks = 2;  // blocks of rows that share a block of columns which is packed for them

// One head of one sequence: its attention matrix over real tokens, and how to work on it.
struct Head {
  const Elementwise& pass;
  const Product& product;
  const Crew& crew;
  Formula formula;
  int64_t count;  // real tokens
  bool causal;    // A_ij = 0 for j > i
  const float* a;
  int64_t a_stride;

  int64_t side() const { return block_side(product); }
  int64_t blocks() const { return divide_up(count, side()); }
  Range rows(int64_t index) const { return block(index, side(), count); }
  View attention() const { return {a, Dtype::float32, a_stride, 1, nullptr, nullptr}; }

  // The k for which A_ik of rows before `end` can be other than zero, in whole steps of depth.
  Range until(int64_t end) const { return {0, causal ? std::min(round_up(end, product.depth), count) : count}; }
  // The k for which A_kj of columns from `begin` on can be.
  Range since(int64_t begin) const { return {causal ? begin / product.depth * product.depth : 0, count}; }
};

// φ(G), of which each block of rows keeps what lies on and right of the diagonal.
class HalfMatrix {
 public:
  HalfMatrix(const Head& head, Workspace& workspace) : side_(head.side()), count_(head.count) {
    for (int64_t i = 0; i < head.blocks(); ++i) blocks_.push_back(workspace.take<float>(side_ * stride(i)));
  }

  int64_t stride(int64_t row_block) const { return round_up(count_ - row_block * side_, 16); }
  // Where block (row_block, col_block) begins, col_block >= row_block.
  float* at(int64_t row_block, int64_t col_block) const { return blocks_[row_block] + (col_block - row_block) * side_; }

  // Rows `is` of the whole, up to column `end`; at most pass.lanes of them, the first a multiple of that.
  void rows(const Elementwise& pass, Range is, int64_t end, float* out, int64_t out_stride) const {
    const int64_t own = is.begin / side_;
    for (int64_t j = 0; j <= own; ++j) {
      const Range js = {j * side_, std::min((j + 1) * side_, is.begin)};
      pass.transpose(at(j, j) + is.begin - js.begin, stride(j), js.size(), is.size(), out + js.begin, out_stride);
    }
    const float* row = at(own, own) + (is.begin - own * side_) * stride(own) + is.begin - own * side_;
    for (int64_t i = 0; i < is.size() && is.begin < end; ++i)
      std::memcpy(out + i * out_stride + is.begin, row + i * stride(own), size_t(end - is.begin) * sizeof(float));
  }

 private:
  int64_t side_, count_;
  std::vector<float*> blocks_;
};

// Returns Σ A_ij (1 − φ(G_ij)) from half of G = A Aᵀ; fills φ and M = φ'(G) ∘ (A + Aᵀ) unless they are null.
double pair_sum(const Head& head, const HalfMatrix* phi, float* m, int64_t m_stride) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const int64_t side = head.side(), stride = row_stride(head.product, side);
  const ColumnBlocks columns(head.product, head.crew, workspace, transposed(head.attention()), head.count, head.count,
                             ColumnBlocks::For::gram, [&](Range js) { return head.until(js.end); });
  const int64_t group_blocks = columns.shared() ? 1 : kGroupBlocks;
  std::vector<double> losses(size_t(head.blocks()), 0.0);

  const auto visit = [&](const Operand& left, Range lines, int64_t i, int64_t j, const Operand& right, Range cols,
                         float* gram) {
    const Range is = head.rows(i), js = head.rows(j);
    multiply(left, lines, right, cols, head.until(is.end), gram, stride, false,
             is.begin - lines.begin - js.begin + cols.begin);
    InteractionBlock b = {};
    b.gram = gram, b.gram_stride = stride;
    b.a_ij = head.a + is.begin * head.a_stride + js.begin, b.a_ji = head.a + js.begin * head.a_stride + is.begin;
    b.a_stride = head.a_stride;
    if (phi) {
      b.phi = phi->at(i, j), b.phi_stride = phi->stride(i);
      b.m_ij = m + is.begin * m_stride + js.begin, b.m_ji = m + js.begin * m_stride + is.begin, b.m_stride = m_stride;
    }
    b.rows = is.size(), b.cols = js.size(), b.diagonal = i == j;
    b.squared = head.formula.squared, b.exclude_diagonal = head.formula.exclude_diagonal;
    losses[size_t(i)] += head.pass.interaction(b);
  };

  head.crew.each(divide_up(head.blocks(), group_blocks), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range group = block(index, group_blocks, head.blocks());
    const Range is = {head.rows(group.begin).begin, head.rows(group.end - 1).end};
    float* gram = own.take<float>(buffer_size(head.product, side, side));
    columns.with_rows(is, head.until(is.end), [&](const Operand& left, Range lines) {
      const int64_t offset = lines.begin - is.begin;
      for (int64_t j = group.begin; j < head.blocks(); ++j)
        columns.with(head.rows(j), head.until(is.end), [&](const Operand& right, Range cols) {
          for (int64_t i = group.begin; i < group.end && i <= j; ++i)
            visit(left, {head.rows(i).begin + offset, head.rows(i).end + offset}, i, j, right, cols, gram);
        });
    });
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

// Turns M into P = M A in place, group of rows by group, and calls finish(rows, φ of the rows, its stride) for strips
// of rows whose P is complete. Where A is causal, P is made for j <= i only.
template <typename Finish>
void weighted_rows(const Head& head, const HalfMatrix& phi, float* m, int64_t stride, const Finish& finish) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const ColumnBlocks columns(head.product, head.crew, workspace, head.attention(), head.count, head.count,
                             ColumnBlocks::For::product, [&](Range js) { return head.since(js.begin); });
  const int64_t group_blocks = columns.shared() ? 1 : kGroupBlocks;
  head.crew.each(divide_up(head.blocks(), group_blocks), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range group = block(index, group_blocks, head.blocks());
    const Range is = {head.rows(group.begin).begin, head.rows(group.end - 1).end};
    {
      const Workspace::Mark product_mark(own);
      // P is summed over all k before anything is added to it: chunk by chunk it would lose 30 to 100 times more.
      const Operand left(head.product, Side::left, own, is.size(), head.count);
      left.pack({m, Dtype::float32, stride, 1, nullptr, nullptr}, is.begin, is.size());
      for (int64_t j = 0; j < (head.causal ? group.end : head.blocks()); ++j) {
        const Range ks = head.since(head.rows(j).begin);
        columns.with(head.rows(j), ks, [&](const Operand& right, Range cols) {
          multiply(left, {0, is.size()}, right, cols, ks, m + is.begin * stride + head.rows(j).begin, stride);
        });
      }
    }
    const int64_t phi_stride = round_up(head.count, 16);
    float* strip = own.take<float>(head.pass.lanes * phi_stride);
    for (int64_t i = is.begin; i < is.end; i += head.pass.lanes) {
      const Range rows = {i, std::min(i + head.pass.lanes, is.end)};
      phi.rows(head.pass, rows, head.causal ? rows.end : head.count, strip, phi_stride);
      finish(rows, strip, phi_stride);
    }
  });
}

// Rows of a head's gradient: element 0 of its i-th real token.
struct Output {
  float* data;
  int64_t token_stride;
  const Sequence& sequence;

  float* row(int64_t i) const { return data + sequence.position(i) * token_stride; }
};

// out = left · right, where a block of rows of left is zero but for the k that needed(rows) gives.
template <typename Needed>
void project(const Head& head, const View& left_matrix, const View& right_matrix, int64_t width, const Output& out,
             const Needed& needed) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Product& p = head.product;
  const Operand right(p, Side::right, workspace, width, head.count);
  head.crew.each(divide_up(head.count, right.depth), [&](int64_t index) {
    right.pack(right_matrix, 0, {0, width}, block(index, right.depth, head.count));
  });
  head.crew.each(head.blocks(), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range is = head.rows(index), ks = needed(is);
    const Operand left(p, Side::left, own, is.size(), head.count);
    left.pack(left_matrix, is.begin, {0, is.size()}, ks);
    const int64_t stride = row_stride(p, width);
    float* product = own.take<float>(buffer_size(p, is.size(), width));
    multiply(left, {0, is.size()}, right, {0, width}, ks, product, stride);
    for (int64_t i = is.begin; i < is.end; ++i)
      std::memcpy(out.row(i), product + (i - is.begin) * stride, size_t(width) * sizeof(float));
  });
}

// a = softmax(scale · q kᵀ), zero where causality hides the key.
void attention_rows(const Head& head, const View& q, const View& k, int64_t width, float scale, float* a) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Operand right(head.product, Side::right, workspace, head.count, width);
  head.crew.each(head.blocks(), [&](int64_t index) {
    const Range cols = head.rows(index);
    right.pack(transposed(k), cols.begin, cols, {0, width});
  });
  head.crew.each(head.blocks(), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range is = head.rows(index);
    float* rows = a + is.begin * head.a_stride;
    const Operand left(head.product, Side::left, own, is.size(), width);
    left.pack(q, is.begin, is.size());
    multiply(left, {0, is.size()}, right, {0, head.causal ? is.end : head.count}, {0, width}, rows, head.a_stride);
    for (int64_t i = is.begin; i < is.end; ++i, rows += head.a_stride) {
      const int64_t visible = head.causal ? i + 1 : head.count;
      if (width == 0) std::fill(rows, rows + visible, 0.0f);
      head.pass.softmax(rows, scale, visible);
      std::fill(rows + visible, rows + head.count, 0.0f);
    }
  });
}

// A view of `heads` at the first real token of a sequence; its rows are real tokens.
View head_view(const Heads& heads, const Sequence& sequence, int64_t head) {
  const int64_t offset = sequence.sample * heads.sample_stride + head * heads.head_stride +
                         (sequence.list ? 0 : sequence.first * heads.token_stride);
  const char* data = static_cast<const char*>(heads.data) + offset * element_size(heads.dtype);
  return {data, heads.dtype, heads.token_stride, 1, sequence.list, nullptr};
}

// Runs body(sequence, index of it, head, crew) over all heads of all sequences.
template <typename Body>
void each_head(const Kernels& kernels, int threads, const Sequences& sequences, int64_t heads, const Body& body) {
  std::vector<double> costs;
  for (const Sequence& sequence : sequences.all())
    costs.insert(costs.end(), size_t(heads), std::pow(sequence.count, 3));
  share_out(kernels, threads, costs, [&](int64_t index, const Crew& crew) {
    body(sequences.all()[size_t(index / heads)], index / heads, index % heads, crew);
  });
}

// The real rows and columns of an attention matrix as float32, close together.
void compact(const Head& head, const Heads& attention, const Sequence& sequence, int64_t index, float* out) {
  const char* data = static_cast<const char*>(head_view(attention, sequence, index).data);
  const int64_t size = element_size(attention.dtype);
  const int64_t span = sequence.count ? sequence.position(head.count - 1) - sequence.position(0) + 1 : 0;
  head.crew.each(divide_up(head.count, 64), [&](int64_t part) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    float* wide = own.take<float>(span);
    const Range is = block(part, 64, head.count);
    for (int64_t i = is.begin; i < is.end; ++i) {
      const int64_t row = sequence.list ? sequence.list[i] : i, first = sequence.position(0);
      float* target = out + i * head.a_stride;
      head.pass.widen(data + (row * attention.token_stride + first) * size, attention.dtype, span,
                      sequence.list ? wide : target);
      for (int64_t j = 0; sequence.list && j < head.count; ++j) target[j] = wide[sequence.list[j] - first];
    }
  });
}

}  // namespace

void interaction(const Kernels& kernels, Precision precision, int threads, const Heads& attention, int64_t heads,
                 const Layout& layout, Formula formula, float* total, void* grad) {
  const Sequences sequences(layout);
  const Product& product = product_for(kernels, attention.dtype, precision);
  const int64_t tokens = layout.tokens, size = element_size(attention.dtype);
  each_head(kernels, threads, sequences, heads,
            [&](const Sequence& sequence, int64_t index, int64_t h, const Crew& crew) {
    Workspace& workspace = Workspace::own();
    const Workspace::Mark mark(workspace);
    char* out = grad ? static_cast<char*>(grad) + (index * heads + h) * tokens * tokens * size : nullptr;
    if (out && sequence.count < tokens) std::memset(out, 0, size_t(tokens * tokens * size));
    total[index * heads + h] = 0;
    if (sequence.count == 0) return;

    Head head = {*kernels.elementwise, product, crew, formula, sequence.count, false, nullptr, 0};
    const int64_t m_stride = row_stride(product, head.count);
    float* m = out ? workspace.take<float>(buffer_size(product, head.count, head.count)) : nullptr;
    std::vector<HalfMatrix> phi;
    if (out) phi.emplace_back(head, workspace);
    if (attention.dtype == Dtype::float32 && !sequence.list) {
      head.a = static_cast<const float*>(head_view(attention, sequence, h).data) + sequence.first;
      head.a_stride = attention.token_stride;
    } else {
      head.a_stride = round_up(head.count, 32) + 16;
      float* a = workspace.take<float>(head.count * head.a_stride);
      compact(head, attention, sequence, h, a);
      head.a = a;
    }

    total[index * heads + h] = float(pair_sum(head, out ? &phi[0] : nullptr, m, m_stride));
    if (!out) return;
    weighted_rows(head, phi[0], m, m_stride, [&](Range is, const float* strip, int64_t strip_stride) {
      for (int64_t i = is.begin; i < is.end; ++i) {
        float* row = m + i * m_stride;
        const float* phi_row = strip + (i - is.begin) * strip_stride;
        char* target = out + sequence.position(i) * tokens * size;
        char* first = target + sequence.first * size;
        if (!sequence.list && attention.dtype == Dtype::float32) {
          head.pass.attention_gradient(phi_row, row, head.count, reinterpret_cast<float*>(first));
          continue;
        }
        head.pass.attention_gradient(phi_row, row, head.count, row);
        if (!sequence.list) {
          head.pass.narrow(row, 1.0f, head.count, attention.dtype, first);
          continue;
        }
        head.pass.narrow(row, 1.0f, head.count, attention.dtype, row);
        const char* narrow = reinterpret_cast<const char*>(row);
        for (int64_t j = 0; j < head.count; ++j)
          std::memcpy(target + sequence.list[j] * size, narrow + j * size, size_t(size));
      }
    });
  });
}

void interaction_from_qk(const Kernels& kernels, Precision precision, int threads, const Heads& q, const Heads& k,
                         int64_t heads, int64_t group, int64_t width, const Layout& layout, float scale, bool causal,
                         Formula formula, float* total, float* grad_q, float* grad_k) {
  const Sequences sequences(layout);
  const Product& product = product_for(kernels, q.dtype, precision);
  const bool packed = layout.cu_seqlens;
  const int64_t head_stride = packed ? width : layout.tokens * width, token_stride = packed ? heads * width : width;
  if (grad_q && packed) {
    const int64_t end = layout.cu_seqlens[layout.sequences] * token_stride, all = layout.tokens * token_stride;
    std::fill(grad_q + end, grad_q + all, 0.0f);
    std::fill(grad_k + end, grad_k + all, 0.0f);
  }

  each_head(kernels, threads, sequences, heads,
            [&](const Sequence& sequence, int64_t index, int64_t h, const Crew& crew) {
    Workspace& workspace = Workspace::own();
    const Workspace::Mark mark(workspace);
    const int64_t place = sequence.sample * layout.tokens * heads * width + h * head_stride;
    const Output out_q = {grad_q + place, token_stride, sequence}, out_k = {grad_k + place, token_stride, sequence};
    if (grad_q && !packed && sequence.count < layout.tokens) {
      std::fill(out_q.data, out_q.data + head_stride, 0.0f);
      std::fill(out_k.data, out_k.data + head_stride, 0.0f);
    }
    total[index * heads + h] = 0;
    if (sequence.count == 0) return;

    Head head = {*kernels.elementwise, product, crew, formula, sequence.count, causal, nullptr, 0};
    const int64_t stride = row_stride(product, head.count), size = buffer_size(product, head.count, head.count);
    float* a = workspace.take<float>(size);
    float* m = grad_q ? workspace.take<float>(size) : nullptr;
    std::vector<HalfMatrix> phi;
    if (grad_q) phi.emplace_back(head, workspace);
    head.a = a, head.a_stride = stride;

    const View queries = head_view(q, sequence, h), keys = head_view(k, sequence, h / group);
    attention_rows(head, queries, keys, width, scale, a);
    total[index * heads + h] = float(pair_sum(head, grad_q ? &phi[0] : nullptr, m, stride));
    if (!grad_q) return;
    weighted_rows(head, phi[0], m, stride, [&](Range is, const float* strip, int64_t strip_stride) {
      for (int64_t i = is.begin; i < is.end; ++i) {
        const int64_t visible = causal ? i + 1 : head.count;
        float* row = m + i * stride;
        head.pass.softmax_gradient(a + i * stride, strip + (i - is.begin) * strip_stride, scale, visible, row);
        std::fill(row + visible, row + head.count, 0.0f);
      }
    });
    const View gradient = {m, Dtype::float32, stride, 1, nullptr, nullptr};
    project(head, gradient, keys, width, out_q, [&](Range is) { return head.until(is.end); });
    project(head, transposed(gradient), queries, width, out_k, [&](Range js) { return head.since(js.begin); });
  });
}

void scale_gradients(const Kernels& kernels, int threads, const HeadGradients& g, int64_t group, Dtype dtype,
                     void* out) {
  constexpr int64_t piece = 4096, task_numbers = 1 << 16;
  const int64_t shared = g.heads / group, pieces = divide_up(g.size, piece), total = g.samples * shared * pieces;
  const int64_t at_once = task_numbers / std::max<int64_t>(1, std::min(g.size, piece));
  parallel_for(kernels, threads, divide_up(total, at_once), [&](int64_t task) {
    Workspace& own = Workspace::own();
    const Workspace::Mark mark(own);
    float* wide = own.take<float>(piece);
    float* sum = own.take<float>(piece);
    const Range indices = block(task, at_once, total);
    for (int64_t index = indices.begin; index < indices.end; ++index) {
      const int64_t place = index / pieces, sample = place / shared;
      const Range part = block(index % pieces, piece, g.size);
      const auto factor = [&](int64_t head) {
        return g.factor[sample * g.factor_sample_stride + head * g.factor_head_stride];
      };
      const auto numbers = [&](int64_t head) {
        const int64_t first = (sample * g.heads + head) * g.size + part.begin;
        const void* data = static_cast<const char*>(g.data) + first * element_size(g.dtype);
        if (g.dtype == Dtype::float32) return static_cast<const float*>(data);
        kernels.elementwise->widen(data, g.dtype, part.size(), wide);
        return static_cast<const float*>(wide);
      };
      char* target = static_cast<char*>(out) + (place * g.size + part.begin) * element_size(dtype);
      const int64_t head = place % shared * group;
      if (group == 1) {
        kernels.elementwise->narrow(numbers(head), factor(head), part.size(), dtype, target);
        continue;
      }
      std::fill(sum, sum + part.size(), 0.0f);
      for (int64_t member = head; member < head + group; ++member) {
        const float* x = numbers(member);
        for (int64_t i = 0; i < part.size(); ++i) sum[i] += factor(member) * x[i];
      }
      kernels.elementwise->narrow(sum, 1.0f, part.size(), dtype, target);
    }
  });
}

}  // namespace safr
