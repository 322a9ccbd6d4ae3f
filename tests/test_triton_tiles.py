"""The tiles that GPUs take, run in the interpreter: its own are larger, since it pays by the tile."""

import pytest
import torch
from support import (
    assert_close_to_float64,
    lengths_mask,
    needs_interpreter,
    normal,
    offsets,
    plain_interaction_total,
    plain_interaction_total_from_qk,
    plain_row_energy,
    relative_error,
)
from test_accuracy import total, total_from_qk
from torch import Tensor

import safr_fast as sf

pytestmark = [needs_interpreter, pytest.mark.usefixtures("uninitialised_is_nan")]
FORM = {"squared": True, "exclude_diagonal": False}


@pytest.fixture(params=["ampere", "hopper", "blackwell", "cdna", "unaligned"])
def tiles(request: pytest.FixtureRequest, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture's tiles for operands of ``bits``, for float32 too: only it tells small errors."""
    from safr_fast.kernels import configs

    table = configs._CONFIGS | ({"unaligned": configs._UNALIGNED} | configs._OVERRIDES).get(request.param, {})
    chosen = {(kernel, any_bits): found for (kernel, of), found in table.items() if of == bits for any_bits in (16, 32)}
    monkeypatch.setitem(configs._OVERRIDES, "interpreter", chosen)
    monkeypatch.setattr(configs, "keeps_rows", lambda _, width: bits == 16 and width <= configs.WIDEST_ROW)


each_table = pytest.mark.parametrize("bits", [16, 32])


@each_table
@pytest.mark.parametrize(("tokens", "width"), [(130, 40), (290, 136), (70, 270)], ids=["token", "feature", "wide"])
def test_row_energy_is_right_with_the_tiles_of_a_gpu(tiles: None, tokens: int, width: int) -> None:
    h = normal(1, tokens, width, seed=tokens)
    h[0, 3] *= 100  # its energy cancels on the feature path
    assert_close_to_float64(lambda h: sf.row_energy(h, impl="triton"), plain_row_energy, h)


@each_table
def test_short_samples_beside_long_ones_are_right_with_the_tiles_of_a_gpu(tiles: None) -> None:
    h, mask = normal(2, 270, 72, seed=5), lengths_mask([270, 80], 270)
    assert_close_to_float64(lambda h: sf.row_energy(h, mask, impl="triton"), lambda h: plain_row_energy(h, mask), h)


# The last two have more tokens than the smaller of a GPU's tiles are for; the last has padding that fills tiles.
each_length = pytest.mark.parametrize(
    ("tokens", "begin", "stop"), [(130, 0, 130), (200, 0, 200), (280, 70, 210)], ids=str
)


def spread(tokens: int, begin: int, stop: int) -> Tensor | None:
    """Mask (1, T): real from begin to stop but for a hole; none where all is real."""
    if stop - begin == tokens:
        return None
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    mask[:, begin:stop] = True
    mask[:, begin + 5] = False
    return mask


@each_table
@each_length
def test_interaction_is_right_with_the_tiles_of_a_gpu(tiles: None, tokens: int, begin: int, stop: int) -> None:
    mask = spread(tokens, begin, stop)
    attention = normal(1, 1, tokens, tokens, seed=1).softmax(-1)
    assert_close_to_float64(
        lambda a: total(a, "triton", mask, **FORM), lambda a: plain_interaction_total(a, mask, **FORM), attention
    )


@each_table
@each_length
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_interaction_from_qk_is_right_with_the_tiles_of_a_gpu(
    tiles: None, tokens: int, begin: int, stop: int, is_causal: bool
) -> None:
    q, k = normal(1, 1, tokens, 72, seed=2), normal(1, 1, tokens, 72, seed=3)
    mask, form = spread(tokens, begin, stop), {**FORM, "is_causal": is_causal}
    assert_close_to_float64(
        lambda q, k: total_from_qk(q, k, "triton", mask, **form),
        lambda q, k: plain_interaction_total_from_qk(q, k, mask, **form),
        q,
        k,
    )


@each_table
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_packed_interaction_is_right_with_the_tiles_of_a_gpu(tiles: None, is_causal: bool) -> None:
    lengths = [70, 20]
    q, k = normal(90, 1, 72, seed=4), normal(90, 1, 72, seed=5)

    def packed(q: Tensor, k: Tensor) -> Tensor:
        return sf.interaction_loss_from_qk(
            q, k, cu_seqlens=offsets(lengths), reduction="none", is_causal=is_causal, impl="triton", **FORM
        )

    def plain(q: Tensor, k: Tensor) -> Tensor:
        sequences = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in (q, k)), strict=True)
        totals = [plain_interaction_total_from_qk(*pair, is_causal=is_causal, **FORM) for pair in sequences]
        return torch.cat(totals) / torch.tensor(lengths)[:, None] ** 2

    assert_close_to_float64(packed, plain, q, k)


@pytest.mark.parametrize("tokens", [1, 45])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("squared", [False, True], ids=["linear", "squared"])
def test_a_head_in_one_program_equals_a_head_in_tiles(
    tokens: int, is_causal: bool, squared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped keys, holes in the mask and a sample of padding alone, where padding is NaN."""
    from safr_fast.kernels import configs, launch

    mask = normal(3, tokens, seed=5) > -0.5
    mask[2] = False
    padding = ~mask[:, None, :, None]
    q, k = (normal(3, heads, tokens, 20, seed=heads).masked_fill(padding, torch.nan) for heads in (4, 2))
    attention = normal(3, 2, tokens, tokens, seed=9).softmax(-1).masked_fill(padding | padding.mT, torch.nan)
    form = {"squared": squared, "exclude_diagonal": not squared, "need_grad": True}
    results = []
    for rows in (64, 0):
        for kernel in ("interaction_block", "attention_block"):
            monkeypatch.setitem(configs._OVERRIDES["interpreter"], (kernel, 32), configs.Config(rows, rows, 64))
        of_qk = launch.interaction_from_qk(q, k, mask, None, scale=0.3, is_causal=is_causal, **form)
        results.append((*of_qk, *launch.interaction(attention, mask, **form)))
    for in_one, in_tiles in zip(*results, strict=True):
        assert in_one.shape == in_tiles.shape
        torch.testing.assert_close(in_one, in_tiles, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_half_a_gram_matrix_gives_what_all_of_it_does(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from safr_fast.kernels import launch, row_energy_launch

    h = normal(3, 150, 140, seed=1)
    mask = None
    if masked:
        mask = normal(3, 150, seed=2) > -0.5
        mask[0, 70:] = mask[1, :64] = mask[2] = False
        h = h.masked_fill(~mask.unsqueeze(-1), torch.nan)
    alpha, beta = normal(3, 150, seed=3), normal(3, 150, seed=4)

    def results() -> tuple[Tensor, ...]:
        energy, norm, moments = launch.row_energy(h, mask, None, False)
        return energy, norm, launch.row_energy_backward(h, mask, None, energy, norm, moments, alpha, beta)

    whole = results()
    whole_gram = (row_energy_launch.row_energy_wide_kernel, row_energy_launch.row_energy_wide_backward_kernel)
    monkeypatch.setattr(row_energy_launch, "MANY_OPERATIONS", 0)
    monkeypatch.setattr(row_energy_launch, "WEIGHT_BYTES", 2 * 4 * 192**2)  # two samples, then the third
    for kernel in whole_gram:
        monkeypatch.delattr(row_energy_launch, kernel.__name__)
    for in_half, in_whole in zip(results(), whole, strict=True):
        assert relative_error(in_half, in_whole) < 1e-6
