"""The Triton interaction works through chunks of a bounded workspace, whose size shows in no bit of the result."""

from dataclasses import replace

import pytest
import torch
from support import DEVICE, needs_interpreter, needs_triton, normal, offsets, relative_error
from torch import Tensor

import safr_fast as sf

pytestmark = [needs_triton, pytest.mark.usefixtures("uninitialised_is_nan")]


def interact(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, workspace_bytes: int | None = None, max_seqlen: int | None = None
) -> tuple[Tensor, ...]:
    from safr_fast.kernels import launch

    return launch.interaction_from_qk(
        q, k, None, cu_seqlens, scale=0.3, is_causal=True, squared=True, exclude_diagonal=False, need_grad=True,
        workspace_bytes=workspace_bytes, max_seqlen=max_seqlen,
    )  # fmt: skip


@pytest.mark.parametrize("workspace_bytes", [1, 500_000], ids=["one at a time", "some at a time"])
@pytest.mark.parametrize("packed", [False, True], ids=["heads", "strips"])
def test_chunks_do_not_show(packed: bool, workspace_bytes: int) -> None:
    if packed:
        q, k, cu_seqlens = normal(75, 2, 8, seed=1), normal(75, 1, 8, seed=2), offsets([70, 5], DEVICE)
    else:
        q, k, cu_seqlens = normal(2, 2, 70, 8, seed=1), normal(2, 1, 70, 8, seed=2), None
    q, k = q.to(DEVICE), k.to(DEVICE)
    at_once = interact(q, k, cu_seqlens)
    for whole, chunked in zip(at_once, interact(q, k, cu_seqlens, workspace_bytes), strict=True):
        assert torch.equal(whole, chunked)


@pytest.mark.parametrize("workspace_bytes", [None, 1], ids=["at once", "one at a time"])
@pytest.mark.parametrize("max_seqlen", [70, 71, 1000])
def test_the_width_of_strips_does_not_show(max_seqlen: int, workspace_bytes: int | None) -> None:
    q, k, cu_seqlens = normal(150, 2, 8, seed=1), normal(150, 1, 8, seed=2), offsets([33, 70, 0, 42], DEVICE)
    q, k = q.to(DEVICE), k.to(DEVICE)
    for expected, result in zip(
        interact(q, k, cu_seqlens), interact(q, k, cu_seqlens, workspace_bytes, max_seqlen), strict=True
    ):
        assert torch.equal(expected, result)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("max_seqlen", [0, 30, 64, 69])
def test_a_sequence_beyond_max_seqlen_has_no_number_and_harms_no_other(max_seqlen: int) -> None:
    q, k = normal(150, 2, 8, seed=1).to(DEVICE), normal(150, 1, 8, seed=2).to(DEVICE)
    cu_seqlens = offsets([20, 70, 60], DEVICE)
    loss, grad_q, grad_k = interact(q, k, cu_seqlens, None, max_seqlen)
    expected = interact(q, k, cu_seqlens)
    within = torch.tensor([20, 70, 60], device=DEVICE) <= max_seqlen
    assert loss[~within].isnan().all()
    assert torch.equal(loss[within], expected[0][within])
    tokens = within.repeat_interleave(cu_seqlens.diff())
    for gradient, whole in zip((grad_q, grad_k), expected[1:], strict=True):
        assert torch.equal(gradient[tokens], whole[tokens])


def test_chunks_of_stored_attention_do_not_show() -> None:
    attention = normal(2, 3, 70, 70).softmax(-1).to(DEVICE)
    results = []
    for workspace_bytes in (None, 1, 500_000):
        leaf = attention.clone().requires_grad_()
        loss = sf.interaction_loss(leaf, workspace_bytes=workspace_bytes, reduction="none", impl="triton")
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], result, strict=True))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("rows", [64, 128])
def test_matrices_are_the_same_read_by_descriptors(rows: int, is_causal: bool) -> None:
    """But for the order of sums; also where a chunk holds several heads, and a sample begins and ends with padding."""
    from safr_fast.kernels import configs, launch

    mask = torch.ones(2, 150, dtype=torch.bool, device=DEVICE)
    mask[0, :70] = mask[1, 130:] = False
    q, k = normal(2, 2, 150, 8, seed=1).to(DEVICE), normal(2, 1, 150, 8, seed=2).to(DEVICE)
    attention = normal(2, 2, 150, 150).softmax(-1).to(DEVICE)
    form = {"squared": True, "exclude_diagonal": False, "need_grad": True, "workspace_bytes": 3 * 3 * 256**2 * 4}
    results = []
    for descriptors in (False, True):

        def choose(
            kernel: str, bits: int, width: int, found: configs.Config, descriptors: bool = descriptors
        ) -> configs.Config:
            if kernel == "query_key_gradient":  # more columns than a tile has are not taken
                return replace(found, columns=128)
            return replace(found, rows=rows, descriptors=descriptors) if kernel in ("interaction", "gram") else found

        with configs.choosing(choose):
            of_qk = launch.interaction_from_qk(q, k, mask, None, scale=0.3, is_causal=is_causal, **form)
            of_attention = launch.interaction(attention, mask, **form)
        results.append((*of_qk, *of_attention))
    for by_pointers, by_descriptors in zip(*results, strict=True):
        torch.testing.assert_close(by_pointers, by_descriptors, rtol=1e-5, atol=1e-6)
        assert by_pointers.any()


