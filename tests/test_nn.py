"""The word mask, attention that stores no weights, and the classifier on ragged batches."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import normal, offsets, value_and_gradients
from torch import Tensor
from torch.nn import functional as F

import safr_fast as sf
from safr_fast import reference
from safr_fast.nn import VMASK, SAFRClassifier, SelfAttention, TransformerClassifier
from safr_fast.nn import packed_attention as packed
from safr_fast.nn.classifier import sinusoidal_positions

SIZES = {"dim": 16, "heads": 4, "feedforward": 32}


def tokens(*lengths: int, vocabulary: int = 20) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, for texts of these lengths."""
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, vocabulary, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
    return ids.where(mask, 0), mask


def classifier(kind: type[TransformerClassifier] = SAFRClassifier, **options: object) -> TransformerClassifier:
    torch.manual_seed(0)
    return kind(20, **(SIZES | {"mask_hidden": 8} if kind is SAFRClassifier else SIZES), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim and hidden must be at least 1, got 0 and 8"),
        ({"hidden": 0}, "dim and hidden must be at least 1, got 16 and 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
    ],
)
def test_a_mask_that_could_not_gate_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VMASK(**({"dim": 16, "hidden": 8} | options))


def test_the_gate_is_hard_in_training_and_a_probability_in_evaluation() -> None:
    torch.manual_seed(0)
    vmask = VMASK(16, 8)
    x = torch.randn(500, 16)
    gate = vmask(x)
    assert torch.allclose(gate, gate.round(), atol=1e-6)
    assert 0 < gate.mean() < 1
    assert (gate == 0).any()
    in_training = vmask.probability(x)
    vmask.eval()
    probability = vmask(x)
    assert torch.equal(in_training, probability)
    assert ((probability > 0) & (probability < 1)).all()
    assert torch.equal(probability, vmask(x))


def test_the_hard_gate_is_drawn_with_its_probability() -> None:
    torch.manual_seed(0)
    vmask = VMASK(16, 8)
    x = torch.randn(1, 16).expand(20_000, 16)
    drawn = vmask(x).mean().item()
    assert drawn == pytest.approx(vmask.eval()(x[:1]).item(), abs=0.02)


def test_a_gate_by_word_type_is_the_gate_of_each_token() -> None:
    torch.manual_seed(0)
    vmask = VMASK(16, 8)
    x, place = torch.randn(5, 16), torch.randint(5, (4_000,))
    drawn = vmask(x, place)
    assert drawn[place == 0].unique().tolist() == [0.0, 1.0]
    torch.testing.assert_close(vmask.eval()(x, place), vmask(x[place]))


def test_the_hard_gate_lets_gradients_through() -> None:
    vmask = VMASK(16, 8)
    vmask(torch.randn(50, 16)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in vmask.parameters())


def test_attention_is_softmax_attention_over_real_keys() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, 4)
    x = torch.randn(3, 7, 16)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    out, q, k = attention(x, mask)
    weights = reference.attention_from_qk(q, k, mask, scale=1 / math.sqrt(4), is_causal=False)
    v = attention.query_key_value(x)[..., 32:].view(3, 7, 4, 4).transpose(1, 2)
    expected = attention.out((weights @ v).transpose(1, 2).reshape(3, 7, 16))
    torch.testing.assert_close(out[mask], expected[mask])


def test_no_tensor_of_attention_weights_is_kept_for_the_backward() -> None:
    """T is unlike every other size here, so a saved T×T tensor shows by its shape."""
    model = classifier()
    ids, mask = tokens(53, 53, 40)
    saved: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(ids, mask)
        q, k = output.qk[0]
        loss = F.cross_entropy(output.logits, torch.tensor([0, 1, 0]))
        if any(backend.name == "cpp" and backend.available for backend in sf.available_backends()):
            loss = loss + sf.interaction_loss_from_qk(q, k, mask, impl="cpp")
    loss.backward()
    assert saved
    assert not [shape for shape in saved if shape[-2:] == (53, 53)]


def test_the_baseline_is_the_same_model_with_an_open_gate() -> None:
    model, plain = classifier().eval(), classifier(TransformerClassifier).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("gate.")})
    model.gate = None
    ids, mask = tokens(5, 3)
    assert torch.equal(plain(ids, mask).logits, model(ids, mask).logits)
    assert plain(ids, mask).gate is None


