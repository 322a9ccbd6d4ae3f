"""Measures on one GPU: what a provider gets wrong first, then time as launched and as a CUDA graph, rates and memory.

Time is by events, the L2 cache emptied before each run, the clocks warm. Rates are over what ``torch.mm`` of the same
dtype and a copy reach in the same process. Without a GPU all of it runs in Triton's interpreter, where no time means
anything, to find mistakes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import formulas
import torch
from comparison import WRONG, Loss, gradients, relative_error
from ragged import Layout, imdb_lengths
from safr_fast.kernels import roofline
from safr_fast.kernels.timing import Timer, graph_of
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """Inputs of one shape, and the least known exact work on them."""

    kind: str
    shape: tuple[int, ...]  # (B, T, E), (B, H, T, D), or (B, H, T, T); packed (N, E) or (N, H, D)
    floor: float  # operations, forward and backward
    lengths: tuple[int, ...] = ()  # of packed samples

    @classmethod
    def hidden(cls, kind: str, B: int, T: int, E: int) -> "Case":
        return cls(kind, (B, T, E), B * formulas.row_energy_floor(T, E))

    @classmethod
    def query_key(cls, B: int, H: int, T: int, D: int) -> "Case":
        return cls("interaction from q, k", (B, H, T, D), B * formulas.interaction_floor(T, H, D))

    @classmethod
    def attention(cls, B: int, H: int, T: int) -> "Case":
        return cls("interaction from A", (B, H, T, T), B * formulas.interaction_floor(T, H))

    @classmethod
    def packed_hidden(cls, lengths: Sequence[int], E: int) -> "Case":
        floor = sum(formulas.row_energy_floor(T, E) for T in lengths)
        return cls("importance loss, packed", (sum(lengths), E), floor, tuple(lengths))

    @classmethod
    def packed_query_key(cls, lengths: Sequence[int], H: int, D: int) -> "Case":
        floor = sum(formulas.interaction_floor(T, H, D) for T in lengths)
        return cls("interaction from q, k, packed", (sum(lengths), H, D), floor, tuple(lengths))

    @property
    def title(self) -> str:
        return f"{self.kind}, {'×'.join(map(str, self.shape))}"

    @property
    def count(self) -> int:
        """Of inputs."""
        return 2 if "q, k" in self.kind else 1

    def losses(self, device: str) -> dict[str, Loss]:
        """The plain formula first: in float64 it is the oracle."""
        if not self.lengths:
            return dense_losses()[self.kind]
        layout = Layout.of(self.lengths, device)
        return layout.interaction() if self.count == 2 else layout.importance()

    def inputs(self, device: str, dtype: torch.dtype, part: bool = False) -> list[Tensor]:
        """All, or of padded ones one sample and head, which costs little in float64."""
        generator = torch.Generator(device).manual_seed(0)
        one = part and not self.lengths
        shape = (*(1 for _ in self.shape[:-2]), *self.shape[-2:]) if one else self.shape
        inputs = [2 * torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(self.count)]
        return [x.softmax(-1) for x in inputs] if self.kind == "interaction from A" else inputs

    def least_bytes(self, dtype: torch.dtype) -> float:
        """Each input read once, and its gradient written once."""
        return 2 * self.count * float(torch.Size(self.shape).numel()) * dtype.itemsize


@functools.cache
def dense_losses() -> dict[str, dict[str, Loss]]:
    import safr_fast as sf

    def row_energy(h: Tensor) -> Tensor:
        energy, squared_norm = sf.row_energy(h, impl="triton")
        return (energy + squared_norm).sum() / h.shape[-1]

    def by(ours: Loss, plain: Loss, algebra: Loss | None = None) -> dict[str, Loss]:
        rivals = {"eager": plain, "compiled": formulas.compiled(plain)}
        if algebra is not None:
            rivals["algebra compiled"] = formulas.compiled(algebra)
        return rivals | {"ours": ours}

    return {
        "row energy": by(row_energy, formulas.row_energy, formulas.row_energy_by_moment),
        "importance loss": by(
            lambda h: sf.importance_loss(h, impl="triton"), formulas.importance, formulas.importance_by_moment
        ),
        "interaction from A": by(lambda a: sf.interaction_loss(a, impl="triton"), formulas.interaction),
        "interaction from q, k": by(
            lambda q, k: sf.interaction_loss_from_qk(q, k, impl="triton"), formulas.interaction_from_qk
        ),
    }


MOST_OF_FLOAT32 = 1e14  # operations: half a minute a measurement
LONGEST_STORED = 2048  # of A: a batch of 256 heads and its gradient take 4 GiB then, in 16 bits
CASES = [
    *(Case.hidden("importance loss", roofline.B, T, roofline.E) for T in roofline.IMPORTANCE),
    *(Case.query_key(roofline.HEADS // 8, 8, T, roofline.D) for T in roofline.INTERACTION),
    *(Case.hidden("row energy", roofline.B, T, roofline.E) for T in roofline.IMPORTANCE),
    *(Case.attention(roofline.HEADS // 8, 8, T) for T in roofline.INTERACTION if T <= LONGEST_STORED),
    Case.packed_hidden(imdb_lengths(), roofline.E),
    Case.packed_query_key(imdb_lengths(), 8, roofline.D),
]
DRY_CASES = [
    Case.hidden("importance loss", 2, 40, 16),
    Case.query_key(1, 2, 70, 16),
    Case.hidden("row energy", 2, 40, 16),
    Case.attention(1, 1, 40),
    Case.packed_hidden([20, 9], 16),
    Case.packed_query_key([70, 9], 2, 16),
]


@dataclass(frozen=True)
class Provider:
    """A loss at a dtype and, for float32, a precision of its products."""

    loss: str
    dtype: str
    precision: str = "highest"

    @property
    def name(self) -> str:
        named = self.dtype == "float32" and (self.loss.startswith("ours") or self.precision != "highest")
        return f"{self.loss} {self.dtype}{f' {self.precision}' if named else ''}"


# Ours first, then what takes longest to compile last: time may run out.
PROVIDERS = [
    Provider("ours", "bfloat16"),
    Provider("eager", "bfloat16"),
    Provider("ours", "float32"),
    Provider("eager", "float32"),
    Provider("ours padded", "bfloat16"),
    *(Provider(loss, "bfloat16") for loss in ("compiled", "algebra compiled")),
    *(Provider("ours", "float32", precision) for precision in ("high", "medium")),
    *(Provider(loss, "float32") for loss in ("compiled", "algebra compiled")),
    *(Provider(loss, "float32", "high") for loss in ("eager", "compiled")),
]
DRY_PROVIDERS = [Provider("ours", "float32"), Provider("ours padded", "float32")]


def providers_of(case: Case, providers: Sequence[Provider] = PROVIDERS) -> Iterator[Provider]:
    own = ("eager", "compiled", "ours", "ours padded") if case.lengths else dense_losses()[case.kind]
    dtypes = DTYPES if case.floor < MOST_OF_FLOAT32 else ("bfloat16",)
    return (provider for provider in providers if provider.loss in own and provider.dtype in dtypes)


@dataclass(frozen=True)
class Peaks:
    """What this process reaches on this device."""

    matmul_tflops: dict[str, float]
    copy_gbytes: float

    @classmethod
    def measured(cls, timer: Timer, device: str) -> "Peaks":
        side, size = (8192, 1 << 30) if device == "cuda" else (64, 1 << 16)
        rates = {}
        for name, dtype in DTYPES.items():
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            rates[name] = 2 * side**3 / timer.milliseconds(functools.partial(torch.mm, a, b)) / 1e9
        source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
        return cls(rates, 2 * size / timer.milliseconds(lambda: target.copy_(source)) / 1e6)

    def rates(self, ms: float, operations: float | None, least_bytes: float | None, dtype: str) -> dict[str, float]:
        """Of what the work cannot do without, beside what the device reaches."""
        rates = {}
        if operations is not None:
            rates["tflops"] = operations / ms / 1e9
            rates["fraction_of_matmul"] = rates["tflops"] / self.matmul_tflops[dtype]
        if least_bytes is not None:
            rates["gbytes"] = least_bytes / ms / 1e6
            rates["fraction_of_copy"] = rates["gbytes"] / self.copy_gbytes
        return rates


def measure(case: Case, provider: Provider, timer: Timer, peaks: Peaks, device: str) -> dict[str, Any]:
    """Error on a part of the case, then time, rates and memory on all of it; or why there are none."""
    dtype = DTYPES[provider.dtype]
    losses = case.losses(device)
    loss, plain = losses[provider.loss], losses["eager"]

    def error() -> float:
        part = case.inputs(device, dtype, part=True)
        oracle = gradients(plain, [x.double() for x in part])
        return max(relative_error(r, e) for r, e in zip(gradients(loss, part), oracle, strict=True))

    def step_of() -> Callable[[], object]:
        inputs = case.inputs(device, dtype)
        return lambda: gradients(loss, inputs)

    row = measure_step(error, step_of, timer, device, provider.precision, capture=provider.loss.startswith("ours"))
    if "ms" in row:
        row |= peaks.rates(row["ms"], case.floor, case.least_bytes(dtype), provider.dtype)
    return row


def measure_step(
    error: Callable[[], float], step_of: Callable[[], Callable[[], object]], timer: Timer, device: str,
    precision: str = "highest", capture: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """``error`` against float64 and, unless it is too large, time and memory of the step that ``step_of`` makes."""
    row: dict[str, Any] = {}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        row["error"] = error()
        if not row["error"] < WRONG:
            return row | {"why": "wrong"}
        step = step_of()
        step()
        if device == "cuda":
            row["peak_mib"] = _peak_mib(step)
        row["ms"] = timer.milliseconds(step)
        if capture and device == "cuda":
            row["graph_ms"] = timer.milliseconds(graph_of(step))
    except Exception as failure:  # one that cannot run must not cost the others their time on the device
        row["why"] = f"{type(failure).__name__}: {str(failure)[:200]}"
    finally:
        torch.set_float32_matmul_precision(before)
        if device == "cuda":
            with contextlib.suppress(RuntimeError):  # after an illegal access every call raises
                torch.cuda.empty_cache()
    return row


def _peak_mib(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
