"""Tensors as the kernels read them."""

import torch
import triton
from torch import Tensor

from .configs import ALIGNED
from .tiles import span_kernel

TALLEST_TILE = 128
WORD = 16  # bytes that a GPU loads at once, from where they are aligned


def readable(x: Tensor, tokens: int = -2) -> Tensor:
    """``x`` itself where its rows lie dense, begin aligned and are within 32-bit offsets in a tile, else a dense copy.

    ``tokens`` is the dimension that a tile's rows follow each other in. Rows of a width that is not aligned itself
    would gain nothing from where they begin.
    """
    dense = x.stride(-1) == 1 and x.stride(tokens) * TALLEST_TILE < 2**31
    begins = x.data_ptr() % WORD == 0 and all(stride % ALIGNED == 0 for stride in x.stride()[:-1])
    if dense and (x.shape[-1] % ALIGNED != 0 or begins):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def spans(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask as bytes, and first, one past the last, and number of its real tokens: (B, T), (B, 3)."""
    mask = as_bytes(mask)
    if mask is None:
        return None, None
    span = mask.new_empty(mask.shape[0], 3, dtype=torch.int32)
    block = min(triton.next_power_of_2(max(mask.shape[1], 1)), 1024)
    span_kernel[(mask.shape[0],)](mask, span, mask.shape[1], BLOCK=block)
    return mask, span
