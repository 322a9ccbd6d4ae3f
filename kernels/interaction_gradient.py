"""From ``M`` and φ(G) to the gradients of the attention weights, or through the softmax to queries and keys."""

import triton
import triton.language as tl

from .interaction_gram import halves, quarters
from .planes import load_planes, product_of_planes, split, store_planes, transposed, whole, whole_mirrored
from .tiles import first_row, load_rows, matrix_tile, real_tokens, span_of, store_rows


@triton.jit
def pair_product(
    pair_ptr, pair_desc, mirrored_desc, attention_ptr, attention_desc, matrix, i0, j0, k_begin, k_stop, pitch,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ``M A``, as scaled as they are. Above the diagonal ``interaction_gram`` keeps no M: there ``M_ki``."""
    acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
    beyond = tl.maximum(i0 + BLOCK, k_begin)
    for k0 in range(k_begin, tl.minimum(beyond, k_stop), BLOCK_K):
        pair = load_planes(pair_ptr, pair_desc, matrix, i0, k0, pitch, BLOCK, BLOCK_K, PLANES)
        attention = load_planes(attention_ptr, attention_desc, matrix, k0, j0, pitch, BLOCK_K, COLUMNS, PLANES)
        acc = product_of_planes(pair, attention, acc, PRECISION)
    for k0 in range(beyond, k_stop, BLOCK_K):
        mirrored = load_planes(pair_ptr, mirrored_desc, matrix, k0, i0, pitch, BLOCK_K, BLOCK, PLANES)
        attention = load_planes(attention_ptr, attention_desc, matrix, k0, j0, pitch, BLOCK_K, COLUMNS, PLANES)
        acc = product_of_planes(transposed(mirrored), attention, acc, PRECISION)
    return acc


@triton.jit
def load_phi(pair_ptr, diagonal_ptr, i0, j0, pitch, PLANES: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS of a tile of φ(G), from where ``interaction_gram`` keeps it."""
    if i0 == j0 // BLOCK * BLOCK:
        phi = whole(load_planes(diagonal_ptr, None, 0, i0, j0, pitch, BLOCK, COLUMNS, PLANES))
    elif i0 < j0:
        phi = whole(load_planes(pair_ptr, None, 0, i0, j0, pitch, BLOCK, COLUMNS, PLANES))
    else:
        phi = whole_mirrored(pair_ptr, None, 0, i0, j0, pitch, BLOCK, COLUMNS, PLANES)
    return phi


@triton.jit(do_not_specialize=["T", "H", "head0"])
def attention_gradient_kernel(
    attention_ptr, attention_desc, pair_ptr, pair_desc, mirrored_desc, diagonal_ptr, mask_ptr, span_ptr, grad_ptr,
    T, H, head0, pitch,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂A = 1 − φ(G) − M A``, to (B, H, T, T)."""
    j0, i0 = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    local_head = tl.program_id(2).to(tl.int64)
    sample = (head0 + local_head) // H
    row = first_row(sample, None, T)
    begin, stop = span_of(sample, None, span_ptr, T)
    if tl.maximum(i0, j0) >= stop or tl.minimum(i0, j0) + BLOCK <= begin:
        return
    matrix = local_head * PLANES * pitch * pitch
    through_pairs = pair_product(
        pair_ptr + matrix, pair_desc, mirrored_desc, attention_ptr + matrix, attention_desc, local_head,
        i0, j0, begin // BLOCK * BLOCK, stop, pitch, PLANES, BLOCK, BLOCK, BLOCK_K, PRECISION,
    )  # fmt: skip
    phi = load_phi(pair_ptr + matrix, diagonal_ptr + matrix, i0, j0, pitch, PLANES, BLOCK, BLOCK)
    i, j = i0 + tl.arange(0, BLOCK), j0 + tl.arange(0, BLOCK)
    keep = real_tokens(i, stop, row, mask_ptr)[:, None] & real_tokens(j, stop, row, mask_ptr)[None, :]
    grad_ptr += (head0 + local_head) * T * T
    tl.store(matrix_tile(grad_ptr, i0, j0, T, BLOCK, BLOCK), 1.0 - phi - through_pairs, mask=keep)


@triton.jit
def exponent_below(top, exponent):
    """The power of 2 that brings ``top`` to between ``2**exponent`` and twice that; 1 for 0."""
    power = exponent - tl.floor(tl.log2(tl.maximum(top, 1e-30)))
    return tl.where(top > 0, tl.exp2(power), 1.0)


@triton.jit
def score_gradient_tile(
    attention_ptr, attention_desc, pair_ptr, pair_desc, mirrored_desc, diagonal_ptr, row_term, grad_scale, grad_ptr,
    matrix, i0, j0, k_begin, k_stop, pitch, attention_scale, pair_scale,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂s`` of COLUMNS columns, one tile or two."""
    through_pairs = pair_product(
        pair_ptr, pair_desc, mirrored_desc, attention_ptr, attention_desc, matrix,
        i0, j0, k_begin, k_stop, pitch, PLANES, BLOCK, COLUMNS, BLOCK_K, PRECISION,
    )  # fmt: skip
    through_pairs *= 1.0 / (pair_scale * attention_scale)
    # All terms at once would need more registers than there are: one tile at a time, in planes half of one.
    PARTS: tl.constexpr = COLUMNS // BLOCK * (1 if PLANES == 1 or BLOCK <= 64 else 2)
    WIDTH: tl.constexpr = COLUMNS // PARTS
    if PARTS == 1:
        parts = (through_pairs,)
    elif PARTS == 2:
        parts = halves(through_pairs)
    else:
        tl.static_assert(PARTS == 4)
        parts = quarters(through_pairs)
    for part in tl.static_range(PARTS):
        j = j0 + part * WIDTH
        phi = load_phi(pair_ptr, diagonal_ptr, i0, j, pitch, PLANES, BLOCK, WIDTH) / attention_scale
        attention = whole(load_planes(attention_ptr, None, 0, i0, j, pitch, BLOCK, WIDTH, PLANES)) / attention_scale
        grad = attention * (row_term[:, None] - phi - parts[part])
        store_planes(grad_ptr, None, 0, i0, j, pitch, split(grad * grad_scale, PLANES, grad_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "H", "head0"])
def score_gradient_kernel(
    attention_ptr, attention_desc, two_tiles_desc, pair_ptr, pair_desc, mirrored_desc, diagonal_ptr, row_term_ptr,
    row_sum_ptr, span_ptr, grad_ptr, grad_scale_ptr,
    T, H, head0, pitch, tiles,
    attention_scale, pair_scale,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂s_ij = A_ij (g_ij − Σ_j A_ij g_ij)`` with ``g = −φ(G) − M A``.

    A tile on the diagonal replaces φ, which its own program alone reads.

    No entry exceeds its row's term, so a power of 2 for each tile of rows, to (heads, tiles), keeps it in 16 bits.
    With ``two_tiles_desc`` a program makes two neighbouring tiles, wherever both are real; not if causal, as the second
    would meet tiles of A above the diagonal, which nobody writes.
    """
    TILES: tl.constexpr = 1 if two_tiles_desc is None else 2
    i_tile = tl.program_id(1)
    local_head = tl.program_id(2).to(tl.int64)
    i0, j0 = i_tile * BLOCK, tl.program_id(0) * (TILES * BLOCK)
    begin, stop = span_of((head0 + local_head) // H, None, span_ptr, T)
    if TILES == 2:
        j0 = tl.where(j0 + BLOCK <= begin, j0 + BLOCK, j0)
    if tl.maximum(i0, j0) >= stop or tl.minimum(i0, j0) + BLOCK <= begin or (IS_CAUSAL and j0 > i0):
        return
    matrix = local_head * PLANES * pitch * pitch
    k_begin = begin // BLOCK * BLOCK
    if IS_CAUSAL:
        k_begin = j0

    i = i0 + tl.arange(0, BLOCK)
    row_term_ptr += local_head * (pitch // SIDE) * pitch
    row_term = tl.zeros((BLOCK,), tl.float32)
    for tile in range(begin // BLOCK * (BLOCK // SIDE), tl.cdiv(stop, BLOCK) * (BLOCK // SIDE)):
        row_term += tl.load(row_term_ptr + tile * pitch + i)
    row_sum = tl.load(row_sum_ptr + local_head * pitch + i)
    row_term = row_term / tl.where(row_sum > 0, row_sum, 1.0)
    grad_scale = exponent_below(tl.max(row_term, 0), 13.0)
    if j0 // BLOCK == begin // BLOCK:
        tl.store(grad_scale_ptr + local_head * tiles + i_tile, grad_scale)

    if TILES == 2:
        if j0 // BLOCK % 2 == 0 and j0 + BLOCK < stop:
            score_gradient_tile(
                attention_ptr + matrix, two_tiles_desc, pair_ptr + matrix, pair_desc, mirrored_desc,
                diagonal_ptr + matrix, row_term, grad_scale, grad_ptr + matrix,
                local_head, i0, j0, k_begin, stop, pitch, attention_scale, pair_scale,
                PLANES, BLOCK, 2 * BLOCK, BLOCK_K, PRECISION,
            )  # fmt: skip
            return
    score_gradient_tile(
        attention_ptr + matrix, attention_desc, pair_ptr + matrix, pair_desc, mirrored_desc,
        diagonal_ptr + matrix, row_term, grad_scale, grad_ptr + matrix,
        local_head, i0, j0, k_begin, stop, pitch, attention_scale, pair_scale,
        PLANES, BLOCK, BLOCK, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "head0"])
def query_gradient_kernel(
    score_grad_ptr, score_grad_scale_ptr, k_ptr, mask_ptr, span_ptr, grad_q_ptr,
    T, D, H, group, head0, pitch, tiles,
    stride_kb, stride_kh, stride_kt,
    scale,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂q_i = scale · Σ_j ∂L/∂s_ij k_j``"""
    tl.static_assert(BLOCK % BLOCK_K == 0)
    i_tile = tl.program_id(0)
    i0 = i_tile * BLOCK
    local_head = tl.program_id(2).to(tl.int64)
    sample, head = (head0 + local_head) // H, (head0 + local_head) % H
    row = first_row(sample, None, T)
    begin, stop = span_of(sample, None, span_ptr, T)
    if i0 >= stop or i0 + BLOCK <= begin:
        return
    score_grad_ptr += local_head * PLANES * pitch * pitch
    k_ptr += sample * stride_kb + head // group * stride_kh
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    j_stop = stop
    if IS_CAUSAL:
        j_stop = tl.minimum(stop, i0 + BLOCK)

    grad = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for j0 in range(begin // BLOCK * BLOCK, j_stop, BLOCK_K):
        real_j = real_tokens(j0 + tl.arange(0, BLOCK_K), stop, row, mask_ptr)
        score_grad = load_planes(score_grad_ptr, None, 0, i0, j0, pitch, BLOCK, BLOCK_K, PLANES)
        k_j = load_rows(k_ptr, j0, stride_kt, real_j, d, D, BLOCK_K)
        grad = product_of_planes(score_grad, split(k_j, PLANES, score_grad_ptr.dtype.element_ty), grad, PRECISION)

    grad *= scale / tl.load(score_grad_scale_ptr + local_head * tiles + i_tile)
    real_i = real_tokens(i0 + tl.arange(0, BLOCK), stop, row, mask_ptr)
    store_rows(grad_q_ptr, (head0 + local_head) * T + i0, real_i, d, D, grad, BLOCK)


@triton.jit(do_not_specialize=["T", "H", "head0"])
def key_gradient_kernel(
    score_grad_ptr, score_grad_scale_ptr, q_ptr, mask_ptr, span_ptr, grad_k_ptr,
    T, D, H, head0, pitch, tiles,
    stride_qb, stride_qh, stride_qt,
    scale,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂k_j = scale · Σ_i ∂L/∂s_ij q_i`` of one query head."""
    tl.static_assert(BLOCK % BLOCK_K == 0)
    j0 = tl.program_id(0) * BLOCK
    local_head = tl.program_id(2).to(tl.int64)
    sample, head = (head0 + local_head) // H, (head0 + local_head) % H
    row = first_row(sample, None, T)
    begin, stop = span_of(sample, None, span_ptr, T)
    if j0 >= stop or j0 + BLOCK <= begin:
        return
    score_grad_ptr += local_head * PLANES * pitch * pitch
    score_grad_scale_ptr += local_head * tiles
    q_ptr += sample * stride_qb + head * stride_qh
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i_begin = begin // BLOCK * BLOCK
    if IS_CAUSAL:
        i_begin = j0

    grad = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for i0 in range(i_begin, stop, BLOCK_K):
        real_i = real_tokens(i0 + tl.arange(0, BLOCK_K), stop, row, mask_ptr)
        score_grad = load_planes(score_grad_ptr, None, 0, i0, j0, pitch, BLOCK_K, BLOCK, PLANES)
        q_i = split(load_rows(q_ptr, i0, stride_qt, real_i, d, D, BLOCK_K), PLANES, score_grad_ptr.dtype.element_ty)
        share = product_of_planes(transposed(score_grad), q_i, tl.zeros_like(grad), PRECISION)
        grad += share / tl.load(score_grad_scale_ptr + i0 // BLOCK)

    real_j = real_tokens(j0 + tl.arange(0, BLOCK), stop, row, mask_ptr)
    store_rows(grad_k_ptr, (head0 + local_head) * T + j0, real_j, d, D, grad * scale, BLOCK)
