"""Launches primitive 2 over packed sequences: chunks of strips, see ``interaction_packed``.

A strip takes 2 · BLOCK · ``longest`` elements, so the workspace is bounded whatever the lengths; those are never read
here. Results do not depend on the chunk: a strip is computed alone, and the key gradient adds strips up in their order.
"""

import torch
from torch import Tensor

from . import configs
from .configs import cdiv
from .interaction_launch import LOG2_E, TRITON_DTYPES, Arithmetic
from .interaction_packed import (
    packed_gram_kernel,
    packed_key_gradient_kernel,
    packed_query_gradient_kernel,
    packed_score_gradient_kernel,
    packed_softmax_kernel,
    packed_strip_total_kernel,
    packed_total_kernel,
)
from .tensors import readable


class Strips:
    """Strips of one chunk: M and φ(G) of a tile of rows each, what is summed over their tiles, and the sizes of all."""

    def __init__(
        self, q: Tensor, k: Tensor, cu_seqlens: Tensor, is_causal: bool, need_grad: bool, workspace_bytes: int | None,
        max_seqlen: int | None,
    ) -> None:  # fmt: skip
        self.q, self.k, self.cu_seqlens = readable(q, tokens=0), readable(k, tokens=0), cu_seqlens.contiguous()
        self.N, self.H, self.D = q.shape
        self.S, self.group = cu_seqlens.shape[0] - 1, self.H // k.shape[1]
        self.arithmetic = Arithmetic.of_scores(q)
        config = configs.config("packed", 8 * q.dtype.itemsize, self.D, q.device)
        self.block = config.rows
        longest = self.N if max_seqlen is None else max(1, min(max_seqlen, self.N))
        self.lengths = self.S, self.N, longest
        self.slots, self.tiles = self.N // self.block + self.S, cdiv(longest, self.block)
        self.pitch = self.tiles * self.block
        self.d_tiles = cdiv(self.D, config.features)
        self.options = {
            "BLOCK": self.block,
            "BLOCK_D": config.features,
            "IS_CAUSAL": is_causal,
            "PRECISION": self.arithmetic.precision,
            **config.execution,
        }

        matrix = self.arithmetic.matrix
        strip_bytes = 2 * self.block * self.pitch * matrix.itemsize
        room = (workspace_bytes or configs.WORKSPACE_BYTES) // strip_bytes
        self.strips = max(1, min(self.H * self.slots, room, configs.GRID_LIMIT))
        self.top, self.row_total, self.row_sum = q.new_empty(3, self.H, self.N, dtype=torch.float32)
        self.loss = self.top.new_empty(self.strips, self.tiles)
        self.strip_loss = self.top.new_empty(self.H * self.slots)
        self.pair, self.phi, self.row_term, self.score_grad, self.score_grad_scale = None, None, None, None, None
        if need_grad:
            self.pair, self.phi = q.new_empty(2, self.strips, self.block, self.pitch, dtype=matrix)
            self.row_term = self.top.new_empty(self.strips, self.tiles, self.block)
            self.score_grad = self.phi.view(self.arithmetic.score_gradient)
            self.score_grad_scale = self.top.new_empty(self.strips)

    def chunks(self) -> list[tuple[int, int]]:
        """First strip and number of strips of each chunk."""
        count = self.slots * self.H
        return [(first, min(self.strips, count - first)) for first in range(0, count, self.strips)]

    @property
    def attention(self) -> tuple[Tensor, ...]:
        """What a tile of A is made again from."""
        return self.q, self.k, self.cu_seqlens, self.top, self.row_total

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.q.stride()[:2], *self.k.stride()[:2]

    def sizes(self, strip0: int) -> tuple[int, ...]:
        return *self.lengths, self.D, self.group, self.slots, strip0, self.pitch, self.tiles


def from_qk(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    is_causal: bool,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
    workspace_bytes: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    N, H, _ = q.shape
    S = cu_seqlens.shape[0] - 1
    total = q.new_zeros(S, H, dtype=torch.float32)
    grad_q, grad_k = (total.new_zeros(q.shape if need_grad else 0) for _ in range(2))
    if total.numel() == 0 or N == 0:
        return total, grad_q, grad_k
    work = Strips(q, k, cu_seqlens, is_causal, need_grad, workspace_bytes, max_seqlen)
    _launch_softmax(work, scale)
    for strip0, count in work.chunks():
        _launch_gram(work, strip0, count, scale, squared, exclude_diagonal)
        if need_grad:
            _launch_score_gradient(work, strip0, count, scale)
            _launch_query_and_key_gradient(work, strip0, count, scale, grad_q, grad_k)
    packed_total_kernel[(S, H)](work.strip_loss, work.cu_seqlens, total, *work.lengths, H, work.slots, BLOCK=work.block)
    return total, grad_q, grad_k


def _launch_softmax(work: Strips, scale: float) -> None:
    packed_softmax_kernel[(work.slots, work.H)](
        *work.attention, work.row_sum, *work.lengths, work.D, work.group, *work.strides,
        scale * LOG2_E, work.arithmetic.attention_scale,
        DTYPE=TRITON_DTYPES[work.arithmetic.matrix], WHOLE=work.d_tiles == 1, **work.options,
    )  # fmt: skip


def _launch_gram(work: Strips, strip0: int, count: int, scale: float, squared: bool, exclude_diagonal: bool) -> None:
    """The loss of a chunk's strips and, for the gradient, M, φ(G) and the row term."""
    packed_gram_kernel[(work.tiles, count)](
        *work.attention, work.pair, work.phi, work.row_term, work.loss, *work.sizes(strip0), *work.strides,
        scale * LOG2_E, work.arithmetic.attention_scale, work.arithmetic.pair_scale,
        DTYPE=TRITON_DTYPES[work.arithmetic.matrix], SQUARED=squared, EXCLUDE_DIAGONAL=exclude_diagonal, **work.options,
    )  # fmt: skip
    packed_strip_total_kernel[(count,)](
        work.loss, work.cu_seqlens, work.strip_loss, *work.lengths, work.slots, strip0, work.tiles, BLOCK=work.block
    )


def _launch_score_gradient(work: Strips, strip0: int, count: int, scale: float) -> None:
    """∂L/∂s in place of φ, and the power of 2 that each strip of it is scaled by."""
    packed_score_gradient_kernel[(work.tiles, count)](
        *work.attention, work.row_sum, work.pair, work.phi, work.row_term, work.score_grad, work.score_grad_scale,
        *work.sizes(strip0), *work.strides,
        scale * LOG2_E, work.arithmetic.attention_scale, work.arithmetic.pair_scale,
        DTYPE=TRITON_DTYPES[work.arithmetic.matrix], **work.options,
    )  # fmt: skip


def _launch_query_and_key_gradient(
    work: Strips, strip0: int, count: int, scale: float, grad_q: Tensor, grad_k: Tensor
) -> None:
    packed_query_gradient_kernel[(count, work.d_tiles)](
        work.score_grad, work.score_grad_scale, work.k, work.cu_seqlens, grad_q,
        *work.lengths, work.H, work.D, work.group, work.slots, strip0, work.pitch, *work.k.stride()[:2],
        scale, **work.options,
    )  # fmt: skip
    packed_key_gradient_kernel[(work.slots, work.d_tiles, work.H)](
        work.score_grad, work.score_grad_scale, work.q, work.cu_seqlens, grad_k,
        *work.lengths, work.H, work.D, work.slots, strip0, strip0 + count, work.pitch, *work.q.stride()[:2],
        scale, **work.options,
    )  # fmt: skip
