"""What the feature moment loses: rows whose energy is small beside the numbers it is made of, from the token Gram.

``R = hᵀSh − n2²`` has an error of about δ·n2², which swallows the R of a token that hardly interferes with any other;
and rounding leaves in ``S h`` about δ·‖S‖·‖h‖/√E, which swallows what the others have in common where a few massive
tokens fill S along one direction. So the rows with ``R < guard · n2 · max(n2, ‖S‖/√E)`` are made directly: ‖S‖/√E, the
root mean square of the eigenvalues of S, is at most what an average row has of R/n2 before the subtraction. They are
few or none in most sequences, and a program that meets none ends at once.
"""

import triton
import triton.language as tl

from .row_energy_wide import energy_of, gram_tile
from .tiles import load_rows, product, real_tokens, slot_of, store_rows, tile_of_rows


@triton.jit
def rms_eigenvalue(moment_norm_ptr, E):
    """Root mean square of the eigenvalues of a sequence's S, from its Euclidean norm."""
    return tl.load(moment_norm_ptr) * tl.rsqrt(tl.cast(E, tl.float32))


@triton.jit
def cancels(energy_ptr, norm_ptr, token, real, guard, floor):
    """Which tokens' moment form lost too many digits; ``floor`` is its ``rms_eigenvalue``."""
    energy = tl.load(energy_ptr + token, mask=real, other=0.0)
    norm = tl.load(norm_ptr + token, mask=real, other=0.0)
    return real & (energy < guard * norm * tl.maximum(norm, floor))


@triton.jit
def number_that_cancel(energy_ptr, norm_ptr, begin, stop, guard, floor, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), tl.int32)
    for t0 in range(begin, stop, BLOCK):
        token = t0 + tl.arange(0, BLOCK)
        found += cancels(energy_ptr, norm_ptr, token, token < stop, guard, floor).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def row_energy_repair_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, energy_ptr, norm_ptr, moment_norm_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    guard,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``R_i`` anew where it cancelled, in the sequences of ``threshold`` tokens or more."""
    h_ptr, sequence, row, begin, stop, i0, has_rows = tile_of_rows(
        h_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=True
    )
    if not has_rows:
        return
    floor = rms_eigenvalue(moment_norm_ptr + slot_of(sequence, cu_ptr, T, threshold), E)
    i = i0 + tl.arange(0, BLOCK_T)
    direct = cancels(energy_ptr + row, norm_ptr + row, i, real_tokens(i, stop, row, mask_ptr), guard, floor)
    if tl.max(direct.to(tl.int32), 0) == 0:
        return
    energy = energy_of(
        h_ptr, mask_ptr, row, begin, stop, i0, direct, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION
    )
    tl.store(energy_ptr + row + i, energy, mask=direct)


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def row_energy_repair_backward_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, energy_ptr, norm_ptr, moment_norm_ptr,
    grad_energy_ptr, grad_norm_ptr, grad_h_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    guard,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_OUT: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the moment backward leaves out: ``2 Σ_j w_ij G_ij h_j + 2 β_i h_i``.

    A row i that cancels gets its whole gradient, ``w_ij = α_i + α_j``; to any other is added what it receives from such
    rows j, ``w_ij = α_j``, since they are not in its ``S_α``.
    """
    h_ptr, sequence, row, begin, stop, i0, has_rows = tile_of_rows(
        h_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=True
    )
    if not has_rows:
        return
    floor = rms_eigenvalue(moment_norm_ptr + slot_of(sequence, cu_ptr, T, threshold), E)
    if number_that_cancel(energy_ptr + row, norm_ptr + row, begin, stop, guard, floor, 1024) == 0:
        return
    i = i0 + tl.arange(0, BLOCK_T)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    real_i = real_tokens(i, stop, row, mask_ptr)
    direct_i = cancels(energy_ptr + row, norm_ptr + row, i, real_i, guard, floor)
    alpha_i = tl.load(grad_energy_ptr + row + i, mask=direct_i, other=0.0)
    beta_i = tl.load(grad_norm_ptr + row + i, mask=direct_i, other=0.0)
    direct_in_tile = tl.max(direct_i.to(tl.int32), 0)

    grad = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    for j0 in range(begin // BLOCK_J * BLOCK_J, stop, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        real_j = real_tokens(j, stop, row, mask_ptr)
        direct_j = cancels(energy_ptr + row, norm_ptr + row, j, real_j, guard, floor)
        if tl.maximum(direct_in_tile, tl.max(direct_j.to(tl.int32), 0)) != 0:
            alpha_j = tl.load(grad_energy_ptr + row + j, mask=real_j, other=0.0)
            gram = gram_tile(h_ptr, i0, j0, real_i, real_j, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION)
            from_j = tl.where(direct_i[:, None] | direct_j[None, :], alpha_j[None, :], 0.0)
            weight = (alpha_i[:, None] + from_j) * gram
            h_j = load_rows(h_ptr, j0, stride_ht, real_j, out, E, BLOCK_J)
            grad = product(weight.to(DERIVED), h_j.to(DERIVED), grad, PRECISION)

    h_i = load_rows(h_ptr, i0, stride_ht, real_i, out, E, BLOCK_T).to(tl.float32)
    by_moment = load_rows(grad_h_ptr + row * E, i0, E, real_i & (direct_i == 0), out, E, BLOCK_T).to(tl.float32)
    grad = by_moment + 2.0 * grad + (2.0 * beta_i)[:, None] * h_i
    store_rows(grad_h_ptr, row + i0, real_i, out, E, grad, BLOCK_T)
