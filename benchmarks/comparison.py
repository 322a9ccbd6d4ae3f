"""One way of comparing: correct first, then timed side by side in one run, medians, the answer in ``extra_info``."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

# Relative error of a gradient beyond which a provider is wrong rather than imprecise, and is not timed.
WRONG = 5e-2

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Provider:
    """A way of computing a loss of the inputs."""

    name: str
    loss: Loss
    dtype: torch.dtype = torch.float32


def gradients(loss: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def compare(
    benchmark: BenchmarkFixture,
    subject: Provider,
    rivals: Sequence[Provider],
    inputs: Sequence[Tensor],
    oracle: Loss,
    rounds: int,
) -> None:
    """Times forward + backward of ``subject``, with every rival between its rounds.

    ``extra_info`` gets each provider's error of the gradient against ``oracle`` in float64, its median in milliseconds,
    and how many times slower than the subject each rival is.
    """
    exact = gradients(oracle, [x.double() for x in inputs])
    steps, errors = {}, {}
    for provider in (subject, *rivals):
        cast = [x.to(provider.dtype) for x in inputs]
        errors[provider.name] = max(
            relative_error(result, expected)
            for result, expected in zip(gradients(provider.loss, cast), exact, strict=True)
        )
        if errors[provider.name] < WRONG:
            steps[provider.name] = lambda loss=provider.loss, cast=cast: gradients(loss, cast)
    assert subject.name in steps, f"{subject.name} is wrong: error {errors[subject.name]:.1e}"
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals if rival.name in steps}

    def run_rivals() -> None:
        for name, times in seconds.items():
            start = time.perf_counter()
            steps[name]()
            times.append(time.perf_counter() - start)

    benchmark.pedantic(steps[subject.name], setup=run_rivals, rounds=rounds, warmup_rounds=2)
    own = benchmark.stats.stats.median
    benchmark.extra_info["error"] = errors
    benchmark.extra_info["median_ms"] = {subject.name: own * 1e3} | {
        name: statistics.median(times) * 1e3 for name, times in seconds.items()
    }
    benchmark.extra_info["times_faster_than"] = {
        name: statistics.median(times) / own for name, times in seconds.items()
    }
