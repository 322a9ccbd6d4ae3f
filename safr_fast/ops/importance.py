"""The importance loss as the fused back ends finish it on what primitive 1 gives: ``Σ_i √R_i / (√n2_i + ε)``.

Elementwise on that, hence no primitive: terms that are not summed, or over several ranks, :mod:`safr_fast.functional`
writes in PyTorch. A small batch would spend as long in two dozen calls of PyTorch as in everything else.
"""

import math
from typing import Any

import torch
from torch import Tensor, library

from safr_fast.ops import dispatch
from safr_fast.ops.first_derivative import first_derivative, is_differentiated
from safr_fast.ops.row_energy import fake_moments, in_samples

_library = library.Library("safr_fast", "FRAGMENT")
_library.define(
    "importance(Tensor h, Tensor? mask, Tensor? cu_seqlens, float eps, bool mean, bool save, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "importance_backward(Tensor h, Tensor? mask, Tensor? cu_seqlens, Tensor energy, Tensor squared_norm,"
    " Tensor moments, Tensor moment_norm, Tensor factor, Tensor grad_loss, float eps, str impl) -> Tensor"
)


def _forward(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    mean: bool,
    save: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    scale = 1 / math.sqrt(max(h.shape[-1], 1))  # in here, where a compiler need not know the width
    return dispatch.module(impl).importance(h, mask, cu_seqlens, eps, scale, mean, save)


def _backward(
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
    impl: str,
) -> Tensor:
    return dispatch.module(impl).importance_backward(
        h, mask, cu_seqlens, energy, squared_norm, moments, moment_norm, factor, grad_loss, eps
    )


for _device in ("CPU", "CUDA"):
    _library.impl("importance", _forward, _device)
    _library.impl("importance_backward", _backward, _device)


@library.register_fake("safr_fast::importance")
def _(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    mean: bool,
    save: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    loss = h.new_empty((), dtype=torch.float32)
    rows = h.new_empty(h.shape[:-1], dtype=torch.float32)
    moments = fake_moments(h, cu_seqlens, save, impl)
    return loss, torch.empty_like(loss), rows, torch.empty_like(rows), moments, moments.new_empty(moments.shape[0])


@library.register_fake("safr_fast::importance_backward")
def _(h: Tensor, *_: Any) -> Tensor:
    return h.new_empty(h.shape)


class Importance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *rest: Any) -> Tensor:
        eps, mean, impl = rest
        loss, factor, *sums = torch.ops.safr_fast.importance(h, mask, cu_seqlens, eps, mean, True, impl)
        ctx.save_for_backward(h, mask, cu_seqlens, *sums, factor)
        ctx.eps, ctx.impl = eps, impl
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        arguments = *ctx.saved_tensors, grad_loss, ctx.eps, ctx.impl
        gradient = first_derivative("importance_loss", torch.ops.safr_fast.importance_backward, *arguments)
        return gradient, *(None,) * 5


def importance(h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, eps: float, mean: bool, impl: str) -> Tensor:
    """Sum over tokens, or mean over the real ones, of ``√(P_i / E)`` of checked arguments, by a back end with kernels
    for it."""
    h, mask = in_samples(h, mask, cu_seqlens)
    if is_differentiated(h):
        return Importance.apply(h, mask, cu_seqlens, float(eps), mean, impl)
    return torch.ops.safr_fast.importance(h, mask, cu_seqlens, float(eps), mean, False, impl)[0]
