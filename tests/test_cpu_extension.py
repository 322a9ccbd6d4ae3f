"""What is particular to the CPU extension: its levels, its threads, the floating-point mode, forks, its products."""

import mmap
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import (
    ISA_VARIABLE,
    every_level,
    forced,
    matmul_precision,
    needs_cpp,
    normal,
    offsets,
    relative_error,
)
from torch import Tensor

import safr_fast as sf
from safr_fast import reference
from safr_fast.ops import dispatch

pytestmark = needs_cpp


def importance(h: Tensor, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    """Energy, squared norm and gradient, on the C++ back end."""
    h = h.detach().requires_grad_()
    energy, squared_norm = sf.row_energy(h, cu_seqlens=cu_seqlens, impl="cpp")
    loss = (energy * normal(*energy.shape, seed=1)).sum() + (squared_norm * normal(*energy.shape, seed=2)).sum()
    return [energy.detach(), squared_norm.detach(), *torch.autograd.grad(loss, h)]


def importance_loss(h: Tensor) -> list[Tensor]:
    h = h.detach().requires_grad_()
    loss = sf.importance_loss(h, impl="cpp")
    return [loss.detach(), *torch.autograd.grad(loss, h)]


def interaction(q: Tensor, k: Tensor, is_causal: bool = False) -> list[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    total = sf.interaction_loss_from_qk(q, k, is_causal=is_causal, reduction="none", impl="cpp")
    return [total.detach(), *torch.autograd.grad(total.sum(), (q, k))]


def from_attention(attention: Tensor) -> list[Tensor]:
    attention = attention.detach().requires_grad_()
    total = sf.interaction_loss(attention, reduction="none", impl="cpp")
    return [total.detach(), *torch.autograd.grad(total.sum(), attention)]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@every_level
@pytest.mark.parametrize(("precision", "allowed"), [("highest", 1e-6), ("high", 3e-5), ("medium", 1e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (33, 31, 257), (65, 100, 64), (129, 47, 600)], ids=str)
def test_products_are_as_accurate_as_their_precision(
    level: str, precision: str, allowed: float, shape: tuple[int, int, int]
) -> None:
    from safr_fast import _cpu

    m, n, k = shape
    a, b, product = normal(m, k), normal(k, n, seed=1), torch.full((m, n), float("nan"))
    index = ["highest", "high", "medium"].index(precision)
    with forced(level):
        _cpu.matmul(index, a.data_ptr(), b.data_ptr(), product.data_ptr(), m, n, k)
    assert relative_error(product, a.double() @ b.double()) <= allowed


@every_level
def test_a_level_can_be_forced(level: str) -> None:
    from safr_fast import _cpu

    with forced(level):
        assert _cpu.isa() == level.removeprefix("cpp:")
        assert _cpu.isa() in next(b.detail for b in sf.available_backends() if b.name == "cpp")


def test_the_best_level_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from safr_fast import _cpu

    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert _cpu.isa() == _cpu.available_isas()[0]
    monkeypatch.setenv(ISA_VARIABLE, "")
    assert _cpu.isa() == _cpu.available_isas()[0]


def test_an_impossible_level_raises_and_says_which_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from safr_fast import _cpu

    sf.row_energy(normal(1, 4, 4))  # that it was asked before is no answer for another level
    impossible = {"neon", "baseline", "avx2", "avx512", "avx512_bf16", "amx"} - set(_cpu.available_isas())
    for name in ("avx9000", *impossible):
        monkeypatch.setenv(ISA_VARIABLE, name)
        for impl in ("cpp", "auto"):
            with pytest.raises(sf.BackendUnavailable, match=f"{ISA_VARIABLE}.*{name}.*baseline"):
                sf.row_energy(normal(1, 4, 4), impl=impl)
        assert name in next(backend.detail for backend in sf.available_backends() if backend.name == "cpp")
    monkeypatch.delenv(ISA_VARIABLE)
    assert dispatch.resolve("auto", torch.device("cpu"), torch.float32) == "cpp"


# Many short sequences are shared out whole; one long sequence or head is shared out in tiles.
THREAD_CASES: dict[str, Callable[[], list[Tensor]]] = {
    "many sequences": lambda: importance(normal(9, 40, 24)),
    "ragged sequences": lambda: importance(normal(1150, 96), offsets([3, 700, 0, 17, 400, 30])),
    "one by tokens": lambda: importance(normal(1, 600, 350)),
    "one by tokens, nothing stored": lambda: importance(normal(1, 1100, 700)),
    "one by features": lambda: importance(normal(1, 1500, 80)),
    "one by features, in parts": lambda: importance(normal(1, 3500, 80)),
    "loss of many sequences": lambda: importance_loss(normal(9, 40, 24)),
    "loss of one by tokens": lambda: importance_loss(normal(1, 600, 350)),
    "many heads": lambda: interaction(normal(2, 3, 70, 16), normal(2, 3, 70, 16, seed=1)),
    "one head": lambda: interaction(normal(1, 1, 600, 16), normal(1, 1, 600, 16, seed=1), is_causal=True),
    "one head, packed on the way": lambda: interaction(normal(1, 1, 1500, 8), normal(1, 1, 1500, 8, seed=1)),
    "one attention matrix": lambda: from_attention(normal(1, 1, 600, 600).softmax(-1)),
}


@pytest.mark.parametrize("case", THREAD_CASES)
def test_the_number_of_threads_changes_no_bit(case: str) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(THREAD_CASES[case]())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for expected, value in zip(results[0], other, strict=True):
            assert torch.equal(expected, value)


def test_python_threads_do_not_disturb_each_other(two_threads: None) -> None:
    inputs = [normal(2, 50 + 37 * i, 32, seed=i) for i in range(6)]
    expected = [importance(h) for h in inputs]

    def work(index: int) -> bool:
        return all(all(map(torch.equal, importance(inputs[index]), expected[index])) for _ in range(5))

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(work, range(len(inputs))))


@every_level
@pytest.mark.parametrize("flush", [False, True])
def test_the_floating_point_mode_is_left_as_it_was(level: str, flush: bool, two_threads: None) -> None:
    denormal = torch.full((1 << 20,), 1e-39)  # long enough that torch's other threads take a part
    try:
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush denormals")
        survivors = (denormal * 0.5).count_nonzero()
        with forced(level):
            importance(normal(4, 40, 24))
            interaction(normal(1, 1, 300, 16), normal(1, 1, 300, 16, seed=1))
        assert (denormal * 0.5).count_nonzero() == survivors
        assert (denormal[:4] * 0.5).count_nonzero() == (0 if flush else 4)
    finally:
        torch.set_flush_denormal(False)


@every_level
def test_nearly_one_hot_attention(level: str) -> None:
    attention = (40 * normal(1, 2, 130, 130)).softmax(-1)  # most weights are denormal or zero
    wide = attention.double().requires_grad_()
    expected = reference.interaction_total(wide, squared=True, exclude_diagonal=False) / 130**2
    gradient = torch.autograd.grad(expected.sum(), wide)[0]
    with forced(level):
        total, grad_attention = from_attention(attention)
    assert relative_error(total, expected.detach()) <= 1e-5
    assert relative_error(grad_attention, gradient) <= 1e-5


@every_level
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_rows_of_a_softmax_gradient_sum_to_zero(level: str, precision: str) -> None:
    # Adding the same vector to all keys changes no attention weight, so it may not change the gradient of the queries.
    q, k = normal(1, 2, 200, 16), normal(1, 2, 200, 16, seed=1)
    with forced(level), matmul_precision(precision):
        grad_q = interaction(q, k)[1]
        shifted = interaction(q, k + 4)[1]
    assert relative_error(shifted, grad_q) <= {"highest": 2e-4, "high": 1e-2}[precision]


@every_level
def test_offsets_beyond_two_gigabytes(level: str) -> None:
    """Rows 2³⁰ elements apart: in a file of holes, so that only the pages of the rows themselves are there."""
    rows, width, stride = 6, 40, 2**30
    with tempfile.TemporaryFile() as file:
        file.truncate((rows * stride + width) * 2)
        with mmap.mmap(file.fileno(), 0) as space:
            far = torch.frombuffer(space, dtype=torch.float16).as_strided((1, rows, width), (0, stride, 1))
            far.copy_(normal(1, rows, width).half())
            with forced(level):
                results, expected = importance(far), importance(far.contiguous())
            del far
    for result, same in zip(results, expected, strict=True):
        assert torch.equal(result, same)


FORK = """
import os, sys, torch, safr_fast
if {load_first}:
    from safr_fast.ops import cpp

torch.set_num_threads(2)
h = torch.randn(1, 1000, 24)
ones = torch.ones(1, 1000)

def work():
    from safr_fast.ops import cpp
    # Without autograd and without torch's own parallel operations, which do not survive a fork.
    energy, squared_norm, moments = cpp.row_energy(h, None, None, True)
    return cpp.row_energy_backward(h, None, None, energy, squared_norm, moments, ones, ones)

expected = work() if {parent_first} else None
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
child = os.fork()
if child == 0:
    value = work()
    os._exit(3 if value.isnan().any() or (expected is not None and not torch.equal(value, expected)) else 0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


FORK_BEFORE_THE_IMPORT = """
import multiprocessing, os, sys, torch

def work():
    torch.set_num_threads(2)
    from safr_fast.ops import cpp
    energy, _, _ = cpp.row_energy(torch.ones(1, 1000, 24), None, None, False)
    os._exit(0 if energy.isfinite().all() else 3)

torch.set_num_threads(2)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
{how_to_fork}
child.start()
child.join(50)
if child.is_alive():
    child.kill()
    child.join()
sys.exit(child.exitcode)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize(
    "how_to_fork",
    [
        'child = multiprocessing.get_context("fork").Process(target=work)',
        'multiprocessing.set_start_method("fork"); child = multiprocessing.Process(target=work)',
    ],
    ids=["a context's", "the usual one"],
)
def test_a_forked_child_that_imports_the_package_first_does_not_hang(how_to_fork: str) -> None:
    code = FORK_BEFORE_THE_IMPORT.format(how_to_fork=how_to_fork)
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize(
    ("load_first", "parent_first"),
    [(True, True), (True, False), (False, False)],
    ids=["used before", "loaded before", "loaded in the child"],
)
def test_a_forked_child_neither_hangs_nor_differs(load_first: bool, parent_first: bool) -> None:
    code = FORK.format(load_first=load_first, parent_first=parent_first)
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
