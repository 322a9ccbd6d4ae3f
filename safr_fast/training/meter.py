"""How fast a run goes, and how much memory it takes."""

import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from safr_fast.training import report as lines

_LINE_EVERY_SECONDS = 60.0


class Meter:
    """An epoch's progress in tokens per second, and the time that is left of it.

    A bar on a terminal; elsewhere a line a minute by ``report``; nothing where that is None.
    """

    def __init__(self, epoch: int, tokens: int, done: int, report: Callable[[str], None] | None) -> None:
        self._epoch, self._tokens, self._first, self._done, self._report = epoch, tokens, done, done, report
        self._started = self._said = time.perf_counter()
        self._bar = tqdm(
            total=tokens,
            initial=done,
            desc=f"epoch {epoch}",
            leave=False,
            unit="token",
            unit_scale=True,
            disable=True if report is None else None,
        )

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, tokens: int) -> None:
        self._done += tokens
        self._bar.update(tokens)
        now = time.perf_counter()
        if self._report is not None and self._bar.disable and now - self._said >= _LINE_EVERY_SECONDS:
            self._said = now
            speed = (self._done - self._first) / (now - self._started)
            self._report(lines.progress(self._epoch, self._done, self._tokens, speed))


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at the most since the process began: resident, and those that PyTorch held on a GPU."""
    peaks = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peaks[str(device)] = torch.cuda.max_memory_allocated(device)
    return peaks
