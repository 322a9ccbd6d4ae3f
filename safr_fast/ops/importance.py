"""How the importance loss ends where the back end has kernels for it: ``Σ_i √R_i / (√n2_i + ε)``, and its gradients.

Elementwise on what primitive 1 gives, hence no primitive: elsewhere :mod:`safr_fast.functional` writes it in PyTorch.
On a GPU it would take longer to launch that way than everything else.
"""

import math
from typing import Any

import torch
from torch import Tensor

from safr_fast.ops import dispatch

_library = torch.library.Library("safr_fast", "FRAGMENT")
_library.define(
    "importance(Tensor energy, Tensor squared_norm, Tensor? mask, Tensor? cu_seqlens, float eps, float scale,"
    " bool mean, str impl) -> (Tensor, Tensor)"
)
_library.define(
    "importance_backward(Tensor energy, Tensor squared_norm, Tensor factor, Tensor grad_loss, float eps, str impl)"
    " -> (Tensor, Tensor)"
)


def _forward(
    energy: Tensor,
    squared_norm: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    scale: float,
    mean: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return dispatch.module(impl).importance(energy, squared_norm, mask, cu_seqlens, eps, scale, mean)


def _backward(
    energy: Tensor, squared_norm: Tensor, factor: Tensor, grad_loss: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    return dispatch.module(impl).importance_backward(energy, squared_norm, factor, grad_loss, eps)


for _device in ("CPU", "CUDA"):
    _library.impl("importance", _forward, _device)
    _library.impl("importance_backward", _backward, _device)


@torch.library.register_fake("safr_fast::importance")
def _(energy: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return energy.new_empty(()), energy.new_empty(())


@torch.library.register_fake("safr_fast::importance_backward")
def _(energy: Tensor, squared_norm: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(energy), torch.empty_like(squared_norm)


class Importance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, energy: Tensor, squared_norm: Tensor, *rest: Any) -> Tensor:
        mask, cu_seqlens, eps, scale, mean, impl = rest
        loss, factor = torch.ops.safr_fast.importance(energy, squared_norm, mask, cu_seqlens, eps, scale, mean, impl)
        ctx.save_for_backward(energy, squared_norm, factor)
        ctx.eps, ctx.impl = eps, impl
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ImportanceGradient.apply(*ctx.saved_tensors, grad_loss, ctx.eps, ctx.impl)
        return *gradients, *(None,) * 6


class ImportanceGradient(torch.autograd.Function):
    """A Function of its own, so that a second derivative raises instead of coming out as zero."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.safr_fast.importance_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError('importance_loss differentiates once; for second derivatives use impl="reference"')


def importance(
    energy: Tensor,
    squared_norm: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    width: int,
    mean: bool,
    impl: str,
) -> Tensor:
    """Sum over tokens, or mean over the real ones, of ``√(P_i / width)``, by a back end with kernels for it."""
    scale = 1 / math.sqrt(max(width, 1))
    return Importance.apply(energy, squared_norm, mask, cu_seqlens, float(eps), scale, mean, impl)
