"""The protocols masked and released: what padding takes part in, which epoch is tested, what gradients are logged."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_support import script_accuracy
from support import relative_error
from torch import Tensor

from safr_fast.data import Vocabulary, sources, synthetic
from safr_fast.data.batches import EncodedSplit
from safr_fast.data.corpus import Split
from safr_fast.data.vocabulary import PAD
from safr_fast.evaluation import Predictor
from safr_fast.training import ModelConfig, OptionError, TrainConfig, load_run, loop, train
from safr_fast.training.measure import build_loss, evaluate, forward, gradient_norms
from safr_fast.training.model import build_model
from safr_fast.training.plan import share, steps
from safr_fast.training.protocol import MASKED, PROTOCOLS, RELEASED
from safr_fast.training.run import RunFolder

TINY = ModelConfig(dim=16, heads=2, feedforward=32, mask_hidden=16, dropout=0.0)
SIZES = {"train": 96, "dev": 40, "test": 40}
WIDTH = 40


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    small = synthetic(0, SIZES)
    monkeypatch.setattr(loop.data, "load", lambda *_, **__: small)
    return small


def released_terms(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and both terms as the authors' code has them, written out: pads are tokens, closed as keys alone."""
    E, heads = TINY.dim, TINY.heads
    x = model.embedding(ids) * E**0.5
    h = model.gate(x).unsqueeze(-1) * x
    gram = h @ h.mT
    off = ~torch.eye(ids.shape[1], dtype=torch.bool)
    polysemanticity = (gram.square() * off).sum(-1) / (h.norm(dim=-1) + 1e-5).square()
    importance = (polysemanticity / E).sqrt().mean()

    position, even = torch.arange(ids.shape[1])[:, None], torch.arange(0, E, 2)
    angle = position / 10_000 ** (even / E)
    x = h + torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
    layer = model.layers[0]
    q, k, v = layer.attention.query_key_value(x).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = (q @ k.mT / (E // heads) ** 0.5).masked_fill(~mask[:, None, None, :], -math.inf)
    attention = scores.softmax(-1)
    overlap = (attention @ attention.mT) * off
    interaction = (attention * (1 - overlap)).mean()

    x = layer.norm_attention(x + layer.attention.out((attention @ v).transpose(1, 2).flatten(2)))
    x = layer.norm_feedforward(x + layer.feedforward(x))
    return model.classify(x.mean(1)), importance, interaction


def test_the_released_protocol_computes_what_the_released_code_does(corpus: Any) -> None:
    vocabulary = Vocabulary.of(corpus.train.texts)
    split = EncodedSplit.of(corpus.test, vocabulary, WIDTH, width=RELEASED.width(WIDTH))
    batch = split.batch([3, 1, 4, 7])
    ids = batch.ids.view(4, WIDTH)
    words = ids != PAD
    assert not words.all()
    torch.manual_seed(0)
    model = build_model(len(vocabulary), TINY, pads_count=True).eval()
    config = TrainConfig(protocol="released", model=TINY)
    output, parts = forward(model, build_loss(config, 1.0, 1.0), batch, RELEASED)
    exact = copy.deepcopy(model).double()
    logits, importance, interaction = released_terms(exact, ids, words)
    assert relative_error(output.logits, logits) < 1e-5
    for term, expected in ((parts.importance, importance), (parts.interaction, interaction)):
        assert term is not None
        assert relative_error(term, expected) < 1e-5
        got, wanted = (
            torch.autograd.grad(value, list(of.parameters()), retain_graph=True, materialize_grads=True)
            for value, of in ((term, model), (expected, exact))
        )
        for ours, theirs in zip(got, wanted, strict=True):
            assert relative_error(ours, theirs) < 1e-5
        assert got[0][0].abs().sum() > 0  # the pad's embedding learns


def test_a_text_without_words_is_finite_under_both_protocols(corpus: Any) -> None:
    vocabulary = Vocabulary.of(corpus.train.texts)
    for name, protocol in PROTOCOLS.items():
        split = EncodedSplit.of(Split(["", "the film"], [0, 1]), vocabulary, 4, width=protocol.width(4))
        model = build_model(len(vocabulary), TINY, pads_count=protocol.pads_count)
        config = TrainConfig(protocol=name, model=TINY)  # type: ignore[arg-type]
        _, parts = forward(model, build_loss(config, 1.0, 1.0), split.batch([0, 1]), protocol)
        parts.total.backward()
        assert parts.total.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_pads_are_tokens_of_one_protocol_and_the_gate_is_measured_on_words_alone(corpus: Any) -> None:
    vocabulary = Vocabulary.of(corpus.train.texts)
    model, counting = (build_model(len(vocabulary), TINY, pads_count=pads_count) for pads_count in (False, True))
    counting.load_state_dict(model.state_dict())
    short, padded = (EncodedSplit.of(corpus.test, vocabulary, WIDTH, width=width) for width in (0, WIDTH))
    assert (padded.lengths == WIDTH).all()
    masked = evaluate(model, short, TrainConfig(model=TINY))
    released = evaluate(counting, padded, TrainConfig(protocol="released", model=TINY))
    assert released["gate"] == pytest.approx(masked["gate"], rel=1e-5)
    assert all(released[name] != pytest.approx(masked[name], rel=1e-2) for name in ("importance", "interaction"))


@pytest.mark.parametrize(
    ("protocol", "tested", "said"),
    [("masked", 2, "best epoch 2 of 4, restored"), ("released", 4, "last epoch 4, best was 2")],
)
def test_the_protocol_says_which_epoch_is_tested(
    corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: Any, tested: int, said: str
) -> None:
    seen = script_accuracy(monkeypatch, 0.6, 0.8, 0.8, 0.7)
    lines: list[str] = []
    config = TrainConfig(
        protocol=protocol, max_len=24, epochs=9, patience=2, device="cpu", model=TINY, out=tmp_path / "run"
    )
    result = train(config, report=lines.append)
    assert (result.best_epoch, result.epochs) == (2, 4)
    for weights in (seen[-1], RunFolder(result.out).load_model()):
        assert all(torch.equal(weights[name], seen[tested - 1][name]) for name in weights)
    assert sum(line.startswith(f"{said}: dev accuracy") for line in lines) == 1


@pytest.mark.parametrize("protocol", ["masked", "released"])
def test_a_run_comes_back_as_it_was_tested(corpus: Any, tmp_path: Path, protocol: Any) -> None:
    config = TrainConfig(protocol=protocol, max_len=24, epochs=2, device="cpu", model=TINY, out=tmp_path / "run")
    result = train(config, report=lambda _: None)
    model, vocabulary, stored = load_run(result.out)
    width = PROTOCOLS[protocol].width(24)
    assert (stored.protocol, model.pads_count) == (protocol, width > 0)
    assert evaluate(model, EncodedSplit.of(corpus.test, vocabulary, 24, width=width), stored) == result.test
    predicted = Predictor(model, vocabulary, stored)([text.split() for text in corpus.test.texts]).argmax(1)
    assert (predicted == torch.tensor(corpus.test.labels)).double().mean() == pytest.approx(result.test["accuracy"])


@pytest.mark.parametrize("batches", [{"batch_size": 7}, {"batch_tokens": 120}], ids=["by texts", "by tokens"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_batches_with_pads_that_count_add_up_to_one_step(corpus: Any, batches: dict[str, int], variant: Any) -> None:
    vocabulary = Vocabulary.of(corpus.train.texts)
    split = EncodedSplit.of(corpus.train, vocabulary, 24, width=24)
    model = build_model(len(vocabulary), TINY, pads_count=True).eval()
    loss = build_loss(TrainConfig(model=TINY, variant=variant), 0.5, 0.25)

    def gradients(**options: int) -> list[Tensor]:
        (step,) = steps(split.lengths, TrainConfig(accumulate=1_000, **options), 1)  # type: ignore[arg-type]
        model.zero_grad()
        for rows in step.batches:
            batch = split.batch(rows)
            share(step, batch, loss, forward(model, loss, batch, RELEASED)[1]).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    for ours, expected in zip(gradients(**batches), gradients(batch_size=len(split)), strict=True):
        assert relative_error(ours, expected) < 1e-4


def test_the_released_protocol_has_fixed_lengths_and_needs_one() -> None:
    lengths = {name: TrainConfig(dataset=name, protocol="released").resolved().max_len for name in ("sst2", "imdb")}  # type: ignore[arg-type]
    assert lengths == {"sst2": 128, "imdb": 256}
    for options, given in (({"max_len": 0}, "max_len 0"), ({"full_length": True}, "full_length")):
        with pytest.raises(OptionError, match=f"{given} cuts no text, but the protocol released pads every text to"):
            TrainConfig(protocol="released", **options)  # type: ignore[arg-type]


def test_the_last_fifth_of_each_class_is_the_released_development_split() -> None:
    labels = [0, 1] * 10
    split = Split([f"text {i}" for i in range(20)], labels)
    train_split, dev = sources._stratified(split, 0.2, None)
    assert list(dev.texts) == [f"text {i}" for i in (16, 17, 18, 19)]
    assert list(train_split.texts) == [f"text {i}" for i in range(16)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("protocol", ["masked", "released"])
def test_gradient_norms_are_logged_when_asked_for_and_change_nothing(
    corpus: Any, tmp_path: Path, protocol: Any, accumulate: int
) -> None:
    def run(name: str, log_gradients: bool) -> tuple[Path, list[dict[str, float]]]:
        config = TrainConfig(
            protocol=protocol, max_len=24, epochs=1, log_every=1, log_gradients=log_gradients,
            accumulate=accumulate, lambda_importance=0.5, lambda_interaction=0.25, device="cpu", model=TINY,
            out=tmp_path / name,
        )  # fmt: skip
        out = train(config, report=lambda _: None).out
        records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return out, [record["train"] for record in records if record["event"] == "step"]

    plain_out, plain = run("plain", False)
    logged_out, logged = run("logged", True)
    assert len(logged) == 3 // accumulate + 3 % accumulate
    names = {f"gradient_{term}" for term in ("cross_entropy", "importance", "interaction")}
    names |= {"gradient_importance_weighted", "gradient_interaction_weighted"}
    for without, with_norms in zip(plain, logged, strict=True):
        assert with_norms.keys() - without.keys() == names
        assert all(with_norms[name] > 0 for name in names)
        assert with_norms["gradient_interaction_weighted"] == 0.25 * with_norms["gradient_interaction"]
        assert without == {name: with_norms[name] for name in without}
    weights = [RunFolder(out).load_model() for out in (plain_out, logged_out)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_gradient_norms_do_not_go_with_compiled_steps() -> None:
    with pytest.raises(OptionError, match="log_gradients goes back several times, as a compiled step cannot"):
        TrainConfig(log_gradients=True, compile=True)


def test_a_gradient_norm_is_that_of_a_backward_pass(corpus: Any) -> None:
    vocabulary = Vocabulary.of(corpus.train.texts)
    split = EncodedSplit.of(corpus.train, vocabulary)
    model = build_model(len(vocabulary), TINY)
    loss = build_loss(TrainConfig(model=TINY), 0.5, 0.0)
    _, parts = forward(model, loss, split.batch([0, 1, 2]), MASKED)
    norms = gradient_norms(loss, parts, model)
    assert set(norms) == {"gradient_cross_entropy", "gradient_importance", "gradient_importance_weighted"}
    assert parts.importance is not None
    parts.importance.backward()
    total = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    assert norms["gradient_importance"] == pytest.approx(math.sqrt(float(total)), rel=1e-5)
