#include "feature_moment.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "token_gram.hpp"

namespace safr {
namespace {

constexpr int64_t kWide = 1024;
constexpr int64_t kPart = 1024;            // tokens that are worth a sum of their own
constexpr int64_t kMostOfParts = 1 << 19;  // floats of all such sums
constexpr double kMostFlagged = 0.25;  // beyond, the token path is as fast
constexpr double kLeast = 0.1;  // at 0.01 gradients that cancel were up to 13 times as far off as the plain formula's
constexpr double kOfAxes = 0.08;  // at 0.04 gradients of 256 features were up to 2.5e-5 off, at 0.08 below 1e-5

// The tokens `all` of S = Σ_i α_i h_i h_iᵀ (α = 1 where null): the upper triangle, by tiles. Rows are `stride` apart.
void moment_of(const Tokens& t, Range all, const float* alpha, float* s, int64_t stride) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Product& p = t.product;
  const int64_t strip = round_up(t.width >= kWide ? 256 : 64, p.nr), strips = divide_up(t.width, strip);
  const auto both = alpha ? std::nullopt : side_of_both(p);
  const int64_t left_strip = round_up(64, p.mr), left_strips = both ? 0 : divide_up(t.width, left_strip);
  const int64_t budget = t.crew.shared() ? 1 << 20 : 1 << 18;  // bytes of an operand; waking a crew has its price
  const int64_t affordable = budget / (t.width * std::max(p.left_bytes, p.right_bytes)) / p.depth * p.depth;
  const int64_t chunk = std::max<int64_t>(p.depth, affordable);
  const int64_t scaled_stride = round_up(t.width, 16);
  float* scaled = alpha ? workspace.take<float>(std::min(chunk, all.size()) * scaled_stride) : nullptr;

  for (int64_t t0 = all.begin; t0 < all.end; t0 += chunk) {
    const Workspace::Mark chunk_mark(workspace);
    const Range ts = {t0, std::min(t0 + chunk, all.end)};
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
    const Operand right(p, both.value_or(Side::right), workspace, t.width, ts.size());
    const View columns = right.side() == Side::left ? transposed(t.h) : t.h;
    std::optional<Operand> packed;
    if (!both) packed.emplace(p, Side::left, workspace, t.width, ts.size());
    const Operand& left = both ? right : *packed;
    t.crew.each(left_strips + strips, [&](int64_t index) {
      if (index < left_strips) {
        const Range rows = block(index, left_strip, t.width);
        left.pack(transposed(weighted), rows.begin, rows, {0, ts.size()}, alpha ? 0 : t0);
      } else {
        const Range cols = block(index - left_strips, strip, t.width);
        right.pack(columns, cols.begin, cols, {0, ts.size()}, t0);
      }
    });
    t.crew.each(strips, [&](int64_t index) {
      const Range cols = block(strips - 1 - index, strip, t.width);  // the longest first
      multiply(left, {0, cols.end}, right, cols, {0, ts.size()}, s + cols.begin, stride, t0 > all.begin, 0);
    });
  }
}

// The same of all tokens. Those of a long sequence are summed in parts, by one thread each: operands that another one
// has packed come slowly from its cache. Parts do not depend on the threads, so that results do not.
void moment(const Tokens& t, const float* alpha, float* s, int64_t stride) {
  const int64_t size = buffer_size(t.product, t.width, t.width);
  const int64_t parts = std::min({t.count / kPart, kMostOfParts / size, int64_t(8)});
  if (parts < 2) return moment_of(t, {0, t.count}, alpha, s, stride);
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  float* others = workspace.take<float>((parts - 1) * size);  // the first is summed in place
  const Crew alone = t.crew.alone();
  const Tokens own = {t.pass, t.product, alone, t.h, t.count, t.width};
  t.crew.each(parts, [&](int64_t index) {
    const Range all = block(index, divide_up(t.count, parts), t.count);
    moment_of(own, all, alpha, index == 0 ? s : others + (index - 1) * size, stride);
  });
  t.crew.each(divide_up(t.width, 32), [&](int64_t index) {
    const Range rows = block(index, 32, t.width);
    for (int64_t r = rows.begin; r < rows.end; ++r)
      for (int64_t part = 0; part < parts - 1; ++part)
        for (int64_t c = r; c < t.width; ++c) s[r * stride + c] += others[part * size + r * stride + c];
  });
}

// The whole of a symmetric matrix from its upper triangle.
void mirror(const Tokens& t, const float* upper, int64_t stride, float* out, int64_t out_stride) {
  const int64_t n = t.width, side = 32;
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
  t.crew.each(divide_up(t.width, 64), [&](int64_t index) {
    const Range rows = block(index, 64, t.width);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      float* row = s + r * stride;
      std::fill(row, row + r, 0.0f);
      t.pass.narrow(row + r + 1, 2.0f, t.width - r - 1, Dtype::float32, row + r + 1);
    }
  });
}

