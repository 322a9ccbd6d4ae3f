"""The whole interaction of a head whose tokens fit in one tile: its T×T matrices stay in a program's registers."""

import triton
import triton.language as tl

from .attention_workspace import scores, softmax_step, weights
from .interaction_gradient import exponent_below
from .interaction_gram import pair_terms
from .tiles import first_row, load_rows, product, real_tokens, store_rows, sum_of


@triton.jit
def block_terms(
    attention, attention_scale, pair_scale,
    BLOCK: tl.constexpr, SQUARED: tl.constexpr, EXCLUDE_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of rounded and scaled weights: themselves without the scale, G, φ(G), M as rounded and scaled, and ``M A``."""
    gram = product(attention, attention.trans(), tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION)
    gram *= 1.0 / (attention_scale * attention_scale)
    share = attention.to(tl.float32) / attention_scale
    token = tl.arange(0, BLOCK)
    on_diagonal = token[:, None] == token[None, :]
    phi, pair = pair_terms(gram, share, share.trans(), on_diagonal, SQUARED, EXCLUDE_DIAGONAL)
    pair = (pair * pair_scale).to(attention.dtype)
    through_pairs = product(pair, attention, tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION)
    return share, gram, phi, pair, through_pairs * (1.0 / (pair_scale * attention_scale))


@triton.jit(do_not_specialize=["T", "H"])
def attention_block_kernel(
    source_ptr, mask_ptr, total_ptr, grad_ptr,
    T, H,
    stride_b, stride_h, stride_t,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, SQUARED: tl.constexpr, EXCLUDE_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``Σ A_ij (1 − φ(G_ij))`` of attention that is given and, with ``grad_ptr``, ``∂L/∂A = 1 − φ(G) − M A``."""
    pair_of = tl.program_id(0).to(tl.int64)
    sample, head = pair_of // H, pair_of % H
    token = tl.arange(0, BLOCK)
    real = real_tokens(token, T, first_row(sample, None, T), mask_ptr)
    keep = real[:, None] & real[None, :]
    source_ptr += sample * stride_b + head * stride_h
    attention = tl.where(keep, load_rows(source_ptr, 0, stride_t, real, token, T, BLOCK), 0.0).to(DTYPE)
    share, _, phi, _, through_pairs = block_terms(
        attention, 1.0, 1.0, BLOCK, SQUARED, EXCLUDE_DIAGONAL, PRECISION
    )  # fmt: skip
    tl.store(total_ptr + pair_of + tl.arange(0, 1), sum_of(share * (1.0 - phi)))
    if grad_ptr is not None:
        grad = tl.where(keep, 1.0 - phi - through_pairs, 0.0)
        store_rows(grad_ptr + pair_of * T * T, 0, token < T, token, T, grad, BLOCK)


@triton.jit(do_not_specialize=["T", "H"])
def interaction_block_kernel(
    q_ptr, k_ptr, mask_ptr, total_ptr, grad_q_ptr, grad_k_ptr,
    T, D, H, group,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    scale, log2_scale, attention_scale, pair_scale,
    DTYPE: tl.constexpr, SCORE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, SQUARED: tl.constexpr, EXCLUDE_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Σ A_ij (1 − φ(G_ij))`` of ``A = softmax(scale · q kᵀ)`` and, with ``grad_q_ptr``, its gradients to q and k.

    Rounds as the kernels over tiles do, but for φ, which is not stored here: see ``interaction_gram`` for the row term
    and ``interaction_gradient`` for the scale of ∂L/∂s.
    """
    pair_of = tl.program_id(0).to(tl.int64)
    sample, head = pair_of // H, pair_of % H
    token = tl.arange(0, BLOCK)
    real = real_tokens(token, T, first_row(sample, None, T), mask_ptr)
    q_ptr += sample * stride_qb + head * stride_qh
    k_ptr += sample * stride_kb + head // group * stride_kh
    score = scores(
        None, q_ptr, k_ptr, 0, 0, real, real, D, stride_qt, stride_kt, log2_scale,
        BLOCK, BLOCK, BLOCK_D, IS_CAUSAL, PRECISION,
    )  # fmt: skip
    nothing = tl.full((BLOCK,), float("-inf"), tl.float32)
    top, total = softmax_step(nothing, tl.zeros((BLOCK,), tl.float32), score)
    attention = weights(score, top, total, attention_scale, DTYPE)
    share, gram, phi, pair, through_pairs = block_terms(
        attention, attention_scale, pair_scale, BLOCK, SQUARED, EXCLUDE_DIAGONAL, PRECISION
    )
    tl.store(total_ptr + pair_of + tl.arange(0, 1), sum_of(share * (1.0 - phi)))
    if grad_q_ptr is not None:
        row_sum = tl.sum(share, 1)
        row_term = tl.sum(share * phi + pair.to(tl.float32) / pair_scale * gram, 1)
        row_term = row_term / tl.where(row_sum > 0, row_sum, 1.0)
        grad_scale = exponent_below(tl.max(row_term[:, None], 0), 13.0)[:, None]
        score_grad = (share * (row_term[:, None] - phi - through_pairs) * grad_scale).to(SCORE_GRADIENT)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            grad = tl.zeros((BLOCK, BLOCK_D), tl.float32)
            k_j = load_rows(k_ptr, 0, stride_kt, real, d, D, BLOCK).to(SCORE_GRADIENT)
            grad_q = product(score_grad, k_j, grad, PRECISION) * (scale / grad_scale)
            store_rows(grad_q_ptr + pair_of * T * D, 0, token < T, d, D, grad_q, BLOCK)
            q_i = load_rows(q_ptr, 0, stride_qt, real, d, D, BLOCK).to(SCORE_GRADIENT)
            grad_k = product(score_grad.trans(), q_i, grad, PRECISION) * (scale / grad_scale)
            store_rows(grad_k_ptr + pair_of * T * D, 0, token < T, d, D, grad_k, BLOCK)
