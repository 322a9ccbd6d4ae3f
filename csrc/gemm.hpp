// Blocked products over a unit's Product: operands are packed once, then register tiles run over their panels.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>

#include "kernels.hpp"
#include "threads.hpp"
#include "work.hpp"

namespace safr {

inline int64_t divide_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }
inline int64_t round_up(int64_t x, int64_t unit) { return divide_up(x, unit) * unit; }

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline const Product& product_for(const Kernels& kernels, Dtype dtype, Precision precision) {
  if (dtype == Dtype::bfloat16) return kernels.bfloat16;
  return kernels.float32[int(dtype == Dtype::float32 ? precision : Precision::highest)];
}

// Side of the square blocks that a Gram matrix is made in: whole panels both ways, within the second-level cache.
inline int64_t block_side(const Product& p) {
  const int64_t step = std::lcm(p.mr, p.nr);
  return std::max(step, 256 / step * step);
}

// Row stride of a float32 buffer that tiles write whole panels into. Odd in cache lines, so that rows fall into
// different sets.
inline int64_t row_stride(const Product& p, int64_t cols) { return round_up(round_up(cols, p.nr), 32) + 16; }

// Elements of such a buffer, whichever tiles write it.
inline int64_t buffer_size(const Product& p, int64_t rows, int64_t cols) {
  const int64_t of_own = p.own_tiles.whole ? round_up(rows, p.own_tiles.rows) : 0;
  return std::max(round_up(rows, p.mr), of_own) * row_stride(p, cols);
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range block(int64_t index, int64_t side, int64_t total) {
  return {index * side, std::min((index + 1) * side, total)};
}

// Lines of a task, at most `most`, such that all threads of a crew get as many; whole `unit`s, as `most` is.
inline int64_t even_share(const Crew& crew, int64_t lines, int64_t most, int64_t unit) {
  const int64_t tasks = round_up(divide_up(lines, most), crew.threads());
  return round_up(divide_up(lines, tasks), unit);
}

enum class Side { left, right };

// One operand of a product, packed. Its lines are the rows of a left operand, the columns of a right one. For each
// `depth` of k its panels lie one behind the other.
class Operand {
 public:
  Operand(const Product& product, Side side, Workspace& workspace, int64_t lines, int64_t k)
      : product(product), k(k), depth(product.depth), side_(side), panels_(divide_up(lines, width())) {
    data_ = workspace.take<char>(panels_ * width() * round_up(k, product.k_unit) * bytes());
  }

  int64_t width() const { return side_ == Side::left ? product.mr : product.nr; }

  // Packs `matrix` from its line `line` on into the lines `to` (which begin at a panel), for k in `ks` (which begins at
  // a multiple of the depth, and unless `to` is one panel ends at one too, or at k); k counts from `k_origin` in the
  // matrix.
  void pack(const View& matrix, int64_t line, Range to, Range ks, int64_t k_origin = 0) const {
    int64_t elements = 0;
    for (int64_t k0 = ks.begin; k0 < ks.end; k0 += depth) {
      const int64_t count = std::min(depth, ks.end - k0);
      elements += round_up(to.size(), width()) * round_up(count, product.k_unit);
      void* out = data_ + offset(k0, to.begin / width());
      if (side_ == Side::left)
        product.pack_left(matrix, line, to.size(), k_origin + k0, count, out);
      else
        product.pack_right(matrix, k_origin + k0, count, line, to.size(), out);
    }
    work.packed_bytes.fetch_add(elements * bytes(), std::memory_order_relaxed);
  }

  // All of it, from the matrix's first line and k.
  void pack(const View& matrix, int64_t line, int64_t lines) const { pack(matrix, line, {0, lines}, {0, k}); }

  // Packed depth of the block that starts at k0.
  int64_t padded(int64_t k0) const { return round_up(std::min(depth, k - k0), product.k_unit); }

  // Line `line`, a multiple of the tile's rows or columns, from k0 on.
  const void* at(int64_t k0, int64_t line) const {
    constexpr int64_t word = 4;
    return data_ + offset(k0, line / width()) + line % width() * word;
  }
  Side side() const { return side_; }

  const Product& product;
  const int64_t k, depth;

 private:
  int64_t bytes() const { return side_ == Side::left ? product.left_bytes : product.right_bytes; }
  int64_t offset(int64_t k0, int64_t index) const { return (panels_ * k0 + index * padded(k0)) * width() * bytes(); }

  Side side_;
  int64_t panels_;
  char* data_;
};

// The side that a matrix is packed as where one packing serves both operands of its product with its own transpose.
inline std::optional<Side> side_of_both(const Product& p) {
  if (p.own_tiles.whole) return Side::right;
  if (p.turn) return Side::left;
  return std::nullopt;
}

// The columns of a right operand, block by block: packed once where all of it is small, else anew for each use.
class ColumnBlocks {
 public:
  enum class For { product, gram };  // of a Gram matrix the rows are asked for, too

  // `needed` gives the range of k that a block of columns is multiplied over.
  template <typename Needed>
  ColumnBlocks(const Product& product, const Crew& crew, Workspace& workspace, const View& matrix, int64_t cols,
               int64_t k, For use, const Needed& needed)
      : product_(product), matrix_(matrix), k_(k) {
    // Bytes: of as many numbers where a number takes more than a float32's.
    const int64_t small = std::max<int64_t>(4 << 20, product.right_bytes << 20);
    if (cols * k * product.right_bytes > small) return;
    const auto both = use == For::gram ? side_of_both(product) : std::nullopt;
    serves_both_ = both.has_value();
    const Operand& shared = shared_.emplace(product, both.value_or(Side::right), workspace, cols, k);
    const View lines = shared.side() == Side::left ? transposed(matrix) : matrix;
    const int64_t side = block_side(product);
    crew.each(divide_up(cols, side), [&](int64_t index) {
      const Range js = block(index, side, cols);
      shared.pack(lines, js.begin, js, needed(js));
    });
  }

  bool shared() const { return shared_.has_value(); }

  // Calls body(left operand, rows of it) for rows of the matrix's transpose, those of a block, and the k in `ks`.
  template <typename Body>
  void with_rows(Range rows, Range ks, const Body& body) const {
    if (serves_both_) return body(*shared_, rows);
    Workspace& workspace = Workspace::own();
    const Workspace::Mark mark(workspace);
    const Operand left(product_, Side::left, workspace, rows.size(), k_);
    left.pack(transposed(matrix_), rows.begin, {0, rows.size()}, ks);
    body(left, Range{0, rows.size()});
  }

  // Calls body(operand, columns of it) for a block of columns and the k in `ks`.
  template <typename Body>
  void with(Range cols, Range ks, const Body& body) const {
    if (shared_) return body(*shared_, cols);
    Workspace& workspace = Workspace::own();
    const Workspace::Mark mark(workspace);
    const Operand own(product_, Side::right, workspace, cols.size(), k_);
    own.pack(matrix_, cols.begin, {0, cols.size()}, ks);
    body(own, Range{0, cols.size()});
  }

 private:
  const Product& product_;
  View matrix_;
  int64_t k_;
  std::optional<Operand> shared_;
  bool serves_both_ = false;
};

constexpr int64_t kWhole = -(int64_t(1) << 62);

// c = left[rows] · right[cols] summed over ks, added to c where `accumulate`. Ranges begin at panels, and at a
// multiple of the depth; c has room for whole panels. One side may stand for both, as side_of_both says. Tiles that lie
// below the diagonal are left out: those whose first row, plus `below`, is not less than the end of their columns.
inline void multiply(const Operand& left, Range rows, const Operand& right, Range cols, Range ks, float* c,
                     int64_t stride, bool accumulate = false, int64_t below = kWhole) {
  const Product& p = left.product;
  const Tiles& tiles = left.side() == Side::left ? p.tiles : p.own_tiles;
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  char* turned = right.side() == Side::left ? workspace.take<char>(p.nr * right.padded(0) * p.right_bytes) : nullptr;
  int64_t multiply_adds = 0, turned_bytes = 0;
  for (int64_t k0 = ks.begin; k0 < ks.end; k0 += left.depth) {
    const int64_t k = std::min(left.padded(k0), round_up(ks.end - k0, p.k_unit));
    const bool add = accumulate || k0 > ks.begin;
    // A right panel stays in the first-level cache while the left ones pass by.
    for (int64_t j = cols.begin; j < cols.end; j += p.nr) {
      const void* panel = right.at(k0, j);
      if (turned) {
        p.turn(panel, p.nr * k * p.right_bytes, turned);
        panel = turned;
        turned_bytes += p.nr * k * p.right_bytes;
      }
      for (int64_t i = rows.begin; i < rows.end && i + below < j + p.nr; i += tiles.rows) {
        const bool half = tiles.right_half && i + below >= j + p.nr / 2;
        const Tile tile = half ? tiles.right_half : tiles.whole;
        tile(k, left.at(k0, i), panel, c + (i - rows.begin) * stride + j - cols.begin, stride, add);
        multiply_adds += tiles.rows * (half ? p.nr / 2 : p.nr) * k;
      }
    }
  }
  work.multiply_adds.fetch_add(multiply_adds, std::memory_order_relaxed);
  work.turned_bytes.fetch_add(turned_bytes, std::memory_order_relaxed);
}

}  // namespace safr
