"""Primitive 2 over packed sequences, whose lengths only the device knows.

The shapes bound one sequence by all N tokens, so a workspace for whole T×T matrices would be N². These kernels keep
strips instead: for one tile of rows of one head, M and φ(G) against the whole sequence. A is never stored but made
again from queries, keys and the softmax's row statistics, wherever a tile of it is needed. A strip is
``head · slots + slot``; a chunk holds the strips from ``strip0`` on.

Strips are as wide as ``longest``, which by the caller's word no sequence exceeds. To check it would mean waiting for
the device, so the loss of one that does is NaN.
"""

import triton
import triton.language as tl

from .attention_workspace import scores, softmax_rows, weights
from .interaction_gradient import exponent_below
from .interaction_gram import pair_terms
from .tiles import count_of, first_row, load_rows, matrix_tile, product, sum_of, tile_of


@triton.jit
def length_of(sequence, cu_ptr, N, longest):
    """Tokens of a sequence, as far as its strips reach."""
    return tl.minimum(count_of(sequence, cu_ptr, None, N), longest)


@triton.jit
def attention_tile(
    head, i0, j0,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the attention weights of one head of one sequence, scaled and rounded."""
    q_ptr, k_ptr, top_ptr, total_ptr, stop, D, stride_qt, stride_kt, log2_scale, attention_scale = head
    i, j = i0 + tl.arange(0, BLOCK), j0 + tl.arange(0, BLOCK)
    score = scores(
        None, q_ptr, k_ptr, i0, j0, i < stop, j < stop, D, stride_qt, stride_kt, log2_scale,
        BLOCK, BLOCK, BLOCK_D, IS_CAUSAL, PRECISION,
    )  # fmt: skip
    top = tl.load(top_ptr + i, mask=i < stop, other=0.0)
    total = tl.load(total_ptr + i, mask=i < stop, other=1.0)
    return weights(score, top, total, attention_scale, DTYPE)


@triton.jit(do_not_specialize=["S", "N", "longest"])
def packed_softmax_kernel(
    q_ptr, k_ptr, cu_ptr, top_ptr, total_ptr, row_sum_ptr,
    S, N, longest, D, group,
    stride_qt, stride_qh, stride_kt, stride_kh,
    log2_scale, attention_scale,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of each row of the softmax, and the sum of its rounded weights: (H, N)."""
    sequence, i0 = tile_of(tl.program_id(0), cu_ptr, S, N, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    row = first_row(sequence, cu_ptr, N)
    stop = length_of(sequence, cu_ptr, N, longest)
    if i0 >= stop:
        return
    q_ptr += row * stride_qt + head * stride_qh
    k_ptr += row * stride_kt + head // group * stride_kh
    i = i0 + tl.arange(0, BLOCK)
    j_stop = stop
    if IS_CAUSAL:
        j_stop = tl.minimum(stop, i0 + BLOCK)

    top, total, row_sum = softmax_rows(
        q_ptr, k_ptr, None, None, row, i0, i < stop, 0, j_stop, stop, D, 0,
        stride_qt, stride_kt, log2_scale, attention_scale, DTYPE, 1, BLOCK, BLOCK, BLOCK_D, WHOLE, IS_CAUSAL, PRECISION,
    )  # fmt: skip
    top = tl.where(count_of(sequence, cu_ptr, None, N) > longest, float("nan"), top)
    out = head * N + row + i
    tl.store(top_ptr + out, top, mask=i < stop)
    tl.store(total_ptr + out, total, mask=i < stop)
    tl.store(row_sum_ptr + out, row_sum, mask=i < stop)


@triton.jit(do_not_specialize=["S", "N", "longest", "slots", "strip0", "tiles"])
def packed_gram_kernel(
    q_ptr, k_ptr, cu_ptr, top_ptr, total_ptr, pair_ptr, phi_ptr, row_term_ptr, loss_ptr,
    S, N, longest, D, group, slots, strip0, pitch, tiles,
    stride_qt, stride_qh, stride_kt, stride_kh,
    log2_scale, attention_scale, pair_scale,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr,
    SQUARED: tl.constexpr, EXCLUDE_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a strip: ``Σ A_ij (1 − φ(G_ij))`` to (strips, tiles) and, for the gradient, M, φ and the row term.

    M and φ go to (strips, BLOCK, pitch), the row term, as in ``interaction_gram``, to (strips, tiles, BLOCK).
    """
    j_tile, local_strip = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, slot = (strip0 + local_strip) // slots, ((strip0 + local_strip) % slots).to(tl.int32)
    sequence, i0 = tile_of(slot, cu_ptr, S, N, BLOCK)
    j0 = j_tile * BLOCK
    row = first_row(sequence, cu_ptr, N)
    stop = length_of(sequence, cu_ptr, N, longest)
    if i0 >= stop or j0 >= stop:
        return
    q_ptr += row * stride_qt + head * stride_qh
    k_ptr += row * stride_kt + head // group * stride_kh
    top_ptr += head * N + row
    total_ptr += head * N + row
    here = (q_ptr, k_ptr, top_ptr, total_ptr, stop, D, stride_qt, stride_kt, log2_scale, attention_scale)
    k_stop = stop
    if IS_CAUSAL:
        k_stop = tl.minimum(stop, tl.minimum(i0, j0) + BLOCK)

    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(0, k_stop, BLOCK):
        a_i = attention_tile(here, i0, k0, DTYPE, BLOCK, BLOCK_D, IS_CAUSAL, PRECISION)
        a_j = attention_tile(here, j0, k0, DTYPE, BLOCK, BLOCK_D, IS_CAUSAL, PRECISION)
        gram = product(a_i, a_j.trans(), gram, PRECISION)
    gram *= 1.0 / (attention_scale * attention_scale)

    attention = attention_tile(here, i0, j0, DTYPE, BLOCK, BLOCK_D, IS_CAUSAL, PRECISION)
    mirrored = attention_tile(here, j0, i0, DTYPE, BLOCK, BLOCK_D, IS_CAUSAL, PRECISION)
    attention = attention.to(tl.float32) / attention_scale
    mirrored = mirrored.to(tl.float32).trans() / attention_scale
    local = tl.arange(0, BLOCK)
    on_diagonal = (i0 + local)[:, None] == (j0 + local)[None, :]
    phi, pair = pair_terms(gram, attention, mirrored, on_diagonal, SQUARED, EXCLUDE_DIAGONAL)

    tl.store(loss_ptr + local_strip * tiles + j_tile + tl.arange(0, 1), sum_of(attention * (1.0 - phi)))
    if pair_ptr is not None:
        pair = (pair * pair_scale).to(pair_ptr.dtype.element_ty)
        phi = (phi * attention_scale).to(phi_ptr.dtype.element_ty)
        strip = local_strip * BLOCK * pitch
        tl.store(matrix_tile(pair_ptr + strip, 0, j0, pitch, BLOCK, BLOCK), pair)
        tl.store(matrix_tile(phi_ptr + strip, 0, j0, pitch, BLOCK, BLOCK), phi)
        row_term = attention * (phi.to(tl.float32) / attention_scale) + pair.to(tl.float32) / pair_scale * gram
        tl.store(row_term_ptr + (local_strip * tiles + j_tile) * BLOCK + local, tl.sum(row_term, 1))


@triton.jit(do_not_specialize=["S", "N", "longest", "slots", "strip0", "tiles"])
def packed_score_gradient_kernel(
    q_ptr, k_ptr, cu_ptr, top_ptr, total_ptr, row_sum_ptr, pair_ptr, phi_ptr, row_term_ptr, grad_ptr, grad_scale_ptr,
    S, N, longest, D, group, slots, strip0, pitch, tiles,
    stride_qt, stride_qh, stride_kt, stride_kh,
    log2_scale, attention_scale, pair_scale,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a strip of ``∂L/∂s``, in place of φ; the formula is in ``interaction_gradient``."""
    j_tile, local_strip = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, slot = (strip0 + local_strip) // slots, ((strip0 + local_strip) % slots).to(tl.int32)
    sequence, i0 = tile_of(slot, cu_ptr, S, N, BLOCK)
    j0 = j_tile * BLOCK
    row = first_row(sequence, cu_ptr, N)
    stop = length_of(sequence, cu_ptr, N, longest)
    if i0 >= stop or j0 >= stop or (IS_CAUSAL and j0 > i0):
        return
    q_ptr += row * stride_qt + head * stride_qh
    k_ptr += row * stride_kt + head // group * stride_kh
    top_ptr += head * N + row
    total_ptr += head * N + row
    here = (q_ptr, k_ptr, top_ptr, total_ptr, stop, D, stride_qt, stride_kt, log2_scale, attention_scale)
    strip = local_strip * BLOCK * pitch
    k_begin = 0
    if IS_CAUSAL:
        k_begin = j0

    through_pairs = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(k_begin, stop, BLOCK):
        a_k = attention_tile(here, k0, j0, DTYPE, BLOCK, BLOCK_D, IS_CAUSAL, PRECISION)
        pair = tl.load(matrix_tile(pair_ptr + strip, 0, k0, pitch, BLOCK, BLOCK))
        through_pairs = product(pair, a_k, through_pairs, PRECISION)
    through_pairs *= 1.0 / (pair_scale * attention_scale)

    local = tl.arange(0, BLOCK)
    row_term = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.cdiv(stop, BLOCK)):
        row_term += tl.load(row_term_ptr + (local_strip * tiles + tile) * BLOCK + local)
    row_sum = tl.load(row_sum_ptr + head * N + row + i0 + local, mask=i0 + local < stop, other=1.0)
    row_term = row_term / row_sum
    grad_scale = exponent_below(tl.max(row_term, 0), 13.0)

    attention = attention_tile(here, i0, j0, DTYPE, BLOCK, BLOCK_D, IS_CAUSAL, PRECISION)
    phi = tl.load(matrix_tile(phi_ptr + strip, 0, j0, pitch, BLOCK, BLOCK)).to(tl.float32) / attention_scale
    grad = attention.to(tl.float32) / attention_scale * (row_term[:, None] - phi - through_pairs)
    tl.store(matrix_tile(grad_ptr + strip, 0, j0, pitch, BLOCK, BLOCK), grad * grad_scale)
    if j_tile == 0:
        tl.store(grad_scale_ptr + local_strip, grad_scale)


@triton.jit(do_not_specialize=["S", "N", "longest", "slots", "strip0"])
def packed_query_gradient_kernel(
    score_grad_ptr, score_grad_scale_ptr, k_ptr, cu_ptr, grad_q_ptr,
    S, N, longest, H, D, group, slots, strip0, pitch,
    stride_kt, stride_kh,
    scale,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂q_i = scale · Σ_j ∂L/∂s_ij k_j`` of a strip, to (N, H, D)."""
    local_strip = tl.program_id(0).to(tl.int64)
    head, slot = (strip0 + local_strip) // slots, ((strip0 + local_strip) % slots).to(tl.int32)
    sequence, i0 = tile_of(slot, cu_ptr, S, N, BLOCK)
    row = first_row(sequence, cu_ptr, N)
    stop = length_of(sequence, cu_ptr, N, longest)
    if i0 >= stop:
        return
    score_grad_ptr += local_strip * BLOCK * pitch
    k_ptr += row * stride_kt + head // group * stride_kh
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    j_stop = stop
    if IS_CAUSAL:
        j_stop = tl.minimum(stop, i0 + BLOCK)

    grad = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for j0 in range(0, j_stop, BLOCK):
        score_grad = tl.load(matrix_tile(score_grad_ptr, 0, j0, pitch, BLOCK, BLOCK))
        k_j = load_rows(k_ptr, j0, stride_kt, j0 + tl.arange(0, BLOCK) < stop, d, D, BLOCK)
        grad = product(score_grad, k_j.to(score_grad.dtype), grad, PRECISION)
    grad *= scale / tl.load(score_grad_scale_ptr + local_strip)
    i = tl.arange(0, BLOCK)
    grad_q_ptr += ((row + i0) * H + head) * D
    tl.store(grad_q_ptr + i[:, None] * (H * D) + d[None, :], grad, mask=(i0 + i < stop)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["S", "N", "longest", "slots", "strip0", "strip_stop"])
def packed_key_gradient_kernel(
    score_grad_ptr, score_grad_scale_ptr, q_ptr, cu_ptr, grad_k_ptr,
    S, N, longest, H, D, slots, strip0, strip_stop, pitch,
    stride_qt, stride_qh,
    scale,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to ``∂L/∂k_j = scale · Σ_i ∂L/∂s_ij q_i`` what the chunk's strips hold of it, row tiles in order."""
    slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    sequence, j0 = tile_of(slot, cu_ptr, S, N, BLOCK)
    row = first_row(sequence, cu_ptr, N)
    stop = length_of(sequence, cu_ptr, N, longest)
    first_strip = head * slots + slot - j0 // BLOCK
    tile_begin = tl.maximum(strip0 - first_strip, 0)
    if IS_CAUSAL:
        tile_begin = tl.maximum(tile_begin, j0 // BLOCK)
    tile_stop = tl.minimum(strip_stop - first_strip, tl.cdiv(stop, BLOCK))
    if j0 >= stop or tile_begin >= tile_stop:
        return
    q_ptr += row * stride_qt + head * stride_qh
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK)
    grad_k_ptr += ((row + j0) * H + head) * D + j[:, None] * (H * D) + d[None, :]
    inside = (j0 + j < stop)[:, None] & (d < D)[None, :]

    grad = tl.load(grad_k_ptr, mask=inside, other=0.0)
    for tile in range(tile_begin, tile_stop):
        strip = first_strip + tile - strip0
        score_grad = tl.load(matrix_tile(score_grad_ptr + strip * BLOCK * pitch, 0, j0, pitch, BLOCK, BLOCK))
        i0 = tile * BLOCK
        q_i = load_rows(q_ptr, i0, stride_qt, i0 + tl.arange(0, BLOCK) < stop, d, D, BLOCK)
        share = product(score_grad.trans(), q_i.to(score_grad.dtype), tl.zeros_like(grad), PRECISION)
        grad += share * (scale / tl.load(score_grad_scale_ptr + strip))
    tl.store(grad_k_ptr, grad, mask=inside)


@triton.jit(do_not_specialize=["S", "N", "longest", "slots", "strip0", "tiles"])
def packed_strip_total_kernel(
    loss_ptr, cu_ptr, strip_loss_ptr,
    S, N, longest, slots, strip0, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum over the tiles of a strip: (strips, tiles) → (H, slots)."""
    local_strip = tl.program_id(0).to(tl.int64)
    sequence, i0 = tile_of(((strip0 + local_strip) % slots).to(tl.int32), cu_ptr, S, N, BLOCK)
    stop = length_of(sequence, cu_ptr, N, longest)
    stop = tl.where(i0 < stop, stop, 0)
    total = tl.zeros((1024,), tl.float32)
    for first in range(0, tl.cdiv(stop, BLOCK), 1024):
        tile = first + tl.arange(0, 1024)
        total += tl.load(loss_ptr + local_strip * tiles + tile, mask=tile * BLOCK < stop, other=0.0)
    tl.store(strip_loss_ptr + strip0 + local_strip, tl.sum(total, 0))


@triton.jit(do_not_specialize=["S", "N", "longest", "slots"])
def packed_total_kernel(
    strip_loss_ptr, cu_ptr, total_ptr,
    S, N, longest, H, slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the strips of each sequence and head: (H, slots) → (S, H)."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = first_row(sequence, cu_ptr, N)
    stop = length_of(sequence, cu_ptr, N, longest)
    first_slot = row // BLOCK + sequence
    total = 0.0
    for slot in range(first_slot, first_slot + tl.cdiv(stop, BLOCK)):
        total += tl.load(strip_loss_ptr + head * slots + slot)
    tl.store(total_ptr + sequence * H + head, total)
