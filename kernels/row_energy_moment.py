"""Row energy by the feature moment ``S = hᵀh``: linear in the number of tokens.

``R_i = h_iᵀ S h_i − n2_i²``, and ``∂L/∂h_i = 2 [α_i S h_i + S_α h_i − 2 α_i n2_i h_i + β_i h_i]`` with
``S_α = Σ_j α_j h_j h_jᵀ``. Sequences of ``threshold`` tokens or more take this path. Padded, a sequence's slot is its
number; packed, ``cu[s] // threshold``, which no two sequences that long can share. The shorter sequences of a batch
are programs of the launch that makes the moments, whose first programs make those.

Of bfloat16 rows S is kept in two bfloat16: rounded, and what that left, without which R would have an error of 1e-3.
The backward pass does with S rounded, and with ``S_α`` rounded.
"""

import triton
import triton.language as tl

from .importance import BLOCK, finish_if_last, gradients_of, store_share
from .row_energy_repair import add_direct, cancelled, repaired, rms_eigenvalue
from .row_energy_tile import clear_rows_of_none, tile_of_rows
from .row_energy_wide import wide_backward_tile, wide_tile
from .tiles import (
    first_row,
    last_sequence,
    load_rows,
    mask_span,
    product,
    real_tokens,
    sequence_ptr,
    slot_of,
    span_of,
    store_rows,
    store_span,
    sum_of,
)


@triton.jit
def sequence_in(slot, cu_ptr, S, T, threshold):
    """The sequence that may own a slot; it does if ``slot_of`` says so and it is long enough."""
    sequence = slot
    if cu_ptr is not None:
        sequence = last_sequence(slot, cu_ptr, S, T, threshold, 0)
    return sequence


