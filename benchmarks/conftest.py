import platform

import pytest
import torch

import safr_fast as sf


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_flags"] = torch.backends.cpu.get_cpu_capability()
    machine_info["platform"] = platform.platform()
    machine_info["backends"] = {backend.name: backend.detail for backend in sf.available_backends()}


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=[1, 2], ids=lambda threads: f"{threads} threads")
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The comparisons themselves; pytest-benchmark's own table shows the subject alone."""
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if "times_faster_than" in bench.extra_info]
    if not rows:
        return
    terminalreporter.section("forward + backward, medians side by side")
    for bench in rows:
        info = bench.extra_info
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in info["median_ms"].items())
        ratios = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in info["times_faster_than"].items())
        subject = next(iter(info["error"]))
        terminalreporter.write_line(f"{bench.name}: {times}; {ratios}; error {info['error'][subject]:.0e}")
