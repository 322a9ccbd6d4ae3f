"""What do row energy and the importance loss cost at my length? 8,192 tokens of width 256, in samples of T."""

import formulas
import pytest
import torch
from comparison import compare
from providers import all_providers
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import safr_fast as sf

TOKENS, WIDTH = 8192, 256
LENGTHS = [128, 256, 512, 1024, 2048, 4096]


def hidden(samples: int, length: int) -> Tensor:
    return torch.randn(samples, length, WIDTH, generator=torch.Generator().manual_seed(0))


def row_energy(h: Tensor) -> Tensor:
    energy, squared_norm = sf.row_energy(h)
    return (energy + squared_norm).sum() / h.shape[-1]


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("length", LENGTHS)
def bench_row_energy(benchmark: BenchmarkFixture, length: int) -> None:
    benchmark.group = f"row energy, {TOKENS:,} tokens of width {WIDTH}"
    samples = TOKENS // length
    benchmark.extra_info |= {"case": f"T={length}", "length": length}
    providers = all_providers(row_energy, formulas.row_energy, [hidden(samples, length)], formulas.row_energy_by_moment)
    compare(benchmark, providers, samples * formulas.row_energy_floor(length, WIDTH))


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096])
def bench_importance_loss(benchmark: BenchmarkFixture, length: int) -> None:
    benchmark.group = f"importance loss, {TOKENS:,} tokens of width {WIDTH}"
    samples = TOKENS // length
    benchmark.extra_info |= {"case": f"T={length}", "length": length}
    providers = all_providers(
        sf.importance_loss, formulas.importance, [hidden(samples, length)], formulas.importance_by_moment
    )
    compare(benchmark, providers, samples * formulas.row_energy_floor(length, WIDTH))


@pytest.mark.parametrize("length", [32, 64, 128, 256])
def bench_batch_of_32(benchmark: BenchmarkFixture, length: int) -> None:
    """The paper's own shapes, where the cost of a call counts."""
    benchmark.group = f"importance loss, 32 samples of width {WIDTH}"
    benchmark.extra_info |= {"case": f"T={length}", "length": length}
    providers = all_providers(
        sf.importance_loss, formulas.importance, [hidden(32, length)], formulas.importance_by_moment
    )
    compare(benchmark, providers, 32 * formulas.row_energy_floor(length, WIDTH))
