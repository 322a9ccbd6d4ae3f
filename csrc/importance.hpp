// The importance loss on what primitive 1 gives for each of `places` tokens: Σ √R / (√n2 + ε), and its gradient.
#pragma once

#include <cstdint>

namespace safr {

double importance(int64_t places, const float* energy, const float* squared_norm, float eps);

// Writes the gradients by energy and squared norm of a loss in which the sum is multiplied by `weight`.
void importance_gradients(int64_t places, const float* energy, const float* squared_norm, float eps, float weight,
                          float* grad_energy, float* grad_squared_norm);

}  // namespace safr
