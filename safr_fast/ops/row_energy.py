"""Primitive 1: energy of each row of the Gram matrix ``h hᵀ`` off its diagonal, and the row's squared norm.

Layers: :func:`row_energy` (called by the public functions) → autograd → ``torch.ops.safr_fast.row_energy`` → back end.
"""

import math
from typing import Any

import torch
from torch import Tensor, library

from safr_fast import arguments, reference
from safr_fast.ops import dispatch
from safr_fast.ops.first_derivative import first_derivative, is_differentiated
from safr_fast.precision import matmul_precision

_library = library.Library("safr_fast", "FRAGMENT")
_library.define(
    "row_energy(Tensor h, Tensor? mask, Tensor? cu_seqlens, bool save_moments, str impl) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "row_energy_backward(Tensor h, Tensor? mask, Tensor? cu_seqlens, Tensor energy, Tensor squared_norm,"
    " Tensor moments, Tensor grad_energy, Tensor grad_squared_norm, str impl) -> Tensor"
)


def _forward(
    h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, save_moments: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.module(impl).row_energy(h, mask, cu_seqlens, save_moments)


def _backward(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    energy: Tensor,
    squared_norm: Tensor,
    moments: Tensor,
    grad_energy: Tensor,
    grad_squared_norm: Tensor,
    impl: str,
) -> Tensor:
    return dispatch.module(impl).row_energy_backward(
        h, mask, cu_seqlens, energy, squared_norm, moments, grad_energy, grad_squared_norm
    )


for _device in ("CPU", "CUDA"):
    _library.impl("row_energy", _forward, _device)
    _library.impl("row_energy_backward", _backward, _device)


@library.register_fake("safr_fast::row_energy")
def _(
    h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, save_moments: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = h.new_empty(h.shape[:-1], dtype=torch.float32)
    return rows, torch.empty_like(rows), fake_moments(h, cu_seqlens, save_moments, impl)


def fake_moments(h: Tensor, cu_seqlens: Tensor | None, saved: bool, impl: str) -> Tensor:
    """As many ``(E, E)`` as the back end keeps for the backward pass."""
    slots = 0
    if saved:
        precision = matmul_precision(h.device.type)
        slots = dispatch.module(impl).moment_slots(h.shape, cu_seqlens is not None, h.dtype, precision)
    return h.new_empty(slots, h.shape[-1], h.shape[-1], dtype=torch.float32)


@library.register_fake("safr_fast::row_energy_backward")
def _(h: Tensor, *_: Any) -> Tensor:
    return h.new_empty(h.shape)


class RowEnergy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, impl: str
    ) -> tuple[Tensor, Tensor]:
        energy, squared_norm, moments = torch.ops.safr_fast.row_energy(h, mask, cu_seqlens, True, impl)
        ctx.save_for_backward(h, mask, cu_seqlens, energy, squared_norm, moments)
        ctx.impl = impl
        return energy, squared_norm

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor, grad_squared_norm: Tensor) -> tuple[Tensor, None, None, None]:
        arguments = *ctx.saved_tensors, grad_energy, grad_squared_norm, ctx.impl
        return first_derivative("row_energy", torch.ops.safr_fast.row_energy_backward, *arguments), None, None, None


def in_samples(h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``h`` as ``(B, T, E)`` and its mask as ``(B, T)``, as the back ends take them; packed ``(N, E)`` as it is."""
    if cu_seqlens is not None:
        return h, mask
    if h.dim() == 2:
        return h.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
    return h.flatten(0, -3), None if mask is None else mask.flatten(0, -2)


def real_tokens(h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | int:
    """How many there are."""
    if mask is not None:
        return mask.sum()
    return math.prod(h.shape[:-1]) if cu_seqlens is None else cu_seqlens[-1]


def row_energy(h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, impl: dispatch.Impl) -> tuple[Tensor, Tensor]:
    """``(R, n2)`` of checked arguments: ``h`` ``(..., T, E)`` or packed ``(N, E)``; each ``(..., T)``."""
    chosen = dispatch.choose(impl, h, mask, cu_seqlens)
    if chosen == "reference":
        arguments.check_offsets(cu_seqlens, h.shape[-2])
        return reference.row_energy(h, mask, cu_seqlens)
    rows = h.shape[:-1]
    h, mask = in_samples(h, mask, cu_seqlens)
    if is_differentiated(h):
        energy, squared_norm = RowEnergy.apply(h, mask, cu_seqlens, chosen)
    else:
        energy, squared_norm, _ = torch.ops.safr_fast.row_energy(h, mask, cu_seqlens, False, chosen)
    if energy.shape == rows:  # a view is a node of the graph, as long to make and to leave as a call's checks
        return energy, squared_norm
    return energy.view(rows), squared_norm.view(rows)
