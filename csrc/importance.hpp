// The importance loss on primitive 1, Σ √R / (√n2 + ε) over the tokens, and its gradient.
#pragma once

#include "row_energy.hpp"

namespace safr {

// The sum; the rest as row_energy writes it.
double importance(const Kernels& kernels, Precision precision, int threads, const Hidden& hidden, float* energy,
                  float* squared_norm, float* moments, int64_t slots, float eps);

// The gradient of a loss in which the sum is multiplied by `weight`; the rest as in row_energy_backward.
void importance_backward(const Kernels& kernels, Precision precision, int threads, const Hidden& hidden,
                         const float* energy, const float* squared_norm, const float* moments, int64_t slots, float eps,
                         float weight, void* grad);

}  // namespace safr
