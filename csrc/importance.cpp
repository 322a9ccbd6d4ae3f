#include "importance.hpp"

#include <cmath>

namespace safr {
namespace {

bool counts(float energy, float squared_norm) { return energy != 0 && squared_norm != 0; }  // NaN does

}  // namespace

double importance(const Kernels& kernels, Precision precision, int threads, const Hidden& hidden, float* energy,
                  float* squared_norm, float* moments, int64_t slots, float eps) {
  row_energy(kernels, precision, threads, hidden, energy, squared_norm, moments, slots);
  const int64_t places = hidden.layout.samples * hidden.layout.tokens;
  double sum = 0;
  for (int64_t i = 0; i < places; ++i)
    if (counts(energy[i], squared_norm[i])) sum += std::sqrt(energy[i]) / (std::sqrt(squared_norm[i]) + eps);
  return sum;
}

void importance_backward(const Kernels& kernels, Precision precision, int threads, const Hidden& hidden,
                         const float* energy, const float* squared_norm, const float* moments, int64_t slots, float eps,
                         float weight, void* grad) {
  const auto gradients = [&](int64_t sample, int64_t position) -> RowGradient {
    const int64_t i = sample * hidden.layout.tokens + position;
    if (!counts(energy[i], squared_norm[i])) return {0, 0};
    const float root = std::sqrt(energy[i]), norm = std::sqrt(squared_norm[i]), divisor = norm + eps;
    // Divided one by one: the square of a small norm underflows.
    return {weight / divisor / (2 * root), -weight * (root / divisor) / divisor / (2 * norm)};
  };
  row_energy_backward(kernels, precision, threads, hidden, energy, squared_norm, moments, slots, gradients, grad);
}

}  // namespace safr
