"""Benchmarks leave out what a neighbour on the processor slows."""

import sys

import pytest
from support import BENCHMARKS

sys.path.append(str(BENCHMARKS))
from quiet import Stopwatch, undisturbed


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "fastest", 100.0)
    monkeypatch.setattr("quiet.PAUSE", 0.0)


@pytest.mark.usefixtures("fastest")
def test_a_disturbed_call_is_timed_again_until_none_is() -> None:
    rates = iter([100, 40, 40, 100, 90])  # before and after, if it was quiet before: the third try is not disturbed
    calls: list[None] = []
    watch = Stopwatch(patience=60, probe=lambda: next(rates))
    watch.seconds(lambda: calls.append(None))
    assert (len(calls), watch.was_quiet, next(rates, None)) == (3, True, None)


@pytest.mark.usefixtures("fastest")
def test_patience_ends() -> None:
    calls: list[None] = []
    watch = Stopwatch(patience=0, probe=lambda: 40.0)
    watch.seconds(lambda: calls.append(None))
    assert (len(calls), watch.was_quiet) == (1, False)


def test_disturbed_rounds_are_left_out_where_enough_others_are_there() -> None:
    assert undisturbed([1, 9, 2, 3], [True, False, True, True]) == [1, 2, 3]
    assert undisturbed([1, 9, 2, 8], [True, False, True, False]) == [1, 9, 2, 8]
