"""The command that measures on a GPU runs through without one, so that no minute on a device goes to its mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
SESSION = Path(__file__).parents[1] / "benchmarks" / "gpu_session.py"
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")


@without_a_gpu
def test_a_dry_run_tests_measures_sweeps_and_writes(tmp_path: Path) -> None:
    command = [sys.executable, str(SESSION), "--dry-run", "--minutes", "30", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (result,) = tmp_path.glob("*.json")
    session = json.loads(result.read_text())
    for part in ("tests", "sanitizer"):
        assert session[part]["rc"] == 0
        assert session[part]["counts"]["passed"] > 0
    assert {case["kind"] for case in session["cases"]} == {
        "row energy", "importance loss", "interaction from A", "interaction from q, k", "importance loss, packed",
        "interaction from q, k, packed",
    }  # fmt: skip
    assert all(case["error"] < 1e-4 and case["ms"] > 0 for case in session["cases"])
    assert all(case["fraction_of_matmul"] > 0 and case["fraction_of_copy"] > 0 for case in session["cases"])
    assert [trial["is_table"] for trial in session["sweep"]] == [True, *[False] * (len(session["sweep"]) - 1)]
    assert len(session["sweep"]) > 1
    assert all(trial["difference"] < 1e-5 for trial in session["sweep"])
    (chosen,) = (tmp_path / "tuning").glob("*.json")
    assert set(json.loads(chosen.read_text())["chosen"]) == {trial["name"] for trial in session["sweep"]}
    assert result.with_suffix(".md").read_text() in run.stdout


@without_a_gpu
def test_without_a_gpu_it_says_what_to_do() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(SESSION)], capture_output=True, text=True, env=environment)
    assert run.returncode != 0
    assert "--dry-run" in run.stderr
