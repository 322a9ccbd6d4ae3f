"""Launches primitive 2 over samples of one padded length: chunks of heads whose T×T matrices fit a bounded workspace.

Per head the workspace holds A; M, and where its symmetry spares it φ(G); and ∂L/∂s: 6 T² bytes for 16-bit input, for
float32 18 T² at ``highest`` and 12 T² at ``high``, see ``Arithmetic.in_planes``. Every head is computed alone, so that
results do not depend on the chunk. Heads of few tokens take no workspace: a program each does them.
"""

from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .attention_workspace import softmax_kernel, stage_kernel
from .configs import cdiv
from .interaction_block import attention_block_kernel, interaction_block_kernel
from .interaction_gradient import (
    attention_gradient_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    score_gradient_kernel,
)
from .interaction_gram import interaction_gram_kernel, interaction_total_kernel
from .tensors import as_bytes, readable, spans

LOG2_E = 1.4426950408889634
PLANES = {"bf16x3": 2, "bf16x6": 3}  # by how products split float32
TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Arithmetic:
    """How T×T matrices are stored and multiplied."""

    matrix: torch.dtype
    score_gradient: torch.dtype
    attention_scale: float
    pair_scale: float
    precision: str
    planes: int = 1

    @property
    def bits(self) -> int:
        return 8 * self.matrix.itemsize * self.planes

    def in_planes(self) -> "Arithmetic":
        """Where matrices lie in memory, what products would split lies there split: each tile meets many others."""
        planes = PLANES.get(self.precision, 1) if self.matrix == torch.float32 else 1
        if planes == 1:
            return self
        return replace(self, matrix=torch.bfloat16, score_gradient=torch.bfloat16, planes=planes)

    @classmethod
    def of_scores(cls, q: Tensor) -> "Arithmetic":
        """A softmax's weights are at most 1 and M at most 4: fixed powers of 2 spread them over float16's range."""
        precision = configs.product_precision(q.dtype, q.device)
        if q.dtype == torch.float32 and precision != "bf16":
            return cls(torch.float32, torch.float32, 1.0, 1.0, precision)
        score_gradient = torch.float16 if q.dtype == torch.float16 else torch.bfloat16
        return cls(torch.float16, score_gradient, 2.0**15, 2.0**13, precision)

    @classmethod
    def of_attention(cls, attention: Tensor) -> "Arithmetic":
        """Weights that are given are bounded by nothing: they keep bfloat16's range, or float32's."""
        dtype = torch.bfloat16 if attention.dtype == torch.bfloat16 else torch.float32
        return cls(dtype, dtype, 1.0, 1.0, configs.product_precision(attention.dtype, attention.device))


