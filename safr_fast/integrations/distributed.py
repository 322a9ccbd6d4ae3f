"""One run in several processes, as ``torchrun`` starts them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed as dist

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Each process's value, in the order of their ranks, the same everywhere."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What ``make`` gives, or raises, in the first process: it runs nowhere else."""
        if self.count == 1:
            return make()
        outcome: list[tuple[Value | None, Exception | None]] = [(None, None)]
        if self.first:
            try:
                outcome = [(make(), None)]
            except Exception as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome)
        value, failure = outcome[0]
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all processes have come here."""
        self.gather(None)


ALONE = Processes()


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that ``torchrun`` started, joined in PyTorch's default group while inside; else this one alone.

    A group that the caller has made is used and left as it is. Tensors on CPUs are exchanged by gloo, those on GPUs by
    NCCL; through a caller's group of NCCL alone everything goes by the current GPU, which each process sets before.
    """
    if not dist.is_available():
        yield ALONE
    elif dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        # By itself PyTorch takes NCCL alone where it sees a GPU, and no objects or tensors of CPUs are exchanged then.
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
        try:
            yield Processes(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield ALONE


def local_rank() -> int:
    """Which of its machine's processes this is, and so which of its GPUs is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def of_each_process(value: Value) -> list[Value]:
    """Each process's value, in a group that is there."""
    return Processes(dist.get_rank(), dist.get_world_size()).gather(value)


def by_nccl() -> bool:
    """Whether what is on GPUs goes by NCCL, which serves one process a GPU."""
    return dist.is_available() and dist.is_initialized() and "cuda:nccl" in dist.get_backend_config()
