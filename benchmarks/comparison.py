"""One way of comparing: correct first, then timed side by side in one run; medians; the answer in ``extra_info``."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial

import torch
from memory import peak_beyond_now
from pytest_benchmark.fixture import BenchmarkFixture
from quiet import Stopwatch, undisturbed, usable_cpus
from torch import Tensor

# Relative error of a gradient beyond which a provider is wrong rather than imprecise, and is not timed.
WRONG = 5e-2
SECONDS_A_CASE = 2.0
SLOW = 1.0  # seconds of a round, from which on first calls count as one, so that the run ends in time
PATIENCE = 1.0  # seconds that a case's disturbed calls may take again
PATIENCE_ONCE = 10.0  # the same of a rate that the whole run is held against
ROUNDS = 3, 25  # at least, at most

Loss = Callable[..., Tensor]
Step = Callable[[], Sequence[Tensor]]
Problem = tuple[Loss, Loss, tuple[Tensor, ...], float]  # loss, oracle, inputs, floor of its work


@dataclass
class Measured:
    """What became of a provider in a case."""

    error: float
    """largest relative error, in the Euclidean norm, of what the step gives"""
    peak_mib: float | None
    """resident memory at the step's peak beyond what was there before"""
    ms: float | None = None
    """median; None: not timed, because wrong"""
    gflops: float | None = None
    """floor of the work over the time, in 10⁹ operations a second"""
    fraction_of_matmul: float | None = None
    """the same over what torch.mm reaches in this process"""
    times_as_long: float | None = None
    """over the first provider's time, the median of the rounds' ratios"""


@dataclass(frozen=True)
class Provider:
    """A way of computing something: ``step`` gives what ``expected``, in float64, is held against.

    ``results`` does, where the step is timed for more than it gives. ``warm_up``: its first call takes memory that
    later ones do not, to compile or to keep. ``floor``: of its own work, where that is not the case's. ``threads``: its
    own, where they are not the case's.
    """

    name: str
    step: Step
    expected: Sequence[Tensor]
    precision: str = "highest"
    results: Step | None = None
    warm_up: bool = True
    floor: float | None = None
    threads: int | None = None

    def run(self) -> Sequence[Tensor]:
        torch.set_float32_matmul_precision(self.precision)
        with using_threads(self.threads or torch.get_num_threads()):
            return self.step()

    def seconds(self, watch: Stopwatch, call: Callable[[], object] | None = None) -> float:
        """Of a run, or of a ``call`` that runs it, on the processors that it uses."""
        return watch.seconds(call or self.run, self.threads or torch.get_num_threads())

    def error(self, given: Sequence[Tensor] = ()) -> float:
        """Largest relative error, in the Euclidean norm, of what the step gives or, just now, has given."""
        torch.set_float32_matmul_precision(self.precision)
        with every_processor():
            found = given or (self.results or self.step)()
        return max(relative_error(r, e) for r, e in zip(found, self.expected, strict=True))

    def first_calls(self) -> tuple[Measured, float, float]:
        """Its error and memory, from as few calls as tell them, since long cases take minutes; seconds of the last, and
        how fast the processor was beside it."""
        found: list[Tensor] = []
        watch = Stopwatch(patience=0)
        if self.warm_up:
            self.run()
        took: list[float] = []
        peak = peak_beyond_now(lambda: took.append(self.seconds(watch, lambda: found.extend(self.run()))))
        if not found:  # where the system does not tell its memory
            took.append(self.seconds(watch, lambda: found.extend(self.run())))
        return Measured(self.error(() if self.results else found), peak), took[0], watch.rate


