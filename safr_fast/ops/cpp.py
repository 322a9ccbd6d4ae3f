"""The CPU back end: the two primitives, and the importance loss on the first, over the extension ``safr_fast._cpu``.

Checks live in the public layer; here tensors become addresses, sizes and strides. NumPy has no bfloat16, and one
extension serves every version of torch because it knows none.
"""

import functools
import math
import multiprocessing
import os
from collections.abc import Callable

import torch
from torch import Tensor

import safr_fast
from safr_fast import arguments
from safr_fast.errors import BackendUnavailable
from safr_fast.ops.row_energy import real_tokens
from safr_fast.precision import matmul_precision


def _forked() -> bool:
    """Whether multiprocessing made this process by forking another."""
    process = multiprocessing.current_process()
    method = getattr(process, "_start_method", None) or multiprocessing.get_start_method(allow_none=True)
    return multiprocessing.parent_process() is not None and method == "fork"


try:
    import safr_fast._cpu as _cpu
except ImportError as error:
    _cpu = None
    _import_error = str(error)
else:
    # The extension may be loaded first in a forked child, which lacks the threads that torch started before. So may the
    # whole package be: of that multiprocessing knows, nothing does where a bare os.fork made the child.
    _cpu.set_home_process(os.getppid() if os.getpid() == safr_fast.PROCESS and _forked() else safr_fast.PROCESS)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PRECISIONS = {"highest": 0, "high": 1, "medium": 2}
KEPT_MOMENTS = 8 << 20  # bytes


def unavailable_reason(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why this back end cannot serve tensors of that kind, or any where none is named; None if it can.

    Raises:
        BackendUnavailable: SAFR_FAST_CPU_ISA names a level that this machine lacks.
    """
    if _cpu is None:
        return (
            f"the extension safr_fast._cpu is not built ({_import_error}); it needs a C++17 compiler and Python's"
            " headers (python3-dev, python3-devel) when the package is installed: pip install --force-reinstall"
            " --no-deps . in the source tree"
        )
    if device is not None and device.type != "cpu":
        return f"its kernels run on the CPU, the tensors are on {device.type}: move them, or use another impl"
    if dtype is not None and dtype not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        return f'it computes {names}, not {str(dtype).removeprefix("torch.")}: cast, or use impl="reference"'
    try:
        _cpu.isa()
    except (RuntimeError, ValueError) as error:
        raise BackendUnavailable(str(error)) from None
    return None


def description() -> str:
    return f"C++ kernels at level {_cpu.isa()} (of {', '.join(_cpu.available_isas())})"


@functools.cache
def _moment_threshold(E: int, dtype: torch.dtype, forward_alone: bool = False) -> int:
    """Real tokens from which on a sequence takes the feature path: where forward and backward together cost the same,
    or forward alone where nothing is saved.

    It does not depend on the precision, so that a backward pass finds the moments that its forward pass saved even
    where the setting changed in between.
    """
    of_both = 2.6 if dtype == torch.bfloat16 else 1.8
    return max(1, math.ceil(of_both * (1.25 if forward_alone else 1.0) * E))


def moment_slots(shape: torch.Size, packed: bool, dtype: torch.dtype, precision: str) -> int:
    """Moments ``(E, E)`` to keep for the backward pass; none, to make them again, where they would fill memory.

    One for each sample ``(B, T, E)`` or, packed ``(N, E)``, for as many sequences as can be long enough.
    """
    E = int(shape[-1])
    threshold = _moment_threshold(E, dtype)
    slots = shape[0] // threshold if packed else shape[0] if shape[1] >= threshold else 0
    return slots if slots * E * E * 4 <= KEPT_MOMENTS else 0


def _strided(x: Tensor) -> tuple[int, ...]:
    """Address and strides of ``(B, T)``, or of ``(N,)`` as one sample."""
    return x.data_ptr(), *((0,) * (2 - x.dim())), *x.stride()


def _options() -> dict[str, int]:
    return {"precision": _PRECISIONS[matmul_precision("cpu")], "threads": torch.get_num_threads()}


def _layout(mask: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, tuple[int, ...] | None]:
    return {
        "mask": None if mask is None else _strided(mask),
        "cu_seqlens": None if cu_seqlens is None else (cu_seqlens.data_ptr(), cu_seqlens.shape[0]),
    }


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _hidden(h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *, forward_alone: bool = False) -> "_cpu.Hidden":
    samples = h if h.dim() == 3 else h.unsqueeze(0)  # (B, T, E)
    return _cpu.Hidden(
        h=samples.data_ptr(),
        dtype=_DTYPES[h.dtype],
        shape=samples.shape,
        strides=samples.stride()[:2],
        threshold=_moment_threshold(h.shape[-1], h.dtype, forward_alone),
        **_layout(mask, cu_seqlens),
        **_options(),
    )


def _forward(
    run: Callable[..., None],
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    save_moments: bool,
    *rest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy and squared norm ``(B, T)`` or ``(N,)``, and moments ``(slots, E, E)``, as the extension's ``run`` writes
    them."""
    E = h.shape[-1]
    h = _inner_contiguous(h)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    packed = cu_seqlens is not None
    slots = moment_slots(h.shape, packed, h.dtype, matmul_precision("cpu")) if save_moments else 0
    energy = torch.empty(h.shape[:-1], dtype=torch.float32)
    sums = energy, torch.empty_like(energy), torch.empty(slots, E, E, dtype=torch.float32)
    run(_hidden(h, mask, cu_seqlens, forward_alone=not save_moments), *_addresses(*sums), *rest)
    return sums


def _backward(
    run: Callable[..., None],
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    energy: Tensor,
    squared_norm: Tensor,
    moments: Tensor,
    *rest: float | tuple[int, ...],
) -> Tensor:
    """The gradient of ``h``, as the extension's ``run`` writes it."""
    h = _inner_contiguous(h)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    energy, squared_norm, moments = energy.contiguous(), squared_norm.contiguous(), moments.contiguous()
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)  # (B, T, E) or (N, E)
    run(_hidden(h, mask, cu_seqlens), *_addresses(energy, squared_norm, moments), *rest, grad_h.data_ptr())
    return grad_h


