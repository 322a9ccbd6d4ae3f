"""Launches primitive 1: which kernels serve a batch, and over which grids."""

import torch
import triton.language as tl
from torch import Tensor

from safr_fast.precision import matmul_precision

from . import configs
from .configs import cdiv
from .importance_launch import Loss, NoLoss
from .row_energy_moment import (
    moment_and_short_kernel,
    moment_backward_kernel,
    moment_kernel,
    moment_total_kernel,
    quadratic_form_kernel,
    weighted_moment_and_short_kernel,
    weighted_moment_kernel,
)
from .row_energy_repair import MOST_SHARES
from .row_energy_symmetric import row_energy_symmetric_kernel, row_energy_total_kernel
from .row_energy_token import row_energy_token_backward_kernel, row_energy_token_kernel
from .row_energy_weights import row_energy_weight_kernel, row_energy_weight_product_kernel
from .row_energy_wide import row_energy_wide_backward_kernel, row_energy_wide_kernel
from .tensors import as_bytes, readable, spans

NEVER = 2**31 - 1
PARTIAL_BYTES = 64 << 20
WEIGHT_BYTES = 256 << 20
MANY_OPERATIONS = 1 << 33  # to save, so that a second launch is worth it
TOTAL_BLOCK = 1024


class Batch:
    """The sequences of one call, and what every kernel wants to know of them."""

    def __init__(self, h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self.h = readable(h)
        self.packed = cu_seqlens is not None
        self.S, self.T = (cu_seqlens.shape[0] - 1, h.shape[0]) if self.packed else h.shape[:2]
        self.E = h.shape[-1]
        precision = matmul_precision(h.device.type)
        threshold = configs.moment_threshold(self.E, h.dtype, precision)
        self.slots = configs.moment_slots(h.shape, self.packed, h.dtype, precision)
        self.threshold = threshold if self.slots else NEVER
        self.some_short = self.slots == 0 or self.packed or mask is not None
        self.mask, self.span = as_bytes(mask), None
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.guard = configs.moment_guard(h.dtype, precision)
        self.precision = configs.product_precision(h.dtype, h.device)
        self.derived = tl.bfloat16 if h.dtype == torch.bfloat16 else tl.float32
        self.bits = 8 * h.dtype.itemsize
        self.derived_bits = self.derived.primitive_bitwidth

    @property
    def is_empty(self) -> bool:
        return self.h.numel() == 0 or self.S == 0

    def halves_gram(self, config: configs.Config, times: int = 1) -> bool:
        """Whether to make half of the Gram matrix, in a launch more: tiles have mirror images that a launch can count,
        and enough operations are saved. Rows that a program can keep whole take kernels of their own. Beside long
        sequences the short ones are made so, in matrices as large as those: hence only up to a length."""
        square = config.rows == config.columns and not self.packed
        operations = times * 2 * self.S * min(self.T, self.threshold) ** 2 * self.E
        bounded = 4 * (self.T + config.rows) ** 2 <= WEIGHT_BYTES
        return square and bounded and operations >= MANY_OPERATIONS and not configs.keeps_rows(self.bits, self.E)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.h, self.mask, self.span, self.cu_seqlens

    @property
    def sizes(self) -> tuple[int, ...]:
        strides = (0, self.h.stride(0)) if self.packed else self.h.stride()[:2]
        return self.S, self.T, self.E, self.threshold, *strides

    def make_room_for_spans(self) -> None:
        """Of each sample's real tokens, for the kernel of the moments to find and those after it to read: (S, 3)."""
        if self.mask is not None:
            self.span = self.h.new_empty(self.S, 3, dtype=torch.int32)

    def find_spans(self) -> None:
        """For kernels of which each program would have to find them anew."""
        if self.span is None:
            self.mask, self.span = spans(self.mask)

    def tiles(self, rows: int) -> int:
        """Slots for the tiles of all sequences, see ``tiles.tile_of``."""
        return self.T // rows + self.S if self.packed else self.S * cdiv(self.T, rows)

    def kept(self, moments: Tensor) -> Tensor:
        """The memory of S as the kernels use it: of bfloat16 rows (slots, 2, E, E), rounded and what that left."""
        if self.derived != tl.bfloat16:
            return moments
        return moments.view(torch.bfloat16).view(self.slots, 2, self.E, self.E)

    def config(self, kernel: str, bits: int) -> configs.Config:
        return configs.config(kernel, bits, self.E, self.h.device)


class Gradients:
    """What the backward kernels read: the sums of the forward pass, and their gradients or the importance loss's."""

    def __init__(
        self,
        energy: Tensor,
        norm: Tensor,
        grad_energy: Tensor | None = None,
        grad_norm: Tensor | None = None,
        grad_loss: Tensor | None = None,
        factor: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        self.sums = energy, norm
        self.given = grad_energy, grad_norm, grad_loss, factor
        self.alpha = torch.empty_like(energy) if grad_energy is None else grad_energy  # see importance.store_alpha
        self.eps = eps


def forward(
    h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, save_moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Rows of packed input may belong to no sequence, and without tokens nothing is launched.
    make = torch.empty if cu_seqlens is None and h.numel() > 0 else torch.zeros
    energy, norm = (make(h.shape[:-1], dtype=torch.float32, device=h.device) for _ in range(2))
    batch = Batch(h, mask, cu_seqlens)
    moments, _ = _forward(batch, energy, norm, NoLoss())
    return energy, norm, moments if save_moments else moments.new_empty(0, batch.E, batch.E)


def importance(
    h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, eps: float, scale: float, mean: bool, save: bool
) -> tuple[Tensor, ...]:
    energy, norm = (h.new_empty(h.shape[:-1], dtype=torch.float32) for _ in range(2))
    batch = Batch(h, mask, cu_seqlens)
    loss = Loss(h, eps, scale, mean)
    moments, moment_norm = _forward(batch, energy, norm, loss)
    if batch.is_empty:
        loss.loss.zero_()
        loss.factor.zero_()
    if not save:
        moments, moment_norm = moments.new_empty(0, batch.E, batch.E), moments.new_empty(0)
    return loss.loss, loss.factor, energy, norm, moments, moment_norm


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
    rows = (x.contiguous() for x in (energy, norm, grad_energy, grad_norm))
    batch = Batch(h, mask, cu_seqlens)
    moment_norm = moments
    if batch.slots > 0:
        rounded = batch.kept(moments).select(1, 0) if batch.derived == tl.bfloat16 else moments
        moment_norm = torch.linalg.vector_norm(rounded, dim=(1, 2), dtype=torch.float32)
    return _backward(batch, moments, moment_norm, Gradients(*rows))


def importance_backward(
    h: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    energy: Tensor,
    norm: Tensor,
    moments: Tensor,
    moment_norm: Tensor,
    factor: Tensor,
    grad_loss: Tensor,
    eps: float,
) -> Tensor:
    gradients = Gradients(energy, norm, grad_loss=grad_loss, factor=factor, eps=eps)
    return _backward(Batch(h, mask, cu_seqlens), moments, moment_norm, gradients)


def _forward(batch: Batch, energy: Tensor, norm: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Fills ``energy``, ``norm`` and ``loss``, and returns the moments and their Euclidean norms: (slots,)."""
    moments, moment_norm = energy.new_empty(batch.slots, batch.E, batch.E), energy.new_empty(batch.slots)
    if batch.is_empty:
        return moments, moment_norm
    wide = batch.config("wide", batch.bits)
    halved = batch.some_short and batch.halves_gram(wide)
    if batch.slots == 0:
        if halved:
            loss.expect(batch.tiles(wide.rows), batch.h, batch.mask, zeroed_before=True)
            _launch_symmetric(batch, wide, energy, norm, loss, 0)
        else:
            _launch_token(batch, energy, norm, loss)
        return moments, moment_norm
    batch.make_room_for_spans()
    form = batch.config("quadratic_form", batch.derived_bits)
    joined = batch.some_short and not halved
    short = batch.config("moment_and_short", batch.bits) if joined else wide
    long_tiles = batch.tiles(form.rows)
    short_tiles = batch.tiles(short.rows) if batch.some_short else 0
    loss.expect(long_tiles + short_tiles, batch.h, batch.mask, zeroed_before=True)
    kept = batch.kept(moments)
    squares = _launch_moment(batch, kept, loss, (energy, norm) if joined else None, short_tiles, long_tiles)
    if halved:
        _launch_symmetric(batch, wide, energy, norm, loss, long_tiles)
    quadratic_form_kernel[(long_tiles,)](
        *batch.tensors, kept, squares, energy, norm, moment_norm, *loss.tensors, *batch.sizes,
        squares.shape[1], batch.guard, **loss.numbers,
        BLOCK_T=form.rows, BLOCK_J=form.columns, BLOCK_E=form.features, DERIVED=batch.derived,
        PRECISION=batch.precision, **form.execution,
    )  # fmt: skip
    return moments, moment_norm


def _backward(batch: Batch, moments: Tensor, moment_norm: Tensor, gradients: Gradients) -> Tensor:
    if batch.is_empty:
        return torch.zeros_like(batch.h, memory_format=torch.contiguous_format)
    grad_h = torch.empty_like(batch.h, memory_format=torch.contiguous_format)
    repeats = cdiv(batch.E, batch.config("wide_backward", batch.derived_bits).out) - 1
    stores_weights = batch.some_short and batch.halves_gram(batch.config("wide", batch.bits), repeats)
    stores_weights = stores_weights and not configs.keeps_rows(batch.derived_bits, batch.E)
    if batch.slots > 0:
        batch.make_room_for_spans()
        kept = batch.kept(moments)
        weighted = kept.new_empty(batch.slots, batch.E, batch.E)
        joined = batch.some_short and not stores_weights
        found = _launch_weighted_moment(batch, weighted, moment_norm, gradients, grad_h if joined else None)
    if stores_weights:
        _launch_weights(batch, gradients, grad_h)
    elif batch.slots == 0:
        _launch_token_backward(batch, gradients, grad_h)
    if batch.slots > 0:
        config = batch.config("moment_backward", batch.derived_bits)
        moment_backward_kernel[(batch.tiles(config.rows) * cdiv(batch.E, config.out),)](
            *batch.tensors, kept, weighted, found, *gradients.sums, moment_norm, *gradients.given, grad_h, *batch.sizes,
            found.shape[1], batch.guard, gradients.eps,
            BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features, BLOCK_OUT=config.out,
            DERIVED=batch.derived, PRECISION=batch.precision, **config.execution,
        )  # fmt: skip
    return grad_h


def _launch_token(batch: Batch, energy: Tensor, norm: Tensor, loss: Loss) -> None:
    if configs.keeps_rows(batch.bits, batch.E):
        kernel, config = row_energy_token_kernel, batch.config("token", batch.bits)
    else:
        kernel, config = row_energy_wide_kernel, batch.config("wide", batch.bits)
    tiles = batch.tiles(config.rows)
    loss.expect(tiles, batch.h, batch.mask, zeroed_before=False)
    kernel[(tiles,)](
        *batch.tensors, energy, norm, *loss.tensors, *batch.sizes, **loss.numbers,
        BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features, PRECISION=batch.precision,
        **config.execution,
    )  # fmt: skip


def _launch_symmetric(
    batch: Batch, config: configs.Config, energy: Tensor, norm: Tensor, loss: Loss, first_share: int
) -> None:
    batch.find_spans()
    h, mask, span, _ = batch.tensors
    tiles = cdiv(batch.T, config.rows)
    partial = energy.new_empty(batch.S, tiles, batch.T)
    sizes = (batch.T, batch.E, batch.threshold, tiles, *h.stride()[:2])
    share, count, ticket, *finished = loss.tensors
    if batch.slots > 0:  # the long sequences finish
        ticket, finished = None, (None, None)
    row_energy_symmetric_kernel[(tiles * tiles * batch.S,)](
        h, mask, span, partial, ticket, *sizes,
        BLOCK_T=config.rows, BLOCK_E=config.features, PRECISION=batch.precision, **config.execution,
    )  # fmt: skip
    row_energy_total_kernel[(tiles * batch.S,)](
        h, mask, span, partial, energy, norm, share, count, ticket, *finished, batch.S, *sizes,
        first_share, **loss.numbers,
        BLOCK_T=config.rows, BLOCK_E=config.features,
    )  # fmt: skip


def _launch_token_backward(batch: Batch, gradients: Gradients, grad_h: Tensor) -> None:
    tensors = (*batch.tensors, *gradients.sums, *gradients.given, gradients.alpha, grad_h)
    if configs.keeps_rows(batch.derived_bits, batch.E):
        config = batch.config("token_backward", batch.derived_bits)
        row_energy_token_backward_kernel[(batch.tiles(config.rows),)](
            *tensors, *batch.sizes, gradients.eps,
            BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features,
            DERIVED=batch.derived, PRECISION=batch.precision, **config.execution,
        )  # fmt: skip
    else:
        config = batch.config("wide_backward", batch.derived_bits)
        row_energy_wide_backward_kernel[(batch.tiles(config.rows), cdiv(batch.E, config.out))](
            *tensors, *batch.sizes, gradients.eps,
            BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features, BLOCK_OUT=config.out,
            DERIVED=batch.derived, PRECISION=batch.precision, **config.execution,
        )  # fmt: skip


def _launch_weights(batch: Batch, gradients: Gradients, grad_h: Tensor) -> None:
    batch.find_spans()
    h, mask, span, _ = batch.tensors
    rows = (*gradients.sums, *gradients.given)
    gram, out = batch.config("wide", batch.bits), batch.config("weight_product", batch.derived_bits)
    tiles = cdiv(batch.T, gram.rows)
    pitch = tiles * gram.rows
    dtype = torch.bfloat16 if h.dtype == torch.bfloat16 else torch.float32
    samples = min(batch.S, WEIGHT_BYTES // (pitch**2 * dtype.itemsize))
    weights = h.new_empty(samples, pitch, pitch, dtype=dtype)
    for sample0 in range(0, batch.S, samples):
        count = min(samples, batch.S - sample0)
        row_energy_weight_kernel[(tiles * tiles * count,)](
            h, mask, span, *rows, weights, batch.T, batch.E, batch.threshold, tiles, sample0, *h.stride()[:2],
            gradients.eps,
            BLOCK_T=gram.rows, BLOCK_E=gram.features, PRECISION=batch.precision, **gram.execution,
        )  # fmt: skip
        row_energy_weight_product_kernel[(pitch // out.rows * count, cdiv(batch.E, out.out))](
            h, mask, span, *rows, weights, grad_h,
            batch.T, batch.E, batch.threshold, pitch, sample0, *h.stride()[:2], gradients.eps,
            BLOCK_T=out.rows, BLOCK_K=out.columns, BLOCK_OUT=out.out, PRECISION=batch.precision, **out.execution,
        )  # fmt: skip


def _launch_moment(
    batch: Batch, moments: Tensor, loss: Loss, short: tuple[Tensor, Tensor] | None, short_tiles: int, first_share: int
) -> Tensor:
    """Fills ``moments``, and ``short``'s sums of the sequences that are, if given. Returns partial sums of the moments'
    squares: (slots, any number)."""
    config = batch.config("moment" if short is None else "moment_and_short", batch.bits)
    shares, partial, programs = _shared_out(batch, moments, config)
    pairs = programs // (shares * batch.slots)
    squares = batch.h.new_empty(
        batch.slots, pairs if shares == 1 else cdiv(batch.E**2, TOTAL_BLOCK), dtype=torch.float32
    )
    tensors = (*batch.tensors, partial, squares if shares == 1 else None, loss.ticket)
    if short is None:
        moment_kernel[(programs,)](
            *tensors, *batch.sizes, batch.slots, shares,
            BLOCK_T=config.rows, BLOCK_E=config.features, PRECISION=batch.precision, **config.execution,
        )  # fmt: skip
    else:
        moment_and_short_kernel[(programs + short_tiles,)](
            *tensors, *short, loss.share, loss.count, *batch.sizes,
            batch.slots, shares, programs, first_share, loss.eps,
            BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features, PRECISION=batch.precision,
            **config.execution,
        )  # fmt: skip
    _add_shares(batch, partial, moments, squares)
    return squares


def _launch_weighted_moment(
    batch: Batch, weighted: Tensor, moment_norm: Tensor, gradients: Gradients, grad_h: Tensor | None
) -> Tensor:
    """Fills the moments weighted by ``α``, and the rows of ``grad_h``, if given, of the sequences that are short.

    Returns how many tokens are left to be made directly: (slots, shares).
    """
    config = batch.config("moment" if grad_h is None else "moment_and_short_backward", batch.derived_bits)
    shares, partial, programs = _shared_out(batch, weighted, config)
    found = batch.h.new_empty(batch.slots, shares, dtype=torch.int32)
    weights = torch.empty_like(gradients.alpha)
    tensors = (*batch.tensors, *gradients.sums, moment_norm, *gradients.given, partial, weights, found)
    if grad_h is None:
        weighted_moment_kernel[(programs,)](
            *tensors, *batch.sizes, batch.slots, shares, batch.guard, gradients.eps,
            BLOCK_T=config.rows, BLOCK_E=config.features, DERIVED=batch.derived, PRECISION=batch.precision,
            **config.execution,
        )  # fmt: skip
    else:
        short_tiles = batch.tiles(config.rows) * cdiv(batch.E, config.out)
        weighted_moment_and_short_kernel[(programs + short_tiles,)](
            *tensors, gradients.alpha, grad_h, *batch.sizes, batch.slots, shares, programs, batch.guard, gradients.eps,
            BLOCK_T=config.rows, BLOCK_J=config.columns, BLOCK_E=config.features, BLOCK_OUT=config.out,
            DERIVED=batch.derived, PRECISION=batch.precision, **config.execution,
        )  # fmt: skip
    _add_shares(batch, partial, weighted, None)
    return found


def _shared_out(batch: Batch, moments: Tensor, config: configs.Config) -> tuple[int, Tensor, int]:
    """Into how many shares the tokens of a sequence are cut, room for what each adds to the moments, and programs."""
    tiles = cdiv(batch.E, config.features)
    pairs = tiles * (tiles + 1) // 2
    size = batch.slots * batch.E**2
    most = min(PARTIAL_BYTES // (4 * size), cdiv(batch.T, 4 * config.rows), MOST_SHARES.value)
    shares = max(1, min(configs.PROGRAMS // (pairs * batch.slots), most))
    partial = moments
    if shares > 1:
        partial = moments.new_empty(shares, batch.slots, batch.E, batch.E, dtype=torch.float32)
    return shares, partial, pairs * batch.slots * shares


def _add_shares(batch: Batch, partial: Tensor, moments: Tensor, squares: Tensor | None) -> None:
    if partial is not moments:
        size = batch.E**2
        moment_total_kernel[(batch.slots, cdiv(size, TOTAL_BLOCK))](
            partial, moments, squares, size, partial.shape[0], BLOCK=TOTAL_BLOCK
        )
