"""The kernels that end the importance loss, against the formula in float64."""

import pytest
import torch
from support import DEVICE, normal, offsets, relative_error
from torch import Tensor

import safr_fast as sf
from safr_fast.ops.importance import importance

pytestmark = pytest.mark.skipif(
    not any(backend.name == "triton" and backend.available for backend in sf.available_backends()),
    reason="neither a GPU nor Triton's interpreter is at hand",
)
WIDTH = 24


def sums(tokens: int) -> tuple[Tensor, Tensor]:
    """Energies and squared norms, zeros among both."""
    energy, norm = (normal(2, tokens, seed=seed).square().to(DEVICE) for seed in (1, 2))
    energy[:, ::5] = 0
    norm[:, ::7] = 0
    return energy, norm


def formula(energy: Tensor, norm: Tensor, eps: float, count: int) -> Tensor:
    alive = (energy != 0) & (norm != 0)
    root, length = (torch.where(alive, x, 1.0).sqrt() for x in (energy, norm))
    return torch.where(alive, root / (length + eps), 0.0).sum() / WIDTH**0.5 / count


@pytest.mark.parametrize("tokens", [1, 700, 20_000], ids=["one", "one program", "several programs"])
@pytest.mark.parametrize("layout", ["dense", "masked", "packed"])
@pytest.mark.parametrize(("eps", "mean"), [(0.0, False), (1e-5, True)], ids=["paper", "released"])
def test_sum_mean_and_gradients(tokens: int, layout: str, eps: float, mean: bool) -> None:
    energy, norm = sums(tokens)
    mask = cu_seqlens = None
    count = energy.numel()
    if layout == "masked":
        mask = (normal(2, tokens, seed=3) > 0).to(DEVICE)
        count = max(int(mask.sum()), 1)
    elif layout == "packed":
        energy, norm = energy.flatten(), norm.flatten()
        cu_seqlens = offsets([tokens // 2, tokens // 3], DEVICE)
        count = max(tokens // 2 + tokens // 3, 1)
    leaves = [energy.clone().requires_grad_(), norm.clone().requires_grad_()]
    loss = importance(*leaves, mask, cu_seqlens, eps, WIDTH, mean, "triton")
    exact_leaves = [energy.double().requires_grad_(), norm.double().requires_grad_()]
    expected = formula(*exact_leaves, eps, count if mean else 1)
    assert relative_error(loss.detach(), expected.detach()) < 1e-6
    for actual, exact in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, exact_leaves), strict=True
    ):
        assert relative_error(actual, exact) < 1e-6


def test_nothing_and_nan() -> None:
    nothing = torch.empty(2, 0, device=DEVICE)
    assert importance(nothing, nothing, None, None, 0.0, WIDTH, True, "triton") == 0
    energy, norm = sums(700)
    energy[1, 4] = torch.nan
    assert importance(energy, norm, None, None, 0.0, WIDTH, True, "triton").isnan()


def test_it_differentiates_once() -> None:
    energy, norm = (x.requires_grad_() for x in sums(5))
    loss = importance(energy, norm, None, None, 1e-5, WIDTH, True, "triton")
    (first,) = torch.autograd.grad(loss, energy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        first.sum().backward()


@pytest.mark.parametrize("mean", [False, True])
def test_opcheck(mean: bool) -> None:
    energy, norm = sums(40)
    ops = torch.ops.safr_fast
    torch.library.opcheck(ops.importance.default, (energy, norm, None, None, 1e-5, 0.2, mean, "triton"))
    _, factor = ops.importance(energy, norm, None, None, 1e-5, 0.2, mean, "triton")
    one = torch.ones((), device=DEVICE)
    torch.library.opcheck(ops.importance_backward.default, (energy, norm, factor, one, 1e-5, "triton"))
