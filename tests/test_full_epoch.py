"""The measurement of an epoch of whole reviews: on a few of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import SHARED, backend_names

ROOT = Path(__file__).parents[1]
IMDB = SHARED / "data" / "imdb"


@pytest.mark.skipif(not IMDB.is_dir(), reason=f"no data folder {IMDB}")
@pytest.mark.skipif("cpp:baseline" not in backend_names(), reason="the C++ extension is not built")
def test_the_terms_are_timed_within_the_epoch(tmp_path: Path) -> None:
    out = tmp_path / "epoch.json"
    command = [ROOT / "benchmarks" / "full_epoch.py", "--data-dir", IMDB, "--out", out, "--texts", "40"]
    subprocess.run([sys.executable, *command, "--batch-tokens", "2048", "--plain-steps", "0"], check=True)
    measured = json.loads(out.read_text(encoding="utf-8"))
    assert measured["reviews"] == 40
    assert 40 * 10 <= measured["tokens"] <= 40 * 2470  # the shortest and the longest review
    assert measured["share"].keys() == {"importance", "interaction"}
    assert all(0 < share < 1 for share in measured["share"].values())
    assert sum(measured["share"].values()) < 1
    assert measured["least_share_in_float32"] > 0
    assert measured["peak_mib"] > 100
