// What every machine of the architecture has: SSE2 on x86-64, and plain 128-bit vectors elsewhere.
#include "vector4.hpp"

#include "../passes.hpp"
#include "denormals.hpp"
#include "fma.hpp"

namespace safr {
namespace {

constexpr Product kFloat32 = fma_product<4, 3>;

}  // namespace

constexpr Kernels kernels_baseline = {
    "baseline", {kFloat32, kFloat32, kFloat32}, kFloat32, flush_denormals, restore_denormals, &kElementwise};

}  // namespace safr
