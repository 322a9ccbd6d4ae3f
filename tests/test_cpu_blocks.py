"""What only long or wide input reaches in the C++ back end, against float64: several blocks, recomputed moments."""

import pytest
import torch
from support import (
    assert_close_to_float64,
    backend_names,
    forced,
    normal,
    plain_interaction_total,
    plain_interaction_total_from_qk,
    plain_row_energy,
)
from torch import Tensor

import safr_fast as sf
from safr_fast.ops import cpp

every_level = pytest.mark.parametrize("backend", [name for name in backend_names() if name.startswith("cpp")])
FORM = {"squared": True, "exclude_diagonal": False}
TOKENS = 530  # two whole blocks of 256 and a rest


def with_holes() -> Tensor:
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    mask[0, 7] = False
    mask[0, -9:] = False
    return mask


either_mask = pytest.mark.parametrize("mask", [None, with_holes()], ids=["dense", "holes"])


@every_level
@either_mask
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_interaction_from_qk_over_several_blocks(backend: str, is_causal: bool, mask: Tensor | None) -> None:
    q, k = 3 * normal(1, 1, TOKENS, 16, seed=1), normal(1, 1, TOKENS, 16, seed=2)
    form = FORM | {"is_causal": is_causal}
    pairs = TOKENS**2 if mask is None else int(mask.sum()) ** 2

    def function(q: Tensor, k: Tensor) -> Tensor:
        return pairs * sf.interaction_loss_from_qk(q, k, mask, reduction="none", impl=impl, **form)

    with forced(backend) as impl:
        assert_close_to_float64(function, lambda q, k: plain_interaction_total_from_qk(q, k, mask, **form), q, k)


@every_level
@either_mask
def test_interaction_of_stored_attention_over_several_blocks(backend: str, mask: Tensor | None) -> None:
    attention = (3 * normal(1, 1, TOKENS, TOKENS, seed=1)).softmax(-1)
    pairs = TOKENS**2 if mask is None else int(mask.sum()) ** 2

    def function(attention: Tensor) -> Tensor:
        return pairs * sf.interaction_loss(attention, mask, reduction="none", impl=impl, **FORM)

    with forced(backend) as impl:
        assert_close_to_float64(function, lambda a: plain_interaction_total(a, mask, **FORM), attention)


@every_level
def test_row_energy_by_tokens_of_more_than_a_thousand(backend: str) -> None:
    h = normal(1, 1030, 580, seed=1)
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.row_energy(h, impl=impl), plain_row_energy, h)


@every_level
def test_row_energy_whose_moments_are_made_again(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "KEPT_MOMENTS", 0)
    h = normal(2, 300, 20, seed=1)
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.row_energy(h, impl=impl), plain_row_energy, h)


@every_level
def test_row_energy_by_a_moment_of_more_than_a_thousand_features(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "_moment_threshold", lambda *_: 1)
    h = normal(1, 90, 1030, seed=1) + normal(1030, seed=2)
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.row_energy(h, impl=impl), plain_row_energy, h)


@every_level
@pytest.mark.parametrize("kept", [1.0, 0.98], ids=["whole", "with holes"])
def test_row_energy_by_a_moment_summed_in_parts(backend: str, kept: float) -> None:
    h, mask = normal(1, 3200, 20, seed=1), torch.rand(1, 3200, generator=torch.Generator().manual_seed(2)) < kept
    with forced(backend) as impl:
        assert_close_to_float64(lambda h: sf.row_energy(h, mask, impl=impl), lambda h: plain_row_energy(h, mask), h)
