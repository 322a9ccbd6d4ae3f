// Row energy from tiles of the Gram matrix of tokens. Nothing of its size is stored beyond kStoredGram tokens.
#pragma once

#include "tokens.hpp"

namespace safr {

// R of every token.
void token_energy(const Tokens& t, float* energy);

// R of the tokens `some` alone, which are those of `chosen`, by their products with every token.
void token_energy_of(const Tokens& t, const std::vector<int32_t>& some, const Tokens& chosen, float* energy);

// The gradient of every token, given α = ∂L/∂R and β = ∂L/∂n2.
void token_gradient(const Tokens& t, const float* alpha, const float* beta, const Gradient& gradient);

// The gradient of the tokens `some` alone.
void token_gradient_of(const Tokens& t, const std::vector<int32_t>& some, const Tokens& chosen, const float* alpha,
                       const float* beta, const Gradient& gradient);

}  // namespace safr
