// NEON, which the compiler's own vectors reach, fused multiply-add included. A tile of 8 × 8 fills half of the 32
// registers: compilers keep all factors of a step in others, and spill where the tile is larger.
#include "vector4.hpp"

#include "../passes.hpp"
#include "denormals.hpp"
#include "fma.hpp"

namespace safr {
namespace {

constexpr Product kFloat32 = fma_product<8, 2>;

}  // namespace

constexpr Kernels kernels_neon = {
    "neon", {kFloat32, kFloat32, kFloat32}, kFloat32, flush_denormals, restore_denormals, &kElementwise};

}  // namespace safr
