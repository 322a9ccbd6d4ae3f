// AVX-512. A tile of 8 × 32 has the sums that two multiply-adds a cycle of four cycles' latency need twice over; taller
// ones are no faster, and half of a Gram matrix takes more of them.
#include "vector16.hpp"

#include "../passes.hpp"
#include "denormals.hpp"
#include "fma.hpp"

namespace safr {
namespace {

constexpr Product kFloat32 = fma_product<8, 2>;

}  // namespace

constexpr Kernels kernels_avx512 = {
    "avx512", {kFloat32, kFloat32, kFloat32}, kFloat32, flush_denormals, restore_denormals, &kElementwise};

}  // namespace safr
