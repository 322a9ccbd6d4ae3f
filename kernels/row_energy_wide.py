"""Row energy by the token Gram matrix, for rows of any width: each Gram tile is summed over tiles of features.

The backward is cut into tiles of features too, and each makes the Gram tiles anew.
"""

import triton
import triton.language as tl

from .importance import finish_if_last, gradients_of, store_alpha, store_share
from .row_energy_tile import clear_rows_of_none, tile_of_rows
from .tiles import load_rows, product, real_tokens, store_rows


@triton.jit
def gram_tile(
    h_ptr, i0, j0, keep_i, keep_j, E, stride_ht,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``G_ij = h_i · h_j`` of two tiles of one sequence, 0 on the diagonal: a token does not interfere with itself."""
    gram = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        h_i = load_rows(h_ptr, i0, stride_ht, keep_i, e, E, BLOCK_T)
        h_j = load_rows(h_ptr, j0, stride_ht, keep_j, e, E, BLOCK_J)
        gram = product(h_i, h_j.trans(), gram, PRECISION)
    i = i0 + tl.arange(0, BLOCK_T)
    j = j0 + tl.arange(0, BLOCK_J)
    return tl.where(i[:, None] == j[None, :], 0.0, gram)


@triton.jit
def energy_of(
    h_ptr, mask_ptr, row, begin, stop, i0, keep_i, E, stride_ht,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Σ_{j≠i} G_ij²`` of the kept rows of a tile, over a sequence."""
    energy = tl.zeros((BLOCK_T,), tl.float32)
    j_first = begin // BLOCK_J * BLOCK_J
    for step in range(0, stop - j_first, BLOCK_J):
        j0 = j_first + step
        real_j = real_tokens(j0 + tl.arange(0, BLOCK_J), stop, row, mask_ptr)
        gram = gram_tile(h_ptr, i0, j0, keep_i, real_j, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION)
        energy += tl.sum(gram * gram, 1)
    return energy


@triton.jit
def norm_of(h_ptr, i0, keep, E, stride_ht, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """``n2_i`` of the kept rows of a tile."""
    norm = tl.zeros((BLOCK_T,), tl.float32)
    for e0 in range(0, E, BLOCK_E):
        h_i = load_rows(h_ptr, i0, stride_ht, keep, e0 + tl.arange(0, BLOCK_E), E, BLOCK_T).to(tl.float32)
        norm += tl.sum(h_i * h_i, 1)
    return norm


@triton.jit
def wide_tile(
    program, h_ptr, mask_ptr, span_ptr, cu_ptr, energy_ptr, norm_ptr, share, share_ptr, count_ptr,
    S, T, E, threshold, stride_hb, stride_ht, eps,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``R_i = Σ_{j≠i} (h_i · h_j)²`` and ``n2_i`` of a tile, in the sequences shorter than ``threshold``."""
    h_ptr, _, row, begin, stop, i0, limit = tile_of_rows(
        program, h_ptr, mask_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=False
    )
    i = i0 + tl.arange(0, BLOCK_T)
    real_i = real_tokens(i, stop, row, mask_ptr)
    energy = energy_of(
        h_ptr, mask_ptr, row, begin, stop, i0, real_i, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION
    )
    norm = norm_of(h_ptr, i0, real_i, E, stride_ht, BLOCK_T, BLOCK_E)
    tl.store(energy_ptr + row + i, energy, mask=i < limit)
    tl.store(norm_ptr + row + i, norm, mask=i < limit)
    store_share(share, energy, norm, real_i, mask_ptr, share_ptr, count_ptr, eps)


@triton.jit(do_not_specialize=["S", "T", "threshold", "shares"])
def row_energy_wide_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, energy_ptr, norm_ptr,
    share_ptr, count_ptr, ticket_ptr, loss_ptr, factor_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    shares, eps, scale, MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The energies and squared norms of all tiles, and the importance loss where it is wanted."""
    wide_tile(
        tl.program_id(0), h_ptr, mask_ptr, span_ptr, cu_ptr, energy_ptr, norm_ptr,
        tl.program_id(0), share_ptr, count_ptr,
        S, T, E, threshold, stride_hb, stride_ht, eps, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION,
    )  # fmt: skip
    finish_if_last(mask_ptr, cu_ptr, share_ptr, count_ptr, ticket_ptr, loss_ptr, factor_ptr, shares, S, T, scale, MEAN)


@triton.jit
def wide_backward_tile(
    program, out_tile, h_ptr, mask_ptr, span_ptr, cu_ptr,
    energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, alpha_ptr,
    grad_h_ptr,
    S, T, E, threshold, stride_hb, stride_ht, eps,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_OUT: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂h_i = 2 Σ_{j≠i} (α_i + α_j) G_ij h_j + 2 β_i h_i`` in the sequences shorter than ``threshold``."""
    out = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    h_ptr, _, row, begin, stop, i0, limit = tile_of_rows(
        program, h_ptr, mask_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=False
    )
    i = i0 + tl.arange(0, BLOCK_T)
    real_i = real_tokens(i, stop, row, mask_ptr)
    alpha_i, beta_i = gradients_of(
        energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, i, real_i, eps
    )
    store_alpha(
        alpha_ptr, mask_ptr, energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
        row, begin, stop, eps,
    )  # fmt: skip

    grad = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    j_first = begin // BLOCK_J * BLOCK_J
    for step in range(0, stop - j_first, BLOCK_J):
        j0 = j_first + step
        j = j0 + tl.arange(0, BLOCK_J)
        real_j = real_tokens(j, stop, row, mask_ptr)
        alpha_j = tl.load(alpha_ptr + row + j, mask=real_j, other=0.0)
        gram = gram_tile(h_ptr, i0, j0, real_i, real_j, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION)
        weight = (alpha_i[:, None] + alpha_j[None, :]) * gram
        h_j = load_rows(h_ptr, j0, stride_ht, real_j, out, E, BLOCK_J)
        grad = product(weight.to(DERIVED), h_j.to(DERIVED), grad, PRECISION)

    h_i = load_rows(h_ptr, i0, stride_ht, real_i, out, E, BLOCK_T).to(tl.float32)
    grad = 2.0 * grad + (2.0 * beta_i)[:, None] * h_i
    store_rows(grad_h_ptr, row + i0, i < limit, out, E, grad, BLOCK_T)


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def row_energy_wide_backward_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr,
    energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, alpha_ptr,
    grad_h_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    eps,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_OUT: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of all tiles, and zeros where rows belong to no sequence."""
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    clear_rows_of_none(grad_h_ptr, cu_ptr, S, T, tl.program_id(0), out, E, BLOCK_T)
    wide_backward_tile(
        tl.program_id(0), tl.program_id(1), h_ptr, mask_ptr, span_ptr, cu_ptr,
        energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, alpha_ptr, grad_h_ptr,
        S, T, E, threshold, stride_hb, stride_ht, eps,
        BLOCK_T, BLOCK_J, BLOCK_E, BLOCK_OUT, DERIVED, PRECISION,
    )  # fmt: skip
