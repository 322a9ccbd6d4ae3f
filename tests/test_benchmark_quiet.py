"""Benchmarks leave out what a neighbour on the processor slows."""

import pytest
from quiet import Stopwatch, undisturbed


@pytest.fixture(autouse=True)
def fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "fastest", 100.0)
    monkeypatch.setattr("quiet.PAUSE", 0.0)


def test_a_disturbed_call_is_timed_again_until_none_is() -> None:
    rates = iter([100, 40, 40, 100, 100, 90])  # before and after each try: the third is not disturbed
    calls: list[None] = []
    watch = Stopwatch(patience=60, probe=lambda threads: next(rates))
    watch.seconds(lambda: calls.append(None))
    assert (len(calls), watch.rate, next(rates, None)) == (3, 90, None)


def test_patience_ends() -> None:
    calls: list[None] = []
    watch = Stopwatch(patience=0, probe=lambda threads: 40.0)
    watch.seconds(lambda: calls.append(None))
    assert (len(calls), watch.rate) == (1, 40)


def test_disturbed_rounds_are_left_out_where_enough_others_are_there() -> None:
    assert undisturbed([1, 9, 2, 3], [99, 40, 90, 70]) == ([1, 2, 3], True)
    assert undisturbed([1, 9, 2, 8], [99, 40, 90, 50]) == ([1, 9, 2, 8], False)


def test_a_faster_probe_judges_what_came_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "fastest", 200.0)
    assert undisturbed([1, 9, 2, 3], [199, 100, 190, 170]) == ([1, 2, 3], True)
