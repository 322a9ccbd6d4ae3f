"""What does the interaction cost at my length? Eight heads of 64, from stored weights and from queries and keys."""

from collections.abc import Sequence

import formulas
import pytest
import torch
from comparison import Provider, compare
from providers import all_providers
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import safr_fast as sf

HEADS, WIDTH = 8, 64
# How far apart the scores are. A fresh model, whose embeddings are multiplied by √E, attends nearly one-hot: its small
# weights and their products are denormal, and plain formulas slow down tenfold. A trained one spreads its attention.
# Flat attention is no case to time: on it the plain formula in float32 is wrong.
SHARPNESS = {"fresh": 8.0, "trained": 2.0}
# Cost is linear in heads: fewer of them keep the long cases short.
ONE_THREAD = [(1, 128, HEADS), (1, 256, HEADS), (1, 512, HEADS), (1, 1024, HEADS), (1, 2048, 2), (1, 4096, 1)]
CASES = [*ONE_THREAD, (2, 128, HEADS), (2, 256, HEADS), (2, 512, HEADS), (2, 1024, HEADS)]


def query_key(samples: int, heads: int, length: int, sharpness: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(samples, heads, length, WIDTH, generator=generator) for _ in range(2))
    return q * sharpness, k


def weights(samples: int, heads: int, length: int, sharpness: float) -> Tensor:
    q, k = query_key(samples, heads, length, sharpness)
    return (q @ k.mT / WIDTH**0.5).softmax(-1)


@pytest.mark.parametrize(("threads", "length", "heads"), CASES, indirect=["threads"])
def bench_from_attention(benchmark: BenchmarkFixture, length: int, heads: int) -> None:
    benchmark.group = "interaction from stored attention, one sample"
    benchmark.extra_info |= {"case": f"T={length}, {heads} heads", "length": length, "heads": heads}
    inputs = [weights(1, heads, length, SHARPNESS["trained"])]
    floor = formulas.interaction_floor(length, heads)
    compare(benchmark, all_providers(sf.interaction_loss, formulas.interaction, inputs), floor)


def from_qk(inputs: Sequence[Tensor]) -> list[Provider]:
    return all_providers(sf.interaction_loss_from_qk, formulas.interaction_from_qk, inputs, dynamic=False)


@pytest.mark.parametrize(("threads", "length", "heads"), CASES, indirect=["threads"])
def bench_from_qk(benchmark: BenchmarkFixture, length: int, heads: int) -> None:
    benchmark.group = f"interaction from q and k of width {WIDTH}, one sample"
    benchmark.extra_info |= {"case": f"T={length}, {heads} heads", "length": length, "heads": heads}
    inputs = query_key(1, heads, length, SHARPNESS["trained"])
    floor = formulas.interaction_floor(length, heads, WIDTH)
    compare(benchmark, from_qk(inputs), floor)


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("length", [128, 256])
def bench_batch_of_32(benchmark: BenchmarkFixture, length: int, sharpness: str) -> None:
    """The paper's own shapes, with attention as a fresh and as a trained model has it."""
    benchmark.group = f"interaction from q and k of width 32, 32 samples of {HEADS} heads"
    benchmark.extra_info |= {"case": f"T={length}, {sharpness}"}
    inputs = [x[..., :32] for x in query_key(32, HEADS, length, SHARPNESS[sharpness])]
    floor = 32 * formulas.interaction_floor(length, HEADS, 32)
    compare(benchmark, from_qk(inputs), floor)


def bench_flat_attention(benchmark: BenchmarkFixture) -> None:
    """Queries and keys as at initialisation: weights near 1/T, where the plain formula in float32 cancels."""
    benchmark.group = "interaction from q and k of width 64, flat attention"
    benchmark.extra_info |= {"case": "T=1024, 2 heads"}
    inputs = query_key(1, 2, 1024, 0.1)
    floor = formulas.interaction_floor(1024, 2, WIDTH)
    compare(benchmark, from_qk(inputs), floor)
