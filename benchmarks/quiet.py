"""Timing AMX on a processor that others use too.

While another guest of the host uses the core's second hyperthread, for seconds or minutes, AMX takes up to three times
as long, everything else a tenth to a half longer. Such calls tell of the neighbour: every provider's alike, they are
timed again for as long as patience lasts, and left out where enough others are there. Calls of as many threads as there
are processors are probed on each of them, other calls on the one that the first thread is on.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch

QUIET = 0.65  # of the fastest probe of the process; disturbed ones have 0.4 to 0.55
PAUSE = 0.02  # seconds until the next try
WATCHED = 15.0  # seconds at first, to see how fast it can be
ENOUGH = 3  # undisturbed calls, that the others are left out


def undisturbed(values: Sequence[float], rates: Sequence[float]) -> tuple[Sequence[float], bool]:
    """Those whose probes were quiet, beside what is the fastest by now, and whether they are enough; else all."""
    kept = [value for value, rate in zip(values, rates, strict=True) if rate >= QUIET * Stopwatch.fastest]
    enough = len(kept) >= ENOUGH
    return kept if enough else values, enough


def usable_cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


@cache
def _pinned() -> list[ThreadPoolExecutor]:
    """A thread on each processor."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    return [ThreadPoolExecutor(1, initializer=partial(os.sched_setaffinity, 0, {cpu})) for cpu in usable_cpus()]


def slowest(rate: Callable[[], float], pinned: Sequence[ThreadPoolExecutor]) -> float:
    """``rate`` on each of the processors, or on this one where there are none."""
    return min(thread.submit(rate).result() for thread in pinned) if pinned else rate()


@cache
def _probe() -> Callable[[int], float] | None:
    """Measures how fast AMX is just now, in calls a second, where so many threads run; none without it."""
    try:
        from safr_fast import _cpu
    except ImportError:
        return None
    if _cpu.isa() != "amx":
        return None
    side, repeats, medium = 128, 64, 2
    a, b, c = (torch.randn(side, side) for _ in range(3))

    def rate() -> float:
        start = time.perf_counter()
        _cpu.matmul(medium, a.data_ptr(), b.data_ptr(), c.data_ptr(), side, side, side, repeats)
        return 1 / (time.perf_counter() - start)

    def where_threads_run(threads: int) -> float:
        return slowest(rate, _pinned() if 1 < threads >= len(usable_cpus()) else [])

    where_threads_run(len(usable_cpus()))  # starts the threads, and takes their memory, while nothing is measured
    end = time.monotonic() + WATCHED
    while time.monotonic() < end:
        Stopwatch.fastest = max(Stopwatch.fastest, rate())
        time.sleep(PAUSE)
    return where_threads_run


class Stopwatch:
    """Times calls, and those that were disturbed again, until ``patience`` seconds have gone into that.

    ``rate``: of the slower probe around the last one.
    """

    fastest = 0.0

    def __init__(self, patience: float, probe: Callable[[int], float] | None = None) -> None:
        self.patience = patience
        self.rate = math.inf
        self._probe = probe or _probe()

    def seconds(self, call: Callable[[], object], threads: int = 1) -> float:
        while True:
            before = self._probed(threads)
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            self.rate = min(before, self._probed(threads))
            if self.rate >= QUIET * Stopwatch.fastest or self.patience <= 0:
                return seconds
            self.patience -= seconds + PAUSE
            time.sleep(PAUSE)

    def median(self, call: Callable[[], object], count: int, threads: int = 1) -> float:
        """Of the undisturbed ones of ``count`` calls."""
        timed = [(self.seconds(call, threads), self.rate) for _ in range(count)]
        return statistics.median(undisturbed(*zip(*timed, strict=True))[0])

    def _probed(self, threads: int) -> float:
        if self._probe is None:
            return math.inf
        rate = self._probe(threads)
        Stopwatch.fastest = max(Stopwatch.fastest, rate)
        return rate
