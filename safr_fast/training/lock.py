"""One process at a time in a folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safr_fast.training.errors import RunError

if sys.platform != "win32":
    import fcntl


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of it, but where its file system has no locks; a process that dies lets go.

    Raises:
        RunError: another process is in it.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{folder} is being trained by another process: wait for it, or give another folder by --out"
            ) from None
        except OSError:
            pass  # no locks here
        yield
    finally:
        os.close(descriptor)