@needs_interpreter
@pytest.mark.parametrize(("planes", "rounding"), [(2, 1e-4), (3, 1e-5)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_planes_add_up_to_the_matrices_that_they_split(
    monkeypatch: pytest.MonkeyPatch, planes: int, rounding: float, descriptors: bool
) -> None:
    """Of numbers rounded to bfloat16 in float32's memory, as the interpreter cannot multiply bfloat16. With descriptors
    also where four tiles of the Gram matrix make one of the workspace."""
    from safr_fast.kernels import configs, launch
    from safr_fast.kernels.interaction_launch import Arithmetic

    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[0, :70] = mask[1, 130:] = False
    q, k = normal(2, 2, 150, 8, seed=1), normal(2, 1, 150, 8, seed=2)
    attention = normal(2, 2, 150, 150).softmax(-1)
    attention[0, 0, 100, 80] = 1e-20
    form = {"squared": True, "exclude_diagonal": False, "need_grad": True, "workspace_bytes": 3 * 3 * planes * 2**18}

    def interactions() -> tuple[Tensor, ...]:
        of_qk = launch.interaction_from_qk(q, k, mask, None, scale=0.3, is_causal=not descriptors, **form)
        return *of_qk, *launch.interaction(attention, mask, **form)

    def choose(kernel: str, bits: int, width: int, found: configs.Config) -> configs.Config:
        if not descriptors or kernel not in ("interaction", "gram"):
            return found
        return replace(found, rows=128 if kernel == "interaction" else 64, descriptors=True)

    expected = interactions()
    monkeypatch.setattr(Arithmetic, "in_planes", lambda self: replace(self, planes=planes))
    monkeypatch.setattr(Arithmetic, "bits", 32)
    with configs.choosing(choose):
        results = interactions()
    errors = [relative_error(result, exact) for result, exact in zip(results, expected, strict=True)]
    assert 0 < max(errors) <= rounding


@pytest.mark.parametrize("cu_seqlens", [[-9, 40, 20, 2**31 - 1], [300, 310], [60, 90]], ids=str)
def test_offsets_that_make_no_sense_reach_no_other_memory(cu_seqlens: list[int]) -> None:
    """They are clamped: to check them would mean waiting for the device. What lies around the tokens is NaN here."""
    from safr_fast.kernels import launch

    room = torch.full((64 + 75 + 64, 4), float("nan"), device=DEVICE)
    h = room[64:-64].copy_(normal(75, 4))
    made_up = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    energy, norm, moments = launch.row_energy(h, None, made_up, True)
    grad_h = launch.row_energy_backward(h, None, made_up, energy, norm, moments, energy, norm)
    results = (energy, norm, grad_h, *interact(h.unsqueeze(1), h.unsqueeze(1), made_up))
    assert all(result.isfinite().all() for result in results)
    assert room[:64].isnan().all()
    assert room[-64:].isnan().all()


def test_offsets_that_start_late_leave_the_tokens_before_them_alone() -> None:
    from safr_fast.kernels import launch

    h = normal(75, 4, device=DEVICE)
    energy, norm, _ = launch.row_energy(h, None, torch.tensor([60, 90], dtype=torch.int32, device=DEVICE), False)
    expected = sf.row_energy(h[60:], impl="reference")
    for result, tail in zip((energy, norm), expected, strict=True):
        assert not result[:60].any()
        torch.testing.assert_close(result[60:], tail)


def test_a_mask_on_a_long_sequence_takes_no_matrix_of_its_length() -> None:
    """Short sequences beside it would be made in such: 4 GiB here, for an input of 32 MiB."""
    from safr_fast.kernels.row_energy_launch import Batch

    def halves(samples: int, tokens: int, mask: Tensor | None) -> bool:
        batch = Batch(torch.empty(samples, tokens, 256), mask, None)
        return batch.halves_gram(batch.config("wide", batch.bits))

    assert not halves(1, 32_768, torch.ones(1, 32_768, dtype=torch.bool))
    assert not halves(32, 8_192, torch.ones(32, 8_192, dtype=torch.bool))
    assert halves(512, 500, None)
