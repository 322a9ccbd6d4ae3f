"""Benchmarks leave out what a neighbour on the processor slows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from quiet import Stopwatch, slowest, undisturbed


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


def test_a_call_is_probed_where_its_threads_run() -> None:
    asked: list[int] = []

    def probe(threads: int) -> float:
        asked.append(threads)
        return 100.0

    watch = Stopwatch(patience=0, probe=probe)
    watch.seconds(lambda: None, threads=2)
    watch.median(lambda: None, 1)
    assert asked == [2, 2, 1, 1]


def test_the_slowest_processor_counts() -> None:
    rates = iter([90.0, 40.0, 70.0, 80.0])
    pinned = [ThreadPoolExecutor(1) for _ in range(2)]
    assert slowest(lambda: next(rates), pinned) == 40
    assert slowest(lambda: next(rates), []) == 70


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
