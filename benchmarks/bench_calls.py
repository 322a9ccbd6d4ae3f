"""What does a call cost when there is nothing to do, and how long does a large dictionary take?"""

from functools import partial

import pytest
import torch
from comparison import Provider, compare
from formulas import row_energy_floor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import safr_fast as sf
from safr_fast.functional import Impl

CALLS = 100
DICTIONARY = 131_072, 2_304


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def bench_one_token(benchmark: BenchmarkFixture, direction: str) -> None:
    """100 calls, each on one sample of one token of width 1."""
    benchmark.group = f"{CALLS} calls of row_energy on one token"
    benchmark.extra_info |= {"case": direction}
    h = torch.ones(1, 1, 1)

    def calls(impl: Impl) -> list[Tensor]:
        for _ in range(CALLS):
            leaf = h.requires_grad_(direction != "forward")
            _, squared_norm = sf.row_energy(leaf, impl=impl)
            if leaf.requires_grad:
                torch.autograd.grad(squared_norm.sum(), leaf)
        return [squared_norm.detach()]

    expected = [torch.ones(1, 1, dtype=torch.float64)]
    compare(benchmark, [Provider(impl, partial(calls, impl), expected) for impl in ("cpp", "reference")])


@pytest.mark.parametrize("threads", [2], indirect=True, ids=["2-threads"])
def bench_dictionary(benchmark: BenchmarkFixture, threads: int) -> None:
    """The capacity of each feature of a dictionary as wide as Gemma 2 2B's residual stream; checked on 64 of them."""
    features, width = DICTIONARY
    benchmark.group = f"capacity of a dictionary of {features:,} × {width:,}"
    benchmark.extra_info |= {"case": "forward", "length": features}
    d = torch.randn(features, width, generator=torch.Generator().manual_seed(0))
    some = torch.arange(0, features, features // 64)
    gram_rows = d[some].double() @ d.double().mT  # (64, N)
    own = gram_rows[torch.arange(len(some)), some]
    expected = [own.square() / gram_rows.square().sum(-1)]
    del gram_rows
    with torch.no_grad():
        ours = Provider("ours highest", lambda: [sf.capacity(d)[some]], expected)
        compare(benchmark, [ours], row_energy_floor(features, width, backward=False))
