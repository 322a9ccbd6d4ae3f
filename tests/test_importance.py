"""The importance loss as the fused back ends finish it, against the formula in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from support import (
    DEVICE,
    assert_close_to_float64,
    device_of,
    every_backend,
    forced,
    lengths_mask,
    needs_triton,
    normal,
    offsets,
    relative_error,
)
from torch import Tensor, library

import safr_fast as sf

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")
# Tokens of the longest sequence: the Gram matrix within a tile and beyond, and the feature moment.
TOKENS = {"a block": 40, "tiles": 150, "feature": 270}
FEATURE_OF_16_BITS = 530
LAYOUTS = ["dense", "masked", "packed"]
each_path = pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def hidden(tokens: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    """``(2, T, E)`` with tokens whose norm or whose energy is 0, and one whose energy cancels on the feature path."""
    h = normal(2, tokens, 24, seed=tokens, dtype=dtype, device=device)
    h[..., 0] = 0
    h[0, 5::7] = 0
    h[1, 3] = 0
    h[1, 3, 0] = 2  # orthogonal to all others
    h[0, 4] *= 30
    return h


def laid_out(h: Tensor, layout: str, first: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Two sequences, of which the second is short where layouts allow; padding and rows of none hold NaN.

    Packed ones begin at row ``first``: Triton's kernels do not look whether that is 0, as it has to be.
    """
    tokens = h.shape[1]
    short = tokens // 3
    if layout == "masked":
        mask = lengths_mask([tokens, short], tokens).to(h.device)
        mask[1, 7] = False
        return h.masked_fill(~mask.unsqueeze(-1), torch.nan), {"mask": mask}
    if layout == "packed":
        rows = h.new_full((first + tokens + short + 70, h.shape[-1]), torch.nan)
        rows[first : first + tokens + short] = torch.cat([h[0], h[1, :short]])
        return rows, {"cu_seqlens": offsets([tokens, short], h.device) + first}
    return h, {}


def value_and_gradient(
    h: Tensor, kwargs: dict[str, Tensor], impl: str = "triton", **more: object
) -> tuple[Tensor, Tensor]:
    leaf = h.detach().requires_grad_()
    loss = sf.importance_loss(leaf, impl=impl, **kwargs, **more)
    return loss.detach(), torch.autograd.grad(3 * loss, leaf)[0]


@every_backend(fused=True)
@each_path
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("eps", "reduction"), [(0.0, "sum"), (1e-5, "mean")], ids=["paper", "released"])
def test_it_is_as_accurate_as_the_formula(
    backend: str, tokens: int, layout: str, dtype: torch.dtype, eps: float, reduction: str
) -> None:
    if tokens == TOKENS["feature"] and dtype == torch.float16:
        tokens = FEATURE_OF_16_BITS
    h, kwargs = laid_out(hidden(tokens, dtype, device_of(backend)), layout, first=0)
    if layout == "packed":  # the plain formula's tokens of no sequence would turn its own gradient to NaN
        h = h[: kwargs["cu_seqlens"][-1]]
    form = {"eps": eps, "reduction": reduction, **kwargs}
    with forced(backend) as impl:
        assert_close_to_float64(
            lambda h: sf.importance_loss(h, impl=impl, **form),
            lambda h: sf.importance_loss(h, impl="reference", **form),
            h,
        )


@every_backend(fused=True)
@each_path
@each_layout
def test_what_is_no_token_counts_for_nothing(backend: str, tokens: int, layout: str) -> None:
    """Nor does memory that was not written."""
    first = 3 if backend == "triton" else 0
    h, kwargs = laid_out(hidden(tokens, device=device_of(backend)), layout, first)
    real = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device)
    if layout == "masked":
        real = kwargs["mask"]
    elif layout == "packed":
        real[:first] = real[kwargs["cu_seqlens"][-1] :] = False
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        with forced(backend) as impl:
            loss, gradient = value_and_gradient(h, kwargs, impl, reduction="sum")
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss.isfinite()
    assert gradient[real].isfinite().all()
    assert not gradient[~real].any()