def test_importance_is_taken_on_gate_times_scaled_embedding_before_positions() -> None:
    model = classifier().eval()
    ids, mask = tokens(5, 3)
    output = model(ids, mask)
    assert output.gate is not None
    expected = output.gate[..., None] * math.sqrt(16) * model.embedding(ids)
    torch.testing.assert_close(output.hidden, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_of_16_bits_gates_in_its_own_dtype(dtype: torch.dtype, training: bool) -> None:
    model = classifier().to(dtype).train(training)
    output = model(torch.arange(12).view(2, 6))
    assert output.logits.dtype == output.hidden.dtype == output.gate.dtype == dtype
    if training:
        assert set(output.gate.unique().tolist()) <= {0.0, 1.0}
    assert model.gate.probability(output.hidden).dtype == dtype
    output.logits.float().sum().backward()
    assert model.gate.to_logits.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(2, 1, dtype=torch.bool)}, "mask must have shape (2, 6), got (2, 1)"),
        ({"mask": torch.ones(2, 6, dtype=torch.int64)}, "mask must be bool (true where a token is real), got int64"),
        ({"ids": torch.zeros(2, 6)}, "ids must be an int64 or int32 tensor of word types, got float32 (2, 6)"),
        ({"ids": [[1, 2]]}, "ids must be an int64 or int32 tensor of word types, got list of (list"),
        ({"ids": torch.arange(6)}, "ids must have shape (B, T), or (N,) with cu_seqlens, got (6,)"),
        ({"max_seqlen": 6}, "max_seqlen goes with cu_seqlens"),
        (
            {"ids": torch.arange(6), "cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32), "max_seqlen": 3},
            "max_seqlen must be at least 4, the tokens of the longest sequence, got 3",
        ),
    ],
)
def test_what_would_classify_wrongly_is_named(arguments: dict[str, Any], message: str) -> None:
    model = classifier()
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        model(**({"ids": torch.arange(12).view(2, 6)} | arguments))


def test_packed_attention_finds_its_longest_and_takes_no_keys() -> None:
    attention = SelfAttention(16, 2)
    x, cu_seqlens = normal(7, 16), torch.tensor([0, 5, 7], dtype=torch.int32)
    found, given = attention(x, cu_seqlens=cu_seqlens), attention(x, cu_seqlens=cu_seqlens, max_seqlen=5)
    assert torch.equal(found[0], given[0])
    with pytest.raises(ValueError, match="keys and cu_seqlens exclude each other"):
        attention(x, torch.ones(7, dtype=torch.bool), cu_seqlens=cu_seqlens)


def test_positions_are_sine_and_cosine_of_rising_wavelength() -> None:
    positions = sinusoidal_positions(50, torch.empty(0, 8))
    for pair in range(4):
        angle = torch.arange(50) / 10_000 ** (2 * pair / 8)
        torch.testing.assert_close(positions[:, 2 * pair], angle.sin())
        torch.testing.assert_close(positions[:, 2 * pair + 1], angle.cos())


@pytest.mark.parametrize("kind", [SAFRClassifier, TransformerClassifier])
def test_padding_takes_part_in_nothing(kind: type[TransformerClassifier]) -> None:
    model = classifier(kind).eval()
    ids, mask = tokens(9, 4, 1)
    together = model(ids, mask).logits
    for row, length in enumerate((9, 4, 1)):
        alone = model(ids[row : row + 1, :length]).logits
        torch.testing.assert_close(together[row : row + 1], alone)
    other = ids.where(mask, 7)
    torch.testing.assert_close(model(other, mask).logits, together)


@pytest.mark.parametrize("kind", [SAFRClassifier, TransformerClassifier])
def test_packed_texts_are_classified_as_padded_ones(kind: type[TransformerClassifier]) -> None:
    lengths = (9, 4, 0, 1)
    model = classifier(kind, layers=2).eval()
    ids, mask = tokens(*lengths)
    padded = model(ids, mask)
    packed = model(ids[mask], cu_seqlens=offsets(lengths))
    torch.testing.assert_close(packed.logits, padded.logits)
    torch.testing.assert_close(packed.hidden, padded.hidden[mask])
    for ours, theirs in zip(packed.qk, padded.qk, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y.transpose(1, 2)[mask])
    gradients = [
        torch.autograd.grad(output.logits.square().sum() + output.hidden.sum(), model.embedding.weight)[0]
        for output in (packed, padded._replace(hidden=padded.hidden[mask]))
    ]
    torch.testing.assert_close(*gradients)


