"""The Gram matrix of attention rows, and all that needs it: the loss, ``M``, φ(G) and the softmax's row term.

G is symmetric, so each program makes one tile of its lower triangle and serves the mirrored one too. Such a tile, of
SIDE rows and columns, is a tile of the workspace, of BLOCK, or a part of one.
"""

import triton
import triton.language as tl

from .planes import (
    load_planes,
    product_of_planes,
    split,
    store_mirrored_planes,
    store_planes,
    transposed,
    whole,
    whole_mirrored,
)
from .tiles import span_of, sum_of


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
    gram, attention_ptr, attention_desc, mirrored_desc, pair_ptr, pair_desc, phi_desc, diagonal_ptr, row_term_ptr,
    matrix, i0, j0, i_tile, apart, pitch, attention_scale, pair_scale,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    SQUARED: tl.constexpr, EXCLUDE_DIAGONAL: tl.constexpr,
):  # fmt: skip
    """A tile's part of the loss and of its rows' terms, and what ``pair_ptr`` asks for. ``apart``: from its mirror."""
    i, j = i0 + tl.arange(0, ROWS), j0 + tl.arange(0, COLUMNS)
    attention = whole(load_planes(attention_ptr, attention_desc, matrix, i0, j0, pitch, ROWS, COLUMNS, PLANES))
    attention /= attention_scale
    mirrored = whole_mirrored(attention_ptr, mirrored_desc, matrix, i0, j0, pitch, ROWS, COLUMNS, PLANES)
    mirrored /= attention_scale
    if IS_CAUSAL:  # nothing is written above the diagonal
        mirrored = tl.where(apart, 0.0, mirrored)
    phi, pair = pair_terms(gram, attention, mirrored, i[:, None] == j[None, :], SQUARED, EXCLUDE_DIAGONAL)

    both = attention + tl.where(apart, mirrored, 0.0)
    loss = sum_of(both * (1.0 - phi))
    row_share = tl.zeros((ROWS,), tl.float32)
    if pair_ptr is not None:
        pair_planes = split(pair * pair_scale, PLANES, pair_ptr.dtype.element_ty)
        phi_planes = split(phi * attention_scale, PLANES, pair_ptr.dtype.element_ty)
        through_pairs = whole(pair_planes) / pair_scale * gram
        rounded_phi = whole(phi_planes) / attention_scale
        row_share = tl.sum(attention * rounded_phi + through_pairs, 1)
        store_planes(pair_ptr, pair_desc, matrix, i0, j0, pitch, pair_planes)
        if i0 // BLOCK == j0 // BLOCK:
            store_planes(diagonal_ptr, None, 0, i0, j0, pitch, phi_planes)
            if ROWS < BLOCK:
                if apart:
                    store_mirrored_planes(diagonal_ptr, None, 0, i0, j0, pitch, phi_planes)
                    store_mirrored_planes(pair_ptr, phi_desc, matrix, i0, j0, pitch, pair_planes)
        else:
            store_mirrored_planes(pair_ptr, phi_desc, matrix, i0, j0, pitch, phi_planes)
        if apart:
            tl.store(row_term_ptr + i_tile * pitch + j, tl.sum(mirrored * rounded_phi + through_pairs, 0))
    return loss, row_share


