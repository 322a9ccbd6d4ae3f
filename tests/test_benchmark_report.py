"""BENCHMARKS.md holds what was measured."""

import pytest

report = pytest.importorskip("report")


def test_the_page_is_made_of_the_kept_runs() -> None:
    runs = report.kept()
    assert runs
    assert report.page(runs) == report.PAGE.read_text(encoding="utf-8")
