"""Values and gradients against float64, next to the plain formula's own error in the same dtype."""

from collections.abc import Callable

import pytest
import torch
from support import (
    assert_close_to_float64,
    device_of,
    every_backend,
    forced,
    lengths_mask,
    matmul_precision,
    normal,
    offsets,
    plain_interaction_total,
    plain_interaction_total_from_qk,
    plain_row_energy,
    relative_error,
    skip_unless_served,
    value_and_gradients,
)
from torch import Tensor

import safr_fast as sf

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def total(attention: Tensor, impl: str, mask: Tensor | None = None, **form: bool) -> Tensor:
    """The pair sum behind the loss, so that long samples weigh as much as short ones."""
    length = attention.shape[-1] if mask is None else mask.sum(-1, keepdim=True)
    return sf.interaction_loss(attention, mask, reduction="none", impl=impl, **form) * length**2


def total_from_qk(q: Tensor, k: Tensor, impl: str, mask: Tensor | None = None, **form: bool) -> Tensor:
    length = q.shape[-2] if mask is None else mask.sum(-1, keepdim=True)
    return sf.interaction_loss_from_qk(q, k, mask, reduction="none", impl=impl, **form) * length**2


@every_backend(fused=True)
@pytest.mark.parametrize("tokens", [1, 15, 17, 63, 65, 127, 129])
@each_dtype
def test_row_energy_is_as_accurate_as_the_formula(backend: str, tokens: int, dtype: torch.dtype) -> None:
    skip_unless_served(backend, dtype)
    h = normal(2, tokens, 48, seed=tokens, dtype=dtype, device=device_of(backend))
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.row_energy(h, impl=impl), plain_row_energy, h)


@every_backend(fused=True)
@pytest.mark.parametrize(("tokens", "width"), [(700, 48), (300, 20), (33, 300), (65, 1)])
def test_row_energy_on_both_sides_of_the_crossover(backend: str, tokens: int, width: int) -> None:
    h = normal(1, tokens, width, seed=tokens, device=device_of(backend))
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.row_energy(h, impl=impl), plain_row_energy, h)


@every_backend(fused=True)
@pytest.mark.parametrize("few", [True, False], ids=["few orthogonal", "all orthogonal"])
def test_row_energy_of_rows_that_barely_interfere(backend: str, few: bool) -> None:
    """Where R ≪ n2² the feature moment cancels; training drives a model there."""
    tokens, width = 400, 200
    h = torch.zeros(1, tokens, width)
    h[0, torch.arange(tokens), torch.arange(tokens) % width] = 1.0
    h[0, width:] *= 1e-3
    h += 1e-4 * normal(1, tokens, width)
    if few:
        h[0, 6:] = normal(tokens - 6, width)
        h[0, :, :6] *= 1e-2
        h[0, :6, :6] = torch.eye(6)
    h = h.to(device_of(backend))
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.row_energy(h, impl=impl), plain_row_energy, h)
        # Of these the six rows show, whose energies are 2e6 times smaller than the others'.
        for measure, form in ((sf.capacity, {}), (sf.importance_loss, {"reduction": "none"})):
            assert_close_to_float64(
                lambda h, of=measure, form=form: of(h, impl=impl, **form),
                lambda h, of=measure, form=form: of(h, impl="reference", **form),
                h,
            )


@every_backend(fused=True)
@pytest.mark.parametrize(("big", "scale"), [(8, 1400.0), (40, 300.0)])
@pytest.mark.parametrize("measure", [sf.importance_loss, sf.capacity], ids=["importance", "capacity"])
def test_measures_beside_massive_activations(
    backend: str, measure: Callable[..., Tensor], big: int, scale: float
) -> None:
    """A few tokens are large along one direction, which the others are orthogonal to: rounding in the moment is of the
    size of the large ones."""
    tokens, width = 700, 256
    direction = torch.nn.functional.normalize(normal(width, seed=1), dim=0)
    h = normal(1, tokens, width, seed=2)
    h -= (h @ direction)[..., None] * direction
    h[0, :big] = scale * direction * (1 + 0.1 * normal(big, 1, seed=3))
    h = h.to(device_of(backend))
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: measure(h, impl=impl), plain_measure(measure), h)