class Workspace:
    """T×T matrices of one chunk of heads, what is summed over their tiles, and the kernels between them."""

    def __init__(
        self, sample: Tensor, span: Tensor | None, arithmetic: Arithmetic, squared: bool, exclude_diagonal: bool,
        is_causal: bool, need_grad: bool, workspace_bytes: int | None,
    ) -> None:  # fmt: skip
        batch, self.H, self.T = sample.shape[:3]
        self.span = span
        self.arithmetic = arithmetic = arithmetic.in_planes()
        self.form = {"SQUARED": squared, "EXCLUDE_DIAGONAL": exclude_diagonal}
        self.is_causal = is_causal
        self.config, gram = (
            configs.config_for(kernel, arithmetic.bits, configs.WIDEST_ROW, self.T, sample.device)
            for kernel in ("interaction", "gram")
        )
        self.gram_config = replace(gram, rows=min(gram.rows, self.config.rows))
        self.tiles = cdiv(self.T, self.config.rows)
        self.pitch = self.tiles * self.config.rows
        self.gram_tiles = self.pitch // self.gram_config.rows
        self.total = sample.new_empty(batch, self.H, dtype=torch.float32)

        matrices = 3 if need_grad else 1
        head_bytes = matrices * self.pitch**2 * arithmetic.bits // 8
        self.heads = configs.heads_of_a_chunk(batch * self.H, head_bytes, workspace_bytes)
        shape = (matrices, self.heads, arithmetic.planes, self.pitch, self.pitch)
        matrix = sample.new_empty(shape, dtype=arithmetic.matrix)
        # grad: φ of the tiles on the diagonal, each until the program that has read it writes ∂L/∂s there
        self.attention, self.pair, self.grad = matrix if need_grad else (*matrix, None, None)
        self.attention_tiles, self.pair_tiles = self.descriptors(self.config)
        of_gram = [self.attention_tiles, self.pair_tiles]
        if self.gram_config != self.config:
            of_gram = self.descriptors(self.gram_config)
        self.gram_descriptors = [descriptor for tiles in of_gram for descriptor in tiles[:2]]
        self.row_term = self.total.new_empty(self.heads, self.gram_tiles, self.pitch) if need_grad else None
        self.row_sum = self.total.new_empty(self.heads, self.pitch)
        self.loss = self.total.new_empty(self.heads, self.gram_tiles, self.gram_tiles)

    def chunks(self) -> list[tuple[int, int]]:
        """First head and number of heads of each chunk, over samples and heads together."""
        count = self.total.numel()
        return [(first, min(self.heads, count - first)) for first in range(0, count, self.heads)]

    def descriptors(self, config: configs.Config) -> list[tuple[TensorDescriptor | None, ...]]:
        """Of a chunk's A and M laid end to end, where the configuration reads them by TMA: of tiles of ``rows`` by
        ``features``, of their mirror images, and of two of these side by side."""
        rows, features = config.rows, config.features
        shapes = ([rows, features], [features, rows], [features, 2 * rows])
        return [
            (None, None, None)
            if matrix is None or not config.descriptors
            else tuple(TensorDescriptor.from_tensor(matrix.view(-1, self.pitch), shape) for shape in shapes)
            for matrix in (self.attention, self.pair)
        ]

    def gram(self, head0: int, heads: int) -> None:
        """The loss of a chunk and, for the gradient, M, φ(G) and the row term."""
        config = self.gram_config
        attention_desc, mirrored_desc, pair_desc, phi_desc = self.gram_descriptors
        interaction_gram_kernel[(self.gram_tiles, self.gram_tiles, heads)](
            self.attention, attention_desc, mirrored_desc, self.span, self.pair, pair_desc, phi_desc,
            self.grad, self.row_term, self.loss,
            self.T, self.H, head0, self.pitch, self.gram_tiles,
            self.arithmetic.attention_scale, self.arithmetic.pair_scale,
            PLANES=self.arithmetic.planes, BLOCK=self.config.rows, SIDE=config.rows, BLOCK_K=config.features,
            IS_CAUSAL=self.is_causal, **self.form, PRECISION=self.arithmetic.precision, **config.execution,
        )  # fmt: skip
        interaction_total_kernel[(heads,)](
            self.loss, self.span, self.total, self.T, self.H, head0, self.gram_tiles, SIDE=config.rows
        )


