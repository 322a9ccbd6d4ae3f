"""Where a run computes: its device, threads and random numbers."""

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from safr_fast.integrations.distributed import by_nccl, local_rank, of_each_process
from safr_fast.training.config import TrainConfig
from safr_fast.training.errors import RunError

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3


@contextmanager
def settings(config: TrainConfig) -> Iterator[torch.device]:
    """The run's device; its threads and random numbers, which are the caller's own again afterwards."""
    device = choose_device(config.device)
    if device.type == "cuda" and by_nccl():
        _check_none_is_shared(of_each_process(str(torch.cuda.get_device_properties(device).uuid)))
    threads = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        on_gpu = device.type == "cuda"
        with torch.cuda.device(device) if on_gpu else nullcontext(), torch.random.fork_rng([device] if on_gpu else []):
            yield device
    finally:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """The device of that name, if it is there; ``auto``: this process's GPU if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("auto", "cuda") and count:
        return torch.device("cuda", local_rank() % count)
    if name == "auto":
        return torch.device("cpu")
    known = re.fullmatch("cpu|cuda(?::(0|[1-9][0-9]*))?", name)
    if known is None:
        raise RunError(f"device must be auto, cpu, cuda or cuda:<number>, got {name!r}")
    if name != "cpu" and int(known[1] or 0) >= count:
        seen = ", ".join(f"cuda:{index}" for index in range(count)) or "no GPU"
        raise RunError(f"device {name!r} is not there: this PyTorch sees {seen}; use --device cpu or auto")
    return torch.device(name)


def _check_none_is_shared(gpus: list[str]) -> None:
    """``gpus``: each process's. NCCL refuses one of two processes too, but not in words that say what to do."""
    count = len(set(gpus))
    if count < len(gpus):
        raise RunError(
            f"{len(gpus)} processes would share {count} GPU{'s' * (count > 1)}, which NCCL does not do: start one "
            "process a GPU by --nproc-per-node, with --device auto, or use --device cpu"
        )


def keep_memory() -> None:
    """Have glibc keep what it got from the system, instead of giving large blocks back and faulting them in anew.

    Of the whole process. Each step makes a gradient for every word type, about 100 MB on IMDB: on whole reviews this
    saves 8 % of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