@every_backend(fused=True)
@pytest.mark.parametrize(
    ("tokens", "width", "big", "scale"), [(60, 16, 8, 1000.0), (60, 16, 1, 300.0), (200, 64, 8, 1000.0)]
)
def test_capacity_of_narrow_tokens_that_share_a_little_with_massive_ones(
    backend: str, tokens: int, width: int, big: int, scale: float
) -> None:
    """The fewer features, the less of the moment's rounding cancels."""
    direction = torch.nn.functional.normalize(normal(width, seed=1), dim=0)
    h = normal(1, tokens, width, seed=2)
    h -= (h @ direction)[..., None] * direction
    h += 0.032 * h.norm(dim=-1, keepdim=True) * direction
    h[0, :big] = scale * direction * (1 + 0.1 * normal(big, 1, seed=3))
    h = h.to(device_of(backend))
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.capacity(h, impl=impl), plain_measure(sf.capacity), h)


@every_backend(fused=True)
@pytest.mark.parametrize("measure", [sf.importance_loss, sf.capacity], ids=["importance", "capacity"])
@pytest.mark.parametrize("share", [0.05, 0.1])
def test_measures_of_tokens_whose_two_large_features_cancel_beside_massive_ones(
    backend: str, measure: Callable[..., Tensor], share: float
) -> None:
    """Massive activations sit on few features, so few entries of the moment are large. Their rounding errors do not
    average out, and they are the same for every token."""
    tokens, width, big = 300, 64, 8
    h = normal(1, tokens, width, seed=2)
    h[..., :2] = 0
    apart = 30 * h.norm(dim=-1) * normal(1, tokens, seed=4).sign()
    along = share * (h.norm(dim=-1).square() + apart.square()).sqrt()
    h[..., 0], h[..., 1] = (along + apart) / 2**0.5, (along - apart) / 2**0.5
    size = 125 * h.norm(dim=-1).mean()
    h[0, :big] = 0
    h[0, :big, :2] = size * (1 + 0.1 * normal(big, 1, seed=3)) / 2**0.5
    h = h.to(device_of(backend))
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: measure(h, impl=impl), plain_measure(measure), h)


@every_backend(fused=True)
@pytest.mark.parametrize("form", [{}, {"reduction": "none"}], ids=["mean", "none"])
@pytest.mark.parametrize(("tokens", "width", "seed"), [(512, 64, 3), (300, 25, 2)])
def test_gradients_of_long_rows_beside_short_ones_in_as_many_directions(
    backend: str, form: dict[str, str], tokens: int, width: int, seed: int
) -> None:
    """Rows along the columns of a rotation, the first of each ten times as long as the others: their energies are a few
    hundredths of n2², and the gradient is what is left of terms far larger than itself."""
    directions = torch.linalg.qr(normal(width, width, seed=seed))[0]
    h = directions[torch.arange(tokens) % width] * normal(tokens, 1, seed=seed + 10).abs()
    h[width:] *= 0.1
    h = h[None].to(device_of(backend))
    with forced(backend) as impl:
        assert_close_to_float64(
            lambda h: sf.importance_loss(h, impl=impl, **form),
            lambda h: sf.importance_loss(h, impl="reference", **form),
            h,
        )


@every_backend(fused=True)
def test_one_token_so_large_that_the_moment_overflows(backend: str) -> None:
    direction = torch.nn.functional.normalize(normal(48, seed=1), dim=0)
    h = normal(1, 300, 48, seed=2) + 8 * direction
    h[0, 0] = 6e9 * direction
    h = h.to(device_of(backend))
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.importance_loss(h, impl=impl), plain_measure(sf.importance_loss), h)


