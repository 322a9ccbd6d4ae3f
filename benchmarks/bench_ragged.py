"""Does padding cost anything? Batches with IMDB's lengths, padded and packed, and lengths that fit no tile."""

from collections.abc import Mapping, Sequence
from functools import partial

import formulas
import pytest
import torch
from comparison import Loss, Provider, compare, exact_gradients, gradient_provider, gradients
from providers import all_providers, precisions
from pytest_benchmark.fixture import BenchmarkFixture
from ragged import SAMPLES, Layout, imdb_lengths
from torch import Tensor

import safr_fast as sf

HEADS, WIDTH, HEAD_WIDTH = 8, 256, 32


def packed_and_padded(
    packed: Mapping[str, Loss],
    tokens: Sequence[Tensor],
    padded: Loss,
    plain: Loss,
    inputs: Sequence[Tensor],
    algebra: Loss | None = None,
) -> list[Provider]:
    """Ours on packed tokens at each precision; ours on the padded batch and its rivals, which all know only that."""
    exact = exact_gradients(packed["eager"], tokens)
    own = partial(gradients, packed["ours"], tokens)
    return [
        *(Provider(f"ours packed {precision}", own, exact, precision) for precision in precisions()),
        *all_providers(padded, plain, inputs, algebra, name="ours padded"),
    ]


def bench_importance_loss(benchmark: BenchmarkFixture) -> None:
    lengths = imdb_lengths()
    layout = Layout.of(lengths)
    benchmark.group = f"importance loss, {SAMPLES} samples with IMDB's lengths"
    benchmark.extra_info |= {"case": layout.description}
    h = torch.randn(*layout.mask.shape, WIDTH, generator=torch.Generator().manual_seed(0))
    mask = layout.mask
    providers = packed_and_padded(
        layout.importance(),
        [h[mask]],
        lambda h: sf.importance_loss(h, mask),
        lambda h: formulas.masked_importance(h, mask),
        [h],
        lambda h: formulas.masked_importance_by_moment(h, mask),
    )
    compare(benchmark, providers, sum(formulas.row_energy_floor(n, WIDTH) for n in lengths))


def bench_interaction(benchmark: BenchmarkFixture) -> None:
    lengths = [min(words, 512) for words in imdb_lengths()[:8]]
    layout = Layout.of(lengths)
    benchmark.group = f"interaction from q and k, 8 samples of {HEADS} heads with IMDB's lengths, cut at 512"
    benchmark.extra_info |= {"case": layout.description}
    generator = torch.Generator().manual_seed(0)
    B, T = layout.mask.shape
    q, k = (torch.randn(B, HEADS, T, HEAD_WIDTH, generator=generator) for _ in range(2))
    mask = layout.mask
    providers = packed_and_padded(
        layout.interaction(),
        [x.transpose(1, 2)[mask] for x in (q, k)],  # (N, H, D)
        lambda q, k: sf.interaction_loss_from_qk(q, k, mask),
        lambda q, k: formulas.masked_interaction_from_qk(q, k, mask),
        [q, k],
    )
    compare(benchmark, providers, sum(formulas.interaction_floor(n, HEADS, HEAD_WIDTH) for n in lengths))


@pytest.mark.parametrize("length", [128, 512, 1024])
def bench_odd_shapes(benchmark: BenchmarkFixture, length: int) -> None:
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
