"""Row energy by the feature moment ``S = hᵀh``: linear in the number of tokens.

``R_i = h_iᵀ S h_i − n2_i²``, and ``∂L/∂h_i = 2 [α_i S h_i + S_α h_i − 2 α_i n2_i h_i + β_i h_i]`` with
``S_α = Σ_j α_j h_j h_jᵀ``. Sequences of ``threshold`` tokens or more take this path. Padded, a sequence's slot is its
number; packed, ``cu[s] // threshold``, which no two sequences that long can share.
"""

import triton
import triton.language as tl

from .row_energy_repair import cancels, rms_eigenvalue
from .tiles import (
    count_of,
    first_row,
    is_written,
    last_sequence,
    load_rows,
    product,
    real_tokens,
    sequence_ptr,
    slot_of,
    span_of,
    store_rows,
    tile_of_rows,
)


@triton.jit
def sequence_in(slot, cu_ptr, S, T, threshold):
    """The sequence that may own a slot; it does if ``slot_of`` says so and it is long enough."""
    sequence = slot
    if cu_ptr is not None:
        sequence = last_sequence(slot, cu_ptr, S, T, threshold, 0)
    return sequence


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def moment_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, energy_ptr, norm_ptr, moment_norm_ptr, grad_energy_ptr, moment_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    guard,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of ``Σ_t h_t h_tᵀ``, to (shares, slots, E, E); with ``grad_energy`` each token weighs ``α_t``.

    Tokens whose energy cancels weigh 0 there: their share is made directly. A slot that no sequence owns becomes 0.
    """
    share, shares = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(E, BLOCK_E)
    slots = tl.num_programs(0) // (tiles * tiles)
    slot = tl.program_id(0) % slots
    a_tile, b_tile = tl.program_id(0) // slots // tiles, tl.program_id(0) // slots % tiles
    if b_tile > a_tile:  # S is symmetric
        return
    sequence = sequence_in(slot, cu_ptr, S, T, threshold)
    row = first_row(sequence, cu_ptr, T)
    owned = (count_of(sequence, cu_ptr, span_ptr, T) >= threshold) & (slot_of(sequence, cu_ptr, T, threshold) == slot)
    stop = tl.where(owned, span_of(sequence, cu_ptr, span_ptr, T)[1], 0)
    h_ptr = sequence_ptr(h_ptr, sequence, row, stride_hb, stride_ht, cu_ptr)
    a = a_tile * BLOCK_E + tl.arange(0, BLOCK_E)
    b = b_tile * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.cdiv(tl.cdiv(stop, BLOCK_T), shares) * BLOCK_T

    if grad_energy_ptr is not None:
        floor = rms_eigenvalue(moment_norm_ptr + slot, E)
    moment = tl.zeros((BLOCK_E, BLOCK_E), tl.float32)
    for t0 in range(share * tokens, tl.minimum((share + 1) * tokens, stop), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        real = real_tokens(t, stop, row, mask_ptr)
        h_a = load_rows(h_ptr, t0, stride_ht, real, a, E, BLOCK_T)
        h_b = load_rows(h_ptr, t0, stride_ht, real, b, E, BLOCK_T)
        if grad_energy_ptr is not None:
            by_moment = real & (cancels(energy_ptr + row, norm_ptr + row, t, real, guard, floor) == 0)
            alpha = tl.load(grad_energy_ptr + row + t, mask=by_moment, other=0.0)
            h_a = h_a.to(DERIVED)
            h_b = (alpha[:, None] * h_b.to(tl.float32)).to(DERIVED)
        moment = product(h_a.trans(), h_b, moment, PRECISION)

    moment_ptr += (share.to(tl.int64) * slots + slot) * E * E
    store_rows(moment_ptr, a_tile * BLOCK_E, a < E, b, E, moment, BLOCK_E)
    if b_tile < a_tile:
        store_rows(moment_ptr, b_tile * BLOCK_E, b < E, a, E, moment.trans(), BLOCK_E)


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def quadratic_form_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, moment_ptr, energy_ptr, norm_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``R_i = h_iᵀ S h_i − n2_i²``, never below 0."""
    h_ptr, sequence, row, _, stop, i0, has_rows = tile_of_rows(
        h_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=True
    )
    if not has_rows:
        return
    moment_ptr += slot_of(sequence, cu_ptr, T, threshold).to(tl.int64) * E * E
    i = i0 + tl.arange(0, BLOCK_T)
    real = real_tokens(i, stop, row, mask_ptr)

    form = tl.zeros((BLOCK_T,), tl.float32)
    norm = tl.zeros((BLOCK_T,), tl.float32)
    for a0 in range(0, E, BLOCK_E):
        a = a0 + tl.arange(0, BLOCK_E)
        image = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for b0 in range(0, E, BLOCK_E):
            b = b0 + tl.arange(0, BLOCK_E)
            h_b = load_rows(h_ptr, i0, stride_ht, real, b, E, BLOCK_T).to(DERIVED)
            moment = load_rows(moment_ptr, b0, E, b < E, a, E, BLOCK_E)
            high = moment.to(DERIVED)
            image = product(h_b, high, image, PRECISION)
            if DERIVED != tl.float32:  # the rest of S: bfloat16 alone would leave R an error of 1e-3
                image = product(h_b, (moment - high.to(tl.float32)).to(DERIVED), image, PRECISION)
        h_a = load_rows(h_ptr, i0, stride_ht, real, a, E, BLOCK_T).to(tl.float32)
        form += tl.sum(image * h_a, 1)
        norm += tl.sum(h_a * h_a, 1)
    tl.store(energy_ptr + row + i, tl.maximum(form - norm * norm, 0.0), mask=is_written(i, stop, cu_ptr, T))
    tl.store(norm_ptr + row + i, norm, mask=is_written(i, stop, cu_ptr, T))