def test_embeddings_may_be_given_in_place_of_their_words() -> None:
    ids, mask = tokens(5, 3)
    packed, cu_seqlens = ids[mask], offsets([5, 3])
    model = classifier().eval()
    given = torch.randn_like(model.embedding(ids))
    for output, own in (
        (model(ids, mask, embedded=model.embedding(ids)), model(ids, mask)),
        (model(ids, mask, embedded=given), model(packed, cu_seqlens=cu_seqlens, embedded=given[mask])),
    ):
        torch.testing.assert_close(output.logits, own.logits)
    assert not torch.allclose(model(ids, mask, embedded=given).logits, model(ids, mask).logits)


def test_packed_texts_exclude_a_mask_and_may_be_none() -> None:
    model = classifier()
    ids, mask = tokens(3, 2)
    with pytest.raises(ValueError, match="mask and cu_seqlens exclude each other"):
        model(ids, mask, cu_seqlens=offsets([3, 2]))
    with pytest.raises(ValueError, match=r"the input must be packed \(N\), got \(2, 3\)"):
        model(ids, cu_seqlens=offsets([3, 2]))
    with pytest.raises(ValueError, match=r"cu_seqlens must end at 6, the number of tokens, got \[0, 3, 5\]"):
        model(ids.flatten(), cu_seqlens=offsets([3, 2]), max_seqlen=3)
    nothing = model(ids[:0, 0], cu_seqlens=offsets([]))
    assert nothing.logits.shape == (0, 2)


@pytest.mark.parametrize("form", [packed._by_sequence, packed._nested])
def test_every_form_of_packed_attention_is_attention_within_each_sequence(form: Callable[..., Tensor]) -> None:
    lengths = [5, 1, 1, 17, 5]
    q, k, v = (normal(29, 2, 8, seed=seed).double() for seed in range(3))

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        segment = torch.arange(5).repeat_interleave(torch.tensor(lengths))
        weights = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(8)).masked_fill(
            segment[:, None] != segment[None, :], -math.inf
        )
        return torch.einsum("hij,jhd->ihd", weights.softmax(-1), v)

    options = [17] if form is packed._nested else []
    results = value_and_gradients(lambda *x: form(*x, offsets(lengths), *options), (q, k, v))
    for result, wanted in zip(results, value_and_gradients(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(result, wanted)


def test_a_sample_without_real_tokens_is_finite_and_moves_nothing_else() -> None:
    model = classifier(dropout=0.0)
    model.gate = None
    ids, mask = tokens(4, 3)
    empty = torch.zeros(1, 4, dtype=torch.int64)
    output = model(torch.cat((ids, empty)), torch.cat((mask, empty.bool())))
    assert output.logits.isfinite().all()
    torch.testing.assert_close(output.logits[:2], model(ids, mask).logits)
    torch.testing.assert_close(output.logits[2], model.classify.bias)
    output.logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert not model.embedding.weight.grad[0].any()


@pytest.mark.parametrize("width", [0, 6])
def test_the_whole_loss_is_finite_on_samples_of_no_and_of_one_token(width: int) -> None:
    model = classifier()
    ids, mask = tokens(6, 1, 2)
    mask[2] = False
    ids, mask = ids[:, :width], mask[:, :width]
    output = model(ids, mask)
    loss = sf.SAFRLoss(1.0, 1.0, variant="released")(
        output.logits, torch.tensor([0, 1, 1]), hidden=output.hidden, qk=output.qk, mask=mask
    )
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_several_layers_give_their_queries_and_keys_to_the_loss() -> None:
    model = classifier(layers=2)
    ids, mask = tokens(5, 3)
    output = model(ids, mask)
    assert [q.shape for q, _ in output.qk] == [(2, 4, 5, 4)] * 2
    loss = sf.SAFRLoss(0.0, 1.0)(output.logits, torch.tensor([0, 1]), hidden=output.hidden, qk=output.qk, mask=mask)
    assert loss.isfinite()


@pytest.mark.parametrize(("options", "named"), [({"heads": 3}, "heads"), ({"dim": 15, "heads": 3}, "dim")])
def test_sizes_that_do_not_fit_are_named(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SAFRClassifier(20, **(SIZES | options))
