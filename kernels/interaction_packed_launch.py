"""Launches primitive 2 over packed sequences: chunks of strips, see ``interaction_packed``.

A strip takes 2 · BLOCK · N elements, so the workspace is bounded whatever the lengths, which are never read here.
Results do not depend on the chunk: a strip is computed alone, and the key gradient adds strips up in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .interaction_launch import LOG2_E, WORKSPACE_BYTES, Arithmetic
from .interaction_packed import (
    packed_gram_kernel,
    packed_key_gradient_kernel,
    packed_query_gradient_kernel,
    packed_score_gradient_kernel,
    packed_softmax_kernel,
    packed_total_kernel,
)
from .tensors import readable

TRITON_DTYPES = {torch.float16: tl.float16, torch.float32: tl.float32}


def from_qk(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    is_causal: bool,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N, H, D = q.shape
    S = cu_seqlens.shape[0] - 1
    total = q.new_zeros(S, H, dtype=torch.float32)
    grad_q, grad_k = (total.new_zeros(q.shape if need_grad else 0) for _ in range(2))
    if total.numel() == 0 or N == 0:
        return total, grad_q, grad_k
    q, k, cu_seqlens = readable(q, tokens=0), readable(k, tokens=0), cu_seqlens.contiguous()
    arithmetic = Arithmetic.of_scores(q)
    config = configs.config("packed", 8 * q.dtype.itemsize, D, q.device)
    block = config.rows
    slots, tiles = N // block + S, triton.cdiv(N, block)
    pitch = tiles * block

    strip_bytes = 2 * block * pitch * arithmetic.matrix.itemsize
    strips = max(1, min(H * slots, WORKSPACE_BYTES // strip_bytes))
    top, row_total, row_sum = total.new_empty(3, H, N)
    loss = total.new_empty(strips, tiles)
    strip_loss = total.new_empty(H * slots)
    pair, phi, row_term, score_grad, score_grad_scale = None, None, None, None, None
    if need_grad:
        pair, phi = q.new_empty(2, strips, block, pitch, dtype=arithmetic.matrix)
        score_grad = phi.view(arithmetic.score_gradient)
        row_term = total.new_empty(strips, tiles, block)
        score_grad_scale = total.new_empty(strips)

    rows = (q, k, cu_seqlens, top, row_total)
    heads = (H // k.shape[1],)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    scales = (scale * LOG2_E, arithmetic.attention_scale)
    causal = {"IS_CAUSAL": is_causal, "PRECISION": arithmetic.precision, **config.execution}
    attention = {"DTYPE": TRITON_DTYPES[arithmetic.matrix], "BLOCK": block, "BLOCK_D": config.features, **causal}
    packed_softmax_kernel[(slots, H)](*rows, row_sum, S, N, D, *heads, *strides, *scales, **attention)
    for strip0 in range(0, H * slots, strips):
        count = min(strips, H * slots - strip0)
        sizes = (S, N, D, *heads, slots, strip0, pitch, tiles)
        packed_gram_kernel[(tiles, count)](
            *rows, pair, phi, row_term, loss.zero_(), *sizes, *strides, *scales, arithmetic.pair_scale,
            SQUARED=squared, EXCLUDE_DIAGONAL=exclude_diagonal, **attention,
        )  # fmt: skip
        torch.sum(loss.narrow(0, 0, count), 1, out=strip_loss.narrow(0, strip0, count))
        if need_grad:
            packed_score_gradient_kernel[(tiles, count)](
                *rows, row_sum, pair, phi, row_term, score_grad, score_grad_scale,
                *sizes, *strides, *scales, arithmetic.pair_scale, **attention,
            )  # fmt: skip
            gradient = {"BLOCK": block, "BLOCK_D": config.features, **causal}
            d_tiles = triton.cdiv(D, config.features)
            packed_query_gradient_kernel[(count, d_tiles)](
                score_grad, score_grad_scale, k, cu_seqlens, grad_q,
                S, N, H, D, *heads, slots, strip0, pitch, k.stride(0), k.stride(1), scale, **gradient,
            )  # fmt: skip
            packed_key_gradient_kernel[(slots, d_tiles, H)](
                score_grad, score_grad_scale, q, cu_seqlens, grad_k,
                S, N, H, D, slots, strip0, strip0 + count, pitch, q.stride(0), q.stride(1), scale, **gradient,
            )  # fmt: skip
    packed_total_kernel[(S, H)](strip_loss, cu_seqlens, total, S, N, H, slots, BLOCK=block)
    return total, grad_q, grad_k
