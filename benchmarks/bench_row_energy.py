"""What does the importance loss cost at my length? 8,192 tokens of width 256, in samples of T."""

import pytest
import torch
from comparison import Provider, compare
from torch import Tensor

import safr_fast as sf

TOKENS, WIDTH = 8192, 256


def plain(h: Tensor) -> Tensor:
    """√(P/E) as the formula is written."""
    gram = h @ h.mT
    overlap = gram.square().masked_fill(torch.eye(h.shape[-2], dtype=torch.bool, device=h.device), 0)
    return (overlap.sum(-1) / h.square().sum(-1) / h.shape[-1]).sqrt().mean()


def moment(h: Tensor) -> Tensor:
    """The best that plain PyTorch can do at length: R = hᵀ(hᵀh)h − n2²."""
    squared_norm = h.square().sum(-1)
    energy = ((h @ (h.mT @ h)) * h).sum(-1) - squared_norm.square()
    return (energy / squared_norm / h.shape[-1]).sqrt().mean()


@pytest.mark.parametrize("length", [128, 256, 512, 1024, 4096])
def bench_importance_loss(benchmark, length: int, precision: str, threads: int) -> None:
    benchmark.group = f"importance loss, {TOKENS} tokens of width {WIDTH}"
    h = torch.randn(TOKENS // length, length, WIDTH, generator=torch.Generator().manual_seed(0))
    rivals = [Provider("eager", plain), Provider("moment eager", moment)]
    compare(benchmark, Provider("safr_fast", sf.importance_loss), rivals, [h], plain, rounds=15 if length < 4096 else 7)


@pytest.mark.parametrize("length", [32, 64, 128])
def bench_small_batch(benchmark, length: int, precision: str, threads: int) -> None:
    """The paper's own shapes, where the cost of a call counts."""
    benchmark.group = "importance loss, batch of 32"
    h = torch.randn(32, length, WIDTH, generator=torch.Generator().manual_seed(0))
    compare(benchmark, Provider("safr_fast", sf.importance_loss), [Provider("eager", plain)], [h], plain, rounds=50)
