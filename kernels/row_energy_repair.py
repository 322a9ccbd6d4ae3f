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
from .tiles import load_rows, product, real_tokens, store_rows

MOST_SHARES = tl.constexpr(256)  # of the tokens of a sequence


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
    grad_h_ptr, h_ptr, mask_ptr, found_ptr, shares,
    energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
    row, begin, stop, i0, out, E, stride_ht, guard, floor, eps,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the moment backward leaves out: ``2 Σ_j w_ij G_ij h_j``.

    A row i that cancelled gets all of it, ``w_ij = α_i + α_j``; any other what it receives from such rows j,
    ``w_ij = α_j``, since they are not in its ``S_α``. ``found_ptr`` tells how many of the sequence did, in shares. What
    the program stored is read again, so that it need not be kept here: 16-bit gradients are then rounded twice.
    """
    tl.static_assert(BLOCK_T % BLOCK_J == 0)
    share = tl.arange(0, MOST_SHARES)
    found = tl.load(found_ptr + share, mask=share < shares, other=0)
    if tl.sum(found, 0) != 0:
        tl.debug_barrier()
        for t0 in range(i0, tl.minimum(i0 + BLOCK_T, stop), BLOCK_J):
            i = t0 + tl.arange(0, BLOCK_J)
            real_i = real_tokens(i, stop, row, mask_ptr)
            direct_i = cancelled(energy_ptr, norm_ptr, row, i, real_i, guard, floor)
            alpha_i = gradients_of(
                energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, i, direct_i, eps
            )[0]
            direct_in_tile = tl.max(direct_i.to(tl.int32), 0)
            grad = tl.zeros((BLOCK_J, out.shape[0]), tl.float32)
            j_first = begin // BLOCK_J * BLOCK_J
            for step in range(0, stop - j_first, BLOCK_J):
                j0 = j_first + step
                j = j0 + tl.arange(0, BLOCK_J)
                real_j = real_tokens(j, stop, row, mask_ptr)
                direct_j = cancelled(energy_ptr, norm_ptr, row, j, real_j, guard, floor)
                if tl.maximum(direct_in_tile, tl.max(direct_j.to(tl.int32), 0)) != 0:
                    alpha_j = gradients_of(
                        energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, j, real_j,
                        eps,
                    )[0]  # fmt: skip
                    gram = gram_tile(h_ptr, t0, j0, real_i, real_j, E, stride_ht, BLOCK_J, BLOCK_J, BLOCK_E, PRECISION)
                    from_j = tl.where(direct_i[:, None] | direct_j[None, :], alpha_j[None, :], 0.0)
                    weight = (alpha_i[:, None] + from_j) * gram
                    h_j = load_rows(h_ptr, j0, stride_ht, real_j, out, E, BLOCK_J)
                    grad = product(weight.to(DERIVED), h_j.to(DERIVED), grad, PRECISION)
            grad = 2.0 * grad + load_rows(grad_h_ptr, row + t0, E, real_i, out, E, BLOCK_J).to(tl.float32)
            store_rows(grad_h_ptr, row + t0, real_i, out, E, grad, BLOCK_J)