@triton.jit(do_not_specialize=["S", "T", "threshold"])
def moment_backward_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, moment_ptr, weighted_ptr, energy_ptr, norm_ptr, moment_norm_ptr,
    grad_energy_ptr, grad_norm_ptr, grad_h_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    guard,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_OUT: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂h_i`` of the rows whose energy did not cancel: one accumulator for ``S h_i`` and then ``S_α h_i``."""
    h_ptr, sequence, row, _, stop, i0, has_rows = tile_of_rows(
        h_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=True
    )
    if not has_rows:
        return
    slot = slot_of(sequence, cu_ptr, T, threshold).to(tl.int64)
    floor = rms_eigenvalue(moment_norm_ptr + slot, E)
    moment_ptr += slot * E * E
    weighted_ptr += slot * E * E
    i = i0 + tl.arange(0, BLOCK_T)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    real = real_tokens(i, stop, row, mask_ptr)
    alpha = tl.load(grad_energy_ptr + row + i, mask=real, other=0.0)
    beta = tl.load(grad_norm_ptr + row + i, mask=real, other=0.0)
    norm = tl.load(norm_ptr + row + i, mask=real, other=0.0)

    grad = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    for b0 in range(0, E, BLOCK_E):
        b = b0 + tl.arange(0, BLOCK_E)
        h_b = load_rows(h_ptr, i0, stride_ht, real, b, E, BLOCK_T).to(DERIVED)
        moment = load_rows(moment_ptr, b0, E, b < E, out, E, BLOCK_E).to(DERIVED)
        grad = product(h_b, moment, grad, PRECISION)
    grad *= alpha[:, None]
    for b0 in range(0, E, BLOCK_E):
        b = b0 + tl.arange(0, BLOCK_E)
        h_b = load_rows(h_ptr, i0, stride_ht, real, b, E, BLOCK_T).to(DERIVED)
        weighted = load_rows(weighted_ptr, b0, E, b < E, out, E, BLOCK_E).to(DERIVED)
        grad = product(h_b, weighted, grad, PRECISION)

    h_i = load_rows(h_ptr, i0, stride_ht, real, out, E, BLOCK_T).to(tl.float32)
    grad = 2.0 * (grad + (beta - 2.0 * alpha * norm)[:, None] * h_i)
    by_moment = is_written(i, stop, cu_ptr, T) & (cancels(energy_ptr + row, norm_ptr + row, i, real, guard, floor) == 0)
    store_rows(grad_h_ptr, row + i0, by_moment, out, E, grad, BLOCK_T)
