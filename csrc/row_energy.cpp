#include "row_energy.hpp"

#include "feature_moment.hpp"
#include "token_gram.hpp"

namespace safr {
namespace {

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
    std::vector<float*> unused;
    for (int64_t index = 0; index < slots; ++index)
      if (!used[size_t(index)]) unused.push_back(moments + index * size);
    parallel_for(kernels, threads, int64_t(unused.size()),
                 [&](int64_t i) { std::fill(unused[size_t(i)], unused[size_t(i)] + size, 0.0f); });
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
                         const RowGradients& gradients, void* grad) {
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
      const RowGradient gradient = gradients(sequence.sample, position);
      columns[0][i] = energy[place];
      columns[1][i] = squared_norm[place];
      columns[2][i] = gradient.energy;
      columns[3][i] = gradient.squared_norm;
    }

    const Gradient gradient = {t.pass, row(sequence.sample, 0), hidden.h.dtype, t.width, sequence};
    if (slot[index] < 0) return token_gradient(t, columns[2], columns[3], gradient);
    const float* saved = slot[index] < slots ? moments + slot[index] * t.width * t.width : nullptr;
    feature_gradient(t, saved, columns[0], columns[1], columns[2], columns[3], gradient);
  });
}

}  // namespace safr