def _addresses(energy: Tensor, squared_norm: Tensor, moments: Tensor) -> tuple[int, int, int, int]:
    return energy.data_ptr(), squared_norm.data_ptr(), moments.data_ptr(), moments.shape[0]


def row_energy(
    h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, save_moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(_cpu.row_energy, h, mask, cu_seqlens, save_moments)


def row_energy_backward(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    energy: Tensor,
    squared_norm: Tensor,
    moments: Tensor,
    grad_energy: Tensor,
    grad_squared_norm: Tensor,
) -> Tensor:
    gradients = _strided(grad_energy), _strided(grad_squared_norm)
    return _backward(_cpu.row_energy_backward, h, mask, cu_seqlens, energy, squared_norm, moments, *gradients)


def importance(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    scale: float,
    mean: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """``scale · Σ √R / (√n2 + ε)``, over the number of real tokens for the mean, what the sum was multiplied by, and
    what :func:`row_energy` gives, followed by the moments' norms ``(slots,)``, which nothing here needs: zeros."""
    if mean:
        scale /= max(int(real_tokens(h, mask, cu_seqlens)), 1)
    loss, factor = torch.empty((), dtype=torch.float32), torch.empty((), dtype=torch.float32)
    rest = eps, scale, loss.data_ptr(), factor.data_ptr()
    energy, squared_norm, moments = _forward(_cpu.importance, h, mask, cu_seqlens, save, *rest)
    return loss, factor, energy, squared_norm, moments, torch.zeros(moments.shape[0], dtype=torch.float32)


def importance_backward(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    energy: Tensor,
    squared_norm: Tensor,
    moments: Tensor,
    moment_norm: Tensor,
    factor: Tensor,
    grad_loss: Tensor,
    eps: float,
) -> Tensor:
    grad_loss = grad_loss.float()
    rest = eps, factor.data_ptr(), grad_loss.data_ptr()
    return _backward(_cpu.importance_backward, h, mask, cu_seqlens, energy, squared_norm, moments, *rest)


def _heads(x: Tensor, packed: bool = False) -> tuple[int, ...]:
    """Address, dtype and strides of sample, head and token of ``(B, H, T, D)``, or of packed ``(N, H, D)``."""
    strides = (0, x.stride(1), x.stride(0)) if packed else x.stride()[:3]
    return x.data_ptr(), _DTYPES[x.dtype], *strides


def interaction(
    attention: Tensor,
    mask: Tensor | None,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """Of the workspace each thread takes one head's, whatever ``workspace_bytes``; so below."""
    attention = _inner_contiguous(attention)
    B, H, T, _ = attention.shape
    total = torch.empty(B, H, dtype=torch.float32)
    grad = torch.empty(attention.shape if need_grad else 0, dtype=attention.dtype)
    _cpu.interaction(
        attention=_heads(attention),
        samples=B,
        heads=H,
        tokens=T,
        mask=None if mask is None else _strided(mask),
        squared=squared,
        exclude_diagonal=exclude_diagonal,
        total=total.data_ptr(),
        grad=grad.data_ptr(),
        **_options(),
    )
    return total, grad


def scale(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """``out`` ``(B, heads, …)`` is ``gradient`` ``(B, H, …)`` of each head times ``factor`` ``(B, H)``, summed over
    those that share one of ``out``'s; or ``gradient`` itself."""
    B, H = gradient.shape[:2]
    _cpu.scale_gradients(
        gradients=gradient.data_ptr(),
        dtype=_DTYPES[gradient.dtype],
        shape=(B, H, gradient.shape[2:].numel()),
        factor=_strided(factor),
        group=max(1, H // max(1, out.shape[1])),
        threads=torch.get_num_threads(),
        out=out.data_ptr(),
        out_dtype=_DTYPES[out.dtype],
    )


def interaction_from_qk(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    is_causal: bool,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
    workspace_bytes: int | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if max_seqlen is not None:
        arguments.check_offsets(cu_seqlens, q.shape[0], max_seqlen=max_seqlen)
    packed = cu_seqlens is not None
    q, k = _inner_contiguous(q), _inner_contiguous(k)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    H, D = q.shape[1], q.shape[-1]
    samples, tokens = (1, q.shape[0]) if packed else (q.shape[0], q.shape[2])
    sequences = samples if cu_seqlens is None else cu_seqlens.shape[0] - 1
    total = torch.empty(sequences, H, dtype=torch.float32)
    grad_q = torch.empty(q.shape if need_grad else 0, dtype=torch.float32)
    grad_k = torch.empty_like(grad_q)  # each query head's own part of the gradient of its key head
    _cpu.interaction_from_qk(
        q=_heads(q, packed),
        k=_heads(k, packed),
        samples=samples,
        heads=H,
        group=max(1, H // max(1, k.shape[1])),
        tokens=tokens,
        width=D,
        scale=scale,
        causal=is_causal,
        squared=squared,
        exclude_diagonal=exclude_diagonal,
        total=total.data_ptr(),
        grad_q=grad_q.data_ptr(),
        grad_k=grad_k.data_ptr(),
        **_layout(mask, cu_seqlens),
        **_options(),
    )
    return total, grad_q, grad_k
