"""Launches the end of the importance loss."""

import torch
import triton
from torch import Tensor

from .importance import importance_backward_kernel, importance_kernel, importance_total_kernel
from .tensors import as_bytes

BLOCK = 4096
ALONE = 4 * BLOCK  # tokens that one program sums
SHARES = 64  # of more tokens than that; a constant, so that the order of sums does not depend on the device


def forward(
    energy: Tensor, norm: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, eps: float, scale: float, mean: bool
) -> tuple[Tensor, Tensor]:
    N = energy.numel()
    loss, factor = energy.new_empty(()), energy.new_empty(())
    shares = 1 if N <= ALONE else SHARES
    total, count = energy.new_empty(shares), energy.new_empty(shares, dtype=torch.int32)
    alone = (loss, factor) if shares == 1 else (None, None)
    importance_kernel[(shares,)](
        energy.contiguous(), norm.contiguous(), as_bytes(mask), None if cu_seqlens is None else cu_seqlens.contiguous(),
        total, count, *alone, N, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, eps, scale,
        BLOCK=BLOCK, MEAN=mean, num_warps=16 if shares == 1 else 8,
    )  # fmt: skip
    if shares > 1:
        importance_total_kernel[(1,)](total, count, loss, factor, scale, SHARES=SHARES, MEAN=mean)
    return loss, factor


def backward(energy: Tensor, norm: Tensor, factor: Tensor, grad_loss: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad_energy, grad_norm = (torch.empty_like(energy, memory_format=torch.contiguous_format) for _ in range(2))
    if energy.numel() > 0:
        importance_backward_kernel[(triton.cdiv(energy.numel(), 1024),)](
            energy.contiguous(), norm.contiguous(), factor, grad_loss, grad_energy, grad_norm, energy.numel(), eps,
            BLOCK=1024,
        )  # fmt: skip
    return grad_energy, grad_norm