def from_attention(
    attention: Tensor,
    mask: Tensor | None,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    arithmetic = Arithmetic.of_attention(attention)
    block = "attention_block", arithmetic.bits, configs.WIDEST_ROW, attention.device
    if attention.numel() > 0 and attention.shape[-1] <= configs.entry(*block).rows:
        config = configs.config(*block)
        return _launch_attention_block(attention, mask, arithmetic, config, squared, exclude_diagonal, need_grad)
    if attention.numel() == 0:
        empty = attention.new_zeros(attention.shape if need_grad else 0)
        return attention.new_zeros(attention.shape[:2], dtype=torch.float32), empty
    grad = _gradient(attention, mask, need_grad)
    attention = readable(attention)
    mask, span = spans(mask)
    form = (squared, exclude_diagonal, False, need_grad, workspace_bytes)
    work = Workspace(attention, span, arithmetic, *form)
    config = work.config
    for head0, heads in work.chunks():
        grid = (work.tiles, work.tiles, heads)
        stage_kernel[grid](
            attention, mask, span, work.attention, work.T, work.H, head0, work.pitch, *attention.stride()[:3],
            PLANES=work.arithmetic.planes, BLOCK=config.rows,
        )  # fmt: skip
        work.gram(head0, heads)
        if need_grad:
            attention_gradient_kernel[grid](
                work.attention, work.attention_tiles[1], work.pair, *work.pair_tiles[:2], work.grad,
                mask, span, grad, work.T, work.H, head0, work.pitch,
                PLANES=work.arithmetic.planes, BLOCK=config.rows, BLOCK_K=config.features,
                PRECISION=work.arithmetic.precision, **config.execution,
            )  # fmt: skip
    return work.total, grad


def from_qk(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    squared: bool,
    exclude_diagonal: bool,
    need_grad: bool,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    block = "interaction_block", 8 * q.dtype.itemsize, q.shape[-1], q.device
    if q.shape[:3].numel() > 0 and q.shape[2] <= configs.entry(*block).rows:
        config = configs.config(*block)
        return _launch_interaction_block(q, k, mask, config, scale, is_causal, squared, exclude_diagonal, need_grad)
    if q.shape[:3].numel() == 0:
        empty = q.new_zeros(q.shape if need_grad else 0, dtype=torch.float32)
        return q.new_zeros(q.shape[:2], dtype=torch.float32), empty, empty.clone()
    grad_q, grad_k = (_gradient(q, mask, need_grad, torch.float32) for _ in range(2))
    q, k = readable(q), readable(k)
    mask, span = spans(mask)
    form = (squared, exclude_diagonal, is_causal, need_grad, workspace_bytes)
    work = Workspace(q, span, Arithmetic.of_scores(q), *form)
    for head0, heads in work.chunks():
        _launch_softmax(work, q, k, mask, head0, heads, scale)
        work.gram(head0, heads)
        if need_grad:
            score_grad, score_grad_scale = _launch_score_gradient(work, head0, heads)
            _launch_query_and_key_gradient(
                work, score_grad, score_grad_scale, q, k, mask, head0, heads, scale, grad_q, grad_k
            )
    return work.total, grad_q, grad_k


def _gradient(x: Tensor, mask: Tensor | None, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """For kernels that write what is real; empty where no gradient is needed."""
    new = x.new_empty if mask is None else x.new_zeros
    return new(x.shape if needed else 0, dtype=dtype or x.dtype)


def _launch_attention_block(
    attention: Tensor, mask: Tensor | None, arithmetic: Arithmetic, config: configs.Config, squared: bool,
    exclude_diagonal: bool, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, H, T, _ = attention.shape
    attention = readable(attention)
    total = attention.new_empty(batch, H, dtype=torch.float32)
    grad = attention.new_empty(attention.shape if need_grad else 0)
    attention_block_kernel[(batch * H,)](
        attention, as_bytes(mask), total, grad if need_grad else None, T, H, *attention.stride()[:3],
        DTYPE=TRITON_DTYPES[arithmetic.matrix], BLOCK=configs.width_block(T, config.rows),
        SQUARED=squared, EXCLUDE_DIAGONAL=exclude_diagonal, PRECISION=arithmetic.precision, **config.execution,
    )  # fmt: skip
    return total, grad


def _launch_interaction_block(
    q: Tensor, k: Tensor, mask: Tensor | None, config: configs.Config, scale: float, is_causal: bool, squared: bool,
    exclude_diagonal: bool, need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, H, T, D = q.shape
    q, k = readable(q), readable(k)
    arithmetic = Arithmetic.of_scores(q)
    total = q.new_empty(batch, H, dtype=torch.float32)
    grad_q, grad_k = (q.new_empty(q.shape if need_grad else 0, dtype=torch.float32) for _ in range(2))
    interaction_block_kernel[(batch * H,)](
        q, k, as_bytes(mask), total, *((grad_q, grad_k) if need_grad else (None, None)),
        T, D, H, H // k.shape[1], *q.stride()[:3], *k.stride()[:3],
        scale, scale * LOG2_E, arithmetic.attention_scale, arithmetic.pair_scale,
        DTYPE=TRITON_DTYPES[arithmetic.matrix], SCORE_GRADIENT=TRITON_DTYPES[arithmetic.score_gradient],
        BLOCK=configs.width_block(T, config.rows), BLOCK_D=config.features, IS_CAUSAL=is_causal,
        SQUARED=squared, EXCLUDE_DIAGONAL=exclude_diagonal, PRECISION=arithmetic.precision, **config.execution,
    )  # fmt: skip
    return total, grad_q, grad_k


def _launch_softmax(
    work: Workspace, q: Tensor, k: Tensor, mask: Tensor | None, head0: int, heads: int, scale: float
) -> None:
    config = configs.config_for("softmax", 8 * q.dtype.itemsize, q.shape[-1], work.T, q.device)
    softmax_kernel[(work.tiles, heads)](
        q, k, mask, work.span, work.attention, work.row_sum,
        work.T, q.shape[-1], work.H, work.H // k.shape[1], head0, work.pitch, *q.stride()[:3], *k.stride()[:3],
        scale * LOG2_E, work.arithmetic.attention_scale,
        PLANES=work.arithmetic.planes, BLOCK=work.config.rows, BLOCK_J=config.columns, BLOCK_D=config.features,
        WHOLE=q.shape[-1] <= config.features, IS_CAUSAL=work.is_causal, PRECISION=work.arithmetic.precision,
        **config.execution,
    )  # fmt: skip


def _launch_score_gradient(work: Workspace, head0: int, heads: int) -> tuple[Tensor, Tensor]:
    """∂L/∂s, and the power of 2 that each tile of its rows is scaled by."""
    score_grad = work.grad.view(work.arithmetic.score_gradient)
    score_grad_scale = work.total.new_empty(heads, work.tiles)
    config = work.config
    _, attention_desc, two_tiles_desc = work.attention_tiles
    if work.is_causal or work.arithmetic.planes == 3:  # whose products need twice the registers
        two_tiles_desc = None
    score_gradient_kernel[(work.tiles if two_tiles_desc is None else cdiv(work.tiles, 2), work.tiles, heads)](
        work.attention, attention_desc, two_tiles_desc, work.pair, *work.pair_tiles[:2], work.grad,
        work.row_term, work.row_sum, work.span, score_grad, score_grad_scale,
        work.T, work.H, head0, work.pitch, work.tiles, work.arithmetic.attention_scale, work.arithmetic.pair_scale,
        PLANES=work.arithmetic.planes, BLOCK=config.rows, SIDE=work.gram_config.rows, BLOCK_K=config.features,
        IS_CAUSAL=work.is_causal, PRECISION=work.arithmetic.precision, **config.execution,
    )  # fmt: skip
    return score_grad, score_grad_scale


def _launch_query_and_key_gradient(
    work: Workspace, score_grad: Tensor, score_grad_scale: Tensor, q: Tensor, k: Tensor, mask: Tensor | None,
    head0: int, heads: int, scale: float, grad_q: Tensor, grad_k: Tensor,
) -> None:  # fmt: skip
    D = q.shape[-1]
    config = configs.config_for("query_key_gradient", 8 * q.dtype.itemsize, D, work.T, q.device)
    grid = (work.tiles, cdiv(D, config.features), heads)
    options = {
        "PLANES": work.arithmetic.planes,
        "BLOCK": work.config.rows,
        "BLOCK_K": min(config.columns, work.config.rows),  # a power of 2 for each tile of rows
        "BLOCK_D": config.features,
        "IS_CAUSAL": work.is_causal,
        "PRECISION": work.arithmetic.precision,
        **config.execution,
    }
    query_gradient_kernel[grid](
        score_grad, score_grad_scale, k, mask, work.span, grad_q,
        work.T, D, work.H, work.H // k.shape[1], head0, work.pitch, work.tiles, *k.stride()[:3], scale, **options,
    )  # fmt: skip
    key_gradient_kernel[grid](
        score_grad, score_grad_scale, q, mask, work.span, grad_k,
        work.T, D, work.H, head0, work.pitch, work.tiles, *q.stride()[:3], scale, **options,
    )  # fmt: skip
