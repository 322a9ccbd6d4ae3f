"""What do two threads bring? Each case on one thread and on two, in turn, from 4,096 tokens up."""

from collections.abc import Callable
from functools import partial

import formulas
import pytest
from bench_interaction import query_key, weights
from bench_row_energy import WIDTH, hidden
from comparison import Problem, Provider, compare, exact_gradients, gradients
from pytest_benchmark.fixture import BenchmarkFixture
from ragged import Layout, imdb_lengths

import safr_fast as sf


def packed_importance() -> Problem:
    lengths = imdb_lengths()
    losses = Layout.of(lengths).importance()
    floor = sum(formulas.row_energy_floor(length, WIDTH) for length in lengths)
    return losses["ours"], losses["eager"], (hidden(1, sum(lengths))[0],), floor


def importance(samples: int, length: int) -> Problem:
    floor = samples * formulas.row_energy_floor(length, WIDTH)
    return sf.importance_loss, formulas.importance, (hidden(samples, length),), floor


def from_qk(samples: int, heads: int, length: int) -> Problem:
    inputs = query_key(samples, heads, length, sharpness=2.0)
    floor = samples * formulas.interaction_floor(length, heads, inputs[0].shape[-1])
    return sf.interaction_loss_from_qk, formulas.interaction_from_qk, inputs, floor


def from_attention(heads: int, length: int) -> Problem:
    floor = formulas.interaction_floor(length, heads)
    return sf.interaction_loss, formulas.interaction, (weights(1, heads, length, 2.0),), floor


# Made when asked for.
CASES: dict[str, Callable[[], Problem]] = {
    "importance loss, 32 samples of 128": lambda: importance(32, 128),
    "importance loss, 8 samples of 512": lambda: importance(8, 512),
    "importance loss, 1 sample of 4096": lambda: importance(1, 4096),
    "importance loss, IMDB's lengths, packed": packed_importance,
    "interaction from q and k, 32 samples of 128, 2 heads": lambda: from_qk(32, 2, 128),
    "interaction from q and k, 8 samples of 512, 1 head": lambda: from_qk(8, 1, 512),
    "interaction from q and k, 1 sample of 4096, 1 head": lambda: from_qk(1, 1, 4096),
    "interaction from A, 1 sample of 4096, 1 head": lambda: from_attention(1, 4096),
}


@pytest.mark.parametrize("threads", [2], indirect=True, ids=["2-threads"])
@pytest.mark.parametrize("case", CASES)
def bench_threads(benchmark: BenchmarkFixture, case: str) -> None:
    benchmark.group = "two threads and one, 4,096 tokens and more"
    benchmark.extra_info |= {"case": case}
    loss, oracle, inputs, floor = CASES[case]()
    expected = exact_gradients(oracle, inputs)
    step = partial(gradients, loss, inputs)
    providers = [Provider(name, step, expected, threads=count) for name, count in (("2 threads", 2), ("1 thread", 1))]
    compare(benchmark, providers, floor)
