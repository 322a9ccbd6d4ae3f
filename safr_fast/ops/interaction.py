"""Primitive 2: the attention triple ``Σ_ij A_ij (1 − φ(G_ij))``, ``G = A Aᵀ``, from A or from queries and keys.

Value and gradient are made in one pass: nothing of size T×T outlives a head on the way from queries and keys. The
gradient is that of the bare sum of each sample and head, and a key's gradient is kept apart for each query head that
uses it: so both can be scaled by whatever gradient arrives later. The public functions divide by the number of pairs.
"""

from typing import Any

import torch
from torch import Tensor, library

from safr_fast import arguments, reference
from safr_fast.ops import dispatch
from safr_fast.ops.first_derivative import first_derivative, is_differentiated

_library = library.Library("safr_fast", "FRAGMENT")
_library.define(
    "interaction(Tensor attention, Tensor? mask, bool squared, bool exclude_diagonal, bool need_grad, str impl,"
    " int? workspace_bytes=None) -> (Tensor, Tensor)"
)
_library.define(
    "interaction_from_qk(Tensor q, Tensor k, Tensor? mask, Tensor? cu_seqlens, float scale, bool is_causal,"
    " bool squared, bool exclude_diagonal, bool need_grad, str impl, int? workspace_bytes=None,"
    " SymInt? max_seqlen=None) -> (Tensor, Tensor, Tensor)"
)
_library.define("scaled(Tensor gradient, Tensor factor, SymInt heads, ScalarType dtype) -> Tensor")


