"""What the tests share: the back ends at hand, the oracle, and inputs that are awkward on purpose."""

import contextlib
import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor

import safr_fast as sf

ROOT = Path(__file__).resolve().parents[1]
SHARED, BENCHMARKS = ROOT.parent / "shared", ROOT / "benchmarks"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ISA_VARIABLE = "SAFR_FAST_CPU_ISA"


@functools.cache
def backend_names() -> tuple[str, ...]:
    """Every back end that serves here; the C++ one once at each instruction-set level, as ``"cpp:avx2"``."""
    names = ["reference"]
    for backend in sf.available_backends():
        if backend.name == "cpp" and backend.available:
            from safr_fast import _cpu

            names += [f"cpp:{isa}" for isa in _cpu.available_isas()]
        elif backend.name == "triton" and backend.available:
            names.append("triton")
    return tuple(names)


def every_backend(*, fused: bool = False) -> pytest.MarkDecorator:
    """Parametrises ``backend``; ``fused`` leaves the reference out."""
    return pytest.mark.parametrize("backend", [name for name in backend_names() if not (fused and name == "reference")])


CPP_LEVELS = tuple(name for name in backend_names() if name.startswith("cpp:"))
needs_cpp = pytest.mark.skipif(not CPP_LEVELS, reason="the C++ extension is not built")
needs_triton = pytest.mark.skipif(
    "triton" not in backend_names(), reason="neither a GPU nor Triton's interpreter is at hand"
)
needs_interpreter = pytest.mark.skipif(
    DEVICE != "cpu" or "triton" not in backend_names(), reason="Triton's interpreter is not at hand"
)
every_level = pytest.mark.parametrize("level", CPP_LEVELS)


def device_of(backend: str) -> str:
    return DEVICE if backend in ("triton", "reference") else "cpu"


@contextlib.contextmanager
def forced(backend: str) -> Iterator[str]:
    """The ``impl`` that stands for ``backend``, with the instruction-set level in force while inside.

    Of the C++ kernels two threads share the work, however many a worker of the tests has.
    """
    impl, _, isa = backend.partition(":")
    before, threads = os.environ.get(ISA_VARIABLE), torch.get_num_threads()
    if isa:
        os.environ[ISA_VARIABLE] = isa
        torch.set_num_threads(max(2, threads))
    try:
        yield impl
    finally:
        torch.set_num_threads(threads)
        if before is None:
            os.environ.pop(ISA_VARIABLE, None)
        else:
            os.environ[ISA_VARIABLE] = before


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def skip_unless_served(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16: only a GPU can run this")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def strided(x: Tensor) -> Tensor:
    """The same values in a layout with a gap after every element, last stride 2."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖; the absolute norm where the expected value is 0."""
    difference = (value.double().cpu() - expected.double().cpu()).norm().item()
    norm = expected.double().norm().item()
    return difference / norm if norm > 0 else difference


def value_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], seed: int = 99
) -> list[Tensor]:
    """Outputs of ``function(*inputs)``, then the inputs' gradients of a fixed random combination of them."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    loss = sum((out * normal(*out.shape, seed=seed + i).to(out)).sum() for i, out in enumerate(outputs))
    return [out.detach() for out in outputs] + list(torch.autograd.grad(loss, inputs))


def assert_close_to_float64(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    *inputs: Tensor,
) -> None:
    """``function`` is as accurate as the specification asks, in values and gradients.

    ``plain`` is the plain formula: run in float64 it is the oracle, run in the inputs' own dtype the yardstick.
    """
    dtype = inputs[0].dtype
    oracle = value_and_gradients(plain, [x.double() for x in inputs])
    yardstick = value_and_gradients(plain, inputs)
    results = value_and_gradients(function, inputs)
    for i, (result, own, expected) in enumerate(zip(results, yardstick, oracle, strict=True)):
        plain_error = relative_error(own, expected)
        if dtype == torch.float32:
            allowed = max(1e-5, 2 * plain_error)
        else:
            # Beside what the output's dtype cannot hold of the right answer: digits of float16's subnormals.
            rounding = relative_error(expected.to(result.dtype), expected)
            allowed = min(1e-2, 2 * plain_error + torch.finfo(dtype).eps) + rounding
        error = relative_error(result, expected)
        assert error <= allowed < 1, (
            f"output {i}: error {error:.2e}, allowed {allowed:.2e}, plain formula {plain_error:.2e}"
        )


def plain_row_energy(h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formula as a user would write it, in the dtype of ``h`` throughout."""
    if mask is not None:
        h = torch.where(mask.unsqueeze(-1), h, 0.0)
    gram = h @ h.mT
    diagonal = torch.eye(h.shape[-2], dtype=torch.bool, device=h.device)
    return gram.masked_fill(diagonal, 0).square().sum(-1), h.square().sum(-1)


def plain_interaction_total(
    attention: Tensor, mask: Tensor | None = None, *, squared: bool, exclude_diagonal: bool
) -> Tensor:
    if mask is not None:
        attention = torch.where(mask[:, None, :, None] & mask[:, None, None, :], attention, 0.0)
    overlap = attention @ attention.mT
    if exclude_diagonal:
        overlap = overlap.masked_fill(torch.eye(overlap.shape[-1], dtype=torch.bool, device=overlap.device), 0)
    return (attention * (1 - (overlap.square() if squared else overlap))).sum((-1, -2))


def plain_interaction_total_from_qk(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, is_causal: bool, squared: bool, exclude_diagonal: bool
) -> Tensor:
    if mask is not None:
        q, k = (torch.where(mask[:, None, :, None], x, 0.0) for x in (q, k))
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / q.shape[-1] ** 0.5
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    allowed = allowed.tril() if is_causal else allowed
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    attention = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return plain_interaction_total(attention, mask, squared=squared, exclude_diagonal=exclude_diagonal)


PEAK = """
import torch, safr_fast as sf
from memory import peak_beyond_now

torch.set_num_threads({threads})

def peak(T):
    leaves = {leaves}
    def call():
        with torch.set_grad_enabled({gradient}):
            value = {value}
            return torch.autograd.grad(value, leaves) if {gradient} else value
    return peak_beyond_now(call)

peak({tokens} // 16)  # libraries loaded, threads started
print(peak({tokens}))
"""


def peak_mib(leaves: str, value: str, tokens: int, *, gradient: bool = True, threads: int = 2) -> float:
    """MiB that ``value`` of ``leaves`` takes at its peak beyond them, both in code that knows ``T``, with its gradient.

    Resident pages of a process of its own, so that buffers of every library count.
    """
    code = PEAK.format(leaves=leaves, value=value, tokens=tokens, gradient=gradient, threads=threads)
    search = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": search}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


def lengths_mask(lengths: Sequence[int], tokens: int) -> Tensor:
    return torch.arange(tokens)[None, :] < torch.tensor(lengths)[:, None]


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def forkserver() -> ForkServerContext:
    """Processes of their own that begin with torch loaded, yet without any thread of this one."""
    context = multiprocessing.get_context("forkserver")
    # Installed modules: it knows no folder of tests. The second is what an optimiser imports, for seconds.
    context.set_forkserver_preload(["safr_fast.training.loop", "torch._dynamo"])
    return context


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` gives in each of ``count`` processes joined by gloo."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(count, forkserver()) as pool:
        calls = [pool.submit(ranks.joined, rank, count, folder, function, arguments) for rank in range(count)]
        return [call.result() for call in calls]
