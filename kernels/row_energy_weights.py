"""Backward of wide rows: the weighted Gram matrix goes to a workspace once, rather than anew for each tile of features.

Half of it is made, as in ``row_energy_symmetric``. For sequences of one padded length, a chunk of samples at a time.
"""

import triton
import triton.language as tl

from .importance import gradients_of
from .row_energy_wide import gram_tile
from .tiles import count_of, first_row, load_rows, matrix_tile, product, real_tokens, span_of, store_rows


@triton.jit(do_not_specialize=["T", "threshold", "tiles", "sample0"])
def row_energy_weight_kernel(
    h_ptr, mask_ptr, span_ptr,
    energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, weight_ptr,
    T, E, threshold, tiles, sample0,
    stride_hb, stride_ht,
    eps,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``(α_i + α_j) G_ij``, 0 on the diagonal, of a tile and its mirror image: (samples, pitch, pitch), tiles whole."""
    j_tile, i_tile = tl.program_id(0) % tiles, tl.program_id(0) // tiles % tiles
    local_sample = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    sample = sample0 + local_sample
    i0, j0 = i_tile * BLOCK_T, j_tile * BLOCK_T
    begin, stop = span_of(sample, None, span_ptr, T)
    if j0 > i0 or i0 >= stop or j0 + BLOCK_T <= begin or count_of(sample, None, span_ptr, T) >= threshold:
        return
    row = first_row(sample, None, T)
    h_ptr += sample * stride_hb
    i, j = i0 + tl.arange(0, BLOCK_T), j0 + tl.arange(0, BLOCK_T)
    real_i, real_j = real_tokens(i, stop, row, mask_ptr), real_tokens(j, stop, row, mask_ptr)
    gram = gram_tile(h_ptr, i0, j0, real_i, real_j, E, stride_ht, BLOCK_T, BLOCK_T, BLOCK_E, PRECISION)
    alpha_i = gradients_of(
        energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, i, real_i, eps
    )[0]
    alpha_j = gradients_of(
        energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, j, real_j, eps
    )[0]
    weight = ((alpha_i[:, None] + alpha_j[None, :]) * gram).to(weight_ptr.dtype.element_ty)
    pitch = tiles * BLOCK_T
    weight_ptr += local_sample * pitch * pitch
    tl.store(matrix_tile(weight_ptr, i0, j0, pitch, BLOCK_T, BLOCK_T), weight)
    if i_tile != j_tile:
        tl.store(matrix_tile(weight_ptr, j0, i0, pitch, BLOCK_T, BLOCK_T), weight.trans())


@triton.jit(do_not_specialize=["T", "threshold", "sample0"])
def row_energy_weight_product_kernel(
    h_ptr, mask_ptr, span_ptr,
    energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, weight_ptr, grad_h_ptr,
    T, E, threshold, pitch, sample0,
    stride_hb, stride_ht,
    eps,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂h_i = 2 Σ_j (α_i + α_j) G_ij h_j + 2 β_i h_i`` of a tile of tokens and of features."""
    tiles = pitch // BLOCK_T
    i0 = tl.program_id(0) % tiles * BLOCK_T
    local_sample = (tl.program_id(0) // tiles).to(tl.int64)
    sample = sample0 + local_sample
    begin, stop = span_of(sample, None, span_ptr, T)
    if i0 >= T or count_of(sample, None, span_ptr, T) >= threshold:
        return
    row = first_row(sample, None, T)
    h_ptr += sample * stride_hb
    weight_ptr += local_sample * pitch * pitch
    i = i0 + tl.arange(0, BLOCK_T)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    meets = (i0 < stop) & (i0 + BLOCK_T > begin)  # a tile of padding alone has no weights
    begin, stop = tl.where(meets, begin, 0), tl.where(meets, stop, 0)

    grad = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    for j0 in range(begin // BLOCK_T * BLOCK_T, stop, BLOCK_K):
        real_j = real_tokens(j0 + tl.arange(0, BLOCK_K), stop, row, mask_ptr)
        weight = tl.load(matrix_tile(weight_ptr, i0, j0, pitch, BLOCK_T, BLOCK_K))
        h_j = load_rows(h_ptr, j0, stride_ht, real_j, out, E, BLOCK_K)
        grad = product(weight, h_j.to(weight.dtype), grad, PRECISION)

    real_i = real_tokens(i, stop, row, mask_ptr)
    beta_i = gradients_of(
        energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, i, real_i, eps
    )[1]
    h_i = load_rows(h_ptr, i0, stride_ht, real_i, out, E, BLOCK_T).to(tl.float32)
    grad = 2.0 * grad + (2.0 * beta_i)[:, None] * h_i
    store_rows(grad_h_ptr, row + i0, i < T, out, E, grad, BLOCK_T)
