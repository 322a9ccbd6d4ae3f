"""What does a machine without the best instructions get? Each level that this one has, forced, beside eager.

Eager takes the best that the machine has; ``MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default`` holds it to SSE2, which
the level ``baseline`` is compiled for.
"""

import os
from collections.abc import Callable

import pytest
from bench_threads import from_qk, importance
from comparison import Loss, Problem, Provider, compare, exact_gradients, gradients
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

VARIABLE = "SAFR_FAST_CPU_ISA"


def levels() -> list[str]:
    try:
        from safr_fast import _cpu
    except ImportError:
        return []
    return _cpu.available_isas()


def at_level(level: str, loss: Loss, inputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Provider:
    def step() -> tuple[Tensor, ...]:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = level
        try:
            return gradients(loss, inputs)
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before

    return Provider(level, step, expected)


CASES: dict[str, Callable[[], Problem]] = {
    "importance loss, 64 samples of 128": lambda: importance(64, 128),
    "importance loss, 16 samples of 512": lambda: importance(16, 512),
    "interaction from q and k, 8 heads of 256": lambda: from_qk(1, 8, 256),
}


@pytest.mark.skipif(not levels(), reason="the C++ extension is not built")
@pytest.mark.parametrize("case", CASES)
def bench_levels(benchmark: BenchmarkFixture, case: str) -> None:
    benchmark.group = "levels of instructions, float32"
    benchmark.extra_info |= {"case": case}
    loss, plain, inputs, floor = CASES[case]()
    expected = exact_gradients(plain, inputs)
    eager = Provider("eager", lambda: gradients(plain, inputs), expected)
    compare(benchmark, [*(at_level(level, loss, inputs, expected) for level in levels()), eager], floor)
