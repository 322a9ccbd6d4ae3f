"""Peak resident memory of a call, beyond what the process held before it."""

import ctypes
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_beyond_now(call: Callable[[], object]) -> float | None:
    """MiB; None where the system does not tell. Scratch memory kept from earlier calls (ours: at most 8 MiB a thread)
    counts as held before."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide as much of what is taken now
        CLEAR.write_text("5")  # the high-water mark starts again from here
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return max(0, _status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """In KiB."""
    return next(int(line.split()[1]) for line in STATUS.open() if line.startswith(field))
