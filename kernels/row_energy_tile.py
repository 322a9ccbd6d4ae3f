"""How a program of primitive 1 finds its sequence, its tile and its real tokens."""

import triton
import triton.language as tl

from .tiles import count_of, first_row, mask_span, offset_of, sequence_ptr, span_of, store_rows, tile_of


@triton.jit
def tile_of_rows(
    program, h_ptr, mask_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht,
    BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """What a program works on: pointer to its sequence, the sequence and its first row, first and one past the last
    token to meet, the tile's first token, and one past the last token to write, padding included.

    A tile of padding alone meets no token, and so writes zeros. A tile of a sequence of ``threshold`` real tokens or
    more, unless LONG, or of fewer, if LONG, neither meets nor writes any. Without ``span_ptr`` a mask is read through.

    Loops over what a tile meets count from 0: of one that counts from where a mask begins, Triton 3.7 loses how the
    rows are aligned, and reads them an element at a time.
    """
    sequence, first = tile_of(program, cu_ptr, S, T, BLOCK)
    row = first_row(sequence, cu_ptr, T)
    if mask_ptr is not None and span_ptr is None:
        begin, stop, count = mask_span(mask_ptr + row, T, 1024)
    else:
        begin, stop = span_of(sequence, cu_ptr, span_ptr, T)
        count = count_of(sequence, cu_ptr, span_ptr, T)
    chosen = (count >= threshold) == LONG
    limit = stop
    if cu_ptr is None:
        limit = T
    meets = chosen & (first < stop) & (first + BLOCK > begin)
    h_ptr = sequence_ptr(h_ptr, sequence, row, stride_hb, stride_ht, cu_ptr)
    return h_ptr, sequence, row, tl.where(meets, begin, 0), tl.where(meets, stop, 0), first, tl.where(chosen, limit, 0)


@triton.jit
def clear_rows_of_none(grad_h_ptr, cu_ptr, S, T, program, out, E, BLOCK: tl.constexpr):
    """Zeros where rows of packed input belong to no sequence. Tile slots are at least as many as tiles of rows."""
    if cu_ptr is not None:
        t = program * BLOCK + tl.arange(0, BLOCK)
        none = (t < T) & ((t < offset_of(0, cu_ptr, T)) | (t >= offset_of(S, cu_ptr, T)))
        zeros = tl.zeros((BLOCK, out.shape[0]), tl.float32)
        store_rows(grad_h_ptr, program * BLOCK, none, out, E, zeros, BLOCK)
