"""Launches primitive 1: which kernels serve a batch, and over which grids."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .row_energy_moment import moment_backward_kernel, moment_kernel, quadratic_form_kernel
from .row_energy_repair import row_energy_repair_backward_kernel, row_energy_repair_kernel
from .row_energy_symmetric import row_energy_symmetric_kernel, row_energy_total_kernel
from .row_energy_token import row_energy_token_backward_kernel, row_energy_token_kernel
from .row_energy_weights import row_energy_weight_kernel, row_energy_weight_product_kernel
from .row_energy_wide import row_energy_wide_backward_kernel, row_energy_wide_kernel
from .tensors import readable, spans

NEVER = 2**31 - 1
PARTIAL_BYTES = 64 << 20
WEIGHT_BYTES = 256 << 20  # or one sample's
MANY_OPERATIONS = 1 << 33  # to save, so that a second launch is worth it
PROGRAMS = 256  # fills a large GPU twice; a constant, so that the order of sums does not depend on the device


class Batch:
    """The sequences of one call, and what every kernel wants to know of them."""

    def __init__(self, h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self.h = readable(h)
        self.packed = cu_seqlens is not None
        self.S, self.T = (cu_seqlens.shape[0] - 1, h.shape[0]) if self.packed else h.shape[:2]
        self.E = h.shape[-1]
        precision = torch.get_float32_matmul_precision()
        threshold = configs.moment_threshold(self.E, h.dtype, precision)
        self.slots = configs.moment_slots(h.shape, self.packed, h.dtype, precision)
        self.threshold = threshold if self.slots else NEVER
        self.some_short = self.slots == 0 or self.packed or mask is not None
        self.mask, self.spans = spans(mask)
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.guard = configs.moment_guard(h.dtype)
        self.precision = configs.product_precision(h.dtype, h.device)
        self.derived = tl.bfloat16 if h.dtype == torch.bfloat16 else tl.float32
        self.bits = 8 * h.dtype.itemsize
        self.derived_bits = self.derived.primitive_bitwidth

    @property
    def gram_operations(self) -> int:
        return 2 * self.S * self.T**2 * self.E

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.h, self.mask, self.spans, self.cu_seqlens

    @property
    def sizes(self) -> tuple[int, ...]:
        strides = (0, self.h.stride(0)) if self.packed else self.h.stride()[:2]
        return self.S, self.T, self.E, self.threshold, *strides

    def tiles(self, rows: int) -> int:
        """Slots for the tiles of all sequences, see ``tiles.tile_of``."""
        return self.T // rows + self.S if self.packed else self.S * triton.cdiv(self.T, rows)

    def config(self, kernel: str, bits: int) -> configs.Config:
        return configs.config(kernel, bits, self.E, self.h.device)


def forward(
    h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, save_moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    energy = _rows_to_write(h, cu_seqlens, h.shape[:-1], torch.float32)
    norm = _rows_to_write(h, cu_seqlens, h.shape[:-1], torch.float32)
    batch = Batch(h, mask, cu_seqlens)
    moments = energy.new_empty(batch.slots, batch.E, batch.E)
    if h.numel() > 0 and batch.S > 0:
        if batch.slots > 0:
            _launch_moment(batch, moments)
            _launch_quadratic_form(batch, moments, energy, norm)
            _launch_repair(batch, energy, norm, _norm_of(moments))
        if batch.some_short:
            _launch_token(batch, energy, norm)
    return energy, norm, moments if save_moments else moments.new_empty(0, batch.E, batch.E)


def backward(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    energy: Tensor,
    norm: Tensor,
    moments: Tensor,
    grad_energy: Tensor,
    grad_norm: Tensor,
) -> Tensor:
    grad_h = _rows_to_write(h, cu_seqlens, h.shape, h.dtype)
    batch = Batch(h, mask, cu_seqlens)
    if h.numel() > 0 and batch.S > 0:
        energy, norm, grad_energy, grad_norm = (x.contiguous() for x in (energy, norm, grad_energy, grad_norm))
        if batch.slots > 0:
            weighted = torch.empty_like(moments)
            rows = energy, norm, _norm_of(moments), grad_energy
            _launch_moment(batch, weighted, *rows)
            _launch_moment_backward(batch, moments, weighted, *rows, grad_norm, grad_h)
            _launch_repair_backward(batch, *rows, grad_norm, grad_h)
        if batch.some_short:
            _launch_token_backward(batch, grad_energy, grad_norm, grad_h)
    return grad_h


def _rows_to_write(h: Tensor, cu_seqlens: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros where rows may belong to no sequence, or nothing is launched; kernels write those of padding themselves."""
    make = torch.empty if cu_seqlens is None and h.numel() > 0 else torch.zeros
    return make(shape, dtype=dtype, device=h.device)


