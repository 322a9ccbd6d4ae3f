// AVX-512. A tile of 14 × 32 leaves four of the 32 registers for operands.
#include "vector16.hpp"

#include "../passes.hpp"
#include "denormals.hpp"
#include "fma.hpp"

namespace safr {
namespace {

constexpr Product kFloat32 = fma_product<14, 2>;

}  // namespace

constexpr Kernels kernels_avx512 = {
    "avx512", {kFloat32, kFloat32, kFloat32}, kFloat32, flush_denormals, restore_denormals, &kElementwise};

}  // namespace safr
