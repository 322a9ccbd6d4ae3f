// Row energy from the moment S = hᵀh of features: linear in the number of tokens. R is a difference of large numbers
// there, so tokens for which it is small are handed to the token path.
#pragma once

#include "tokens.hpp"

namespace safr {

// R of every token. S goes to `saved`, width × width, unless that is null.
void feature_energy(const Tokens& t, const float* squared_norm, float* energy, float* saved);

// The gradient of every token, given S (null: it is made again) and α = ∂L/∂R, β = ∂L/∂n2.
void feature_gradient(const Tokens& t, const float* s, const float* energy, const float* squared_norm,
                      const float* alpha, const float* beta, const Gradient& gradient);

}  // namespace safr
