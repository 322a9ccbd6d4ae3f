"""Row energy by the token Gram matrix, for rows that fit in one tile.

A program keeps the rows of its tile and meets every tile of the sequence; no Gram matrix is stored.
"""

import triton
import triton.language as tl

from .tiles import is_written, load_rows, product, real_tokens, store_rows, tile_of_rows


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def row_energy_token_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, energy_ptr, norm_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``R_i = Σ_{j≠i} (h_i · h_j)²`` and ``n2_i`` in the sequences shorter than ``threshold``."""
    h_ptr, _, row, begin, stop, i0, has_rows = tile_of_rows(
        h_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=False
    )
    if not has_rows:
        return
    i = i0 + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    real_i = real_tokens(i, stop, row, mask_ptr)
    h_i = load_rows(h_ptr, i0, stride_ht, real_i, e, E, BLOCK_T)

    energy = tl.zeros((BLOCK_T,), tl.float32)
    for j0 in range(begin // BLOCK_J * BLOCK_J, stop, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        h_j = load_rows(h_ptr, j0, stride_ht, real_tokens(j, stop, row, mask_ptr), e, E, BLOCK_J)
        gram = product(h_i, h_j.trans(), tl.zeros((BLOCK_T, BLOCK_J), tl.float32), PRECISION)
        gram = tl.where(i[:, None] == j[None, :], 0.0, gram)  # a token does not interfere with itself
        energy += tl.sum(gram * gram, 1)

    h_i = h_i.to(tl.float32)
    tl.store(energy_ptr + row + i, energy, mask=is_written(i, stop, cu_ptr, T))
    tl.store(norm_ptr + row + i, tl.sum(h_i * h_i, 1), mask=is_written(i, stop, cu_ptr, T))


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def row_energy_token_backward_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, grad_energy_ptr, grad_norm_ptr, grad_h_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂h_i = 2 Σ_{j≠i} (α_i + α_j) G_ij h_j + 2 β_i h_i`` in the sequences shorter than ``threshold``."""
    h_ptr, _, row, begin, stop, i0, has_rows = tile_of_rows(
        h_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=False
    )
    if not has_rows:
        return
    i = i0 + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    real_i = real_tokens(i, stop, row, mask_ptr)
    h_i = load_rows(h_ptr, i0, stride_ht, real_i, e, E, BLOCK_T)
    alpha_i = tl.load(grad_energy_ptr + row + i, mask=real_i, other=0.0)
    beta_i = tl.load(grad_norm_ptr + row + i, mask=real_i, other=0.0)

    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for j0 in range(begin // BLOCK_J * BLOCK_J, stop, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        real_j = real_tokens(j, stop, row, mask_ptr)
        alpha_j = tl.load(grad_energy_ptr + row + j, mask=real_j, other=0.0)
        h_j = load_rows(h_ptr, j0, stride_ht, real_j, e, E, BLOCK_J)
        gram = product(h_i, h_j.trans(), tl.zeros((BLOCK_T, BLOCK_J), tl.float32), PRECISION)
        weight = (alpha_i[:, None] + alpha_j[None, :]) * gram
        weight = tl.where(i[:, None] == j[None, :], 0.0, weight)
        grad = product(weight.to(DERIVED), h_j.to(DERIVED), grad, PRECISION)

    grad = 2.0 * grad + (2.0 * beta_i)[:, None] * h_i.to(tl.float32)
    store_rows(grad_h_ptr, row + i0, is_written(i, stop, cu_ptr, T), e, E, grad, BLOCK_T)