def _norm_of(moments: Tensor) -> Tensor:
    """Euclidean norm of each moment, which tells what rounding leaves in it: (slots,)."""
    return torch.linalg.vector_norm(moments, dim=(1, 2))


def _launch_token(batch: Batch, energy: Tensor, norm: Tensor) -> None:
    if configs.keeps_rows(batch.bits, batch.E):
        kernel, config = row_energy_token_kernel, batch.config("token", batch.bits)
    else:
        config = batch.config("wide", batch.bits)
        if _is_square(batch, config) and batch.gram_operations >= MANY_OPERATIONS:
            _launch_symmetric(batch, config, energy, norm)
            return
        kernel = row_energy_wide_kernel
    kernel[(batch.tiles(config.rows),)](
        *batch.tensors, energy, norm, *batch.sizes,
        BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features, PRECISION=batch.precision,
        **config.execution,
    )  # fmt: skip


def _is_square(batch: Batch, config: configs.Config) -> bool:
    """Whether tiles of the Gram matrix have mirror images that a launch can count."""
    return config.rows == config.columns and not batch.packed


def _launch_symmetric(batch: Batch, config: configs.Config, energy: Tensor, norm: Tensor) -> None:
    h, mask, span, _ = batch.tensors
    tiles = triton.cdiv(batch.T, config.rows)
    partial = energy.new_empty(batch.S, tiles, batch.T)
    sizes = (batch.T, batch.E, batch.threshold, tiles, *h.stride()[:2])
    row_energy_symmetric_kernel[(tiles * tiles * batch.S,)](
        h, mask, span, partial, *sizes,
        BLOCK_T=config.rows, BLOCK_E=config.features, PRECISION=batch.precision, **config.execution,
    )  # fmt: skip
    row_energy_total_kernel[(tiles * batch.S,)](
        h, mask, span, partial, energy, norm, batch.S, *sizes, BLOCK_T=config.rows, BLOCK_E=config.features,
    )  # fmt: skip


def _launch_token_backward(batch: Batch, grad_energy: Tensor, grad_norm: Tensor, grad_h: Tensor) -> None:
    tensors = (*batch.tensors, grad_energy, grad_norm, grad_h)
    if configs.keeps_rows(batch.derived_bits, batch.E):
        config = batch.config("token_backward", batch.derived_bits)
        row_energy_token_backward_kernel[(batch.tiles(config.rows),)](
            *tensors, *batch.sizes,
            BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features,
            DERIVED=batch.derived, PRECISION=batch.precision, **config.execution,
        )  # fmt: skip
    else:
        config = batch.config("wide_backward", batch.derived_bits)
        repeats = triton.cdiv(batch.E, config.out) - 1
        if _is_square(batch, batch.config("wide", batch.bits)) and repeats * batch.gram_operations >= MANY_OPERATIONS:
            _launch_weights(batch, grad_energy, grad_norm, grad_h)
            return
        row_energy_wide_backward_kernel[(batch.tiles(config.rows), triton.cdiv(batch.E, config.out))](
            *tensors, *batch.sizes,
            BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features, BLOCK_OUT=config.out,
            DERIVED=batch.derived, PRECISION=batch.precision, **config.execution,
        )  # fmt: skip