def _from_attention(
    attention: Tensor,
    mask: Tensor | None,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
    impl: str,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    return dispatch.module(impl).interaction(attention, mask, squared, exclude_diagonal, need_grad, workspace_bytes)


def _from_qk(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    is_causal: bool,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
    impl: str,
    workspace_bytes: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.module(impl).interaction_from_qk(
        q, k, mask, cu_seqlens, scale, is_causal, squared, exclude_diagonal, need_grad, workspace_bytes, max_seqlen
    )


def _scaled_by_triton(gradient: Tensor, factor: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return dispatch.module("triton").scaled(gradient, factor, heads, dtype)


_library.impl("scaled", _scaled_by_triton, "CUDA")
for _device in ("CPU", "CUDA"):
    _library.impl("interaction", _from_attention, _device)
    _library.impl("interaction_from_qk", _from_qk, _device)


@library.register_fake("safr_fast::interaction")
def _(
    attention: Tensor, mask: Tensor | None, squared: bool, exclude_diagonal: bool, need_grad: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    total = attention.new_empty(attention.shape[:2], dtype=torch.float32)
    return total, attention.new_empty(attention.shape if need_grad else 0)


@library.register_fake("safr_fast::interaction_from_qk")
def _(
    q: Tensor, k: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_grad = options[4]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    total = q.new_empty(sequences, q.shape[1], dtype=torch.float32)
    grad_q = q.new_empty(q.shape if need_grad else 0, dtype=torch.float32)
    return total, grad_q, torch.empty_like(grad_q)


@library.register_fake("safr_fast::scaled")
def _(gradient: Tensor, factor: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape[0], heads, *gradient.shape[2:], dtype=dtype)


class Interaction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attention: Tensor,
        mask: Tensor | None,
        squared: bool,
        exclude_diagonal: bool,
        impl: str,
        workspace_bytes: int | None,
    ) -> Tensor:
        total, gradient = torch.ops.safr_fast.interaction(
            attention, mask, squared, exclude_diagonal, True, impl, workspace_bytes
        )
        ctx.save_for_backward(attention, gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        attention, gradient = ctx.saved_tensors
        return _gradient(gradient, grad_total, attention), *(None,) * 5


class InteractionFromQK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *options: Any
    ) -> Tensor:
        *formula, impl, workspace_bytes, max_seqlen = options
        total, grad_q, grad_k = torch.ops.safr_fast.interaction_from_qk(
            q, k, mask, cu_seqlens, *formula, True, impl, workspace_bytes, max_seqlen
        )
        ctx.save_for_backward(q, k, cu_seqlens, grad_q, grad_k)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        q, k, cu_seqlens, grad_q, grad_k = ctx.saved_tensors
        factor = grad_total
        if cu_seqlens is not None:
            segment = reference.segment_ids(cu_seqlens, q.shape[0])
            # tokens past the last sequence find the row of zeros below it
            factor = torch.nn.functional.pad(grad_total, (0, 0, 0, 1))[segment]  # (N, H)
        grad_q = _gradient(grad_q, factor, q, k) if ctx.needs_input_grad[0] else None
        grad_k = _gradient(grad_k, factor, k, q) if ctx.needs_input_grad[1] else None
        return grad_q, grad_k, *(None,) * 9


def _gradient(bare: Tensor, factor: Tensor, x: Tensor, *others: Tensor) -> Tensor:
    """By ``x``; it depends on the ``others`` too, which is what they are here for."""
    return first_derivative("the interaction", _scaled, bare, factor, x, *others)


def _scaled(gradient: Tensor, factor: Tensor, x: Tensor, *_: Tensor) -> Tensor:
    """``gradient`` times ``factor``, of samples (or packed tokens) and heads, summed over the heads that share one of
    ``x``'s, in the dtype of ``x``."""
    if gradient.is_cuda and gradient.dim() == 4 and not dispatch.is_batched(factor):
        return torch.ops.safr_fast.scaled(gradient, factor, x.shape[1], x.dtype)
    factor = factor.reshape(*factor.shape, *(1,) * (gradient.dim() - 2))
    if gradient.shape == x.shape:
        if gradient.dtype == x.dtype == factor.dtype or dispatch.is_batched(factor):
            return (gradient * factor).to(x.dtype)
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=x.dtype))  # in one launch
    shared = x.shape[0], x.shape[1], gradient.shape[1] // x.shape[1], *x.shape[2:]
    return (gradient * factor).reshape(shared).sum(2).to(x.dtype)


def interaction(
    attention: Tensor,
    mask: Tensor | None,
    squared: bool,
    exclude_diagonal: bool,
    impl: dispatch.Impl,
    workspace_bytes: int | None,
) -> Tensor:
    """``(B, H)`` pair sums of a checked ``attention`` ``(B, H, T, T)``."""
    chosen = dispatch.choose(impl, attention, mask)
    if chosen == "reference":
        return reference.interaction_total(attention, mask, squared=squared, exclude_diagonal=exclude_diagonal)
    if is_differentiated(attention):
        return Interaction.apply(attention, mask, squared, exclude_diagonal, chosen, workspace_bytes)
    options = (squared, exclude_diagonal, False, chosen, workspace_bytes)
    return torch.ops.safr_fast.interaction(attention, mask, *options)[0]


def interaction_from_qk(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    is_causal: bool,
    squared: bool,
    exclude_diagonal: bool,
    impl: dispatch.Impl,
    workspace_bytes: int | None,
    max_seqlen: int | None,
) -> Tensor:
    """``(B, H)`` pair sums of checked queries and keys; ``(S, H)`` of packed ones."""
    chosen = dispatch.choose(impl, q, k, mask, cu_seqlens)
    if chosen == "reference":
        arguments.check_offsets(cu_seqlens, q.shape[0], max_seqlen=max_seqlen)
        return reference.interaction_total_from_qk(
            q,
            k,
            mask,
            cu_seqlens,
            scale=scale,
            is_causal=is_causal,
            squared=squared,
            exclude_diagonal=exclude_diagonal,
        )
    formula = (scale, is_causal, squared, exclude_diagonal)
    if is_differentiated(q, k):
        return InteractionFromQK.apply(q, k, mask, cu_seqlens, *formula, chosen, workspace_bytes, max_seqlen)
    options = (*formula, False, chosen, workspace_bytes, max_seqlen)
    return torch.ops.safr_fast.interaction_from_qk(q, k, mask, cu_seqlens, *options)[0]
