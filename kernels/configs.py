"""Tile sizes and arithmetic by architecture, dtype and width. No Triton here: the ops' fake versions ask too."""

from dataclasses import dataclass
from typing import Any

import torch

WIDEST_ROW = 256  # features of a token that one program can keep


@dataclass(frozen=True)
class Config:
    """A kernel's tiles, tokens by the tokens they meet by features, and how a program runs."""

    rows: int
    columns: int
    features: int
    out: int = 0  # features of a gradient tile
    num_warps: int = 4
    num_stages: int = 2

    @property
    def execution(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def config(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Config:
    """The configuration of a kernel for rows of ``width`` features."""
    block = width_block(width, WIDEST_ROW)
    return {
        "token": Config(64, 64, block),
        "token_backward": Config(64, 64, block),
        "wide": Config(64, 64, 64),
        "wide_backward": Config(64, 64, 64, 128),
        "moment": Config(64, 0, min(block, 64)),
        "quadratic_form": Config(64, 0, min(block, 64)),
        "moment_backward": Config(64, 0, min(block, 64), min(block, 128)),
        "interaction": Config(64, 64, 64),
        "packed": Config(64, 64, min(block, 128)),
        "softmax": Config(64, 64, min(block, 128)),
        "query_key_gradient": Config(64, 64, min(block, 128)),
    }[kernel]


def moment_threshold(E: int, dtype: torch.dtype, precision: str) -> int:
    """Tokens from which the feature moment takes fewer operations than the token Gram, and enough to launch it."""
    return max(2 * E, 256)


def product_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How float32 products are made, see ``tiles.product``. The interpreter knows no splitting.

    float16 input meets them where it is multiplied by what is derived from it, whose range float16 lacks.
    """
    if device.type == "cpu" or dtype == torch.bfloat16:
        return "ieee"
    if dtype == torch.float16:
        return "bf16x3"
    return {"highest": "bf16x6", "high": "bf16x3", "medium": "bf16"}[torch.get_float32_matmul_precision()]


def moment_guard(dtype: torch.dtype) -> float:
    """Share of n2² under which a row energy made from the moment is made again from the token Gram."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "medium":
        return 0.05
    return 0.25


def width_block(width: int, largest: int) -> int:
    """The power of two that holds ``width`` features, from the least a product can have up to ``largest``."""
    block = 16
    while block < min(width, largest):
        block *= 2
    return block
