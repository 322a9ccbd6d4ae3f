// AVX2 with FMA. A tile of 6 × 16 leaves four of the 16 registers for operands. Six rows do not divide a panel of 16
// columns, so a matrix is multiplied with itself by four: their 8 sums are just enough to keep two units busy.
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
