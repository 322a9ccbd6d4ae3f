"""What every kernel shares: the matrix product, and how a program finds its sequence, its tile and its real tokens."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` in float32. 16-bit operands multiply exactly; PRECISION splits or rounds float32 ones."""
    if PRECISION != "bf16":
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    elif a.dtype == tl.float32 or b.dtype == tl.float32:
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def sum_of(tile):
    """Sum over both axes, in a tensor of one element.

    Two axes down to the end: Triton 3.7 crashes for sm_100 where what comes of a product is reduced along its only one.
    """
    return tl.sum(tl.sum(tile, 1, keep_dims=True), 0)


@triton.jit
def offset_of(sequence, cu_ptr, T):
    """Where a packed sequence starts. Clamped: the offsets cannot be checked without waiting for the device."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), T)


@triton.jit
def last_sequence(target, cu_ptr, S, T, STEP, PER_SEQUENCE: tl.constexpr):
    """The last sequence ``s`` with ``cu[s] // STEP + PER_SEQUENCE * s <= target``; 0 where there is none."""
    low = target * 0
    high = low + S
    while low + 1 < high:
        middle = (low + high) // 2
        before = offset_of(middle, cu_ptr, T) // STEP + PER_SEQUENCE * middle <= target
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def first_row(sequence, cu_ptr, T):
    """Where a sequence starts among all rows. Padded input has T rows for each sequence; packed input T in all."""
    if cu_ptr is not None:
        row = offset_of(sequence, cu_ptr, T).to(tl.int64)
    else:
        row = sequence.to(tl.int64) * T
    return row


@triton.jit
def span_of(sequence, cu_ptr, span_ptr, T):
    """First and one past the last real token, counted from the sequence's first row."""
    if cu_ptr is not None:
        begin = 0
        stop = tl.maximum(offset_of(sequence + 1, cu_ptr, T) - offset_of(sequence, cu_ptr, T), 0)
    elif span_ptr is not None:
        span_ptr += 3 * sequence.to(tl.int64)
        begin = tl.load(span_ptr)
        stop = tl.load(span_ptr + 1)
    else:
        begin = 0
        stop = T
    return begin, stop


@triton.jit
def count_of(sequence, cu_ptr, span_ptr, T):
    """How many real tokens a sequence has."""
    if span_ptr is not None:
        count = tl.load(span_ptr + 3 * sequence.to(tl.int64) + 2)
    else:
        count = span_of(sequence, cu_ptr, None, T)[1]
    return count


@triton.jit
def tile_of(slot, cu_ptr, S, T, BLOCK: tl.constexpr):
    """Sequence of a tile slot, and the tile's first token.

    Packed sequence s owns the slots from ``cu[s] // BLOCK + s`` on: as many as its tiles need, whatever the lengths,
    so that ``T // BLOCK + S`` slots do for all and nothing has to be summed beforehand. A slot that none owns gets a
    first token past the end.
    """
    if cu_ptr is not None:
        sequence = last_sequence(slot, cu_ptr, S, T, BLOCK, 1)
        tile = slot - offset_of(sequence, cu_ptr, T) // BLOCK - sequence
        first = tl.where(tile < 0, T, tile * BLOCK)
    else:
        tiles = tl.cdiv(T, BLOCK)
        sequence = slot // tiles
        first = slot % tiles * BLOCK
    return sequence, first


@triton.jit
def sequence_ptr(ptr, sequence, row, stride_b, stride_t, cu_ptr):
    """Pointer to the first token of a sequence in a tensor of any strides."""
    if cu_ptr is not None:
        ptr += row * stride_t
    else:
        ptr += sequence.to(tl.int64) * stride_b
    return ptr


@triton.jit
def slot_of(sequence, cu_ptr, T, threshold):
    """Where the moment of a sequence of ``threshold`` tokens or more lies, see ``row_energy_moment``."""
    slot = sequence
    if cu_ptr is not None:
        slot = offset_of(sequence, cu_ptr, T) // threshold
    return slot


@triton.jit
def real_tokens(token, stop, row, mask_ptr):
    """Which tokens of a tile are real."""
    inside = token < stop
    if mask_ptr is not None:
        inside = tl.load(mask_ptr + row + token, mask=inside, other=0) != 0
    return inside


