"""Fills the workspace with the attention weights of a chunk of heads: (heads, planes, pitch, pitch), scaled, tile by
tile. float32 ones lie in planes, split once rather than by each product that they are in, see ``planes``.

A tile is written whole, with zeros at padding and above a causal diagonal, so that the kernels behind it need no masks.
Tiles without a real token are neither written nor read. Every program of a chunk counts heads from ``head0``, over
samples and query heads together.
"""

import triton
import triton.language as tl

from .planes import split, store_planes, whole
from .tiles import first_row, load_rows, product, real_tokens, span_of


@triton.jit
def scores(
    q_i, q_ptr, k_ptr, i0, j0, real_i, real_j, D, stride_qt, stride_kt, log2_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``log2(e) · scale · q_i · k_j``, −∞ where i may not attend to j. ``q_i``: the rows, if loaded whole."""
    dots = tl.zeros((ROWS, COLUMNS), tl.float32)
    if q_i is not None:
        k_j = load_rows(k_ptr, j0, stride_kt, real_j, tl.arange(0, BLOCK_D), D, COLUMNS)
        dots = product(q_i, k_j.trans(), dots, PRECISION)
    else:
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            q_d = load_rows(q_ptr, i0, stride_qt, real_i, d, D, ROWS)
            k_d = load_rows(k_ptr, j0, stride_kt, real_j, d, D, COLUMNS)
            dots = product(q_d, k_d.trans(), dots, PRECISION)
    allowed = real_i[:, None] & real_j[None, :]
    if IS_CAUSAL:
        allowed = allowed & (i0 + tl.arange(0, ROWS)[:, None] >= j0 + tl.arange(0, COLUMNS)[None, :])
    return tl.where(allowed, dots * log2_scale, float("-inf"))


@triton.jit
def softmax_step(top, total, score):
    """Maximum and sum of powers of 2 of a row, one tile further. The maximum of nothing counts as 0."""
    higher = tl.maximum(top, tl.max(score, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(score - shift[:, None]), 1)
    return higher, total


@triton.jit
def weights(score, top, total, attention_scale, DTYPE: tl.constexpr):
    """Scaled and rounded attention weights of a tile of scores: 0 in the rows of padding."""
    shift = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(score - shift[:, None]) * (attention_scale / tl.where(total > 0, total, 1.0))[:, None]
    return share.to(DTYPE)


@triton.jit
def softmax_rows(
    q_ptr, k_ptr, mask_ptr, attention_ptr, row, i0, real_i, j_begin, j_stop, stop, D, pitch,
    stride_qt, stride_kt, log2_scale, attention_scale,
    DTYPE: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of powers of 2 of a tile of rows, and what its rounded weights, stored if asked for, sum to.

    WHOLE: BLOCK_D holds all features, so that the queries are loaded once.
    """
    q_i = None
    if WHOLE:
        q_i = load_rows(q_ptr, i0, stride_qt, real_i, tl.arange(0, BLOCK_D), D, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for j0 in range(j_begin, j_stop, BLOCK_J):
        real_j = real_tokens(j0 + tl.arange(0, BLOCK_J), stop, row, mask_ptr)
        score = scores(
            q_i, q_ptr, k_ptr, i0, j0, real_i, real_j, D, stride_qt, stride_kt, log2_scale,
            BLOCK, BLOCK_J, BLOCK_D, IS_CAUSAL, PRECISION,
        )  # fmt: skip
        top, total = softmax_step(top, total, score)

    row_sum = tl.zeros((BLOCK,), tl.float32)
    for j0 in range(j_begin, j_stop, BLOCK_J):
        real_j = real_tokens(j0 + tl.arange(0, BLOCK_J), stop, row, mask_ptr)
        score = scores(
            q_i, q_ptr, k_ptr, i0, j0, real_i, real_j, D, stride_qt, stride_kt, log2_scale,
            BLOCK, BLOCK_J, BLOCK_D, IS_CAUSAL, PRECISION,
        )  # fmt: skip
        share = split(weights(score, top, total, attention_scale, tl.float32), PLANES, DTYPE)
        if attention_ptr is not None:
            store_planes(attention_ptr, None, 0, i0, j0, pitch, share)
        row_sum += tl.sum(whole(share), 1)
    return top, total, row_sum / attention_scale


@triton.jit(do_not_specialize=["T", "H", "head0"])
def softmax_kernel(
    q_ptr, k_ptr, mask_ptr, span_ptr, attention_ptr, row_sum_ptr,
    T, D, H, group, head0, pitch,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    log2_scale, attention_scale,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``A = softmax(scale · q kᵀ)`` to the workspace, and what its rounded rows sum to."""
    i0 = tl.program_id(0) * BLOCK
    local_head = tl.program_id(1).to(tl.int64)
    sample, head = (head0 + local_head) // H, (head0 + local_head) % H
    row = first_row(sample, None, T)
    begin, stop = span_of(sample, None, span_ptr, T)
    if i0 >= stop or i0 + BLOCK <= begin:
        return
    q_ptr += sample * stride_qb + head * stride_qh
    k_ptr += sample * stride_kb + head // group * stride_kh
    i = i0 + tl.arange(0, BLOCK)
    real_i = real_tokens(i, stop, row, mask_ptr)
    j_begin = begin // BLOCK * BLOCK
    j_stop = tl.cdiv(stop, BLOCK) * BLOCK  # the last tile whole, though made of several here
    if IS_CAUSAL:
        j_stop = tl.minimum(j_stop, i0 + BLOCK)

    attention_ptr += local_head * PLANES * pitch * pitch
    _, _, row_sum = softmax_rows(
        q_ptr, k_ptr, mask_ptr, attention_ptr, row, i0, real_i, j_begin, j_stop, stop, D, pitch,
        stride_qt, stride_kt, log2_scale, attention_scale,
        attention_ptr.dtype.element_ty, PLANES, BLOCK, BLOCK_J, BLOCK_D, WHOLE, IS_CAUSAL, PRECISION,
    )  # fmt: skip
    tl.store(row_sum_ptr + local_head * pitch + i, row_sum)


@triton.jit(do_not_specialize=["T", "H", "head0"])
def stage_kernel(
    source_ptr, mask_ptr, span_ptr, attention_ptr,
    T, H, head0, pitch,
    stride_b, stride_h, stride_t,
    PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention that is given, to the workspace."""
    j0, i0 = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    local_head = tl.program_id(2).to(tl.int64)
    sample, head = (head0 + local_head) // H, (head0 + local_head) % H
    row = first_row(sample, None, T)
    begin, stop = span_of(sample, None, span_ptr, T)
    if tl.maximum(i0, j0) >= stop or tl.minimum(i0, j0) + BLOCK <= begin:
        return
    i, j = i0 + tl.arange(0, BLOCK), j0 + tl.arange(0, BLOCK)
    real_i, real_j = real_tokens(i, stop, row, mask_ptr), real_tokens(j, stop, row, mask_ptr)
    source_ptr += sample * stride_b + head * stride_h
    tile = load_rows(source_ptr, i0, stride_t, real_i, j, T, BLOCK)
    tile = tl.where(real_j[None, :], tile, 0.0).to(tl.float32)
    attention_ptr += local_head * PLANES * pitch * pitch
    store_planes(attention_ptr, None, 0, i0, j0, pitch, split(tile, PLANES, attention_ptr.dtype.element_ty))
