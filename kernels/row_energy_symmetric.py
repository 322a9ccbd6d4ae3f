"""Row energy by half of the token Gram matrix: each tile below the diagonal serves its mirror image too.

What a tile adds to its rows, and to its columns, goes to a buffer and is summed in order. That takes a second launch,
so it is for long and wide sequences of one padded length.
"""

import triton
import triton.language as tl

from .importance import finish_if_last, store_share
from .row_energy_tile import tile_of_rows
from .row_energy_wide import gram_tile, norm_of
from .tiles import count_of, first_row, real_tokens, span_of


@triton.jit(do_not_specialize=["T", "threshold", "tiles"])
def row_energy_symmetric_kernel(
    h_ptr, mask_ptr, span_ptr, partial_ptr, ticket_ptr,
    T, E, threshold, tiles,
    stride_hb, stride_ht,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Σ_j G_ij²`` over one tile of tokens j, for the tokens i of another, and the other way: (B, tiles, T).

    The first program leaves the ticket at 0 for the kernel that comes after.
    """
    if ticket_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(ticket_ptr, 0)
    j_tile, i_tile = tl.program_id(0) % tiles, tl.program_id(0) // tiles % tiles
    sample = tl.program_id(0) // (tiles * tiles)
    i0, j0 = i_tile * BLOCK_T, j_tile * BLOCK_T
    begin, stop = span_of(sample, None, span_ptr, T)
    if j0 > i0 or i0 >= stop or j0 + BLOCK_T <= begin or count_of(sample, None, span_ptr, T) >= threshold:
        return
    row = first_row(sample, None, T)
    h_ptr += sample.to(tl.int64) * stride_hb
    i, j = i0 + tl.arange(0, BLOCK_T), j0 + tl.arange(0, BLOCK_T)
    real_i, real_j = real_tokens(i, stop, row, mask_ptr), real_tokens(j, stop, row, mask_ptr)
    gram = gram_tile(h_ptr, i0, j0, real_i, real_j, E, stride_ht, BLOCK_T, BLOCK_T, BLOCK_E, PRECISION)
    energy = gram * gram
    partial_ptr += row * tiles
    tl.store(partial_ptr + j_tile.to(tl.int64) * T + i, tl.sum(energy, 1), mask=i < T)
    if i_tile != j_tile:
        tl.store(partial_ptr + i_tile.to(tl.int64) * T + j, tl.sum(energy, 0), mask=j < T)


@triton.jit(do_not_specialize=["S", "T", "threshold", "tiles", "first_share", "shares"])
def row_energy_total_kernel(
    h_ptr, mask_ptr, span_ptr, partial_ptr, energy_ptr, norm_ptr,
    share_ptr, count_ptr, ticket_ptr, loss_ptr, factor_ptr,
    S, T, E, threshold, tiles,
    stride_hb, stride_ht,
    first_share, shares, eps, scale, MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``R_i`` of what the tiles gave, and ``n2_i``; the importance loss where it is wanted."""
    program = tl.program_id(0)
    h_ptr, _, row, begin, stop, i0, limit = tile_of_rows(
        program, h_ptr, mask_ptr, span_ptr, None, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=False
    )
    i = i0 + tl.arange(0, BLOCK_T)
    real_i = real_tokens(i, stop, row, mask_ptr)
    partial_ptr += row * tiles
    energy = tl.zeros((BLOCK_T,), tl.float32)
    for tile in range(begin // BLOCK_T, tl.cdiv(stop, BLOCK_T)):
        energy += tl.load(partial_ptr + tl.cast(tile, tl.int64) * T + i, mask=real_i, other=0.0)
    norm = norm_of(h_ptr, i0, real_i, E, stride_ht, BLOCK_T, BLOCK_E)
    tl.store(energy_ptr + row + i, energy, mask=i < limit)
    tl.store(norm_ptr + row + i, norm, mask=i < limit)
    store_share(first_share + program, energy, norm, real_i, mask_ptr, share_ptr, count_ptr, eps)
    finish_if_last(mask_ptr, None, share_ptr, count_ptr, ticket_ptr, loss_ptr, factor_ptr, shares, S, T, scale, MEAN)
