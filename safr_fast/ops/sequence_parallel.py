r"""Row energy of sequences whose tokens are spread over the ranks of a process group.

.. math:: R_i = Σ_{j≠i, \text{own}} (h_i · h_j)² + h_i^⊤ S' h_i, \qquad S' = Σ_{j, \text{others}} h_j h_j^⊤

The first sum is the primitive itself. For the second, ranks exchange E×E moments alone, by one all-reduce each way: S
in the forward pass, and in the backward S_α = Σ_j α_j h_j h_jᵀ with α = ∂L/∂R. Moments are float64, since a rank takes
its own part off again, and a quadratic form in float32 would drown what near-orthogonal rows have left.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from safr_fast.ops.dispatch import transformed
from safr_fast.reference import real


def _of_others(own: Tensor, group: "dist.ProcessGroup") -> Tensor:
    everyone = own.clone()
    dist.all_reduce(everyone, group=group)
    return everyone - own


class EnergyOfOthers(torch.autograd.Function):
    """``h_iᵀ S' h_i`` ``(..., T)`` of ``h`` ``(..., T, E)``; 0 for padding."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, mask: Tensor | None, group: "dist.ProcessGroup") -> Tensor:
        x = real(mask, h.double())  # (..., T, E)
        others = _of_others(x.mT @ x, group)  # (..., E, E)
        ctx.save_for_backward(h, mask, others)
        ctx.group = group
        # What is below 0 is the rounding of a difference.
        return (x @ others).mul(x).sum(-1).clamp(min=0).to(torch.promote_types(h.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad_energy: Tensor) -> tuple[Tensor, None, None]:
        return EnergyOfOthersGradient.apply(*ctx.saved_tensors, grad_energy, ctx.group), None, None


class EnergyOfOthersGradient(torch.autograd.Function):
    """``2 (α_i S' + S'_α) h_i``. A Function of its own, so that a second derivative raises."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, mask: Tensor | None, others: Tensor, alpha: Tensor, group: "dist.ProcessGroup"
    ) -> Tensor:
        x = real(mask, h.double())
        weighted = x * alpha.double().unsqueeze(-1)  # (..., T, E)
        return (2 * (weighted @ others + x @ _of_others(weighted.mT @ x, group))).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("row_energy over a group differentiates once; for second derivatives leave group out")


class SumOverRanks(torch.autograd.Function):
    """The ranks' sum, the same on each; the gradient goes to each rank's own part of it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: "dist.ProcessGroup") -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def energy_of_others(h: Tensor, mask: Tensor | None, group: "dist.ProcessGroup") -> Tensor:
    if transformed(h, mask):
        raise RuntimeError(
            "row_energy over a group takes no forward-mode derivatives and no torch.func transforms of a gradient: "
            "leave group out"
        )
    return EnergyOfOthers.apply(h, mask, group)


def sum_over_ranks(part: Tensor, group: "dist.ProcessGroup") -> Tensor:
    return SumOverRanks.apply(part, group)
