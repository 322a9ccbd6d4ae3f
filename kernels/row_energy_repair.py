"""What the feature moment loses: rows whose energy is small beside the numbers it is made of, from the token Gram.

``R = hᵀSh − n2²`` has an error of about δ·n2², which swallows the R of a token that hardly interferes with any other;
and rounding leaves in ``S h`` about δ·‖S‖·‖h‖/√E, which swallows what the others have in common where a few massive
tokens fill S along one direction. So the rows with ``R < guard · n2 · max(n2, ‖S‖/√E)`` are made directly: ‖S‖/√E, the
root mean square of the eigenvalues of S, is at most what an average row has of R/n2 before the subtraction. They are
few or none in most sequences, and a program that meets none passes on.
"""

import triton
import triton.language as tl

from .importance import gradients_of
from .row_energy_wide import energy_of, gram_tile
from .tiles import load_rows, product, real_tokens


@triton.jit
def rms_eigenvalue(moment_norm, E):
    """Root mean square of the eigenvalues of a sequence's S, from its Euclidean norm."""
    return moment_norm * tl.rsqrt(tl.cast(E, tl.float32))


@triton.jit
def cancels(energy, norm, real, guard, floor):
    """Which tokens' moment form lost too many digits; ``floor`` is its ``rms_eigenvalue``."""
    return real & (energy < guard * norm * tl.maximum(norm, floor))


@triton.jit
def cancelled(energy_ptr, norm_ptr, row, token, real, guard, floor):
    """``cancels`` of tokens whose sums are stored. That a row was made anew shows in the same numbers."""
    energy = tl.load(energy_ptr + row + token, mask=real, other=0.0)
    return cancels(energy, tl.load(norm_ptr + row + token, mask=real, other=0.0), real, guard, floor)


@triton.jit
def number_that_cancelled(energy_ptr, norm_ptr, row, begin, stop, guard, floor, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), tl.int32)
    for t0 in range(begin, stop, BLOCK):
        token = t0 + tl.arange(0, BLOCK)
        found += cancelled(energy_ptr, norm_ptr, row, token, token < stop, guard, floor).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def repaired(
    energy, norm, h_ptr, mask_ptr, row, begin, stop, i0, real, E, stride_ht, guard, floor,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``R_i`` of a tile, anew where it cancelled or overflowed."""
    overflown = real & (norm < float("inf")) & ~(energy < float("inf"))  # NaN: infinity less infinity
    direct = cancels(energy, norm, real, guard, floor) | overflown
    stop = tl.where(tl.max(direct.to(tl.int32), 0) != 0, stop, 0)
    made = energy_of(h_ptr, mask_ptr, row, begin, stop, i0, direct, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION)
    return tl.where(direct, made, energy)


@triton.jit
def add_direct(
    grad, direct_i, alpha_i, h_ptr, mask_ptr,
    energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
    row, begin, stop, i0, real_i, out, E, stride_ht, guard, floor, eps,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the moment backward leaves out: ``Σ_j w_ij G_ij h_j``.

    A row i that cancelled gets all of it, ``w_ij = α_i + α_j``; any other what it receives from such rows j,
    ``w_ij = α_j``, since they are not in its ``S_α``.
    """
    found = number_that_cancelled(energy_ptr, norm_ptr, row, begin, stop, guard, floor, 1024)
    stop = tl.where(found != 0, stop, 0)
    direct_in_tile = tl.max(direct_i.to(tl.int32), 0)
    alpha_i = tl.where(direct_i, alpha_i, 0.0)
    for j0 in range(begin // BLOCK_J * BLOCK_J, stop, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        real_j = real_tokens(j, stop, row, mask_ptr)
        direct_j = cancelled(energy_ptr, norm_ptr, row, j, real_j, guard, floor)
        if tl.maximum(direct_in_tile, tl.max(direct_j.to(tl.int32), 0)) != 0:
            alpha_j = gradients_of(
                energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, j, real_j, eps
            )[0]
            gram = gram_tile(h_ptr, i0, j0, real_i, real_j, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION)
            from_j = tl.where(direct_i[:, None] | direct_j[None, :], alpha_j[None, :], 0.0)
            weight = (alpha_i[:, None] + from_j) * gram
            h_j = load_rows(h_ptr, j0, stride_ht, real_j, out, E, BLOCK_J)
            grad = product(weight.to(DERIVED), h_j.to(DERIVED), grad, PRECISION)
    return grad