def gradients(loss: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


def gradient_provider(name: str, loss: Loss, inputs: Sequence[Tensor], oracle: Loss) -> Provider:
    """Forward and backward of ``loss``, held against ``oracle`` in float64."""
    return Provider(name, partial(gradients, loss, inputs), exact_gradients(oracle, inputs), warm_up=loss is not oracle)


def exact_gradients(oracle: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with every_processor():
        return gradients(oracle, [x.double() for x in inputs])


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def every_processor() -> AbstractContextManager[None]:
    """For what is not timed."""
    return using_threads(len(usable_cpus()))


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


@cache
def matmul_gflops(threads: int, side: int = 1024) -> float:
    """What ``torch.mm`` of float32 reaches on ``threads`` threads."""
    a, b = (torch.randn(side, side) for _ in range(2))
    watch = Stopwatch(PATIENCE_ONCE)
    with using_threads(threads):
        median = watch.median(lambda: torch.mm(a, b), 15, threads)
    return 2 * side**3 / median / 1e9


@cache
def tile_gflops(side: int = 512, repeats: int = 8) -> float | None:
    """What the package's own register tiles of float32 reach on one thread, operands packed; None without them."""
    try:
        from safr_fast import _cpu
    except ImportError:
        return None
    a, b, c = (torch.randn(side, side) for _ in range(3))

    watch = Stopwatch(PATIENCE_ONCE)

    def seconds(count: int) -> float:
        addresses = a.data_ptr(), b.data_ptr(), c.data_ptr()
        return watch.median(lambda: _cpu.matmul(0, *addresses, side, side, side, count), 15)

    return 2 * side**3 * repeats / (seconds(1 + repeats) - seconds(1)) / 1e9


def compare(benchmark: BenchmarkFixture, providers: Sequence[Provider], floor: float | None = None) -> None:
    """Times the first provider, and every other between its rounds.

    ``floor``: operations that the cheapest known algorithm cannot do without.
    """
    before = torch.get_float32_matmul_precision()
    try:
        _compare(benchmark, providers, floor)
    finally:
        torch.set_float32_matmul_precision(before)


def _compare(benchmark: BenchmarkFixture, providers: Sequence[Provider], floor: float | None) -> None:
    measured: dict[str, Measured] = {}
    seconds: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for provider in providers:
        measured[provider.name], last, rate = provider.first_calls()
        if measured[provider.name].error < WRONG:
            seconds[provider.name], rates[provider.name] = [last], [rate]
    once = sum(last for [last] in seconds.values())
    subject = providers[0]
    assert subject.name in seconds, f"{subject.name} is wrong: error {measured[subject.name].error:.1e}"
    timed = [provider for provider in providers if provider.name in seconds]
    watch = Stopwatch(PATIENCE)

    def run_all() -> None:
        for provider in [*timed[1:], subject]:
            seconds[provider.name].append(provider.seconds(watch))
            rates[provider.name].append(watch.rate)

    rounds = min(max(int(SECONDS_A_CASE / once), ROUNDS[0]), ROUNDS[1])
    if once < SLOW:
        for own in (*seconds.values(), *rates.values()):
            own.clear()
    else:
        rounds -= 1
    benchmark.pedantic(subject.run, setup=run_all, rounds=rounds)  # its own times are not used: they may be disturbed

    disturbed = []
    for provider in timed:
        times, own_rates = seconds[provider.name], rates[provider.name]
        ratios = [t / own for t, own in zip(times, seconds[subject.name], strict=True)]
        of_both = [min(both) for both in zip(own_rates, rates[subject.name], strict=True)]
        kept, _ = undisturbed(times, own_rates)
        kept_ratios, enough = undisturbed(ratios, of_both)
        if not enough:
            disturbed.append(provider.name)
        result, median = measured[provider.name], statistics.median(kept)
        result.ms = median * 1e3
        result.times_as_long = statistics.median(kept_ratios)
        work = floor if provider.floor is None else provider.floor
        if work is not None:
            result.gflops = work / median / 1e9
            result.fraction_of_matmul = result.gflops / matmul_gflops(provider.threads or torch.get_num_threads())
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "disturbed": disturbed,
        "floor_gflop": None if floor is None else floor / 1e9,
        "matmul_gflops": matmul_gflops(torch.get_num_threads()),
        "tile_gflops": tile_gflops(),
        "providers": {name: asdict(result) for name, result in measured.items()},
    }