@triton.jit
def below_diagonal(pair):
    """Row and column of the tiles on and below the diagonal, numbered row by row."""
    row = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= pair, row + 1, row)  # were the root rounded down
    row = tl.where(row * (row + 1) // 2 > pair, row - 1, row)
    return row, pair - row * (row + 1) // 2


@triton.jit
def left_by_rounding(x, DTYPE: tl.constexpr):
    return x - x.to(DTYPE).to(tl.float32)


@triton.jit
def store_weights(
    weight_ptr, mask_ptr, energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
    row, first, last, guard, floor, eps,
):  # fmt: skip
    """What the tokens of a share weigh in ``S_α``, for the program itself to read as after ``store_alpha``: ``α``, or 0
    where their energy cancels. Returns how many those are."""
    found = tl.zeros((BLOCK,), tl.int32)
    for t0 in range(first, last, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        real = real_tokens(t, last, row, mask_ptr)
        direct = cancelled(energy_ptr, norm_ptr, row, t, real, guard, floor)
        alpha = gradients_of(
            energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, t, real, eps
        )[0]
        tl.store(weight_ptr + row + t, tl.where(direct, 0.0, alpha), mask=t < last)
        found += direct.to(tl.int32)
    tl.debug_barrier()
    return tl.sum(found, 0)


@triton.jit
def moment_tile(
    program, h_ptr, mask_ptr, span_ptr, cu_ptr,
    energy_ptr, norm_ptr, moment_norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
    moment_ptr, squares_ptr, weight_ptr, found_ptr,
    S, T, E, threshold, stride_hb, stride_ht, slots, shares, guard, eps,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of ``Σ_t h_t h_tᵀ``, to (shares, slots, E, E); with ``energy_ptr`` each token weighs ``α_t``.

    Tokens whose energy cancels weigh 0 there: their share is made directly. How many they are goes to ``found_ptr``,
    (slots, shares). A slot that no sequence owns becomes 0. With ``squares_ptr``, which a single share has, the sum of
    squares of the tile and its mirror image goes there. Where there is a mask, the span of its sample is found, and
    stored.
    """
    tiles = tl.cdiv(E, BLOCK_E)
    pairs = tiles * (tiles + 1) // 2
    slot, pair, share = program % slots, program // slots % pairs, program // (slots * pairs)
    a_tile, b_tile = below_diagonal(pair)
    sequence = sequence_in(slot, cu_ptr, S, T, threshold)
    row = first_row(sequence, cu_ptr, T)
    if mask_ptr is not None:
        begin, stop, count = mask_span(mask_ptr + row, T, 1024)
        if program < slots:
            store_span(span_ptr, sequence, begin, stop, count)
    else:
        stop = span_of(sequence, cu_ptr, None, T)[1]
        count = stop
    owned = (count >= threshold) & (slot_of(sequence, cu_ptr, T, threshold) == slot)
    stop = tl.where(owned, stop, 0)
    h_ptr = sequence_ptr(h_ptr, sequence, row, stride_hb, stride_ht, cu_ptr)
    a = a_tile * BLOCK_E + tl.arange(0, BLOCK_E)
    b = b_tile * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.cdiv(tl.cdiv(stop, BLOCK_T), shares) * BLOCK_T

    first, last = share * tokens, tl.minimum((share + 1) * tokens, stop)
    if energy_ptr is not None:
        floor = rms_eigenvalue(tl.load(moment_norm_ptr + slot), E)
        found = store_weights(
            weight_ptr, mask_ptr, energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
            row, first, last, guard, floor, eps,
        )  # fmt: skip
        tl.store(found_ptr + slot * shares + share, found, mask=pair == 0)
    moment = tl.zeros((BLOCK_E, BLOCK_E), tl.float32)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        real = real_tokens(t, stop, row, mask_ptr)
        h_a = load_rows(h_ptr, t0, stride_ht, real, a, E, BLOCK_T)
        h_b = load_rows(h_ptr, t0, stride_ht, real, b, E, BLOCK_T)
        if energy_ptr is not None:
            weight = tl.load(weight_ptr + row + t, mask=real, other=0.0)
            h_a = h_a.to(DERIVED)
            h_b = (weight[:, None] * h_b.to(tl.float32)).to(DERIVED)
        moment = product(h_a.trans(), h_b, moment, PRECISION)

    SPLIT: tl.constexpr = squares_ptr is not None and moment_ptr.dtype.element_ty == tl.bfloat16
    moment_ptr += (share.to(tl.int64) * slots + slot) * E * E * (2 if SPLIT else 1)
    store_rows(moment_ptr, a_tile * BLOCK_E, a < E, b, E, moment, BLOCK_E)
    if SPLIT:
        rest = left_by_rounding(moment, tl.bfloat16)
        store_rows(moment_ptr + E * E, a_tile * BLOCK_E, a < E, b, E, rest, BLOCK_E)
    if b_tile < a_tile:
        store_rows(moment_ptr, b_tile * BLOCK_E, b < E, a, E, moment.trans(), BLOCK_E)
        if SPLIT:
            store_rows(moment_ptr + E * E, b_tile * BLOCK_E, b < E, a, E, rest.trans(), BLOCK_E)
    if squares_ptr is not None:
        times = tl.where(b_tile < a_tile, 2.0, 1.0)
        tl.store(squares_ptr + slot * pairs + pair + tl.arange(0, 1), times * sum_of(moment * moment))


@triton.jit(do_not_specialize=["S", "T", "threshold", "slots", "shares"])
def moment_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, moment_ptr, squares_ptr, ticket_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    slots, shares,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The moments, and the ticket at 0 for the kernel that finishes the loss."""
    if ticket_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(ticket_ptr, 0)
    moment_tile(
        tl.program_id(0), h_ptr, mask_ptr, span_ptr, cu_ptr, None, None, None, None, None, None, None,
        moment_ptr, squares_ptr, None, None, S, T, E, threshold, stride_hb, stride_ht, slots, shares, 0.0, 0.0,
        BLOCK_T, BLOCK_E, tl.float32, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["S", "T", "threshold", "slots", "shares", "programs", "first_share"])
def moment_and_short_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, moment_ptr, squares_ptr, ticket_ptr,
    energy_ptr, norm_ptr, share_ptr, count_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    slots, shares, programs, first_share, eps,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same in the first ``programs``; in the others the energies of the sequences without a moment."""
    if ticket_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(ticket_ptr, 0)
    if tl.program_id(0) < programs:
        moment_tile(
            tl.program_id(0), h_ptr, mask_ptr, span_ptr, cu_ptr, None, None, None, None, None, None, None,
            moment_ptr, squares_ptr, None, None, S, T, E, threshold, stride_hb, stride_ht, slots, shares, 0.0, 0.0,
            BLOCK_T, BLOCK_E, tl.float32, PRECISION,
        )  # fmt: skip
    else:
        tile = tl.program_id(0) - programs
        wide_tile(
            tile, h_ptr, mask_ptr, None, cu_ptr, energy_ptr, norm_ptr, first_share + tile, share_ptr, count_ptr,
            S, T, E, threshold, stride_hb, stride_ht, eps, BLOCK_T, BLOCK_J, BLOCK_E, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["S", "T", "threshold", "slots", "shares"])
def weighted_moment_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr,
    energy_ptr, norm_ptr, moment_norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
    moment_ptr, weight_ptr, found_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    slots, shares, guard, eps,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The moments ``S_α``."""
    moment_tile(
        tl.program_id(0), h_ptr, mask_ptr, span_ptr, cu_ptr,
        energy_ptr, norm_ptr, moment_norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
        moment_ptr, None, weight_ptr, found_ptr, S, T, E, threshold, stride_hb, stride_ht, slots, shares, guard, eps,
        BLOCK_T, BLOCK_E, DERIVED, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["S", "T", "threshold", "slots", "shares", "programs"])
def weighted_moment_and_short_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr,
    energy_ptr, norm_ptr, moment_norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
    moment_ptr, weight_ptr, found_ptr, alpha_ptr, grad_h_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    slots, shares, programs, guard, eps,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_OUT: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same in the first ``programs``; in the others the gradients of the sequences without a moment."""
    if tl.program_id(0) < programs:
        moment_tile(
            tl.program_id(0), h_ptr, mask_ptr, span_ptr, cu_ptr,
            energy_ptr, norm_ptr, moment_norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
            moment_ptr, None, weight_ptr, found_ptr,
            S, T, E, threshold, stride_hb, stride_ht, slots, shares, guard, eps,
            BLOCK_T, BLOCK_E, DERIVED, PRECISION,
        )  # fmt: skip
    else:
        outs = tl.cdiv(E, BLOCK_OUT)
        tile = tl.program_id(0) - programs
        wide_backward_tile(
            tile // outs, tile % outs, h_ptr, mask_ptr, None, cu_ptr,
            energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, alpha_ptr, grad_h_ptr,
            S, T, E, threshold, stride_hb, stride_ht, eps,
            BLOCK_T, BLOCK_J, BLOCK_E, BLOCK_OUT, DERIVED, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["shares"])
def moment_total_kernel(partial_ptr, moment_ptr, squares_ptr, size, shares, BLOCK: tl.constexpr):
    """Moments of ``size`` numbers from all their shares: S, with the sum of squares of each block of it, or ``S_α``."""
    slot, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    partial_ptr += slot * size
    moment = tl.zeros((BLOCK,), tl.float32)
    for _ in range(shares):
        moment += tl.load(partial_ptr + at, mask=at < size, other=0.0)
        partial_ptr += tl.num_programs(0).to(tl.int64) * size
    SPLIT: tl.constexpr = squares_ptr is not None and moment_ptr.dtype.element_ty == tl.bfloat16
    moment_ptr += slot * size * (2 if SPLIT else 1)
    tl.store(moment_ptr + at, moment, mask=at < size)
    if SPLIT:
        tl.store(moment_ptr + size + at, left_by_rounding(moment, tl.bfloat16), mask=at < size)
    if squares_ptr is not None:
        tl.store(squares_ptr + slot * tl.num_programs(1) + block, tl.sum(moment * moment, 0))


@triton.jit
def both_sums(x, y, more_x, more_y):
    return x + more_x, y + more_y


@triton.jit
def root_of_sum(squares_ptr, squares):
    total = tl.zeros((256,), tl.float32)
    for first in range(0, squares, 256):
        at = first + tl.arange(0, 256)
        total += tl.load(squares_ptr + at, mask=at < squares, other=0.0)
    return tl.sqrt(tl.sum(total, 0))


@triton.jit(do_not_specialize=["S", "T", "threshold", "squares", "shares"])
def quadratic_form_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, moment_ptr, squares_ptr, energy_ptr, norm_ptr, moment_norm_ptr,
    share_ptr, count_ptr, ticket_ptr, loss_ptr, factor_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    squares, guard,
    shares, eps, scale, MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``R_i = h_iᵀ S h_i − n2_i²``, never below 0 and made directly where it cancels; the norm of S, and the importance
    loss where it is wanted. Of S the tiles on and below the diagonal, row by row, serve."""
    program = tl.program_id(0)
    h_ptr, sequence, row, begin, stop, i0, limit = tile_of_rows(
        program, h_ptr, mask_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=True
    )
    slot = tl.where(limit > 0, slot_of(sequence, cu_ptr, T, threshold), 0)  # of a short sequence it may not exist
    slot = slot.to(tl.int64)
    SPLIT: tl.constexpr = moment_ptr.dtype.element_ty == tl.bfloat16
    moment_ptr += slot * E * E * (2 if SPLIT else 1)
    moment_norm = root_of_sum(squares_ptr + slot * squares, squares)
    tl.store(moment_norm_ptr + slot, moment_norm, mask=(limit > 0) & (i0 == 0))
    i = i0 + tl.arange(0, BLOCK_T)
    real = real_tokens(i, stop, row, mask_ptr)

    form = tl.zeros((BLOCK_T,), tl.float32)
    norm = tl.zeros((BLOCK_T,), tl.float32)
    tiles = tl.cdiv(E, BLOCK_E)
    a0, b0 = 0, 0
    for _ in range(tl.where(limit > 0, tiles * (tiles + 1) // 2, 0)):
        a = a0 + tl.arange(0, BLOCK_E)
        b = b0 + tl.arange(0, BLOCK_E)
        h_a = load_rows(h_ptr, i0, stride_ht, real, a, E, BLOCK_T).to(tl.float32)
        h_b = load_rows(h_ptr, i0, stride_ht, real, b, E, BLOCK_T).to(DERIVED)
        moment = load_rows(moment_ptr, b0, E, b < E, a, E, BLOCK_E)
        image = product(h_b, moment.to(DERIVED), tl.zeros((BLOCK_T, BLOCK_E), tl.float32), PRECISION)
        if SPLIT:
            rest = load_rows(moment_ptr + E * E, b0, E, b < E, a, E, BLOCK_E)
            image = product(h_b, rest, image, PRECISION)
        form_of_tile, norm_of_tile = tl.reduce((image * h_a, h_a * h_a), 1, both_sums)
        mirrored = b0 < a0
        form += tl.where(mirrored, 2.0, 1.0) * form_of_tile
        norm += tl.where(mirrored, 0.0, norm_of_tile)
        a0, b0 = tl.where(mirrored, a0, a0 + BLOCK_E), tl.where(mirrored, b0 + BLOCK_E, 0)
    energy = repaired(
        tl.maximum(form - norm * norm, 0.0, propagate_nan=tl.PropagateNan.ALL), norm, h_ptr, mask_ptr, row, begin, stop,
        i0, real, E, stride_ht, guard, rms_eigenvalue(moment_norm, E), BLOCK_T, BLOCK_J, BLOCK_E, PRECISION,
    )  # fmt: skip
    tl.store(energy_ptr + row + i, energy, mask=i < limit)
    tl.store(norm_ptr + row + i, norm, mask=i < limit)
    store_share(program, energy, norm, real, mask_ptr, share_ptr, count_ptr, eps)
    finish_if_last(mask_ptr, cu_ptr, share_ptr, count_ptr, ticket_ptr, loss_ptr, factor_ptr, shares, S, T, scale, MEAN)


@triton.jit(do_not_specialize=["S", "T", "threshold", "shares"])
def moment_backward_kernel(
    h_ptr, mask_ptr, span_ptr, cu_ptr, moment_ptr, weighted_ptr, found_ptr,
    energy_ptr, norm_ptr, moment_norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, grad_h_ptr,
    S, T, E, threshold,
    stride_hb, stride_ht,
    shares, guard, eps,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_OUT: tl.constexpr,
    DERIVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``∂L/∂h_i``: ``S h_i`` and ``S_α h_i``, then what the rows that cancelled ask for. Zeros where rows belong to no
    sequence."""
    outs = tl.cdiv(E, BLOCK_OUT)
    tile = tl.program_id(0) // outs  # programs that read the same rows follow each other
    out = tl.program_id(0) % outs * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    clear_rows_of_none(grad_h_ptr, cu_ptr, S, T, tile, out, E, BLOCK_T)
    h_ptr, sequence, row, begin, stop, i0, limit = tile_of_rows(
        tile, h_ptr, mask_ptr, span_ptr, cu_ptr, S, T, threshold, stride_hb, stride_ht, BLOCK_T, LONG=True
    )
    if limit == 0:
        return
    slot = slot_of(sequence, cu_ptr, T, threshold).to(tl.int64)
    moment_ptr += slot * E * E * (2 if moment_ptr.dtype.element_ty == tl.bfloat16 else 1)
    weighted_ptr += slot * E * E
    i = i0 + tl.arange(0, BLOCK_T)
    real = real_tokens(i, stop, row, mask_ptr)

    by_own = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    by_others = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    for b0 in range(0, E, BLOCK_E):
        b = b0 + tl.arange(0, BLOCK_E)
        h_b = load_rows(h_ptr, i0, stride_ht, real, b, E, BLOCK_T).to(DERIVED)
        moment = load_rows(moment_ptr, b0, E, b < E, out, E, BLOCK_E).to(DERIVED)
        weighted = load_rows(weighted_ptr, b0, E, b < E, out, E, BLOCK_E).to(DERIVED)
        by_own = product(h_b, moment, by_own, PRECISION)
        by_others = product(h_b, weighted, by_others, PRECISION)

    floor = rms_eigenvalue(tl.load(moment_norm_ptr + slot), E)
    alpha, beta = gradients_of(
        energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr, row, i, real, eps
    )
    norm = tl.load(norm_ptr + row + i, mask=real, other=0.0)
    direct = cancelled(energy_ptr, norm_ptr, row, i, real, guard, floor)
    grad = tl.where(direct[:, None], 0.0, alpha[:, None] * by_own + by_others)
    h_i = load_rows(h_ptr, i0, stride_ht, real, out, E, BLOCK_T).to(tl.float32)
    own = beta - tl.where(direct, 0.0, 2.0 * alpha * norm)
    store_rows(grad_h_ptr, row + i0, i < limit, out, E, 2.0 * (grad + own[:, None] * h_i), BLOCK_T)
    add_direct(
        grad_h_ptr, h_ptr, mask_ptr, found_ptr + slot * shares, shares,
        energy_ptr, norm_ptr, grad_energy_ptr, grad_norm_ptr, grad_loss_ptr, factor_ptr,
        row, begin, stop, i0, out, E, stride_ht, guard, floor, eps,
        BLOCK_T, BLOCK_J, BLOCK_E, DERIVED, PRECISION,
    )  # fmt: skip
