"""Every back end against the stored float64 values and gradients, and against the same on other seeds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import SHARED, device_of, every_backend, forced, lengths_mask, normal, relative_error
from torch import Tensor

import safr_fast as sf

FILES = sorted((SHARED / "conformance").glob("*.npz"))
SEEDS = (1, 2)
FLOAT64_OVER_FLOAT32 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

pytestmark = pytest.mark.skipif(not FILES, reason=f"no conformance files in {SHARED / 'conformance'}")
each_hidden = pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("hidden")], ids=lambda path: path.stem
)
each_attention = pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("attention")], ids=lambda path: path.stem
)
FORMS = {
    f"{power}_{diagonal}": {"squared": power == "squared", "exclude_diagonal": diagonal == "offdiag"}
    for power in ("squared", "linear")
    for diagonal in ("full", "offdiag")
}

# What a file stores: names of the value and of its gradients → the function of (impl, mask, inputs) that makes them.
Measure = Callable[..., Tensor]


def load(path: Path) -> dict[str, Tensor]:
    with np.load(path) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def mask_of(stored: dict[str, Tensor], tokens: int) -> Tensor | None:
    return lengths_mask(stored["lengths"].tolist(), tokens) if "lengths" in stored else None


def hidden_measures(stored: dict[str, Tensor]) -> dict[tuple[str | None, str | None], Measure]:
    def both(impl: str, mask: Tensor | None, h: Tensor) -> Tensor:
        energy, squared_norm = sf.row_energy(h, mask, impl=impl)
        return energy * stored["w_row_energy"].to(energy) + squared_norm * stored["w_squared_norm"].to(energy)

    def weighted_capacity(impl: str, mask: Tensor | None, h: Tensor) -> Tensor:
        capacity = sf.capacity(h, mask, impl=impl)
        return capacity * stored["w_row_energy"].to(capacity)

    measures: dict[tuple[str | None, str | None], Measure] = {
        ("row_energy", None): lambda impl, mask, h: sf.row_energy(h, mask, impl=impl)[0],
        ("squared_norm", None): lambda impl, mask, h: sf.row_energy(h, mask, impl=impl)[1],
        ("capacity", None): lambda impl, mask, h: sf.capacity(h, mask, impl=impl),
        (None, "grad_row_energy"): both,
        (None, "grad_capacity"): weighted_capacity,
    }
    for name, eps in (("eps0", 0.0), ("eps1e-5", 1e-5)):
        measures[f"polysemanticity_{name}", None] = lambda impl, mask, h, eps=eps: sf.polysemanticity(
            h, mask, eps=eps, impl=impl
        )
        for reduction in ("sum", "mean"):
            value = f"importance_{reduction}_{name}"
            measures[value, f"grad_{value}"] = lambda impl, mask, h, eps=eps, reduction=reduction: sf.importance_loss(
                h, mask, eps=eps, reduction=reduction, impl=impl
            )
    return measures


def check(
    measure: Measure, backend: str, mask: Tensor | None, inputs: list[Tensor], expected: list[Tensor | None]
) -> None:
    """Value and gradients within 1e-5 of ``expected``, or twice the plain formula's own error in float32.

    The reference is the plain formula, so it is held to float64's rounding instead: to 1e-12, or where the formula
    cancels to as many digits of float64 as it keeps of float32. More cannot be asked, since the stored values are
    rounded too: in 80 bits, a gradient of attention_tile_edges proves to be 1.6e-12 off itself. The band under a
    gradient that is 0 in exact arithmetic is float32's rounding of value over input.
    """

    def run(impl: str, dtype: torch.dtype, device: str) -> list[Tensor]:
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        value = measure(impl, None if mask is None else mask.to(device), *leaves)
        derivatives = torch.autograd.grad(value.sum(), leaves) if any(x is not None for x in expected[1:]) else ()
        return [value.detach(), *derivatives]

    plain = run("reference", torch.float32, "cpu")
    if backend == "reference":
        actual, least, digits = run("reference", torch.float64, device_of(backend)), 1e-12, FLOAT64_OVER_FLOAT32
    else:
        with forced(backend) as impl:
            actual, least, digits = run(impl, torch.float32, device_of(backend)), 1e-5, 1.0
    band = torch.finfo(torch.float32).eps * actual[0].double().norm().item() / max(inputs[0].norm().item(), 1e-30)
    for i, target in enumerate(expected):
        if target is None:
            continue
        error = relative_error(actual[i], target)
        allowed = max(least, 2 * digits * relative_error(plain[i], target))
        near_zero = i > 0 and target.norm() < band and actual[i].double().norm() < band
        assert error <= allowed or near_zero, f"output {i}: error {error:.2e}, allowed {allowed:.2e}"


@every_backend()
@each_hidden
def test_stored_hidden_measures(path: Path, backend: str) -> None:
    stored = load(path)
    mask = mask_of(stored, stored["h"].shape[-2])
    for (value, gradient), measure in hidden_measures(stored).items():
        expected = [stored[value] if value else None, stored[gradient] if gradient else None]
        check(measure, backend, mask, [stored["h"]], expected)


@every_backend()
@each_attention
def test_stored_interaction_from_attention(path: Path, backend: str) -> None:
    stored = load(path)
    attention = stored["attention"]
    mask = mask_of(stored, attention.shape[-1])
    # All reduce alike, in PyTorch; the interpreter is slow.
    reductions = ("sum",) if backend == "triton" else ("sum", "mean", "none")
    for form, options in FORMS.items():
        for reduction in reductions:
            gradient = stored[f"grad_attention_{form}"] if reduction == "sum" else None
            check(
                lambda impl, mask, a, options=options, reduction=reduction: sf.interaction_loss(
                    a, mask, reduction=reduction, impl=impl, **options
                ),
                backend,
                mask,
                [attention],
                [stored[f"interaction_{reduction}_{form}"], gradient],
            )


@every_backend()
@each_attention
def test_stored_interaction_from_qk(path: Path, backend: str) -> None:
    stored = load(path)
    mask = mask_of(stored, stored["q"].shape[-2])
    for form, options in FORMS.items():
        check(
            lambda impl, mask, q, k, options=options: sf.interaction_loss_from_qk(
                q,
                k,
                mask,
                scale=stored["scale"].item(),
                is_causal=bool(stored["causal"]),
                reduction="sum",
                impl=impl,
                **options,
            ),
            backend,
            mask,
            [stored["q"], stored["k"]],
            [stored[f"interaction_qk_sum_{form}"], stored[f"grad_q_{form}"], stored[f"grad_k_{form}"]],
        )


def against_the_reference(measure: Callable, backend: str, mask: Tensor | None, inputs: list[Tensor]) -> None:
    leaves = [x.double().requires_grad_() for x in inputs]
    value = measure("reference", mask, *leaves)
    check(measure, backend, mask, inputs, [value.detach(), *torch.autograd.grad(value.sum(), leaves)])


def redrawn(x: Tensor, seed: int) -> Tensor:
    """Other numbers of the same kind: zeros stay zeros, the scale of each row stays."""
    noise = normal(*x.shape, seed=seed)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    return noise * rms * (x != 0)


def rotated(h: Tensor, seed: int) -> Tensor:
    """Other numbers whose rows lie to each other as those of ``h`` do, however nearly orthogonal or alike."""
    rotation, _ = torch.linalg.qr(normal(h.shape[-1], h.shape[-1], seed=seed).double())
    return (h.double() @ rotation).float()


@every_backend(fused=True)
@pytest.mark.parametrize("seed", SEEDS)
@each_hidden
def test_hidden_measures_on_other_seeds(path: Path, backend: str, seed: int) -> None:
    stored = load(path)
    h = redrawn(stored["h"], seed)
    mask = mask_of(stored, h.shape[-2])
    for measure in hidden_measures(stored).values():
        against_the_reference(measure, backend, mask, [h])


@every_backend(fused=True)
@pytest.mark.parametrize("seed", SEEDS)
@each_hidden
def test_the_same_rows_turned_in_space(path: Path, backend: str, seed: int) -> None:
    """Token by token: where rows are nearly orthogonal, the plain formula's error of a sum is any number near 0."""
    stored = load(path)
    h = rotated(stored["h"], seed)
    mask = mask_of(stored, h.shape[-2])
    against_the_reference(lambda impl, mask, h: sf.row_energy(h, mask, impl=impl)[0], backend, mask, [h])
    against_the_reference(lambda impl, mask, h: sf.capacity(h, mask, impl=impl), backend, mask, [h])
    against_the_reference(
        lambda impl, mask, h: sf.importance_loss(h, mask, reduction="none", impl=impl), backend, mask, [h]
    )


