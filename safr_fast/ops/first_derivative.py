"""Gradients of the fused back ends, which have no derivative of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safr_fast.ops.dispatch import is_batched

# Before PyTorch 2.12 Dynamo answers that it exports whenever it compiles.
_DYNAMO_KNOWS_EXPORTS = torch.torch_version.TorchVersion(torch.__version__) >= "2.12"

# What PyTorch's own compiler goes by to write into saved tensors.
_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _is_exporting() -> bool:
    return torch.compiler.is_exporting() and (_DYNAMO_KNOWS_EXPORTS or not torch.compiler.is_dynamo_compiling())


def is_differentiated(*inputs: Tensor) -> bool:
    """Whether a backward pass may follow. An exported program has none, and keeps nothing for one: what is kept would
    tie it to the lengths that it was made with."""
    if _is_exporting():
        return False
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def frees_what_it_used() -> bool:
    """Whether the backward pass under way frees what was saved for it, which may then be written to."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or _keeps_graph())


def first_derivative(name: str, gradient: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``gradient(*arguments)`` in the backward pass of ``name``; to differentiate it by any tensor among them raises
    instead of giving zero."""
    if not torch.is_grad_enabled():  # it is where the caller asked for create_graph
        return gradient(*arguments)
    if any(isinstance(x, Tensor) and is_batched(x) for x in arguments):  # autograd would lose track of them
        raise _differentiates_once(name)
    return _FirstDerivative.apply(name, gradient, *arguments)


def _differentiates_once(name: str) -> RuntimeError:
    return RuntimeError(f'{name} differentiates once; for second derivatives use impl="reference"')


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, gradient: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.name = name
        return gradient(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise _differentiates_once(ctx.name)