@triton.jit(do_not_specialize=["T", "H", "head0"])
def interaction_gram_kernel(
    attention_ptr, attention_desc, mirrored_desc, span_ptr, pair_ptr, pair_desc, phi_desc, diagonal_ptr, row_term_ptr,
    loss_ptr,
    T, H, head0, pitch, tiles,
    attention_scale, pair_scale,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr, BLOCK_K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    SQUARED: tl.constexpr, EXCLUDE_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Σ A_ij (1 − φ(G_ij))`` over a tile and its mirror image, to (heads, tiles, tiles).

    With ``pair_ptr``, for the gradient, to (heads, planes, pitch, pitch): M in the tiles, of BLOCK, on and below the
    diagonal, φ in those above it; both are symmetric. φ of the tiles on the diagonal goes to ``diagonal_ptr``. And to
    (heads, tiles, pitch) each row's share of ``Σ_j A_ij φ_ij + Σ_k M_ik G_ik``, which is ``−Σ_j A_ij ∂L/∂A_ij`` without
    the 1 of ``1 − φ``. It is made of the rounded A, φ and M, so that the rows of ∂L/∂s will sum to zero.
    """
    j_tile, i_tile = tl.program_id(0), tl.program_id(1)
    local_head = tl.program_id(2).to(tl.int64)
    i0, j0 = i_tile * SIDE, j_tile * SIDE
    begin, stop = span_of((head0 + local_head) // H, None, span_ptr, T)
    if j0 > i0 or i0 // BLOCK * BLOCK >= stop or j0 // BLOCK * BLOCK + BLOCK <= begin:
        return
    attention_ptr += local_head * PLANES * pitch * pitch
    k_stop = stop
    if IS_CAUSAL:
        k_stop = tl.minimum(stop, j0 + SIDE)

    gram = tl.zeros((SIDE, SIDE), tl.float32)
    for k0 in range(begin // BLOCK * BLOCK, k_stop, BLOCK_K):
        a_i = load_planes(attention_ptr, attention_desc, local_head, i0, k0, pitch, SIDE, BLOCK_K, PLANES)
        a_j = load_planes(attention_ptr, attention_desc, local_head, j0, k0, pitch, SIDE, BLOCK_K, PLANES)
        gram = product_of_planes(a_i, transposed(a_j), gram, PRECISION)
    gram *= 1.0 / (attention_scale * attention_scale)
    if pair_ptr is not None:
        pair_ptr += local_head * PLANES * pitch * pitch
        diagonal_ptr += local_head * PLANES * pitch * pitch
        row_term_ptr += local_head * tiles * pitch

    loss = tl.zeros((1,), tl.float32)
    row_share = tl.zeros((SIDE,), tl.float32)
    # All terms of a large tile at once would need more registers than there are; a descriptor is of BLOCK_K columns.
    BY_ADDRESS: tl.constexpr = 4 if SIDE > 64 else 2 if PLANES > 1 else 1
    PARTS: tl.constexpr = BY_ADDRESS if attention_desc is None else SIDE // BLOCK_K
    if PARTS == 1:
        parts = (gram,)
    elif PARTS == 2:
        parts = halves(gram)
    else:
        tl.static_assert(PARTS == 4)
        parts = quarters(gram)
    for part in tl.static_range(len(parts)):
        part_loss, part_row_share = tile_and_mirror(
            parts[part], attention_ptr, attention_desc, mirrored_desc, pair_ptr, pair_desc, phi_desc, diagonal_ptr,
            row_term_ptr, local_head, i0, j0 + part * (SIDE // len(parts)), i_tile, i0 > j0, pitch,
            attention_scale, pair_scale,
            PLANES, BLOCK, SIDE, SIDE // len(parts), IS_CAUSAL, SQUARED, EXCLUDE_DIAGONAL,
        )  # fmt: skip
        loss += part_loss
        row_share += part_row_share
    tl.store(loss_ptr + (local_head * tiles + i_tile) * tiles + j_tile + tl.arange(0, 1), loss)
    if pair_ptr is not None:
        tl.store(row_term_ptr + j_tile * pitch + i0 + tl.arange(0, SIDE), row_share)


@triton.jit(do_not_specialize=["T", "H", "head0", "tiles"])
def interaction_total_kernel(loss_ptr, span_ptr, total_ptr, T, H, head0, tiles, SIDE: tl.constexpr):
    """Sum over the tiles of a head that ``interaction_gram_kernel`` made."""
    local_head = tl.program_id(0).to(tl.int64)
    begin, stop = span_of((head0 + local_head) // H, None, span_ptr, T)
    loss_ptr += local_head * tiles * tiles
    total = tl.zeros((1024,), tl.float32)
    for first in range(0, tiles * tiles, 1024):
        tile = first + tl.arange(0, 1024)
        i0, j0 = tile // tiles * SIDE, tile % tiles * SIDE
        total += tl.load(loss_ptr + tile, mask=(j0 <= i0) & (i0 < stop) & (j0 + SIDE > begin), other=0.0)
    tl.store(total_ptr + head0 + local_head, tl.sum(total, 0))
