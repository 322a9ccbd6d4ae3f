"""BENCHMARKS.md holds what was measured, and what measures can be run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
report = pytest.importorskip("report")


def test_the_page_is_made_of_the_kept_runs() -> None:
    runs = report.kept()
    assert runs
    assert report.page(runs) == report.PAGE.read_text(encoding="utf-8")


def test_every_suite_can_be_collected() -> None:
    """Nothing else imports them: one that names what another no longer has would fail where it is to measure."""
    suites = sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "benchmarks"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout[-3000:]
    assert {line.split("::")[0] for line in run.stdout.splitlines() if "::" in line} == {
        f"benchmarks/{name}" for name in suites
    }