@every_backend(fused=True)
@pytest.mark.parametrize("seed", SEEDS)
@each_attention
def test_interaction_on_other_seeds(path: Path, backend: str, seed: int) -> None:
    stored = load(path)
    q, k = redrawn(stored["q"], seed), redrawn(stored["k"], seed + 100)
    mask = mask_of(stored, q.shape[-2])
    scale, is_causal = stored["scale"].item(), bool(stored["causal"])
    for options in FORMS.values():

        def measure(impl: str, mask: Tensor | None, q: Tensor, k: Tensor, options: dict = options) -> Tensor:
            return sf.interaction_loss_from_qk(
                q, k, mask, scale=scale, is_causal=is_causal, reduction="sum", impl=impl, **options
            )

        against_the_reference(measure, backend, mask, [q, k])


@every_backend(fused=True)
@pytest.mark.parametrize("seed", SEEDS)
@each_attention
def test_interaction_of_stored_weights_on_other_seeds(path: Path, backend: str, seed: int) -> None:
    attention = load(path)["attention"]
    mask = mask_of(load(path), attention.shape[-1])
    scores = attention.clamp(min=torch.finfo(torch.float32).tiny).log() + 0.3 * normal(*attention.shape, seed=seed)
    attention = torch.where(attention > 0, scores.exp(), 0.0)
    attention = attention / attention.sum(-1, keepdim=True).where(attention.sum(-1, keepdim=True) > 0, 1.0)
    for options in FORMS.values():

        def measure(impl: str, mask: Tensor | None, a: Tensor, options: dict = options) -> Tensor:
            return sf.interaction_loss(a, mask, reduction="sum", impl=impl, **options)

        against_the_reference(measure, backend, mask, [attention])
