"""What do two threads bring? Each case on one thread and on two, in turn, from 4,096 tokens up."""

from collections.abc import Callable

import formulas
import pytest
import torch
from bench_interaction import query_key, weights
from bench_row_energy import hidden
from comparison import Loss, Problem, Provider, compare, exact_gradients, gradients
from pytest_benchmark.fixture import BenchmarkFixture
from ragged import Layout, imdb_lengths
from torch import Tensor

import safr_fast as sf


def packed_importance() -> Problem:
    lengths = imdb_lengths()
    losses = Layout.of(lengths).importance()
    return losses["ours"], losses["eager"], (hidden(1, sum(lengths))[0],)


def from_qk(samples: int, heads: int, length: int) -> Problem:
    return sf.interaction_loss_from_qk, formulas.interaction_from_qk, query_key(samples, heads, length, sharpness=2.0)


def importance(*shape: int) -> Problem:
    return sf.importance_loss, formulas.importance, (hidden(*shape),)


# Made when asked for.
CASES: dict[str, Callable[[], Problem]] = {
    "importance loss, 32 samples of 128": lambda: importance(32, 128),
    "importance loss, 8 samples of 512": lambda: importance(8, 512),
    "importance loss, 1 sample of 4096": lambda: importance(1, 4096),
    "importance loss, IMDB's lengths, packed": packed_importance,
    "interaction from q and k, 32 samples of 128, 2 heads": lambda: from_qk(32, 2, 128),
    "interaction from q and k, 8 samples of 512, 1 head": lambda: from_qk(8, 1, 512),
    "interaction from q and k, 1 sample of 4096, 1 head": lambda: from_qk(1, 1, 4096),
    "interaction from A, 1 sample of 4096, 1 head": lambda: (
        sf.interaction_loss,
        formulas.interaction,
        (weights(1, 1, 4096, 2.0),),
    ),
}


@pytest.mark.parametrize("threads", [2], indirect=True, ids=["2-threads"])
@pytest.mark.parametrize("case", CASES)
def bench_threads(benchmark: BenchmarkFixture, case: str) -> None:
    benchmark.group = "two threads and one, 4,096 tokens and more"
    benchmark.extra_info |= {"case": case}
    loss, oracle, inputs = CASES[case]()
    expected = exact_gradients(oracle, inputs)
    compare(benchmark, [on_threads(count, loss, inputs, expected) for count in (2, 1)])


def on_threads(count: int, loss: Loss, inputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Provider:
    def step() -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return gradients(loss, inputs)
        finally:
            torch.set_num_threads(before)

    return Provider(f"{count} thread{'s' if count > 1 else ''}", step, expected)
