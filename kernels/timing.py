"""How long a step takes on a GPU: by events, the L2 cache emptied before every run, once the clocks are warm."""

import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], object]

WARM_SECONDS = 0.1  # of running the step before its times count: an idle GPU takes as long to raise its clocks
SECONDS = 1.0
RUNS = 3, 200  # at least, at most
EVICTING_BYTES = 512 << 20  # at least; beyond the last cache of any GPU that reports less than it has


class Timer:
    """Median milliseconds of a step. ``once`` runs it once and says how long that took; ``clock`` counts seconds."""

    def __init__(
        self, once: Callable[[Step], float], seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.once, self.seconds, self.clock = once, seconds, clock

    def milliseconds(self, step: Step) -> float:
        step()  # compiles
        warm_at = self.clock() + min(WARM_SECONDS, self.seconds)
        while self.clock() < warm_at:
            self.once(step)
        times: list[float] = []
        stop_at = self.clock() + self.seconds
        while len(times) < RUNS[0] or (self.clock() < stop_at and len(times) < RUNS[1]):
            times.append(self.once(step))
        return statistics.median(times)

    @classmethod
    def of(cls, device: torch.device, seconds: float = SECONDS) -> "Timer":
        """By events on a GPU; by the clock, and only as often as must be, on the CPU, where kernels are interpreted."""
        if device.type == "cpu":
            return cls(once_by_clock, 0.0)
        return cls(OnceByEvents(device), seconds)


def once_by_clock(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


class OnceByEvents:
    """One run on the current stream, nothing of whose operands is in the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.evicting_bytes = evicting_bytes(torch.cuda.get_device_properties(device).L2_cache_size)

    def __call__(self, step: Step) -> float:
        # While it is written, the host gets ahead with the step's launches. It is not kept: others may need the room.
        torch.zeros(self.evicting_bytes, dtype=torch.uint8, device=self.device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


def evicting_bytes(cache: int) -> int:
    """What has to be written for nothing else to be left in a cache of ``cache`` bytes."""
    return max(4 * cache, EVICTING_BYTES)


def graph_of(step: Step) -> Step:
    """Replays the step as a CUDA graph, which takes the host's part out of its launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