@triton.jit
def load_rows(ptr, first, stride, keep, column, columns, BLOCK: tl.constexpr):
    """Rows ``first …`` of a matrix, zero where not kept: what the padding holds never enters a product."""
    ptr += tl.cast(first, tl.int64) * stride
    row = tl.arange(0, BLOCK)
    return tl.load(
        ptr + row[:, None] * stride + column[None, :], mask=keep[:, None] & (column < columns)[None, :], other=0.0
    )


@triton.jit
def store_rows(ptr, first, keep, column, columns, values, BLOCK: tl.constexpr):
    """Writes the kept rows of a contiguous matrix from row ``first`` on, in its own dtype."""
    ptr += tl.cast(first, tl.int64) * columns
    row = tl.arange(0, BLOCK)
    tl.store(ptr + row[:, None] * columns + column[None, :], values, mask=keep[:, None] & (column < columns)[None, :])


@triton.jit
def matrix_tile(ptr, i0, j0, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to one tile of a matrix."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return ptr + tl.cast(i0, tl.int64) * pitch + j0 + i[:, None] * pitch + j[None, :]


@triton.jit
def mirrored_tile(ptr, i0, j0, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to the elements ``(j, i)`` that mirror those of one tile of a matrix."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return ptr + tl.cast(j0, tl.int64) * pitch + i0 + i[:, None] + j[None, :] * pitch


@triton.jit
def load_tile(ptr, descriptor, matrix, i0, j0, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile of a square matrix at ``ptr``, the ``matrix``-th of those that a TMA descriptor, if given, covers."""
    if descriptor is not None:
        tile = descriptor.load([(matrix * pitch + i0).to(tl.int32), j0])
    else:
        tile = tl.load(matrix_tile(ptr, i0, j0, pitch, ROWS, COLUMNS))
    return tile


@triton.jit
def store_tile(ptr, descriptor, matrix, i0, j0, pitch, tile):
    if descriptor is not None:
        descriptor.store([(matrix * pitch + i0).to(tl.int32), j0], tile)
    else:
        tl.store(matrix_tile(ptr, i0, j0, pitch, tile.shape[0], tile.shape[1]), tile)


@triton.jit
def load_mirrored(ptr, descriptor, matrix, i0, j0, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The elements ``(j, i)`` that mirror those of a tile, where those are. A descriptor is of tiles as they lie."""
    if descriptor is not None:
        tile = descriptor.load([(matrix * pitch + j0).to(tl.int32), i0]).trans()
    else:
        tile = tl.load(mirrored_tile(ptr, i0, j0, pitch, ROWS, COLUMNS))
    return tile


@triton.jit
def store_mirrored(ptr, descriptor, matrix, i0, j0, pitch, tile):
    """A tile to where it is mirrored."""
    if descriptor is not None:
        descriptor.store([(matrix * pitch + j0).to(tl.int32), i0], tile.trans())
    else:
        tl.store(mirrored_tile(ptr, i0, j0, pitch, tile.shape[0], tile.shape[1]), tile)


@triton.jit
def mask_span(mask_ptr, T, BLOCK: tl.constexpr):
    """First, one past the last, and number of the real tokens of one sample."""
    begin = tl.full((BLOCK,), 2147483647, tl.int32)
    stop = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for t0 in range(0, T, BLOCK):
        token = t0 + tl.arange(0, BLOCK)
        real = tl.load(mask_ptr + token, mask=token < T, other=0) != 0
        begin = tl.where(real, tl.minimum(begin, token), begin)
        stop = tl.where(real, token + 1, stop)
        count += real.to(tl.int32)
    last = tl.max(stop, 0)
    return tl.minimum(tl.min(begin, 0), last), last, tl.sum(count, 0)


@triton.jit
def store_span(span_ptr, sample, begin, stop, count):
    span_ptr += 3 * sample.to(tl.int64)
    tl.store(span_ptr, begin)
    tl.store(span_ptr + 1, stop)
    tl.store(span_ptr + 2, count)


@triton.jit
def span_kernel(mask_ptr, span_ptr, T, BLOCK: tl.constexpr):
    """What ``mask_span`` finds, of each sample: (B, T) → (B, 3)."""
    sample = tl.program_id(0)
    begin, stop, count = mask_span(mask_ptr + sample.to(tl.int64) * T, T, BLOCK)
    store_span(span_ptr, sample, begin, stop, count)
