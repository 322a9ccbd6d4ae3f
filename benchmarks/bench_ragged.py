"""Does padding cost anything? Batches with IMDB's lengths, padded and packed, and lengths that fit no tile."""

import math

import formulas
import pytest
import torch
from comparison import compare, gradient_provider
from formulas import compiled
from torch import Tensor

import safr_fast as sf

SAMPLES, HEADS, WIDTH, HEAD_WIDTH = 32, 8, 256, 32


def imdb_lengths() -> Tensor:
    """Words of 32 reviews: the quantiles (i + ½)/32 of the log-normal law with median 188 and σ = 0.645 that fits
    IMDB's training reviews, within their 10 to 2,470; shuffled."""
    quantiles = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    words = (5.239 + 0.645 * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).exp().clamp(10, 2470).round().long()
    return words[torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))]


def padded(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Mask (B, T), and offsets of the same tokens packed."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return mask, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def bench_importance_loss(benchmark) -> None:
    lengths = imdb_lengths()
    mask, cu_seqlens = padded(lengths)
    benchmark.group = f"importance loss, {SAMPLES} samples with IMDB's lengths"
    benchmark.extra_info |= {"case": f"{int(lengths.sum()):,} real tokens of {mask.numel():,}"}
    h = torch.randn(*mask.shape, WIDTH, generator=torch.Generator().manual_seed(0))

    def plain(h: Tensor) -> Tensor:
        return formulas.masked_importance(h, mask)

    def packed_plain(h: Tensor) -> Tensor:
        return formulas.masked_importance(_unpack(h, mask), mask)

    providers = [
        gradient_provider(
            "ours packed", lambda h: sf.importance_loss(h, cu_seqlens=cu_seqlens), [h[mask]], packed_plain
        ),
        gradient_provider("ours padded", lambda h: sf.importance_loss(h, mask), [h], plain),
        gradient_provider("eager", plain, [h], plain),
        gradient_provider("compiled", lambda h: compiled(formulas.masked_importance)(h, mask), [h], plain),
    ]
    compare(benchmark, providers, sum(formulas.row_energy_floor(n, WIDTH) for n in lengths.tolist()))


def bench_interaction(benchmark) -> None:
    lengths = imdb_lengths()[:8].clamp(max=512)
    mask, cu_seqlens = padded(lengths)
    benchmark.group = f"interaction from q and k, 8 samples of {HEADS} heads with IMDB's lengths, cut at 512"
    benchmark.extra_info |= {"case": f"{int(lengths.sum()):,} real tokens of {mask.numel():,}"}
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(lengths), HEADS, mask.shape[1], HEAD_WIDTH, generator=generator) for _ in range(2))
    packed = [x.transpose(1, 2)[mask] for x in (q, k)]  # (N, H, D)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return formulas.masked_interaction_from_qk(q, k, mask)

    def packed_plain(q: Tensor, k: Tensor) -> Tensor:
        return plain(*(_unpack(x, mask).transpose(1, 2) for x in (q, k)))

    def packed_ours(q: Tensor, k: Tensor) -> Tensor:
        return sf.interaction_loss_from_qk(q, k, cu_seqlens=cu_seqlens)

    providers = [
        gradient_provider("ours packed", packed_ours, packed, packed_plain),
        gradient_provider("ours padded", lambda q, k: sf.interaction_loss_from_qk(q, k, mask), [q, k], plain),
        gradient_provider("eager", plain, [q, k], plain),
        gradient_provider(
            "compiled", lambda q, k: compiled(formulas.masked_interaction_from_qk)(q, k, mask), [q, k], plain
        ),
    ]
    compare(benchmark, providers, sum(formulas.interaction_floor(n, HEADS, HEAD_WIDTH) for n in lengths.tolist()))


@pytest.mark.parametrize("length", [128, 512, 1024])
def bench_odd_shapes(benchmark, length: int) -> None:
    """The aligned case beside lengths and widths that are no multiples of a tile, each for about 8,192 real tokens."""
    benchmark.group = "importance loss, odd shapes"
    benchmark.extra_info |= {"case": f"T={length}"}
    samples = 8192 // length
    h = torch.randn(samples, length, WIDTH, generator=torch.Generator().manual_seed(0))
    odd = length - 5
    mask = (torch.arange(length) < odd).expand(samples, length)
    cu_seqlens = torch.arange(0, samples * odd + 1, odd, dtype=torch.int32)
    narrow = h[:, :odd, : WIDTH - 5]

    def masked(h: Tensor) -> Tensor:
        return sf.importance_loss(h, mask)

    def packed(h: Tensor) -> Tensor:
        return sf.importance_loss(h, cu_seqlens=cu_seqlens)

    providers = [
        gradient_provider("aligned", sf.importance_loss, [h], formulas.importance),
        gradient_provider(f"T={odd}", sf.importance_loss, [h[:, :odd].contiguous()], formulas.importance),
        gradient_provider(f"T={odd}, E={WIDTH - 5}", sf.importance_loss, [narrow.contiguous()], formulas.importance),
        gradient_provider(f"masked to {odd}", masked, [h], lambda h: formulas.masked_importance(h, mask)),
        gradient_provider(
            f"packed, {odd} each",
            packed,
            [h[:, :odd].flatten(0, 1)],
            lambda h: formulas.importance(h.unflatten(0, (samples, odd))),
        ),
    ]
    compare(benchmark, providers, samples * formulas.row_energy_floor(length, WIDTH))


def _unpack(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_zeros(*mask.shape, *x.shape[1:]).index_put((mask,), x)
