"""The Gram matrix of attention rows, and all that needs it: the loss, ``M``, φ(G) and the softmax's row term.

G is symmetric, so each program makes one tile of its lower triangle and serves the mirrored one too.
"""

import triton
import triton.language as tl

from .tiles import load_tile, matrix_tile, product, span_of, sum_of


@triton.jit
def pair_terms(gram, attention, mirrored, on_diagonal, SQUARED: tl.constexpr, EXCLUDE_DIAGONAL: tl.constexpr):
    """φ(G_ij) and ``M_ij = W_ij + W_ji = φ'(G_ij) (A_ij + A_ji)`` of a tile."""
    if SQUARED:
        phi = gram * gram
        slope = 2.0 * gram
    else:
        phi = gram
        slope = tl.full(gram.shape, 1.0, tl.float32)
    if EXCLUDE_DIAGONAL:
        phi = tl.where(on_diagonal, 0.0, phi)
        slope = tl.where(on_diagonal, 0.0, slope)
    return phi, slope * (attention + mirrored)


@triton.jit
def halves(tile):
    """Left and right columns of a tile."""
    return tl.split(tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def quarters(tile):
    """A tile's columns in four parts, from left to right."""
    left, right = halves(tile)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@triton.jit
def tile_and_mirror(
    gram, attention_ptr, pair_ptr, phi_ptr, row_term_ptr, i0, j0, i_tile, pitch, attention_scale, pair_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_CAUSAL: tl.constexpr, SQUARED: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr,
):  # fmt: skip
    """A tile's part of the loss and of its rows' terms; what ``pair_ptr`` asks for of it and its mirror is stored."""
    i, j = i0 + tl.arange(0, ROWS), j0 + tl.arange(0, COLUMNS)
    attention = tl.load(matrix_tile(attention_ptr, i0, j0, pitch, ROWS, COLUMNS)).to(tl.float32) / attention_scale
    apart = i0 >= j0 + COLUMNS  # from the mirrored tile; else both lie in one tile on the diagonal
    mirrored_ptr = matrix_tile(attention_ptr, j0, i0, pitch, COLUMNS, ROWS)
    if IS_CAUSAL:  # nothing is written above the diagonal
        mirrored = tl.load(mirrored_ptr, mask=(j[:, None] >= 0) & (not apart), other=0.0)
    else:
        mirrored = tl.load(mirrored_ptr)
    mirrored = mirrored.to(tl.float32).trans() / attention_scale
    phi, pair = pair_terms(gram, attention, mirrored, i[:, None] == j[None, :], SQUARED, EXCLUDE_DIAGONAL)

    both = attention + tl.where(apart, mirrored, 0.0)
    loss = sum_of(both * (1.0 - phi))
    row_share = tl.zeros((ROWS,), tl.float32)
    if pair_ptr is not None:
        pair = (pair * pair_scale).to(pair_ptr.dtype.element_ty)
        phi = (phi * attention_scale).to(phi_ptr.dtype.element_ty)
        through_pairs = pair.to(tl.float32) / pair_scale * gram
        rounded_phi = phi.to(tl.float32) / attention_scale
        row_share = tl.sum(attention * rounded_phi + through_pairs, 1)
        tl.store(matrix_tile(pair_ptr, i0, j0, pitch, ROWS, COLUMNS), pair)
        tl.store(matrix_tile(phi_ptr, i0, j0, pitch, ROWS, COLUMNS), phi)
        if apart:
            tl.store(matrix_tile(pair_ptr, j0, i0, pitch, COLUMNS, ROWS), pair.trans())
            tl.store(matrix_tile(phi_ptr, j0, i0, pitch, COLUMNS, ROWS), phi.trans())
            tl.store(row_term_ptr + i_tile * pitch + j, tl.sum(mirrored * rounded_phi + through_pairs, 0))
    return loss, row_share


@triton.jit(do_not_specialize=["T", "H", "head0"])
def interaction_gram_kernel(
    attention_ptr, attention_desc, span_ptr, pair_ptr, phi_ptr, row_term_ptr, loss_ptr,
    T, H, head0, pitch, tiles,
    attention_scale, pair_scale,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr, SQUARED: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Σ A_ij (1 − φ(G_ij))`` over a tile and its mirror image, to (heads, tiles, tiles).

    With ``pair_ptr``, for the gradient: M and φ to (heads, pitch, pitch) and, to (heads, tiles, pitch), each row's
    share of ``Σ_j A_ij φ_ij + Σ_k M_ik G_ik``, which is ``−Σ_j A_ij ∂L/∂A_ij`` without the 1 of ``1 − φ``. It is made
    of the rounded A, φ and M, so that the rows of ∂L/∂s will sum to zero.
    """
    j_tile, i_tile = tl.program_id(0), tl.program_id(1)
    local_head = tl.program_id(2).to(tl.int64)
    i0, j0 = i_tile * BLOCK, j_tile * BLOCK
    begin, stop = span_of((head0 + local_head) // H, None, span_ptr, T)
    if j0 > i0 or i0 >= stop or j0 + BLOCK <= begin:
        return
    attention_ptr += local_head * pitch * pitch
    k_stop = stop
    if IS_CAUSAL:
        k_stop = tl.minimum(stop, j0 + BLOCK)

    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(begin // BLOCK * BLOCK, k_stop, BLOCK_K):
        a_i = load_tile(attention_ptr, attention_desc, local_head, i0, k0, pitch, BLOCK, BLOCK_K)
        a_j = load_tile(attention_ptr, attention_desc, local_head, j0, k0, pitch, BLOCK, BLOCK_K)
        gram = product(a_i, a_j.trans(), gram, PRECISION)
    gram *= 1.0 / (attention_scale * attention_scale)
    if pair_ptr is not None:
        pair_ptr += local_head * pitch * pitch
        phi_ptr += local_head * pitch * pitch
        row_term_ptr += local_head * tiles * pitch

    loss = tl.zeros((1,), tl.float32)
    row_share = tl.zeros((BLOCK,), tl.float32)
    if BLOCK <= 64:
        parts = (gram,)
    else:  # a tile's terms all at once would need more registers than there are
        parts = quarters(gram)
    for part in tl.static_range(len(parts)):
        part_loss, part_row_share = tile_and_mirror(
            parts[part], attention_ptr, pair_ptr, phi_ptr, row_term_ptr, i0, j0 + part * (BLOCK // len(parts)), i_tile,
            pitch, attention_scale, pair_scale, BLOCK, BLOCK // len(parts), IS_CAUSAL, SQUARED, EXCLUDE_DIAGONAL,
        )  # fmt: skip
        loss += part_loss
        row_share += part_row_share
    tl.store(loss_ptr + (local_head * tiles + i_tile) * tiles + j_tile + tl.arange(0, 1), loss)
    if pair_ptr is not None:
        tl.store(row_term_ptr + j_tile * pitch + i0 + tl.arange(0, BLOCK), row_share)


@triton.jit(do_not_specialize=["T", "H", "head0", "tiles"])
def interaction_total_kernel(loss_ptr, span_ptr, total_ptr, T, H, head0, tiles, BLOCK: tl.constexpr):
    """Sum over the tiles of a head that ``interaction_gram_kernel`` made."""
    local_head = tl.program_id(0).to(tl.int64)
    begin, stop = span_of((head0 + local_head) // H, None, span_ptr, T)
    loss_ptr += local_head * tiles * tiles
    total = tl.zeros((1024,), tl.float32)
    for first in range(0, tiles * tiles, 1024):
        tile = first + tl.arange(0, 1024)
        i0, j0 = tile // tiles * BLOCK, tile % tiles * BLOCK
        total += tl.load(loss_ptr + tile, mask=(j0 <= i0) & (i0 < stop) & (j0 + BLOCK > begin), other=0.0)
    tl.store(total_ptr + head0 + local_head, tl.sum(total, 0))