// Rounds x to bfloat16 and returns in `rest` what that lost.
void split(const Tokens& t, float* x, float* rest, uint16_t* rounded) {
  t.pass.narrow(x, 1.0f, t.width, Dtype::bfloat16, rounded);
  t.pass.widen(rounded, Dtype::bfloat16, t.width, rest);
  t.pass.combine(-1.0f, rest, x, 0.0f, x, t.width, rest);
  t.pass.widen(rounded, Dtype::bfloat16, t.width, x);
}

// R_i = h_iᵀ S' h_i − n2_i², where S' is folded, and is spent.
void quadratic_form(const Tokens& t, float* s, int64_t stride, const float* squared_norm, float* energy) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Product& p = t.product;
  // Below the last column of a strip S' is zero. Wide rows do not stay in the cache from strip to strip: few strips.
  const bool wide = t.width >= kWide;
  const int64_t strip = wide ? round_up(256, p.nr) : p.nr, strips = divide_up(t.width, strip);
  const auto above = [&](Range cols) {
    return Range{0, std::min(round_up(cols.end, wide ? p.depth : p.k_unit), t.width)};
  };

  std::vector<Operand> parts;
  const auto add_part = [&](const float* matrix) {
    parts.emplace_back(p, Side::right, workspace, t.width, t.width);
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

  const int64_t rows_at_once = even_share(t.crew, t.count, t.rows_at_once(1 << 20), p.mr);
  const int64_t buffer_stride = row_stride(p, t.width);
  t.crew.each(divide_up(t.count, rows_at_once), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range is = block(index, rows_at_once, t.count);
    const Operand left(p, Side::left, own, is.size(), t.width);
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
      energy[i] = float(std::max(form - double(squared_norm[i]) * squared_norm[i], 0.0));  // in this order NaN stays
    }
  });
}

// Σ_a S_aa h_a².
double along_axes(const float* h, const float* diagonal, int64_t width) {
  constexpr int64_t lanes = 16;
  float sums[lanes] = {};
  int64_t a = 0;
  for (; a + lanes <= width; a += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += diagonal[a + lane] * h[a + lane] * h[a + lane];
  double total = 0;
  for (; a < width; ++a) total += double(diagonal[a]) * h[a] * h[a];
  for (float sum : sums) total += sum;
  return total;
}

// Tokens whose R the feature path cannot tell from rounding: R is a difference of numbers the size of n2², of
// n2 · tr(S) / width and, where few directions carry S, of n2 · ‖S‖, in single precision. The last errs less the more
// terms of either sign it has; where those directions are a few axes, it has few, each the size of Σ_a S_aa h_a². One
// whose R is not finite may have overflown on the way.
std::vector<int32_t> flagged(const Tokens& t, const float* energy, const float* squared_norm, double moment_norm,
                             const std::vector<float>& diagonal) {
  const double steepest = *std::max_element(diagonal.begin(), diagonal.end());
  double trace = 0;
  for (int64_t i = 0; i < t.count; ++i) trace += squared_norm[i];
  const double floor = std::max(trace / double(t.width), std::max(0.1, 16.0 / double(t.width)) * moment_norm);
  std::vector<char> lost(t.count);
  t.crew.each(divide_up(t.count, 256), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    float* buffer = own.take<float>(t.width);
    const Range is = block(index, 256, t.count);
    for (int64_t i = is.begin; i < is.end; ++i) {
      const double n2 = squared_norm[i];
      const bool overflown = !std::isfinite(energy[i]) && std::isfinite(n2);
      lost[i] = overflown || energy[i] < kLeast * n2 * std::max(n2, floor);
      if (!lost[i] && energy[i] < kOfAxes * n2 * steepest)  // which Σ_a S_aa h_a² does not exceed
        lost[i] = energy[i] < kOfAxes * along_axes(t.row(i, buffer), diagonal.data(), t.width);
    }
  });
  std::vector<int32_t> some;
  for (int64_t i = 0; i < t.count; ++i)
    if (lost[i]) some.push_back(int32_t(i));
  return some;
}

