"""What the GPU suites do about time, rates and caches, as far as it can be tried without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
gpu = pytest.importorskip("gpu")
report = pytest.importorskip("report")
timing = pytest.importorskip("safr_fast.kernels.timing")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class PretendDevice:
    """Runs take as long as given, in turn, the last for ever; time passes by nothing else."""

    def __init__(self, *milliseconds: float) -> None:
        self.left, self.now, self.runs = list(milliseconds), 0.0, 0

    def once(self, step: timing.Step) -> float:
        self.runs += 1
        ms = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        self.now += ms / 1e3
        return ms

    def timer(self, seconds: float) -> timing.Timer:
        return timing.Timer(self.once, seconds, lambda: self.now)


def test_the_median_counts_once_clocks_are_warm() -> None:
    device = PretendDevice(60.0, 50.0, *[20.0, 30.0, 90.0] * 3, 25.0)
    assert device.timer(0.4).milliseconds(lambda: None) == 30.0
    assert device.runs == 2 + 9


def test_a_long_step_is_timed_a_few_times_and_a_short_one_not_for_ever() -> None:
    long, short = PretendDevice(5e3), PretendDevice(1e-3)
    assert long.timer(1.0).milliseconds(lambda: None) == 5e3
    assert long.runs == 1 + timing.RUNS[0]
    short.timer(1e-4).milliseconds(lambda: None)
    assert short.runs <= 101 + timing.RUNS[1]


def test_a_step_is_compiled_before_it_is_timed() -> None:
    calls = []
    device = PretendDevice(1.0)
    device.timer(0.0).milliseconds(lambda: calls.append(device.runs))
    assert calls[0] == 0


@pytest.mark.parametrize("mib", [4, 50, 126, 256])
def test_more_is_written_between_runs_than_caches_hold(mib: int) -> None:
    assert timing.evicting_bytes(mib << 20) >= max(4 * mib << 20, 512 << 20)


def test_rates_are_over_what_the_process_reaches() -> None:
    peaks = gpu.Peaks({"bfloat16": 800.0, "float32": 50.0}, 3000.0)
    assert peaks.rates(2.0, 400e9, 3e9, "bfloat16") == {
        "tflops": 200.0, "fraction_of_matmul": 0.25, "gbytes": 1500.0, "fraction_of_copy": 0.5
    }  # fmt: skip
    assert peaks.rates(2.0, 50e9, None, "float32") == {"tflops": 25.0, "fraction_of_matmul": 0.5}


def test_cases_are_those_of_the_roofline_with_its_floors() -> None:
    from safr_fast.kernels import roofline

    long = gpu.Case.query_key(32, 8, 8192, 64)
    assert long in gpu.CASES
    assert long.floor == pytest.approx(roofline.interaction(256, 8192, 64, "").floor, rel=0.02)  # and of the scores
    tokens = gpu.Case.hidden("importance loss", 32, 128, 256)
    assert tokens in gpu.CASES
    assert tokens.floor == roofline.importance(32, 128, 256, "").floor
    assert gpu.Case.attention(2, 3, 5).least_bytes(torch.bfloat16) == 2 * 2 * 3 * 25 * 2
    assert gpu.Case.query_key(2, 3, 5, 4).least_bytes(torch.float32) == 2 * 2 * 2 * 3 * 5 * 4 * 4


def test_providers_are_those_of_the_cpu_and_bfloat16() -> None:
    names = [provider.name for provider in gpu.providers_of(gpu.Case.hidden("row energy", 1, 8, 4))]
    assert names == [
        "ours bfloat16", "eager bfloat16", "ours float32 highest", "eager float32", "compiled bfloat16",
        "algebra compiled bfloat16", "ours float32 high", "ours float32 medium", "compiled float32",
        "algebra compiled float32", "eager float32 high", "compiled float32 high",
    ]  # fmt: skip
    longest = gpu.Case.query_key(32, 8, 8192, 64)
    assert {provider.dtype for provider in gpu.providers_of(longest)} == {"bfloat16"}
    names = [provider.name for provider in gpu.providers_of(gpu.Case.attention(1, 1, 8))]
    assert not any("algebra" in name for name in names)
    names = [provider.name for provider in gpu.providers_of(gpu.Case.packed_query_key([5, 3], 2, 4))]
    assert {name.partition(" bfloat16")[0] for name in names if "bfloat16" in name} == {
        "ours", "ours padded", "eager", "compiled"
    }  # fmt: skip


@pytest.mark.parametrize("case", gpu.DRY_CASES[-2:], ids=lambda case: case.kind)
def test_packed_cases_pad_what_they_compare_with(case: "gpu.Case") -> None:
    inputs = case.inputs("cpu", torch.float32)
    losses = case.losses("cpu")
    for name in ("ours", "ours padded"):
        torch.testing.assert_close(losses[name](*inputs), losses["eager"](*inputs))


@pytest.mark.parametrize(("error", "why"), [(0.2, "wrong"), (float("nan"), "wrong"), (None, "ZeroDivisionError")])
def test_what_is_wrong_or_fails_is_not_timed(error: float | None, why: str) -> None:
    timer = timing.Timer(lambda step: pytest.fail("was timed"), 0.0)
    row = gpu.measure_step(lambda: 1 / 0 if error is None else error, lambda: pytest.fail("was run"), timer, "cpu")
    assert why in row["why"]
    assert "ms" not in row


def test_precision_is_that_of_the_provider_and_put_back() -> None:
    seen = []
    before = torch.get_float32_matmul_precision()
    timer = timing.Timer(timing.once_by_clock, 0.0)
    gpu.measure_step(
        lambda: 0.0, lambda: lambda: seen.append(torch.get_float32_matmul_precision()), timer, "cpu", "high"
    )
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_the_suite_is_skipped_and_says_why() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--benchmark-only", str(BENCHMARKS / "bench_gpu.py")]
    # A parallel test run's workers would have the benchmarks believe that they run in parallel too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, env=environment)
    assert run.returncode in (0, 5), run.stdout[-3000:]
    assert "PyTorch sees no GPU to measure on" in run.stdout
    assert f"{len(gpu.CASES) + 3} skipped" in run.stdout


def test_the_report_gives_gpu_cases_a_table_of_their_own() -> None:
    case = {
        "group": "row energy, on a GPU", "rounds": 10, "case": "32×512×256", "length": 512, "device": "A GPU",
        "matmul_tflops": {"bfloat16": 800.0}, "copy_gbytes": 3000.0,
        "providers": {
            "ours bfloat16": {"error": 1e-3, "ms": 0.5, "graph_ms": 0.4, "times_as_long": 1.0,
                              "fraction_of_matmul": 0.3, "fraction_of_copy": 0.1, "peak_mib": 8.0},
            "eager bfloat16": {"error": float("nan"), "ms": None, "why": "OutOfMemoryError: 34 GiB"},
        },
    }  # fmt: skip
    run = {"machine": "CPU", "cpus": 1, "level": "none", "versions": {}, "date": "2026-01-01", "cases": [case]}
    page = report.page([("name", json.loads(json.dumps(run)))])
    assert "A GPU, cold L2. `torch.mm` of bfloat16 800 TFLOP/s; a copy 3000 GB/s." in page
    assert "| 32×512×256 | ours bfloat16 | 0.5 | 1.00 | 0.4 | 1e-03 | 0.30 | 0.10 | 8 |" in page
    assert "|  | eager bfloat16 | OutOfMemoryError: 34 GiB |" in page
