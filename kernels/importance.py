"""The importance loss ``Σ_i √R_i / (√n2_i + ε)``, at the end of the kernels that make its sums, and its gradients.

Forward, each program stores what its tile adds, its *share*. The last program to arrive adds up all shares, always in
the same order; which program that is, it learns from an integer, the *ticket*.
"""

import triton
import triton.language as tl

from .tiles import offset_of, real_tokens, sum_of

BLOCK = tl.constexpr(1024)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def roots(energy, norm):
    """``√R``, ``√n2`` and whether their term is other than 0 by definition; 1 where it is not. NaN stays.

    What is subnormal counts as 0, as on the CPU: a GPU's square root makes 0 of it, and divided by that the gradient of
    one token would be infinite and that of all others NaN.
    """
    alive = ~(energy < SMALLEST_NORMAL) & ~(norm < SMALLEST_NORMAL)
    return tl.sqrt(tl.where(alive, energy, 1.0)), tl.sqrt(tl.where(alive, norm, 1.0)), alive


@triton.jit
def store_share(share, energy, norm, real, mask_ptr, share_ptr, count_ptr, eps):
    """What the tokens of a tile add to the sum and, masked, how many are real."""
    if share_ptr is not None:
        root, length, alive = roots(energy, norm)
        terms = tl.where(alive, root / (length + eps), 0.0)
        one = share + tl.arange(0, 1)
        tl.store(share_ptr + one, sum_of(terms[:, None]))
        if mask_ptr is not None:
            tl.store(count_ptr + one, sum_of(real.to(tl.int32)[:, None]))


@triton.jit
def total_of_shares(
    mask_ptr, cu_ptr, share_ptr, count_ptr, loss_ptr, factor_ptr, shares, S, T, scale, MEAN: tl.constexpr
):
    """The loss, and what the sum was multiplied by."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for share0 in range(0, shares, BLOCK):
        share = share0 + tl.arange(0, BLOCK)
        total += tl.load(share_ptr + share, mask=share < shares, other=0.0, cache_modifier=".cg")
        if mask_ptr is not None:
            count += tl.load(count_ptr + share, mask=share < shares, other=0, cache_modifier=".cg")
    factor = scale
    if MEAN:
        if mask_ptr is not None:
            real = tl.sum(count, 0)
        elif cu_ptr is not None:
            real = offset_of(S, cu_ptr, T)
        else:
            real = tl.cast(S, tl.int64) * T
        factor = scale / tl.maximum(real, 1).to(tl.float32)
    tl.store(loss_ptr, tl.sum(total, 0) * factor)
    tl.store(factor_ptr, factor)


@triton.jit
def finish_if_last(
    mask_ptr, cu_ptr, share_ptr, count_ptr, ticket_ptr, loss_ptr, factor_ptr, shares, S, T, scale, MEAN: tl.constexpr
):
    """Finishes the loss in the last of the programs to arrive, and leaves the ticket at 0 for the next launch.

    Taking a ticket releases what the program stored and acquires what the others did; the barrier puts the stores of
    all threads before it.
    """
    if ticket_ptr is not None:
        tl.debug_barrier()
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            total_of_shares(mask_ptr, cu_ptr, share_ptr, count_ptr, loss_ptr, factor_ptr, shares, S, T, scale, MEAN)
            tl.store(ticket_ptr, 0)


@triton.jit
def gradients_of(
    energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, token, keep, eps
):
    """``α_i = ∂L/∂R_i`` and ``β_i = ∂L/∂n2_i``, 0 of tokens not kept: as given or, if not, the importance loss's."""
    if grad_energy_ptr is not None:
        alpha = tl.load(grad_energy_ptr + row + token, mask=keep, other=0.0)
        beta = tl.load(grad_norm_ptr + row + token, mask=keep, other=0.0)
    else:
        energy = tl.load(energy_ptr + row + token, mask=keep, other=0.0)
        root, length, alive = roots(energy, tl.load(norm_ptr + row + token, mask=keep, other=0.0))
        half = 0.5 * tl.load(grad_loss_ptr) * tl.load(factor_ptr)
        alpha = tl.where(alive, half / root / (length + eps), 0.0)
        beta = tl.where(alive, -half * (root / (length + eps)) / ((length + eps) * length), 0.0)
    return alpha, beta


@triton.jit
def store_alpha(
    alpha_ptr, mask_ptr, energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
    row, begin, stop, eps,
):  # fmt: skip
    """``α`` of the tokens of a sequence, for the program itself to read: its loop over them would make each in many
    threads. Other programs of the sequence store the same."""
    if grad_energy_ptr is None:  # else alpha_ptr is the same tensor
        for t0 in range(begin, stop, BLOCK):
            token = t0 + tl.arange(0, BLOCK)
            real = real_tokens(token, stop, row, mask_ptr)
            alpha = gradients_of(
                energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, token, real, eps
            )[0]
            tl.store(alpha_ptr + row + token, alpha, mask=token < stop)
        tl.debug_barrier()
