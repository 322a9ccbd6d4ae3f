"""Which back end serves a call, and why each was or was not chosen."""

import functools
import importlib
import os
import types
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from safr_fast.errors import BackendUnavailable

Impl = Literal["auto", "reference", "cpp", "triton"]
IMPLS: tuple[str, ...] = get_args(Impl)

# Where each fused back end's functions live; imported when first needed, so that neither Triton nor the
# extension is loaded by `import safr_fast`.
_MODULES = {"cpp": "safr_fast.ops.cpp", "triton": "safr_fast.kernels.launch"}


@dataclass(frozen=True)
class Backend:
    """A back end and whether it can serve on this machine; ``detail`` says with what, or why not and what to do."""

    name: str
    available: bool
    detail: str


@functools.cache
def module(impl: str) -> types.ModuleType:
    return importlib.import_module(_MODULES[impl])


def _obstacle(impl: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why a fused back end cannot serve tensors of this kind (or anything at all), with the remedy; None if it can.

    Raises:
        BackendUnavailable: what the user asked of it by environment variable is impossible.
    """
    try:
        return module(impl).unavailable_reason(device, dtype)
    except ImportError as error:
        return f"{_MODULES[impl]} cannot be imported ({error}): install safr-fast with its {impl} back end"


def available_backends() -> tuple[Backend, ...]:
    """The back ends of this installation, in the order of the ``impl`` argument's values."""
    backends = [Backend("reference", True, "plain PyTorch: any device and floating dtype, twice differentiable")]
    for impl in _MODULES:
        try:
            obstacle = _obstacle(impl)
        except BackendUnavailable as error:
            obstacle = str(error)
        backends.append(Backend(impl, obstacle is None, obstacle or module(impl).description()))
    return tuple(backends)


def check_impl(impl: str) -> None:
    if not isinstance(impl, str) or impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")


def choose(impl: str, differentiated: Tensor, *others: Tensor | None) -> str:
    """:func:`resolve` for the device and dtype of ``differentiated``, and for how derivatives of all inputs are taken.

    Raises:
        ValueError, BackendUnavailable: as :func:`resolve`; also where ``impl`` was named and only the reference has the
            derivatives that are taken.
    """
    chosen = resolve(impl, differentiated.device, differentiated.dtype)
    if chosen == "reference" or not transformed(differentiated, *others):
        return chosen
    return _for_transforms(impl, chosen)


def transformed(*inputs: Tensor | None) -> bool:
    """Whether derivatives by one of ``inputs`` are taken in a way that an autograd Function does not see."""
    if torch.compiler.is_compiling():
        return _within_transform()
    batched = needed = False
    for x in inputs:
        if x is None:
            continue
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            return True
        needed |= x.requires_grad
        while _functorch.is_functorch_wrapped_tensor(x):
            if _functorch.is_gradtrackingtensor(x):
                return True
            batched = True
            x = _functorch.get_unwrapped(x)
            needed |= x.requires_grad
    return batched and needed and torch.is_grad_enabled()


def is_batched(x: Tensor) -> bool:
    """Whether it stands for many tensors: of ``torch.vmap``, or a gradient under ``is_grads_batched``."""
    if torch.compiler.is_compiling():
        return False
    return _functorch.is_batchedtensor(x) or _functorch.is_legacy_batchedtensor(x)


def _within_transform() -> bool:
    """What a compiler can tell of it: the transforms it is in, not which of them a tensor has part in."""
    transforms = [interpreter.key() for interpreter in _functorch.get_interpreter_stack() or ()]
    batched_alone = all(kind == _functorch.TransformType.Vmap for kind in transforms)
    needed = torch.is_grad_enabled() or not batched_alone
    return (bool(transforms) and needed) or forward_ad._current_level >= 0


def _for_transforms(impl: str, chosen: str) -> str:
    obstacle = 'forward-mode derivatives and torch.func transforms of a gradient need impl="reference"'
    if impl != "auto":
        raise BackendUnavailable(f'impl="{impl}" cannot serve: {obstacle}')
    _warn_of_reference(chosen, obstacle)
    return "reference"


def _warn_of_reference(fused: str, obstacle: str) -> None:
    warnings.warn(
        f'safr_fast uses impl="reference", which stores T×T tensors, since "{fused}" cannot serve: {obstacle}',
        stacklevel=3,
    )


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The back end that serves: ``impl`` itself, or the fastest that can where it is ``"auto"``.

    Raises:
        ValueError: no such ``impl``.
        BackendUnavailable: ``impl`` was named and cannot serve tensors of this device and dtype.
    """
    check_impl(impl)
    return _resolve(impl, device, dtype, os.environ.get("SAFR_FAST_CPU_ISA"))


for _function in (resolve, _within_transform, _for_transforms):
    # What torch.compiler.assume_constant_result does, which imports the compiler: as slow to import as torch itself.
    vars(_function)["_dynamo_marked_constant"] = True


@functools.cache
def _resolve(impl: str, device: torch.device, dtype: torch.dtype, _isa: str | None) -> str:
    if impl == "reference":
        return impl
    if impl != "auto":
        obstacle = _obstacle(impl, device, dtype)
        if obstacle is not None:
            raise BackendUnavailable(f'impl="{impl}" cannot serve: {obstacle}')
        return impl
    fused = {"cpu": "cpp", "cuda": "triton"}.get(device.type)
    if fused is None or dtype == torch.float64:
        return "reference"
    obstacle = _obstacle(fused, device, dtype)
    if obstacle is None:
        return fused
    _warn_of_reference(fused, obstacle)
    return "reference"
