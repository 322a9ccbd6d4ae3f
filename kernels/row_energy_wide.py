"""Row energy by the token Gram matrix, for rows of any width: each Gram tile is summed over tiles of features.

The backward is cut into tiles of features too, and each makes the Gram tiles anew.
"""

import triton
import triton.language as tl

from .tiles import is_written, load_rows, product, real_tokens, store_rows, tile_of_rows


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
    for j0 in range(begin // BLOCK_J * BLOCK_J, stop, BLOCK_J):
        real_j = real_tokens(j0 + tl.arange(0, BLOCK_J), stop, row, mask_ptr)
        gram = gram_tile(h_ptr, i0, j0, keep_i, real_j, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION)
        energy += tl.sum(gram * gram, 1)
    return energy


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def row_energy_wide_kernel(
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
    real_i = real_tokens(i, stop, row, mask_ptr)

    energy = energy_of(
        h_ptr, mask_ptr, row, begin, stop, i0, real_i, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION
    )
    norm = tl.zeros((BLOCK_T,), tl.float32)
    for e0 in range(0, E, BLOCK_E):
        h_i = load_rows(h_ptr, i0, stride_ht, real_i, e0 + tl.arange(0, BLOCK_E), E, BLOCK_T).to(tl.float32)
        norm += tl.sum(h_i * h_i, 1)
    tl.store(energy_ptr + row + i, energy, mask=is_written(i, stop, cu_ptr, T))
    tl.store(norm_ptr + row + i, norm, mask=is_written(i, stop, cu_ptr, T))


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def row_energy_wide_backward_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, grad_energy_ptr, grad_norm_ptr, grad_h_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_OUT: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂h_i = 2 Σ_{j≠i} (α_i + α_j) G_ij h_j + 2 β_i h_i`` in the sequences shorter than ``threshold``."""
    h_ptr, _, row, begin, stop, i0, has_rows = tile_of_rows(
        h_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=False
    )
    if not has_rows:
        return
    i = i0 + tl.arange(0, BLOCK_T)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    real_i = real_tokens(i, stop, row, mask_ptr)
    alpha_i = tl.load(grad_energy_ptr + row + i, mask=real_i, other=0.0)
    beta_i = tl.load(grad_norm_ptr + row + i, mask=real_i, other=0.0)

    grad = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    for j0 in range(begin // BLOCK_J * BLOCK_J, stop, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        real_j = real_tokens(j, stop, row, mask_ptr)
        alpha_j = tl.load(grad_energy_ptr + row + j, mask=real_j, other=0.0)
        gram = gram_tile(h_ptr, i0, j0, real_i, real_j, E, stride_ht, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION)
        weight = (alpha_i[:, None] + alpha_j[None, :]) * gram
        h_j = load_rows(h_ptr, j0, stride_ht, real_j, out, E, BLOCK_J)
        grad = product(weight.to(DERIVED), h_j.to(DERIVED), grad, PRECISION)

    h_i = load_rows(h_ptr, i0, stride_ht, real_i, out, E, BLOCK_T).to(tl.float32)
    store_rows(
        grad_h_ptr,
        row + i0,
        is_written(i, stop, cu_ptr, T),
        out,
        E,
        2.0 * grad + (2.0 * beta_i)[:, None] * h_i,
        BLOCK_T,
    )
