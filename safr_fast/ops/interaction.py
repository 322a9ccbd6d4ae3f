"""Primitive 2: the attention triple ``Σ_ij A_ij (1 − φ(G_ij))``, ``G = A Aᵀ``, from A or from queries and keys.

Value and gradient are made in one pass: nothing of size T×T outlives a head on the way from queries and keys. The
gradient is that of the bare sum of each sample and head, and a key's gradient is kept apart for each query head that
uses it: so both can be scaled by whatever gradient arrives later. Sums become losses within the autograd Functions,
which saves a small tensor's operation and its gradient each.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, library

from safr_fast import arguments, reference
from safr_fast.ops import dispatch
from safr_fast.ops.first_derivative import first_derivative, frees_what_it_used, is_differentiated

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
_library.define("scaled(Tensor gradient, Tensor factor, SymInt heads, ScalarType dtype, str impl) -> Tensor")
_library.define("scale_(Tensor(a!) gradient, Tensor factor, str impl) -> ()")


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


def _scaled(gradient: Tensor, factor: Tensor, heads: int, dtype: torch.dtype, impl: str) -> Tensor:
    out = _unscaled(gradient, heads, dtype)
    dispatch.module(impl).scale(gradient.contiguous(), factor, out)
    return out


def _unscaled(gradient: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape[0], heads, *gradient.shape[2:], dtype=dtype)


def _scale_in_place(gradient: Tensor, factor: Tensor, impl: str) -> None:
    dispatch.module(impl).scale(gradient, factor, gradient)


for _device in ("CPU", "CUDA"):
    _library.impl("scaled", _scaled, _device)
    _library.impl("scale_", _scale_in_place, _device)
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
def _(gradient: Tensor, factor: Tensor, heads: int, dtype: torch.dtype, impl: str) -> Tensor:
    return _unscaled(gradient, heads, dtype)


@library.register_fake("safr_fast::scale_")
def _(gradient: Tensor, factor: Tensor, impl: str) -> None:
    return None


class _Divisor(NamedTuple):
    """What the sums ``(B, H)`` of a loss are divided by: ``(B, 1)`` where samples differ in length, else one number."""

    of_samples: Tensor | None
    of_all: int

    def divide(self, x: Tensor) -> Tensor:
        return x / (self.of_all if self.of_samples is None else self.of_samples)


def _divisor(total: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, tokens: int, reduction: str) -> _Divisor:
    count = max(total.numel(), 1) if reduction == "mean" else 1
    if mask is None and cu_seqlens is None:
        return _Divisor(None, max(tokens, 1) ** 2 * count)
    length = cast(Tensor, cu_seqlens).diff() if mask is None else mask.sum(-1)
    return _Divisor(length.clamp(min=1).to(total.dtype).square().unsqueeze(-1) * count, 1)


def _reduce(total: Tensor, divisor: _Divisor, reduction: str) -> Tensor:
    if reduction == "none":
        return divisor.divide(total)
    return divisor.divide(total.sum()) if divisor.of_samples is None else divisor.divide(total).sum()


class Interaction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attention: Tensor,
        mask: Tensor | None,
        squared: bool,
        exclude_diagonal: bool,
        reduction: str,
        impl: str,
        workspace_bytes: int | None,
    ) -> Tensor:
        total, gradient = torch.ops.safr_fast.interaction(
            attention, mask, squared, exclude_diagonal, True, impl, workspace_bytes
        )
        divisor = _divisor(total, mask, None, attention.shape[-1], reduction)
        ctx.save_for_backward(attention, gradient, divisor.of_samples)
        ctx.of_all, ctx.impl = divisor.of_all, impl
        return _reduce(total, divisor, reduction)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        attention, gradient, of_samples = ctx.saved_tensors
        factor = _Divisor(of_samples, ctx.of_all).divide(grad_loss)
        return _gradient(ctx.impl, gradient, factor, attention), *(None,) * 6


class InteractionFromQK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *options: Any
    ) -> Tensor:
        *formula, reduction, impl, workspace_bytes, max_seqlen = options
        total, grad_q, grad_k = torch.ops.safr_fast.interaction_from_qk(
            q, k, mask, cu_seqlens, *formula, True, impl, workspace_bytes, max_seqlen
        )
        divisor = _divisor(total, mask, cu_seqlens, q.shape[-2], reduction)
        ctx.save_for_backward(q, k, cu_seqlens, grad_q, grad_k, divisor.of_samples)
        ctx.of_all, ctx.impl = divisor.of_all, impl
        return _reduce(total, divisor, reduction)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        q, k, cu_seqlens, grad_q, grad_k, of_samples = ctx.saved_tensors
        factor = _Divisor(of_samples, ctx.of_all).divide(grad_loss)
        if cu_seqlens is not None:
            segment = reference.segment_ids(cu_seqlens, q.shape[0])
            # tokens past the last sequence find the row of zeros below it
            factor = torch.nn.functional.pad(factor, (0, 0, 0, 1))[segment]  # (N, H) or (N, 1)
        grad_q = _gradient(ctx.impl, grad_q, factor, q, k) if ctx.needs_input_grad[0] else None
        grad_k = _gradient(ctx.impl, grad_k, factor, k, q) if ctx.needs_input_grad[1] else None
        return grad_q, grad_k, *(None,) * 10


def _gradient(impl: str, bare: Tensor, factor: Tensor, x: Tensor, *others: Tensor) -> Tensor:
    """``bare`` times ``factor``, which is one number or one for each of its first two dimensions, by ``x``; it depends
    on the ``others`` too, which is what they are here for."""
    fused = not dispatch.is_batched(factor) and (bare.dim() == 4 or impl == "cpp")  # Triton: packed rows are too short
    alike = bare.shape == x.shape and bare.dtype == x.dtype and bare.is_contiguous()
    if fused and alike and frees_what_it_used():
        torch.ops.safr_fast.scale_(bare, factor.expand(bare.shape[:2]), impl)
        return bare
    return first_derivative("the interaction", _scaled_sum, fused, impl, bare, factor, x, *others)


def _scaled_sum(fused: bool, impl: str, gradient: Tensor, factor: Tensor, x: Tensor, *_: Tensor) -> Tensor:
    """``gradient`` times ``factor``, summed over the heads that share one of ``x``'s, in the dtype of ``x``."""
    if fused:
        return torch.ops.safr_fast.scaled(gradient, factor.expand(gradient.shape[:2]), x.shape[1], x.dtype, impl)
    scaled = gradient * factor.reshape(*factor.shape, *(1,) * (gradient.dim() - factor.dim()))
    if gradient.shape != x.shape:
        scaled = scaled.reshape(x.shape[0], x.shape[1], gradient.shape[1] // x.shape[1], *x.shape[2:]).sum(2)
    return scaled.to(x.dtype)


def interaction(
    attention: Tensor,
    mask: Tensor | None,
    squared: bool,
    exclude_diagonal: bool,
    reduction: str,
    impl: dispatch.Impl,
    workspace_bytes: int | None,
) -> Tensor:
    """Loss of a checked ``attention`` ``(B, H, T, T)``: of all, or ``(B, H)`` where ``reduction`` is "none"."""
    chosen = dispatch.choose(impl, attention, mask)
    if chosen != "reference" and is_differentiated(attention):
        return Interaction.apply(attention, mask, squared, exclude_diagonal, reduction, chosen, workspace_bytes)
    if chosen == "reference":
        total = reference.interaction_total(attention, mask, squared=squared, exclude_diagonal=exclude_diagonal)
    else:
        options = (squared, exclude_diagonal, False, chosen, workspace_bytes)
        total = torch.ops.safr_fast.interaction(attention, mask, *options)[0]
    return _reduce(total, _divisor(total, mask, None, attention.shape[-1], reduction), reduction)


def interaction_from_qk(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    is_causal: bool,
    squared: bool,
    exclude_diagonal: bool,
    reduction: str,
    impl: dispatch.Impl,
    workspace_bytes: int | None,
    max_seqlen: int | None,
) -> Tensor:
    """The same of checked queries and keys; ``(S, H)`` of packed ones where ``reduction`` is "none"."""
    chosen = dispatch.choose(impl, q, k, mask, cu_seqlens)
    formula = (scale, is_causal, squared, exclude_diagonal)
    if chosen != "reference" and is_differentiated(q, k):
        return InteractionFromQK.apply(q, k, mask, cu_seqlens, *formula, reduction, chosen, workspace_bytes, max_seqlen)
    if chosen == "reference":
        arguments.check_offsets(cu_seqlens, q.shape[0], max_seqlen=max_seqlen)
        total = reference.interaction_total_from_qk(
            q,
            k,
            mask,
            cu_seqlens,
            scale=scale,
            is_causal=is_causal,
            squared=squared,
            exclude_diagonal=exclude_diagonal,
        )
    else:
        options = (*formula, False, chosen, workspace_bytes, max_seqlen)
        total = torch.ops.safr_fast.interaction_from_qk(q, k, mask, cu_seqlens, *options)[0]
    return _reduce(total, _divisor(total, mask, cu_seqlens, q.shape[-2], reduction), reduction)