def plain_measure(measure: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    def plain(h: Tensor) -> Tensor:
        energy, squared_norm = plain_row_energy(h)
        if measure is sf.capacity:
            return squared_norm.square() / (squared_norm.square() + energy)
        return (energy / squared_norm / h.shape[-1]).sqrt().mean()

    return plain


@pytest.mark.parametrize("width", [2, 48])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_rounds_a_gradient_once(width: int, dtype: torch.dtype) -> None:
    h = normal(2, 90, width, dtype=dtype)
    (_, gradient), (_, expected) = (
        value_and_gradients(lambda h: sf.importance_loss(h, impl="reference"), [x]) for x in (h, h.double())
    )
    assert relative_error(gradient, expected) < torch.finfo(dtype).eps


def test_the_yardstick_finds_a_wrong_function() -> None:
    """Of the helper that the tests above rest on: a value or a gradient that is a little off does not pass."""
    h = normal(2, 20, 8)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * (1 + 1e-4)

    assert_close_to_float64(plain_row_energy, plain_row_energy, h)
    with pytest.raises(AssertionError, match="output 0"):
        assert_close_to_float64(lambda h: [(1 + 1e-4) * x for x in plain_row_energy(h)], plain_row_energy, h)
    with pytest.raises(AssertionError, match="output 2"):
        assert_close_to_float64(lambda h: plain_row_energy(Wrong.apply(h)), plain_row_energy, h)


@every_backend(fused=True)
@pytest.mark.parametrize("tokens", [1, 15, 17, 65, 129])
@pytest.mark.parametrize("squared", [True, False], ids=["squared", "linear"])
@pytest.mark.parametrize("exclude_diagonal", [True, False], ids=["offdiag", "full"])
@each_dtype
def test_interaction_is_as_accurate_as_the_formula(
    backend: str, tokens: int, squared: bool, exclude_diagonal: bool, dtype: torch.dtype
) -> None:
    skip_unless_served(backend, dtype)
    form = {"squared": squared, "exclude_diagonal": exclude_diagonal}
    attention = (3 * normal(1, 2, tokens, tokens, seed=tokens)).softmax(-1).to(dtype).to(device_of(backend))
    with forced(backend) as impl:
        assert_close_to_float64(
            lambda a: total(a, impl, **form), lambda a: plain_interaction_total(a, **form), attention
        )


@every_backend(fused=True)
@pytest.mark.parametrize("tokens", [1, 17, 65, 129])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0], ids=["flat", "medium", "peaky"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@each_dtype
def test_interaction_from_qk_is_as_accurate_as_the_formula(
    backend: str, tokens: int, sharpness: float, is_causal: bool, dtype: torch.dtype
) -> None:
    skip_unless_served(backend, dtype)
    form = {"squared": True, "exclude_diagonal": False, "is_causal": is_causal}
    device = device_of(backend)
    q = (sharpness * normal(1, 2, tokens, 32, seed=tokens)).to(dtype).to(device)
    k = normal(1, 2, tokens, 32, seed=tokens + 1, dtype=dtype, device=device)
    with forced(backend) as impl:
        assert_close_to_float64(
            lambda q, k: total_from_qk(q, k, impl, **form),
            lambda q, k: plain_interaction_total_from_qk(q, k, **form),
            q,
            k,
        )


@every_backend(fused=True)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_grouped_keys_and_holes_in_the_mask(backend: str, is_causal: bool) -> None:
    device = device_of(backend)
    q, k = normal(2, 6, 45, 16, seed=3, device=device), normal(2, 2, 45, 16, seed=4, device=device)
    mask = (normal(2, 45, seed=5) > -0.5).to(device)
    form = {"squared": False, "exclude_diagonal": True, "is_causal": is_causal}
    with forced(backend) as impl:
        assert_close_to_float64(
            lambda q, k: total_from_qk(q, k, impl, mask, **form),
            lambda q, k: plain_interaction_total_from_qk(q, k, mask, **form),
            q,
            k,
        )


@every_backend(fused=True)
def test_holes_in_the_mask(backend: str) -> None:
    device = device_of(backend)
    mask = (normal(3, 50, seed=6) > 0).to(device)
    h = normal(3, 50, 24, seed=7, device=device)
    attention = normal(3, 2, 50, 50, seed=8, device=device).softmax(-1)
    form = {"squared": True, "exclude_diagonal": True}
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.row_energy(h, mask, impl=impl), lambda h: plain_row_energy(h, mask), h)
        assert_close_to_float64(
            lambda a: total(a, impl, mask, **form), lambda a: plain_interaction_total(a, mask, **form), attention
        )


