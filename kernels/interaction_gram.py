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

    local = tl.arange(0, BLOCK)
    attention = tl.load(matrix_tile(attention_ptr, i0, j0, pitch, BLOCK, BLOCK)).to(tl.float32) / attention_scale
    above = i0 != j0
    mirrored_ptr = matrix_tile(attention_ptr, j0, i0, pitch, BLOCK, BLOCK)
    if IS_CAUSAL:  # nothing is written above the diagonal
        mirrored = tl.load(mirrored_ptr, mask=(local[:, None] >= 0) & (i0 == j0), other=0.0)
    else:
        mirrored = tl.load(mirrored_ptr)
    mirrored = mirrored.to(tl.float32).trans() / attention_scale
    on_diagonal = (i0 + local)[:, None] == (j0 + local)[None, :]
    phi, pair = pair_terms(gram, attention, mirrored, on_diagonal, SQUARED, EXCLUDE_DIAGONAL)

    both = attention + tl.where(above, mirrored, 0.0)
    tl.store(loss_ptr + (local_head * tiles + i_tile) * tiles + j_tile + tl.arange(0, 1), sum_of(both * (1.0 - phi)))
    if pair_ptr is not None:
        pair = (pair * pair_scale).to(pair_ptr.dtype.element_ty)
        phi = (phi * attention_scale).to(phi_ptr.dtype.element_ty)
        pair_ptr += local_head * pitch * pitch
        phi_ptr += local_head * pitch * pitch
        row_term_ptr += local_head * tiles * pitch
        through_pairs = pair.to(tl.float32) / pair_scale * gram
        rounded_phi = phi.to(tl.float32) / attention_scale
        tl.store(matrix_tile(pair_ptr, i0, j0, pitch, BLOCK, BLOCK), pair)
        tl.store(matrix_tile(phi_ptr, i0, j0, pitch, BLOCK, BLOCK), phi)
        tl.store(row_term_ptr + j_tile * pitch + i0 + local, tl.sum(attention * rounded_phi + through_pairs, 1))
        if above:
            tl.store(matrix_tile(pair_ptr, j0, i0, pitch, BLOCK, BLOCK), pair.trans())
            tl.store(matrix_tile(phi_ptr, j0, i0, pitch, BLOCK, BLOCK), phi.trans())
            tl.store(row_term_ptr + i_tile * pitch + j0 + local, tl.sum(mirrored * rounded_phi + through_pairs, 0))


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
