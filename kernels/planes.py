"""Float32 tiles as sums of bfloat16 ones, their *planes*, which tensor cores multiply: split once, for many products.

A tile that is not split is one plane, in the dtype of its matrix. In memory a matrix's planes follow each other.
"""

import triton
import triton.language as tl

from .tiles import load_mirrored, load_tile, product, store_mirrored, store_tile


@triton.jit
def split(tile, PLANES: tl.constexpr, DTYPE: tl.constexpr):
    """A float32 tile in DTYPE, or the *planes* that add up to it: rounded to bfloat16, then what that left, twice."""
    if PLANES == 1:
        planes = (tile.to(DTYPE),)
    else:
        first = tile.to(tl.bfloat16)
        left = tile - first.to(tl.float32)
        left = tl.where(tl.abs(left) < float("inf"), left, 0.0)  # of what is not finite
        second = left.to(tl.bfloat16)
        if PLANES == 2:
            planes = (first.to(DTYPE), second.to(DTYPE))
        else:
            third = (left - second.to(tl.float32)).to(tl.bfloat16)
            planes = (first.to(DTYPE), second.to(DTYPE), third.to(DTYPE))
    return planes


@triton.jit
def whole(planes):
    """The float32 tile that was split."""
    tile = planes[0].to(tl.float32)
    for plane in tl.static_range(1, len(planes)):
        tile += planes[plane].to(tl.float32)
    return tile


@triton.jit
def transposed(planes):
    if len(planes) == 1:
        result = (planes[0].trans(),)
    elif len(planes) == 2:
        result = (planes[0].trans(), planes[1].trans())
    else:
        result = (planes[0].trans(), planes[1].trans(), planes[2].trans())
    return result


@triton.jit
def product_of_planes(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` of tiles in planes, the smallest products first, without those below the rounding of what is split:
    three products of two planes, six of three.

    Tensor cores cut off what an accumulator cannot hold, each time in the same direction. Beside three planes that
    shows: their six products start from zero.
    """
    if len(a) == 1:
        acc = product(a[0], b[0], acc, PRECISION)
    elif len(a) == 2:
        acc = product(a[1], b[0], acc, "ieee")
        acc = product(a[0], b[1], acc, "ieee")
        acc = product(a[0], b[0], acc, "ieee")
    else:
        share = product(a[2], b[0], tl.zeros_like(acc), "ieee")
        share = product(a[0], b[2], share, "ieee")
        share = product(a[1], b[1], share, "ieee")
        share = product(a[1], b[0], share, "ieee")
        share = product(a[0], b[1], share, "ieee")
        acc += product(a[0], b[0], share, "ieee")
    return acc


@triton.jit
def load_planes(
    ptr, descriptor, matrix, i0, j0, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr
):
    """:func:`load_tile` of a matrix whose planes follow each other."""
    size = tl.cast(pitch, tl.int64) * pitch
    first = load_tile(ptr, descriptor, matrix * PLANES, i0, j0, pitch, ROWS, COLUMNS)
    if PLANES == 1:
        planes = (first,)
    else:
        second = load_tile(ptr + size, descriptor, matrix * PLANES + 1, i0, j0, pitch, ROWS, COLUMNS)
        if PLANES == 2:
            planes = (first, second)
        else:
            third = load_tile(ptr + 2 * size, descriptor, matrix * PLANES + 2, i0, j0, pitch, ROWS, COLUMNS)
            planes = (first, second, third)
    return planes


@triton.jit
def store_planes(ptr, descriptor, matrix, i0, j0, pitch, planes):
    for plane in tl.static_range(len(planes)):
        start = ptr + plane * (tl.cast(pitch, tl.int64) * pitch)
        store_tile(start, descriptor, matrix * len(planes) + plane, i0, j0, pitch, planes[plane])


@triton.jit
def whole_mirrored(
    ptr, descriptor, matrix, i0, j0, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr
):
    """:func:`load_mirrored` of a matrix in planes, in float32."""
    tile = load_mirrored(ptr, descriptor, matrix * PLANES, i0, j0, pitch, ROWS, COLUMNS).to(tl.float32)
    for plane in tl.static_range(1, PLANES):
        start = ptr + plane * (tl.cast(pitch, tl.int64) * pitch)
        tile += load_mirrored(start, descriptor, matrix * PLANES + plane, i0, j0, pitch, ROWS, COLUMNS).to(tl.float32)
    return tile


@triton.jit
def store_mirrored_planes(ptr, descriptor, matrix, i0, j0, pitch, planes):
    for plane in tl.static_range(len(planes)):
        start = ptr + plane * (tl.cast(pitch, tl.int64) * pitch)
        store_mirrored(start, descriptor, matrix * len(planes) + plane, i0, j0, pitch, planes[plane])
