"""Gradients of the fused back ends, which have no derivative of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_derivative(name: str, gradient: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``gradient(*arguments)`` in the backward pass of ``name``; to differentiate it raises instead of giving zero."""
    if torch.is_grad_enabled():  # only where the caller asked for create_graph
        return _FirstDerivative.apply(name, gradient, *arguments)
    return gradient(*arguments)


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, gradient: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.name = name
        return gradient(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f'{ctx.name} differentiates once; for second derivatives use impl="reference"')
