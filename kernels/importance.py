"""The end of the importance loss: ``Σ_i √R_i / (√n2_i + ε)`` from the sums of primitive 1, and their gradients."""

import triton
import triton.language as tl

from .tiles import offset_of


@triton.jit
def roots(energy_ptr, norm_ptr, t, N):
    """``√R``, ``√n2`` and whether their term is other than 0 by definition; 1 where it is not. NaN stays."""
    energy = tl.load(energy_ptr + t, mask=t < N, other=0.0)
    norm = tl.load(norm_ptr + t, mask=t < N, other=0.0)
    alive = (energy != 0) & (norm != 0)
    return tl.sqrt(tl.where(alive, energy, 1.0)), tl.sqrt(tl.where(alive, norm, 1.0)), alive


@triton.jit
def finish(total, count, scale, loss_ptr, factor_ptr, MEAN: tl.constexpr):
    factor = scale
    if MEAN:
        factor = scale / tl.maximum(count, 1).to(tl.float32)
    tl.store(loss_ptr, total * factor)
    tl.store(factor_ptr, factor)


@triton.jit(do_not_specialize=["N", "S"])
def importance_kernel(
    energy_ptr, norm_ptr, mask_ptr, cu_ptr, total_ptr, count_ptr, loss_ptr, factor_ptr,
    N, S,
    eps, scale,
    BLOCK: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """One share of the sum, and of the number of real tokens; with ``loss_ptr``, which a single share has, the loss."""
    share, shares = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for t0 in range(share * BLOCK, N, shares * BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        root, length, alive = roots(energy_ptr, norm_ptr, t, N)
        total += tl.where(alive, root / (length + eps), 0.0)
        if mask_ptr is not None:
            count += tl.load(mask_ptr + t, mask=t < N, other=0).to(tl.int32)
    total = tl.sum(total, 0)
    real = tl.sum(count, 0)
    if mask_ptr is None:
        if cu_ptr is not None:
            real = tl.where(share == 0, offset_of(S, cu_ptr, N), 0)
        else:
            real = tl.where(share == 0, N, 0)
    if loss_ptr is not None:
        finish(total, real, scale, loss_ptr, factor_ptr, MEAN)
    else:
        tl.store(total_ptr + share, total)
        tl.store(count_ptr + share, real)


@triton.jit
def importance_total_kernel(
    total_ptr, count_ptr, loss_ptr, factor_ptr, scale, SHARES: tl.constexpr, MEAN: tl.constexpr
):  # fmt: skip
    """The loss from all shares."""
    share = tl.arange(0, SHARES)
    finish(
        tl.sum(tl.load(total_ptr + share), 0), tl.sum(tl.load(count_ptr + share), 0), scale, loss_ptr, factor_ptr, MEAN
    )


@triton.jit(do_not_specialize=["N"])
def importance_backward_kernel(
    energy_ptr, norm_ptr, factor_ptr, grad_loss_ptr, grad_energy_ptr, grad_norm_ptr,
    N,
    eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``∂L/∂R_i`` and ``∂L/∂n2_i``; 0 where the term is."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    root, length, alive = roots(energy_ptr, norm_ptr, t, N)
    half = 0.5 * tl.load(grad_loss_ptr) * tl.load(factor_ptr)
    grad_energy = half / root / (length + eps)
    grad_norm = -half * (root / (length + eps)) / ((length + eps) * length)
    tl.store(grad_energy_ptr + t, tl.where(alive, grad_energy, 0.0), mask=t < N)
    tl.store(grad_norm_ptr + t, tl.where(alive, grad_norm, 0.0), mask=t < N)
