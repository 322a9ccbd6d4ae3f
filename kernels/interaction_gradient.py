"""From ``M`` and φ(G) to the gradients of the attention weights, or through the softmax to queries and keys."""

import triton
import triton.language as tl

from .tiles import first_row, load_rows, load_tile, matrix_tile, product, real_tokens, span_of, store_rows


@triton.jit
def pair_product(
    pair_ptr, pair_desc, attention_ptr, attention_desc, matrix, i0, j0, k_begin, k_stop, pitch,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ``M A``, as scaled as they are."""
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(k_begin, k_stop, BLOCK_K):
        pair = load_tile(pair_ptr, pair_desc, matrix, i0, k0, pitch, BLOCK, BLOCK_K)
        attention = load_tile(attention_ptr, attention_desc, matrix, k0, j0, pitch, BLOCK_K, BLOCK)
        acc = product(pair, attention, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "H", "head0"])
def attention_gradient_kernel(
    attention_ptr, attention_desc, pair_ptr, pair_desc, phi_ptr, mask_ptr, span_ptr, grad_ptr,
    T, H, head0, pitch,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂A = 1 − φ(G) − M A``, to (B, H, T, T)."""
    j0, i0 = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    local_head = tl.program_id(2).to(tl.int64)
    sample = (head0 + local_head) // H
    row = first_row(sample, None, T)
    begin, stop = span_of(sample, None, span_ptr, T)
    if tl.maximum(i0, j0) >= stop or tl.minimum(i0, j0) + BLOCK <= begin:
        return
    matrix = local_head * pitch * pitch
    through_pairs = pair_product(
        pair_ptr + matrix, pair_desc, attention_ptr + matrix, attention_desc, local_head,
        i0, j0, begin // BLOCK * BLOCK, stop, pitch, BLOCK, BLOCK_K, PRECISION,
    )  # fmt: skip
    phi = tl.load(matrix_tile(phi_ptr + matrix, i0, j0, pitch, BLOCK, BLOCK)).to(tl.float32)
    i, j = i0 + tl.arange(0, BLOCK), j0 + tl.arange(0, BLOCK)
    keep = real_tokens(i, stop, row, mask_ptr)[:, None] & real_tokens(j, stop, row, mask_ptr)[None, :]
    grad_ptr += (head0 + local_head) * T * T
    tl.store(matrix_tile(grad_ptr, i0, j0, T, BLOCK, BLOCK), 1.0 - phi - through_pairs, mask=keep)


@triton.jit
def exponent_below(top, exponent):
    """The power of 2 that brings ``top`` to between ``2**exponent`` and twice that; 1 for 0."""
    power = exponent - tl.floor(tl.log2(tl.maximum(top, 1e-30)))
    return tl.where(top > 0, tl.exp2(power), 1.0)


@triton.jit(do_not_specialize=["T", "H", "head0"])
def score_gradient_kernel(
    attention_ptr, attention_desc, pair_ptr, pair_desc, phi_ptr, row_term_ptr, row_sum_ptr, span_ptr,
    grad_ptr, grad_scale_ptr,
    T, H, head0, pitch, tiles,
    attention_scale, pair_scale,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂s_ij = A_ij (g_ij − Σ_j A_ij g_ij)`` with ``g = −φ(G) − M A``, in place of φ.

    No entry exceeds its row's term, so a power of 2 for each tile of rows, to (heads, tiles), keeps it in 16 bits.
    """
    j_tile, i_tile = tl.program_id(0), tl.program_id(1)
    local_head = tl.program_id(2).to(tl.int64)
    i0, j0 = i_tile * BLOCK, j_tile * BLOCK
    begin, stop = span_of((head0 + local_head) // H, None, span_ptr, T)
    if tl.maximum(i0, j0) >= stop or tl.minimum(i0, j0) + BLOCK <= begin or (IS_CAUSAL and j0 > i0):
        return
    matrix = local_head * pitch * pitch
    k_begin = begin // BLOCK * BLOCK
    if IS_CAUSAL:
        k_begin = j0
    through_pairs = pair_product(
        pair_ptr + matrix, pair_desc, attention_ptr + matrix, attention_desc, local_head,
        i0, j0, k_begin, stop, pitch, BLOCK, BLOCK_K, PRECISION,
    )  # fmt: skip
    through_pairs *= 1.0 / (pair_scale * attention_scale)

    i = i0 + tl.arange(0, BLOCK)
    row_term_ptr += local_head * tiles * pitch
    row_term = tl.zeros((BLOCK,), tl.float32)
    for tile in range(begin // BLOCK, tl.cdiv(stop, BLOCK)):
        row_term += tl.load(row_term_ptr + tile * pitch + i)
    row_sum = tl.load(row_sum_ptr + local_head * pitch + i)
    row_term = row_term / tl.where(row_sum > 0, row_sum, 1.0)
    grad_scale = exponent_below(tl.max(row_term, 0), 13.0)

    phi = tl.load(matrix_tile(phi_ptr + matrix, i0, j0, pitch, BLOCK, BLOCK)).to(tl.float32) / attention_scale
    attention = (
        tl.load(matrix_tile(attention_ptr + matrix, i0, j0, pitch, BLOCK, BLOCK)).to(tl.float32) / attention_scale
    )
    grad = attention * (row_term[:, None] - phi - through_pairs)
    tl.store(matrix_tile(grad_ptr + matrix, i0, j0, pitch, BLOCK, BLOCK), grad * grad_scale)
    if j_tile == begin // BLOCK:
        tl.store(grad_scale_ptr + local_head * tiles + i_tile, grad_scale)


@triton.jit(do_not_specialize=["T", "H", "head0"])
def query_gradient_kernel(
    score_grad_ptr, score_grad_scale_ptr, k_ptr, mask_ptr, span_ptr, grad_q_ptr,
    T, D, H, group, head0, pitch, tiles,
    stride_kb, stride_kh, stride_kt,
    scale,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂q_i = scale · Σ_j ∂L/∂s_ij k_j``"""
    i_tile = tl.program_id(0)
    i0 = i_tile * BLOCK
    local_head = tl.program_id(2).to(tl.int64)
    sample, head = (head0 + local_head) // H, (head0 + local_head) % H
    row = first_row(sample, None, T)
    begin, stop = span_of(sample, None, span_ptr, T)
    if i0 >= stop or i0 + BLOCK <= begin:
        return
    score_grad_ptr += local_head * pitch * pitch
    k_ptr += sample * stride_kb + head // group * stride_kh
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    j_stop = stop
    if IS_CAUSAL:
        j_stop = tl.minimum(stop, i0 + BLOCK)

    grad = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for j0 in range(begin // BLOCK * BLOCK, j_stop, BLOCK_K):
        real_j = real_tokens(j0 + tl.arange(0, BLOCK_K), stop, row, mask_ptr)
        score_grad = tl.load(matrix_tile(score_grad_ptr, i0, j0, pitch, BLOCK, BLOCK_K))
        k_j = load_rows(k_ptr, j0, stride_kt, real_j, d, D, BLOCK_K)
        grad = product(score_grad, k_j.to(score_grad.dtype), grad, PRECISION)

    grad *= scale / tl.load(score_grad_scale_ptr + local_head * tiles + i_tile)
    real_i = real_tokens(i0 + tl.arange(0, BLOCK), stop, row, mask_ptr)
    store_rows(grad_q_ptr, (head0 + local_head) * T + i0, real_i, d, D, grad, BLOCK)


@triton.jit(do_not_specialize=["T", "H", "head0"])
def key_gradient_kernel(
    score_grad_ptr, score_grad_scale_ptr, q_ptr, mask_ptr, span_ptr, grad_k_ptr,
    T, D, H, head0, pitch, tiles,
    stride_qb, stride_qh, stride_qt,
    scale,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂k_j = scale · Σ_i ∂L/∂s_ij q_i`` of one query head."""
    j0 = tl.program_id(0) * BLOCK
    local_head = tl.program_id(2).to(tl.int64)
    sample, head = (head0 + local_head) // H, (head0 + local_head) % H
    row = first_row(sample, None, T)
    begin, stop = span_of(sample, None, span_ptr, T)
    if j0 >= stop or j0 + BLOCK <= begin:
        return
    score_grad_ptr += local_head * pitch * pitch
    score_grad_scale_ptr += local_head * tiles
    q_ptr += sample * stride_qb + head * stride_qh
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i_begin = begin // BLOCK * BLOCK
    if IS_CAUSAL:
        i_begin = j0

    grad = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for i0 in range(i_begin, stop, BLOCK_K):
        real_i = real_tokens(i0 + tl.arange(0, BLOCK_K), stop, row, mask_ptr)
        score_grad = tl.load(matrix_tile(score_grad_ptr, i0, j0, pitch, BLOCK_K, BLOCK))
        q_i = load_rows(q_ptr, i0, stride_qt, real_i, d, D, BLOCK_K)
        share = product(score_grad.trans(), q_i.to(score_grad.dtype), tl.zeros_like(grad), PRECISION)
        grad += share / tl.load(score_grad_scale_ptr + i0 // BLOCK)

    real_j = real_tokens(j0 + tl.arange(0, BLOCK), stop, row, mask_ptr)
    store_rows(grad_k_ptr, (head0 + local_head) * T + j0, real_j, d, D, grad * scale, BLOCK)