@every_backend()
def test_packed_sequences_equal_padded_ones(backend: str) -> None:
    """Lengths on both sides of the crossover, an empty segment, and tokens past the last one."""
    lengths, width, device = [70, 0, 5, 33, 1], 16, device_of(backend)
    mask = lengths_mask(lengths, max(lengths)).to(device)
    cu_seqlens = offsets(lengths, device)
    h = normal(len(lengths), max(lengths), width, seed=9, device=device)
    q, k = (normal(len(lengths), 4, max(lengths), 8, seed=10 + i, device=device) for i in range(2))
    tail = 3

    def pack(x: Tensor) -> Tensor:  # (B, T, ...) → (N, ...), with tokens of no sequence behind
        return torch.cat([x[mask], torch.full_like(x[0, :tail], float("nan"))])

    with forced(backend) as impl:
        padded = value_and_gradients(lambda h: sf.importance_loss(h, mask, reduction="none", impl=impl)[mask], [h])
        packed = value_and_gradients(
            lambda h: sf.importance_loss(h, cu_seqlens=cu_seqlens, reduction="none", impl=impl)[:-tail], [pack(h)]
        )
        heads = [x.transpose(1, 2) for x in (q, k)]
        padded += value_and_gradients(
            lambda q, k: sf.interaction_loss_from_qk(q, k, mask, reduction="none", is_causal=True, impl=impl), [q, k]
        )
        packed += value_and_gradients(
            lambda q, k: sf.interaction_loss_from_qk(
                q, k, cu_seqlens=cu_seqlens, reduction="none", is_causal=True, impl=impl
            ),
            [pack(x) for x in heads],
        )
    assert relative_error(packed[0], padded[0]) < 1e-6
    assert relative_error(packed[1][:-tail], padded[1][mask]) < 1e-6
    assert relative_error(packed[2], padded[2]) < 1e-6
    for of_packed, of_padded in zip(packed[3:], padded[3:], strict=True):
        assert relative_error(of_packed[:-tail], of_padded.transpose(1, 2)[mask]) < 1e-5
    for gradient in (packed[1], *packed[3:]):
        assert (gradient[-tail:] == 0).all()


@every_backend(fused=True)
@pytest.mark.parametrize(("precision", "allowed"), [("high", 1e-4), ("medium", 2e-2)])
def test_lower_precision_is_what_was_asked_for(backend: str, precision: str, allowed: float) -> None:
    device = device_of(backend)
    h = normal(2, 60, 48, device=device)
    q, k = normal(1, 2, 60, 16, seed=1, device=device), normal(1, 2, 60, 16, seed=2, device=device)
    form = {"squared": True, "exclude_diagonal": False}
    oracle = value_and_gradients(plain_row_energy, [h.double()])
    oracle += value_and_gradients(
        lambda q, k: plain_interaction_total_from_qk(q, k, is_causal=False, **form), [q.double(), k.double()]
    )
    if backend == "triton" and precision == "medium" and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16: only a GPU can run this")
    with forced(backend) as impl, matmul_precision(precision):
        actual = value_and_gradients(lambda h: sf.row_energy(h, impl=impl), [h])
        actual += value_and_gradients(lambda q, k: total_from_qk(q, k, impl, **form), [q, k])
    for result, expected in zip(actual, oracle, strict=True):
        assert relative_error(result, expected) < allowed