// ‖S‖ in the Euclidean norm, from its upper triangle.
double norm_of(const Tokens& t, const float* upper, int64_t stride) {
  std::vector<double> sums(divide_up(t.width, 64));
  t.crew.each(int64_t(sums.size()), [&](int64_t index) {
    const Range rows = block(index, 64, t.width);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const float* row = upper + r * stride + r;
      sums[index] += 2.0 * t.pass.dot(row, row, t.width - r) - double(row[0]) * row[0];
    }
  });
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

std::vector<float> diagonal_of(const float* s, int64_t stride, int64_t width) {
  std::vector<float> diagonal(width);
  for (int64_t a = 0; a < width; ++a) diagonal[a] = s[a * stride + a];
  return diagonal;
}

bool too_many(const std::vector<int32_t>& some, const Tokens& t) {
  return double(some.size()) > kMostFlagged * double(t.count);
}

// The tokens `some` of `t` as tokens of their own, over `rows`, which it fills.
Tokens choose(const Tokens& t, const std::vector<int32_t>& some, std::vector<int32_t>& rows) {
  for (int32_t i : some) rows.push_back(t.h.rows ? t.h.rows[i] : i);
  return t.subset(rows.data(), int64_t(rows.size()));
}

}  // namespace

void feature_energy(const Tokens& t, const float* squared_norm, float* energy, float* saved) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const int64_t stride = row_stride(t.product, t.width);
  float* s = workspace.take<float>(buffer_size(t.product, t.width, t.width));
  moment(t, nullptr, s, stride);
  if (saved) mirror(t, s, stride, saved, t.width);
  const double moment_norm = norm_of(t, s, stride);
  const std::vector<float> diagonal = diagonal_of(s, stride, t.width);
  fold(t, s, stride);
  quadratic_form(t, s, stride, squared_norm, energy);

  const std::vector<int32_t> some = flagged(t, energy, squared_norm, moment_norm, diagonal);
  if (too_many(some, t)) return token_energy(t, energy);
  if (some.empty()) return;
  std::vector<int32_t> rows;
  token_energy_of(t, some, choose(t, some, rows), energy);
}

// Twice α_i S h_i + S_α h_i − 2 α_i n2_i h_i + β_i h_i. Flagged tokens stay out of S_α; their pairs are added one by
// one, and their own rows made from pairs alone.
void feature_gradient(const Tokens& t, const float* s, const float* energy, const float* squared_norm,
                      const float* alpha, const float* beta, const Gradient& gradient) {
  Workspace& workspace = Workspace::own();
  const Workspace::Mark mark(workspace);
  const Product& p = t.product;
  if (!s) {
    const int64_t upper_stride = row_stride(p, t.width);
    float* upper = workspace.take<float>(buffer_size(p, t.width, t.width));
    float* whole = workspace.take<float>(t.width * t.width);
    moment(t, nullptr, upper, upper_stride);
    mirror(t, upper, upper_stride, whole, t.width);
    s = whole;
  }
  const std::vector<int32_t> some =
      flagged(t, energy, squared_norm, norm_of(t, s, t.width), diagonal_of(s, t.width, t.width));
  if (too_many(some, t)) return token_gradient(t, alpha, beta, gradient);
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
    if (index == 0) pair_gram.pack(transposed(chosen.h), 0, n);
  });
  float* pair_alpha = workspace.take<float>(n);
  for (int64_t i = 0; i < n; ++i) pair_alpha[i] = alpha[some[i]];

  const int64_t rows_at_once = even_share(t.crew, t.count, t.rows_at_once(1 << 19), p.mr);
  t.crew.each(divide_up(t.count, rows_at_once), [&](int64_t index) {
    Workspace& own = Workspace::own();
    const Workspace::Mark own_mark(own);
    const Range is = block(index, rows_at_once, t.count), own_rows = {0, is.size()};
    const Operand left(p, Side::left, own, is.size(), t.width);
    left.pack(t.h, is.begin, is.size());
    float* plain = own.take<float>(buffer_size(p, is.size(), t.width));
    float* total = own.take<float>(buffer_size(p, is.size(), t.width));
    multiply(left, own_rows, right, {0, t.width}, {0, t.width}, plain, stride);
    multiply(left, own_rows, weighted_right, {0, t.width}, {0, t.width}, total, stride);

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
      const int64_t row = (i - is.begin) * stride;
      const float own_weight = float(beta[i] - 2.0 * alpha[i] * squared_norm[i]);
      t.pass.combine(alpha[i], plain + row, total + row, own_weight, t.row(i, buffer), t.width, total + row);
      gradient.store(i, total + row, 0, t.width, 2.0f);
    }
  });
  if (n > 0) token_gradient_of(t, some, chosen, alpha, beta, gradient);
}

}  // namespace safr
