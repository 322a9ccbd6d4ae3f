"""What the forward kernels of primitive 1 are given to finish the importance loss, and where tickets come from."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_tickets: dict[tuple[torch.device, int], Tensor] = {}


class Loss:
    """``scale · Σ √R / (√n2 + ε)``, over the number of real tokens for the mean: shares of it, then the loss."""

    def __init__(self, h: Tensor, eps: float, scale: float, mean: bool) -> None:
        self.loss, self.factor = (h.new_empty((), dtype=torch.float32) for _ in range(2))
        self.eps, self.scale, self.mean = eps, scale, mean
        self.shares = 0
        self.share = self.count = self.ticket = None

    def expect(self, shares: int, h: Tensor, mask: Tensor | None, zeroed_before: bool) -> None:
        """Room for so many shares, and a ticket, which a kernel sets to 0 before the last or which is there at 0."""
        self.shares = shares
        self.share = h.new_empty(shares, dtype=torch.float32)
        self.count = None if mask is None else h.new_empty(shares, dtype=torch.int32)
        self.ticket = h.new_empty(1, dtype=torch.int32) if zeroed_before else _ticket(h.device)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """For the kernel that finishes."""
        finished = (None, None) if self.ticket is None else (self.loss, self.factor)
        return self.share, self.count, self.ticket, *finished

    @property
    def numbers(self) -> dict[str, Any]:
        return {"shares": self.shares, "eps": self.eps, "scale": self.scale, "MEAN": self.mean}


class NoLoss(Loss):
    """Energies alone are wanted."""

    def __init__(self) -> None:
        self.eps, self.scale, self.mean, self.shares = 0.0, 0.0, False, 0
        self.share = self.count = self.ticket = None

    def expect(self, *_: Any, **__: Any) -> None:
        pass


def _ticket(device: torch.device) -> Tensor:
    """An integer at 0, which every launch leaves so: one a stream, since launches of one stream follow each other.

    While a CUDA graph is captured, one of its own: two graphs captured on one stream may be replayed at once.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    key = device, stream
    if key not in _tickets:
        made = _made_elsewhere(device) if on_gpu else torch.zeros(1, dtype=torch.int32, device=device)
        return _tickets.setdefault(key, made)
    return _tickets[key]


def _made_elsewhere(device: torch.device) -> Tensor:
    """Zeros from the ordinary memory pool, which another thread always uses.

    ``torch.compile`` in mode "reduce-overhead" has this thread allocate from the pool of a graph while it warms up, and
    takes what stays allocated there for a leak.
    """
    stream = torch.cuda.current_stream(device)

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(1, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()
