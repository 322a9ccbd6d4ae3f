// The importance loss on what primitive 1 gives: scale · Σ √R / (√n2 + ε), and its gradient.
#pragma once

#include "row_energy.hpp"

namespace safr {

// Writes the loss and `factor`, what the sum was multiplied by: `scale`, over the number of real tokens for the mean.
void importance(const Layout& layout, const float* energy, const float* squared_norm, float eps, double scale,
                bool mean, float* loss, float* factor);

// Writes the gradients by energy and squared norm of each of `places` tokens, of a loss whose sum weighs `weight`.
void importance_gradients(int64_t places, const float* energy, const float* squared_norm, float eps, float weight,
                          float* grad_energy, float* grad_squared_norm);

}  // namespace safr
