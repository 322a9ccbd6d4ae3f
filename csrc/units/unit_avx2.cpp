// AVX2 with FMA. A tile of 6 × 16 leaves four of the 16 registers for operands.
#include "vector8.hpp"

#include "../passes.hpp"
#include "denormals.hpp"
#include "fma.hpp"

namespace safr {
namespace {

constexpr Product kFloat32 = fma_product<6, 2, 4>;

}  // namespace

constexpr Kernels kernels_avx2 = {
    "avx2", {kFloat32, kFloat32, kFloat32}, kFloat32, flush_denormals, restore_denormals, &kElementwise};

}  // namespace safr
