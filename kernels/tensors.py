"""Tensors as the kernels read them."""

import torch
import triton
from torch import Tensor

from .tiles import span_kernel

TALLEST_TILE = 128


def readable(x: Tensor, tokens: int = -2) -> Tensor:
    """``x`` itself where its rows lie dense and a tile of them is within 32-bit offsets, else a contiguous copy.

    ``tokens`` is the dimension that a tile's rows follow each other in.
    """
    if x.stride(-1) == 1 and x.stride(tokens) * TALLEST_TILE < 2**31:
        return x
    return x.contiguous()


def spans(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask as bytes, and first, one past the last, and number of its real tokens: (B, T), (B, 3)."""
    if mask is None:
        return None, None
    mask = mask.contiguous().view(torch.uint8)
    span = mask.new_empty(mask.shape[0], 3, dtype=torch.int32)
    block = min(triton.next_power_of_2(max(mask.shape[1], 1)), 1024)
    span_kernel[(mask.shape[0],)](mask, span, mask.shape[1], BLOCK=block)
    return mask, span
