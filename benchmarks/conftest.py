import platform
from collections.abc import Iterator

import pytest
import torch
from quiet import usable_cpus

import safr_fast as sf


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the cases of minutes, too, which a run leaves out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long", False):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run it with --long"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)
    machine_info["torch"] = torch.__version__
    machine_info["cpus"] = len(usable_cpus())
    machine_info["platform"] = f"{platform.system()} {platform.machine()}"
    machine_info["backends"] = {backend.name: backend.detail for backend in sf.available_backends()}


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One, unless a benchmark is parametrised otherwise."""
    count = getattr(request, "param", 1)
    if count > len(usable_cpus()):
        pytest.skip(f"needs {count} processors")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The comparisons themselves; pytest-benchmark's own table shows each case's first provider alone."""
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if "providers" in bench.extra_info]
    if not rows:
        return
    terminalreporter.section("medians side by side")
    for bench in rows:
        times = ", ".join(
            f"{name} {p.get('why', 'wrong') if p['ms'] is None else format(p['ms'], '.3g') + ' ms'} ({p['error']:.0e})"
            for name, p in bench.extra_info["providers"].items()
        )
        shares = ", ".join(
            f"{name} {share:.0%}" for name, share in bench.extra_info.get("regularisers_share", {}).items()
        )
        of_step = f" | regularisers' share of the step: {shares}" if shares else ""
        terminalreporter.write_line(f"{bench.group} | {bench.extra_info['case']} | {times}{of_step}")
