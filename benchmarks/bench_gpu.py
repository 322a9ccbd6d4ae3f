"""What do the losses cost on a GPU at my length, and what share of a training step is theirs?

The times that count are in ``extra_info``, by events and, for ours, of a CUDA graph, see ``gpu.py``; pytest-benchmark's
own column is what the host waits for the first provider.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bench_training_step import Training, ours, plain, task
from comparison import WRONG, gradients
from gpu import CASES, DTYPES, Case, Peaks, measure, measure_step, providers_of
from pytest_benchmark.fixture import BenchmarkFixture
from safr_fast.kernels.timing import Timer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU to measure on")
SAMPLES = 32


@pytest.fixture(scope="module")
def timer() -> Timer:
    return Timer.of(torch.device("cuda"))


@pytest.fixture(scope="module")
def peaks(timer: Timer) -> Peaks:
    return Peaks.measured(timer, "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def bench_loss(benchmark: BenchmarkFixture, case: Case, timer: Timer, peaks: Peaks) -> None:
    benchmark.group = f"{case.kind}, on a GPU"
    length = max(case.lengths, default=case.shape[-2])
    benchmark.extra_info |= {"case": "×".join(map(str, case.shape)), "length": length}
    rows = {provider.name: measure(case, provider, timer, peaks, "cuda") for provider in providers_of(case)}
    inputs = case.inputs("cuda", torch.bfloat16)
    record(benchmark, rows, peaks, lambda: gradients(case.losses("cuda")["ours"], inputs))


@pytest.mark.parametrize("length", [256, 512, 1024])
def bench_training_step(benchmark: BenchmarkFixture, length: int, timer: Timer, peaks: Peaks) -> None:
    benchmark.group = f"training step of the paper's model, {SAMPLES} samples, on a GPU"
    benchmark.extra_info |= {"case": f"T={length}", "length": length}
    training = Training([length] * SAMPLES, "cuda")
    rows, steps = {}, {}
    for name, loss, exact in (("ours", ours, plain), ("eager", plain, plain), ("no regulariser", task, task)):
        for dtype in DTYPES:
            key = f"{name} {dtype}"
            provider = training.provider(key, loss, exact, "highest", DTYPES[dtype])
            steps[key] = provider.step
            rows[key] = measure_step(provider.error, partial(steps.__getitem__, key), timer, "cuda")
    record(benchmark, rows, peaks, steps["ours bfloat16"])
    benchmark.extra_info["regularisers_share"] = {
        f"{name} {dtype}": 1 - rows[f"no regulariser {dtype}"]["ms"] / rows[f"{name} {dtype}"]["ms"]
        for name in ("ours", "eager")
        for dtype in DTYPES
        if "ms" in rows[f"{name} {dtype}"]
    }


def record(
    benchmark: BenchmarkFixture, rows: dict[str, dict[str, Any]], peaks: Peaks, step: Callable[[], object]
) -> None:
    """``rows`` by provider, the first of which has to be right; and the host's time for ``step``."""
    subject, first = next(iter(rows.items()))
    assert first.get("error", math.inf) < WRONG, f"{subject}: {first}"
    assert "ms" in first, f"{subject}: {first}"
    for row in rows.values():
        row["times_as_long"] = row["ms"] / first["ms"] if "ms" in row else None
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name(),
        "matmul_tflops": peaks.matmul_tflops,
        "copy_gbytes": peaks.copy_gbytes,
        "providers": {name: {"error": math.nan, "ms": None} | row for name, row in rows.items()},
    }

    def waited_for() -> None:
        step()
        torch.cuda.synchronize()

    benchmark.pedantic(waited_for, rounds=10, warmup_rounds=1)
