"""Row energy by the token Gram matrix, for rows that fit in one tile.

A program keeps the rows of its tile and meets every tile of the sequence; no Gram matrix is stored.
"""

import triton
import triton.language as tl

from .importance import finish_if_last, gradients_of, store_alpha, store_share
from .row_energy_tile import clear_rows_of_none, tile_of_rows
from .tiles import load_rows, product, real_tokens, store_rows


@triton.jit(do_not_specialize=["S", "T", "threshold", "shares"])
def row_energy_token_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, energy_ptr, norm_ptr,
    share_ptr, count_ptr, ticket_ptr, loss_ptr, factor_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    shares, eps, scale, MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``R_i = Σ_{j≠i} (h_i · h_j)²`` and ``n2_i``, and the importance loss where it is wanted."""
    program = tl.program_id(0)
    h_ptr, _, row, begin, stop, i0, limit = tile_of_rows(
        program, h_ptr, mask_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=False
    )
    i = i0 + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    real_i = real_tokens(i, stop, row, mask_ptr)
    h_i = load_rows(h_ptr, i0, stride_ht, real_i, e, E, BLOCK_T)

    energy = tl.zeros((BLOCK_T,), tl.float32)
    j_first = begin // BLOCK_J * BLOCK_J
    for step in range(0, stop - j_first, BLOCK_J):
        j0 = j_first + step
        j = j0 + tl.arange(0, BLOCK_J)
        h_j = load_rows(h_ptr, j0, stride_ht, real_tokens(j, stop, row, mask_ptr), e, E, BLOCK_J)
        gram = product(h_i, h_j.trans(), tl.zeros((BLOCK_T, BLOCK_J), tl.float32), PRECISION)
        gram = tl.where(i[:, None] == j[None, :], 0.0, gram)  # a token does not interfere with itself
        energy += tl.sum(gram * gram, 1)

    h_i = h_i.to(tl.float32)
    norm = tl.sum(h_i * h_i, 1)
    tl.store(energy_ptr + row + i, energy, mask=i < limit)
    tl.store(norm_ptr + row + i, norm, mask=i < limit)
    store_share(program, energy, norm, real_i, mask_ptr, share_ptr, count_ptr, eps)
    finish_if_last(mask_ptr, cu_ptr, share_ptr, count_ptr, ticket_ptr, loss_ptr, factor_ptr, shares, S, T, scale, MEAN)


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def row_energy_token_backward_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr,
    energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, alpha_ptr,
    grad_h_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    eps,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂h_i = 2 Σ_{j≠i} (α_i + α_j) G_ij h_j + 2 β_i h_i``, and zeros where rows belong to no sequence."""
    program = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    clear_rows_of_none(grad_h_ptr, cu_ptr, S, T, program, e, E, BLOCK_T)
    h_ptr, _, row, begin, stop, i0, limit = tile_of_rows(
        program, h_ptr, mask_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=False
    )
    i = i0 + tl.arange(0, BLOCK_T)
    real_i = real_tokens(i, stop, row, mask_ptr)
    h_i = load_rows(h_ptr, i0, stride_ht, real_i, e, E, BLOCK_T)
    alpha_i, beta_i = gradients_of(
        energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, i, real_i, eps
    )

    store_alpha(
        alpha_ptr, mask_ptr, energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
        row, begin, stop, eps,
    )  # fmt: skip
    grad = beta_i[:, None] * h_i.to(tl.float32)  # here, so that the loop does not hold the rows in registers too
    j_first = begin // BLOCK_J * BLOCK_J
    for step in range(0, stop - j_first, BLOCK_J):
        j0 = j_first + step
        j = j0 + tl.arange(0, BLOCK_J)
        real_j = real_tokens(j, stop, row, mask_ptr)
        alpha_j = tl.load(alpha_ptr + row + j, mask=real_j, other=0.0)
        h_j = load_rows(h_ptr, j0, stride_ht, real_j, e, E, BLOCK_J)
        gram = product(h_i, h_j.trans(), tl.zeros((BLOCK_T, BLOCK_J), tl.float32), PRECISION)
        weight = (alpha_i[:, None] + alpha_j[None, :]) * gram
        weight = tl.where(i[:, None] == j[None, :], 0.0, weight)
        grad = product(weight.to(DERIVED), h_j.to(DERIVED), grad, PRECISION)

    store_rows(grad_h_ptr, row + i0, i < limit, e, E, 2.0 * grad, BLOCK_T)
