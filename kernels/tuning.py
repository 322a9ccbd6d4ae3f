"""Opt-in choice of configurations by time: with ``SAFR_FAST_AUTOTUNE=1``, and kept on disk.

The first call of a kind tries the neighbours of every configuration that it takes from ``configs``, keeps the fastest
whose results are the same but for rounding, and writes it to a file of the device, this Triton and these kernels. Later
calls, and later processes, take it from there and try nothing, so that results are again the same to the bit. A call is
of a kind with another by its kernels, dtype and float32 precision, and by the powers of two that hold its features and
its tokens. Nothing is tried while a CUDA graph is captured.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safr_fast.precision import matmul_precision

from . import availability, configs
from .configs import Config
from .timing import Timer

if sys.platform != "win32":
    import fcntl

FORMAT = 1
SECONDS_A_TRIAL = 0.1
# Fields that a kernel's neighbours differ in, beside warps and stages. The rest is tied to what other kernels lay out.
VARIED = {
    "token": ("rows", "columns"),
    "token_backward": ("rows", "columns"),
    "wide": ("rows", "columns"),
    "wide_backward": ("rows", "columns"),
    "moment": ("rows",),
    "quadratic_form": ("rows",),
    "moment_backward": ("rows",),
    "interaction": ("rows", "descriptors"),
    "interaction_long": ("rows", "descriptors"),
    "gram": ("rows", "descriptors"),
    "gram_long": ("rows", "descriptors"),
    "packed": ("rows",),
}
EXECUTION = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
WIDEST = 1 << 30
ACCUMULATORS = 64  # float32 that a thread may hold of one tile of a product; with more kernels spill nearly everywhere
# Relative difference, in the Euclidean norm, beyond which results are not the same but for rounding.
ROUNDING_16, ROUNDING_32 = 1e-2, 1e-4
# Calls with results that are not finite after which a kind is given up: to look waits for the device.
MOST_NOT_FINITE = 10

Launch = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Device:
    """What the choice depends on beside the call, and what a program may take."""

    name: str
    capability: str
    triton: str
    kernels: str  # of their sources
    shared_bytes: int
    has_descriptors: bool

    @classmethod
    def of(cls, device: torch.device) -> "Device":
        properties = torch.cuda.get_device_properties(device)
        return cls(
            name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            triton=availability.version(),
            kernels=_digest_of_kernels(),
            shared_bytes=getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
            has_descriptors=torch.version.hip is None and properties.major >= 9,
        )

    @property
    def identity(self) -> dict[str, str]:
        return {"device": self.name, "capability": self.capability, "triton": self.triton, "kernels": self.kernels}

    @property
    def file_name(self) -> str:
        words = re.findall(r"[a-z0-9]+", self.name.lower())
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:12]
        return "-".join([*words, digest]) + ".json"


@functools.cache
def _digest_of_kernels() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


class Cache:
    """Chosen configurations by the name of what they are for, in one JSON file that several processes may share.

    ``chosen`` is replaced, never changed, so that threads may look into it.
    """

    def __init__(self, folder: Path, device: Device) -> None:
        self.path, self.identity = folder / device.file_name, device.identity
        self.useless: set[str] = set()
        self.chosen: dict[str, Config] = {}
        self.read()

    def read(self) -> None:
        """Takes in what other processes have written meanwhile, but for names that are ``useless``."""
        self.chosen = self.chosen | {name: c for name, c in self._read().items() if name not in self.useless}

    def drop(self, name: str) -> None:
        """What the file has of that name is not to be used, and may be written over."""
        self.useless.add(name)
        self.chosen = {key: config for key, config in self.chosen.items() if key != name}

    def add(self, name: str, config: Config) -> Config:
        """Keeps it, unless another process has kept one of that name by now; gives what is kept, the same for all."""
        kept = config
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(self.path.parent):
                self.read()
                kept = self.chosen.get(name, config)
                self._write(self.chosen | {name: kept})
        except OSError as error:
            warnings.warn(f"{self.path} cannot be written ({error}): configurations are kept for this process alone",
                          stacklevel=2)  # fmt: skip
        self.chosen = self.chosen | {name: kept}
        self.useless.discard(name)
        return kept

    def _write(self, chosen: dict[str, Config]) -> None:
        """The file is replaced whole."""
        content = {"format": FORMAT, **self.identity, "chosen": {key: asdict(c) for key, c in chosen.items()}}
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(temporary, self.path)

    def _read(self) -> dict[str, Config]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if {key: content[key] for key in ("format", *self.identity)} != {"format": FORMAT, **self.identity}:
                raise ValueError("written for something else")
            return {name: Config(**fields) for name, fields in content["chosen"].items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{self.path} is ignored, and written anew ({type(error).__name__}: {error})", stacklevel=2)
            return {}


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits for other processes to leave it, but where its file system has no locks."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def folder() -> Path:
    """Where choices are kept: ``SAFR_FAST_CACHE_DIR``, or ``safr-fast`` in the user's cache folder."""
    if named := os.environ.get("SAFR_FAST_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safr-fast"


def neighbours(kernel: str, bits: int, found: Config, device: Device) -> list[Config]:
    """``found`` itself, then what differs from it in tiles, warps or stages and may fit the device."""
    axes: dict[str, Sequence[int]] = dict(EXECUTION)
    for name in VARIED.get(kernel, ()):
        if name == "descriptors":
            axes[name] = (False, True) if device.has_descriptors else (False,)
        else:
            axes[name] = sorted({getattr(found, name), 64, 128})
    others = [found]
    for name, values in axes.items():
        others = [replace(config, **{name: value}) for config in others for value in values]
    return [found, *(c for c in others if c != found and _may_fit(kernel, bits, c, device))]


def _may_fit(kernel: str, bits: int, config: Config, device: Device) -> bool:
    """Whether registers and shared memory have room for what a program holds of its tiles at the least."""
    columns = config.columns if "columns" in VARIED.get(kernel, ()) else config.rows  # its tiles are square
    accumulators = config.rows * columns // (32 * config.num_warps)
    operands = (config.rows + columns) * min(config.features or columns, configs.WIDEST_ROW) * bits // 8
    return accumulators <= ACCUMULATORS and operands * (config.num_stages - 1) <= device.shared_bytes


class Tuner:
    """Tries and remembers the configurations of one device.

    ``report`` is told of every trial; after ``deadline``, of ``time.perf_counter``, what is not chosen stays as it is.
    """

    def __init__(
        self, device: Device, folder: Path, timer: Timer, report: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.device, self.timer, self.report = device, timer, report
        self.cache = Cache(folder, device)
        self.deadline = math.inf
        self.lock = threading.Lock()
        self.tried: set[str] = set()
        self.not_finite: Counter[str] = Counter()
        self.served: dict[str, Config] = {}

    def run(self, launch: Launch, x: Tensor, tokens: int, unwritten: int = 0) -> tuple[Tensor, ...]:
        """What ``launch`` gives with the configurations chosen for it, trying those that are not chosen yet.

        Its last ``unwritten`` results may hold memory that no kernel writes, such as moments of short sequences: they
        are not compared.
        """
        kind = Kind.of(x, tokens)
        missing: dict[str, Entry] = {}
        results = self._launched(launch, kind, missing)
        if not missing or _capturing(x):
            return results
        with self.lock:
            if missing.keys() - self.tried:
                self.cache.read()
            for name, entry in missing.items():
                if name not in self.tried and self._cached(name, entry) is None:
                    self._try(name, entry, launch, kind, results[: len(results) - unwritten])
        return self._launched(launch, kind) if self.served.keys() & missing.keys() else results

    def _launched(
        self, launch: Launch, kind: "Kind", missing: dict[str, "Entry"] | None = None, **instead: Config
    ) -> tuple[Tensor, ...]:
        """``launch()`` with what is chosen, or given by name, and the table's where nothing is."""

        def choose(kernel: str, bits: int, width: int, found: Config) -> Config:
            name = kind.name(kernel, bits, width)
            entry = Entry(kernel, bits, found)
            chosen = instead.get(name) or self.served.get(name) or self._cached(name, entry)
            if chosen is None and missing is not None:
                missing.setdefault(name, entry)
            return chosen or found

        with configs.choosing(choose):
            return launch()

    def _cached(self, name: str, entry: "Entry") -> Config | None:
        """What the file has, if it is one that would be tried: other tiles might reach beyond what kernels lay out."""
        kept = self.cache.chosen.get(name)
        if kept is None:
            return None
        if kept in neighbours(entry.kernel, entry.bits, entry.found, self.device):
            self.served[name] = kept
            return kept
        self.cache.drop(name)
        warnings.warn(f"{self.cache.path}: what it has for {name!r} is ignored: none that would be tried", stacklevel=2)
        return None

    def _try(self, name: str, entry: "Entry", launch: Launch, kind: "Kind", expected: tuple[Tensor, ...]) -> None:
        """Chooses one configuration, the others as they are chosen so far."""
        if not all(result.isfinite().all() for result in expected):
            self.not_finite[name] += 1  # nothing to hold results against: another call may do
            if self.not_finite[name] == MOST_NOT_FINITE:
                self.tried.add(name)
            return
        best, least = entry.found, math.inf
        for config in neighbours(entry.kernel, entry.bits, entry.found, self.device):
            if time.perf_counter() > self.deadline:
                return
            trial: dict[str, Any] = {"name": name, "config": str(config), "is_table": config == entry.found}
            step = functools.partial(self._launched, launch, kind, **{name: config})
            try:
                trial["difference"] = _difference(step()[: len(expected)], expected)
                if trial["difference"] > kind.rounding:
                    raise ValueError("results differ by more than rounding")
                trial["ms"] = self.timer.milliseconds(step)
            except Exception as error:  # what does not fit the chip is of many kinds
                trial["why"] = f"{type(error).__name__}: {str(error)[:200]}"
            if trial.get("ms", math.inf) < least:
                best, least = config, trial["ms"]
            if self.report is not None:
                self.report(trial)
        self.tried.add(name)
        if least < math.inf:
            self.served[name] = self.cache.add(name, best)


@dataclass(frozen=True)
class Entry:
    """What a launcher took from the table."""

    kernel: str
    bits: int
    found: Config


@dataclass(frozen=True)
class Kind:
    """What calls have in common that share their choices, beside kernels and width."""

    dtype: str
    tokens: int
    rounding: float

    @classmethod
    def of(cls, x: Tensor, tokens: int) -> "Kind":
        dtype, rounding = str(x.dtype).removeprefix("torch."), ROUNDING_16
        if x.dtype == torch.float32:
            precision = matmul_precision(x.device.type)
            dtype = f"{dtype} {precision}"
            rounding = ROUNDING_16 if precision == "medium" else ROUNDING_32
        return cls(dtype, configs.width_block(tokens, WIDEST), rounding)

    def name(self, kernel: str, bits: int, width: int) -> str:
        alignment = "aligned" if width % configs.ALIGNED == 0 else "unaligned"
        bucket = configs.width_block(width, WIDEST)
        return f"{kernel} of {bits} bits, {self.dtype}, {alignment} width to {bucket}, tokens to {self.tokens}"


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative one, in the Euclidean norm."""
    largest = 0.0
    for result, exact in zip(results, expected, strict=True):
        norm, difference = (torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (exact, result - exact))
        if math.isnan(difference):
            return math.inf
        largest = max(largest, difference / norm if norm > 0 else difference)
    return largest


_used: Tuner | None = None


@contextlib.contextmanager
def using(tuner: Tuner) -> Iterator[None]:
    """Every launch goes through ``tuner``, whatever the environment says."""
    global _used
    before, _used = _used, tuner
    try:
        yield
    finally:
        _used = before


def tuned(launch: Launch, x: Tensor, tokens: int, unwritten: int = 0) -> tuple[Tensor, ...]:
    """``launch()``, through the tuner where one is asked for, see :meth:`Tuner.run`.

    ``tokens``: of a sequence, of packed ones on average.
    """
    tuner = _used
    if tuner is None and os.environ.get("SAFR_FAST_AUTOTUNE") == "1" and x.is_cuda:
        tuner = _tuner_of(x.device)
    return launch() if tuner is None else tuner.run(launch, x, tokens, unwritten)


@functools.cache
def _tuner_of(device: torch.device) -> Tuner:
    return Tuner(Device.of(device), folder(), Timer.of(device, SECONDS_A_TRIAL))