def _launch_weights(batch: Batch, grad_energy: Tensor, grad_norm: Tensor, grad_h: Tensor) -> None:
    h, mask, span, _ = batch.tensors
    gram, out = batch.config("wide", batch.bits), batch.config("weight_product", batch.derived_bits)
    tiles = triton.cdiv(batch.T, gram.rows)
    pitch = tiles * gram.rows
    dtype = torch.bfloat16 if h.dtype == torch.bfloat16 else torch.float32
    samples = min(batch.S, max(1, WEIGHT_BYTES // (pitch**2 * dtype.itemsize)))
    weights = h.new_empty(samples, pitch, pitch, dtype=dtype)
    for sample0 in range(0, batch.S, samples):
        count = min(samples, batch.S - sample0)
        row_energy_weight_kernel[(tiles * tiles * count,)](
            h, mask, span, grad_energy, weights, batch.T, batch.E, batch.threshold, tiles, sample0, *h.stride()[:2],
            BLOCK_T=gram.rows, BLOCK_E=gram.features, PRECISION=batch.precision, **gram.execution,
        )  # fmt: skip
        row_energy_weight_product_kernel[(pitch // out.rows * count, triton.cdiv(batch.E, out.out))](
            h, mask, span, grad_norm, weights, grad_h,
            batch.T, batch.E, batch.threshold, pitch, sample0, *h.stride()[:2],
            BLOCK_T=out.rows, BLOCK_K=out.columns, BLOCK_OUT=out.out, PRECISION=batch.precision, **out.execution,
        )  # fmt: skip


def _launch_moment(
    batch: Batch,
    moments: Tensor,
    energy: Tensor | None = None,
    norm: Tensor | None = None,
    moment_norm: Tensor | None = None,
    grad_energy: Tensor | None = None,
) -> None:
    """Fills ``moments``, weighted by ``grad_energy`` if given. Long sequences are shared out, and the shares summed."""
    config = batch.config("moment", batch.bits if grad_energy is None else batch.derived_bits)
    pairs = triton.cdiv(batch.E, config.features) ** 2
    most = min(PARTIAL_BYTES // (4 * moments.numel()), triton.cdiv(batch.T, 4 * config.rows))
    shares = max(1, min(PROGRAMS // (pairs * batch.slots), most))
    partial = moments.new_empty(shares, *moments.shape) if shares > 1 else moments
    moment_kernel[(pairs * batch.slots, shares)](
        *batch.tensors, energy, norm, moment_norm, grad_energy, partial, *batch.sizes, batch.guard,
        BLOCK_T=config.rows, BLOCK_E=config.features, DERIVED=batch.derived, PRECISION=batch.precision,
        **config.execution,
    )  # fmt: skip
    if shares > 1:
        torch.sum(partial, 0, out=moments)


def _launch_quadratic_form(batch: Batch, moments: Tensor, energy: Tensor, norm: Tensor) -> None:
    config = batch.config("quadratic_form", batch.derived_bits)
    quadratic_form_kernel[(batch.tiles(config.rows),)](
        *batch.tensors, moments, energy, norm, *batch.sizes,
        BLOCK_T=config.rows, BLOCK_E=config.features, DERIVED=batch.derived, PRECISION=batch.precision,
        **config.execution,
    )  # fmt: skip


def _launch_repair(batch: Batch, energy: Tensor, norm: Tensor, moment_norm: Tensor) -> None:
    config = batch.config("wide", batch.bits)
    row_energy_repair_kernel[(batch.tiles(config.rows),)](
        *batch.tensors, energy, norm, moment_norm, *batch.sizes, batch.guard,
        BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features, PRECISION=batch.precision,
        **config.execution,
    )  # fmt: skip


def _launch_moment_backward(batch: Batch, moments: Tensor, weighted: Tensor, *rows_and_grad_h: Tensor) -> None:
    config = batch.config("moment_backward", batch.derived_bits)
    moment_backward_kernel[(batch.tiles(config.rows), triton.cdiv(batch.E, config.out))](
        *batch.tensors, moments, weighted, *rows_and_grad_h, *batch.sizes, batch.guard,
        BLOCK_T=config.rows, BLOCK_E=config.features, BLOCK_OUT=config.out,
        DERIVED=batch.derived, PRECISION=batch.precision, **config.execution,
    )  # fmt: skip


def _launch_repair_backward(batch: Batch, *rows_and_grad_h: Tensor) -> None:
    config = batch.config("repair_backward", batch.derived_bits)
    row_energy_repair_backward_kernel[(batch.tiles(config.rows), triton.cdiv(batch.E, config.out))](
        *batch.tensors, *rows_and_grad_h, *batch.sizes, batch.guard,
        BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features, BLOCK_OUT=config.out,
        DERIVED=batch.derived, PRECISION=batch.precision, **config.execution,
    )  # fmt: skip