@needs_triton
@pytest.mark.skipif(DEVICE != "cpu", reason="changes Triton's interpreter")
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("small", [1e-20, 3e-11], ids=["its norm is subnormal", "all energies are"])
def test_a_square_root_of_triton_that_flushes_as_a_gpus_does_spoils_no_gradient(
    small: float, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_sqrt
    flushed = []

    def flushing(self: Any, x: Any) -> Any:
        subnormal = np.abs(x.data) < np.finfo(np.float32).tiny
        flushed.append(bool((subnormal & (x.data != 0)).any()))
        return plain(self, interpreter.TensorHandle(np.where(subnormal, np.float32(0), x.data), x.dtype))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_sqrt", flushing)
    h = normal(1, 4, 16)
    h[0, 1 if small == 1e-20 else slice(None)] *= small
    loss, gradient = value_and_gradient(h, {}, eps=eps)
    expected = sf.importance_loss(h.double() * (h.abs() > 1e-9), impl="reference", eps=eps)  # as if they were 0
    assert flushed
    assert not any(flushed)  # what a GPU would lose is never asked for
    assert gradient.isfinite().all()
    assert abs(loss.double() - expected) <= 1e-6 * expected


@needs_triton
@each_layout
def test_every_launch_of_triton_leaves_its_ticket_for_the_next(layout: str) -> None:
    from safr_fast.kernels import importance_launch

    h, kwargs = laid_out(hidden(150), layout)
    first = value_and_gradient(h, kwargs)
    assert importance_launch._tickets
    assert not any(ticket.any() for ticket in importance_launch._tickets.values())
    value_and_gradient(*laid_out(hidden(TOKENS["feature"]), layout))
    assert all(torch.equal(*pair) for pair in zip(value_and_gradient(h, kwargs), first, strict=True))


@every_backend(fused=True)
@each_layout
def test_many_samples_are_added_up(backend: str, layout: str) -> None:
    h = normal(40, 2, 4, device=device_of(backend))
    mask = torch.arange(2, device=h.device) < 1 + torch.arange(len(h), device=h.device)[:, None] % 2
    kwargs = {"mask": mask} if layout == "masked" else {}
    if layout == "packed":
        h, kwargs = h[mask], {"cu_seqlens": offsets(mask.sum(1).tolist(), h.device)}
    with forced(backend) as impl:
        actual = value_and_gradient(h, kwargs, impl)
    for result, expected in zip(actual, value_and_gradient(h.double(), kwargs, "reference"), strict=True):
        assert relative_error(result, expected) < 1e-6


@needs_triton
@pytest.mark.parametrize("masked", [False, True])
def test_more_shares_than_one_block_of_triton_are_added_up(masked: bool) -> None:
    from safr_fast.kernels.row_energy_launch import TOTAL_BLOCK

    h = normal(TOTAL_BLOCK + 76, 2, 4, device=DEVICE)
    mask = torch.arange(2, device=DEVICE) < 1 + torch.arange(len(h), device=DEVICE)[:, None] % 2 if masked else None
    loss, expected = (sf.importance_loss(x, mask, impl=impl) for x, impl in ((h, "triton"), (h.double(), "reference")))
    assert relative_error(loss, expected) < 1e-6


@needs_triton
@each_layout
@pytest.mark.parametrize("constant", ["MANY_OPERATIONS", "PROGRAMS"])
def test_other_launches_of_triton_give_the_same(constant: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the Gram matrix of short sequences beside long ones, and moments in one share."""
    from safr_fast.kernels import configs, row_energy_launch

    h, kwargs = laid_out(hidden(TOKENS["feature"]), layout)
    usual = value_and_gradient(h, kwargs)
    monkeypatch.setattr(configs if constant == "PROGRAMS" else row_energy_launch, constant, 0)
    for result, expected in zip(value_and_gradient(h, kwargs), usual, strict=True):
        real = expected.isfinite()
        assert relative_error(result[real], expected[real]) < 2e-6


@every_backend(fused=True)
def test_nothing_and_nan(backend: str) -> None:
    device = device_of(backend)
    with forced(backend) as impl:
        for nothing, kwargs in (
            (torch.empty(2, 0, 8, device=device), {}),
            (torch.empty(2, 5, 0, device=device), {}),
            (normal(5, 8, device=device), {"cu_seqlens": offsets([0, 0], device)}),
            (normal(5, 8, device=device), {"cu_seqlens": offsets([], device)}),
            (normal(2, 5, 8, device=device), {"mask": torch.zeros(2, 5, dtype=torch.bool, device=device)}),
        ):
            loss, gradient = value_and_gradient(nothing, kwargs, impl)
            assert loss == 0
            assert not gradient.any()
        h = hidden(150, device=device)
        h[1, 4, 2] = torch.nan
        assert sf.importance_loss(h, impl=impl).isnan()


@needs_triton
@pytest.mark.parametrize("cu_seqlens", [[-9, 40, 20, 2**31 - 1], [300, 310], [60, 90]], ids=str)
def test_offsets_that_make_no_sense_reach_no_other_memory_by_triton(cu_seqlens: list[int]) -> None:
    room = torch.full((64 + 75 + 64, 4), float("nan"), device=DEVICE)
    h = room[64:-64].copy_(normal(75, 4))
    loss, gradient = value_and_gradient(h, {"cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)})
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert room[:64].isnan().all()
    assert room[-64:].isnan().all()


@every_backend(fused=True)
def test_it_differentiates_once(backend: str) -> None:
    h = hidden(5, device=device_of(backend)).requires_grad_()
    with forced(backend) as impl:
        (first,) = torch.autograd.grad(sf.importance_loss(h, impl=impl), h, create_graph=True)
    with pytest.raises(RuntimeError, match="importance_loss differentiates once"):
        first.sum().backward()


@every_backend(fused=True)
@each_layout
@pytest.mark.parametrize("tokens", [40, 300])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(backend: str, save: bool, tokens: int, layout: str) -> None:
    h, kwargs = laid_out(hidden(tokens, device=device_of(backend)), layout, 3 if backend == "triton" else 0)
    h = h.nan_to_num(0)
    layout_of = kwargs.get("mask"), kwargs.get("cu_seqlens")
    ops = torch.ops.safr_fast
    # Not compared between runs: what is saved of rows of no sequence stays unwritten.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    with forced(backend) as impl:
        library.opcheck(ops.importance.default, (h, *layout_of, 1e-5, True, save, impl), test_utils=checks)
        if save:
            _, factor, *sums = ops.importance(h, *layout_of, 1e-5, True, True, impl)
            saved = (*sums, factor, torch.ones((), device=h.device), 1e-5, impl)
            library.opcheck(ops.importance_backward.default, (h, *layout_of, *saved), test_utils=checks)
