#include "importance.hpp"

#include <cmath>

namespace safr {
namespace {

bool counts(float energy, float squared_norm) { return energy != 0 && squared_norm != 0; }  // NaN does

}  // namespace

double importance(int64_t places, const float* energy, const float* squared_norm, float eps) {
  double sum = 0;
  for (int64_t i = 0; i < places; ++i)
    if (counts(energy[i], squared_norm[i])) sum += std::sqrt(energy[i]) / (std::sqrt(squared_norm[i]) + eps);
  return sum;
}

void importance_gradients(int64_t places, const float* energy, const float* squared_norm, float eps, float weight,
                          float* grad_energy, float* grad_squared_norm) {
  for (int64_t i = 0; i < places; ++i) {
    grad_energy[i] = grad_squared_norm[i] = 0;
    if (!counts(energy[i], squared_norm[i])) continue;
    const float root = std::sqrt(energy[i]), norm = std::sqrt(squared_norm[i]), divisor = norm + eps;
    grad_energy[i] = weight / divisor / (2 * root);
    // Divided one by one: the square of a small norm underflows.
    grad_squared_norm[i] = -weight * (root / divisor) / divisor / (2 * norm);
  }
}

}  // namespace safr
