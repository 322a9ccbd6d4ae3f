"""Capacity by place, rankers, intervals and whole evaluations against slow implementations of their own."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from evaluation_support import predict
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from safr_fast.data import Corpus, Vocabulary, synthetic
from safr_fast.data.corpus import Split
from safr_fast.evaluation import EvaluationConfig, Predictor, Words, evaluate_run, measure, score
from safr_fast.evaluation.deletion import random_scores
from safr_fast.evaluation.encoding import Encoded
from safr_fast.evaluation.places import PLACES, exact_capacity, hidden_states
from safr_fast.evaluation.rankers import GRADIENT_RANKERS
from safr_fast.evaluation.run import average_capacity, evaluate_scores
from safr_fast.evaluation.statistics import bootstrap, paired_test, t_interval
from safr_fast.evaluation.table import table
from safr_fast.nn import SAFRClassifier, TransformerClassifier
from safr_fast.training import ModelConfig, TrainConfig, TrainResult, load_run, loop, train
from safr_fast.training.agreement import above

SIZES = {"dim": 16, "heads": 4, "feedforward": 32}


def model_and_batch(
    gate: bool = True, pads_count: bool = False, layers: int = 1
) -> tuple[TransformerClassifier, Tensor, Tensor]:
    torch.manual_seed(0)
    kind = SAFRClassifier if gate else TransformerClassifier
    model = kind(20, **SIZES, pads_count=pads_count, layers=layers, **({"mask_hidden": 8} if gate else {})).eval()
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    return model, torch.randint(2, 20, (3, 9)).where(mask, 0), mask


@pytest.mark.parametrize("gate", [True, False])
def test_places_hold_what_their_names_say(gate: bool) -> None:
    model, ids, mask = model_and_batch(gate)
    output, states = hidden_states(model, ids, mask)
    layer = model.layers[0]
    assert list(states) == [place for place in PLACES if gate or place != "vmask"]
    x = model.embedding(ids) * 4.0
    torch.testing.assert_close(states["embedding"], x)
    if gate:
        assert output.gate is not None
        torch.testing.assert_close(states["vmask"], output.gate[..., None] * x)
    torch.testing.assert_close(states["ffn1_pre"], layer.feedforward[0](states["norm"]))
    torch.testing.assert_close(states["ffn1_post"], states["ffn1_pre"].relu())
    torch.testing.assert_close(states["ffn2"], layer.feedforward[2](states["ffn1_post"]))
    torch.testing.assert_close(states["block"], layer.norm_feedforward(states["norm"] + states["ffn2"]))
    torch.testing.assert_close(output.logits, model(ids, mask).logits)


def test_several_layers_have_places_of_their_own() -> None:
    model, ids, mask = model_and_batch(layers=11)
    states = hidden_states(model, ids, mask)[1]
    inner = [place for place in PLACES if place not in ("embedding", "vmask")]
    assert list(states) == ["embedding", "vmask", *(f"layer{i}.{place}" for i in range(1, 12) for place in inner)]


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-30])
def test_capacity_is_the_formula_at_any_scale_of_a_row(scale: float) -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 5, 6)
    h[0, 1:3] *= scale
    h[1] *= scale
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    found = exact_capacity(h.masked_fill(~mask[..., None], float("nan")), mask)
    for b, length in ((0, 5), (1, 3)):
        for i in range(length):
            own = h[b, i].double()
            shares = [float((own @ h[b, j].double() / own.norm()) ** 2) for j in range(length)]
            assert found[b, i].item() == pytest.approx(shares[i] / sum(shares), rel=1e-9)
    assert not found[1, 3:].any()


@pytest.mark.parametrize("pads_count", [False, True])
def test_scores_of_a_text_do_not_depend_on_its_batch(pads_count: bool) -> None:
    model, *_ = model_and_batch(pads_count=pads_count)
    texts = ["a b c d e", "a b", "c", "d d a b e e a c", "e"]
    vocabulary = Vocabulary("abcde")
    config = TrainConfig(protocol="released" if pads_count else "masked", max_len=8)
    together = score(model, Predictor(model, vocabulary, config).encode(texts), gradients=True)
    assert {"vmask", "attention", "gradient_x_input", "integrated_gradients"} <= set(together)
    for i, text in enumerate(texts):
        apart = score(model, Predictor(model, vocabulary, config).encode([text]), gradients=True)
        for name, rows in together.items():
            assert rows[i].shape == (len(text.split()),), name
            torch.testing.assert_close(rows[i], apart[name][0], rtol=1e-4, atol=1e-6)


def test_gradient_rankers_agree_with_their_definitions() -> None:
    """Written out: embedding · gradient, and the mean gradient on the line from 0 by a fine midpoint sum."""
    model, *_ = model_and_batch(gate=False)
    vocabulary = Vocabulary("abcde")
    predictor = Predictor(model, vocabulary, TrainConfig())
    text = "a c b e e"
    scores = score(model, predictor.encode([text]), gradients=True)
    batch = predictor.encode([text]).batch([0])
    weights = model.embedding.weight.detach().clone()
    target = model(batch.ids, batch.mask).logits.argmax().item()

    def gradient(share: float) -> tuple[Tensor, Tensor]:
        x = (share * weights[batch.ids]).requires_grad_()
        logit = model(batch.ids, batch.mask, embedded=x).logits[0, target]
        return torch.autograd.grad(logit, x)[0], logit.detach()

    x = weights[batch.ids]
    at_input, whole = gradient(1.0)
    torch.testing.assert_close(scores["gradient_x_input"][0], (x * at_input).sum(-1)[0], rtol=1e-4, atol=1e-5)
    path = torch.stack([gradient((step + 0.5) / 400)[0] for step in range(400)]).mean(0)
    torch.testing.assert_close(scores["integrated_gradients"][0], (x * path).sum(-1)[0], rtol=2e-2, atol=2e-3)
    assert scores["integrated_gradients"][0].sum().item() == pytest.approx((whole - gradient(0.0)[1]).item(), abs=1e-2)


def test_scores_are_those_of_evaluation_whatever_the_mode_of_the_model() -> None:
    model, *_ = model_and_batch()
    texts = Predictor(model, Vocabulary("abcde"), TrainConfig()).encode(["a c b e e"])
    expected = score(model, texts, gradients=True)
    scores = score(model.train(), texts, gradients=True)
    assert model.training
    for name, (values,) in scores.items():
        assert torch.equal(values, expected[name][0]), name


def test_attention_received_by_the_words_of_a_text_adds_up_to_its_queries() -> None:
    model, *_ = model_and_batch()
    received = score(model, Predictor(model, Vocabulary("abcde"), TrainConfig()).encode(["a b c", "d"]))["attention"]
    assert received[0].sum().item() == pytest.approx(3, abs=1e-5)
    assert received[1].sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pads_count", [False, True])
def test_a_predictor_gives_each_text_its_own_probabilities(pads_count: bool) -> None:
    model, *_ = model_and_batch(pads_count=pads_count)
    config = TrainConfig(protocol="released" if pads_count else "masked", max_len=4)
    predictor = Predictor(model, Vocabulary("abcde"), config)
    texts = [list("abcdeabc"), ["a"], [], list("abcd"), ["a"], list("cd")]
    together = predictor(texts)
    assert torch.equal(together[0], together[3])  # the same to a window of four
    assert torch.equal(together[1], together[4])
    for words, row in zip(texts, together, strict=True):
        torch.testing.assert_close(predictor([words])[0], row, rtol=1e-5, atol=1e-6)
    assert together.sum(1).tolist() == pytest.approx([1.0] * len(texts))


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.sampled_from([0, 1, 20, 256, 300, 2_470, 5_000]), max_size=200))
def test_batches_hold_every_text_once_and_fit_in_memory(lengths: list[int]) -> None:
    found = Encoded([range(length) for length in lengths]).batches()
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    for rows in found:
        longest = max(lengths[row] for row in rows)
        assert len(rows) == 1 or len(rows) * longest**2 <= 64 * 256**2
        assert len(rows) <= 64


def test_average_capacity_parts_tokens_by_the_gate() -> None:
    scores = {
        "capacity:vmask": [torch.tensor([0.9, 0.1, 0.2, 0.3, 0.5, 0.4, 0.8]), torch.tensor([0.6])],
        "vmask": [torch.tensor([0.1, 0.9, 0.8, 0.7, 0.2, 0.3, 0.4]), torch.tensor([0.5])],
    }
    (averages,) = average_capacity(scores).values()
    assert averages["important"] == pytest.approx((0.1 + 0.2 + 0.6) / 3)  # ⌊0.3 · 7⌋ of the first, one of the second
    assert averages["less"] == pytest.approx((0.9 + 0.3 + 0.5 + 0.4 + 0.8) / 5)
    assert averages["all"] == pytest.approx(3.8 / 8)
    assert set(average_capacity({"capacity:vmask": scores["vmask"]})["vmask"]) == {"all"}


def test_bootstrap_intervals_are_those_of_scipy_and_one_resample_serves_all() -> None:
    values = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).exp().double()
    low, high = bootstrap(values, draws=4_000)
    for column in range(3):
        expected = stats.bootstrap(
            (values[:, column].numpy(),), lambda x, axis: x.mean(axis), method="percentile", rng=1
        )
        spread = expected.standard_error
        assert low[column].item() == pytest.approx(expected.confidence_interval.low, abs=0.15 * spread)
        assert high[column].item() == pytest.approx(expected.confidence_interval.high, abs=0.15 * spread)
    one_low, _ = bootstrap(values[:, 0], draws=4_000)
    assert one_low.item() == pytest.approx(low[0].item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: paired_test(torch.zeros(3), torch.zeros(3, 1)),
            "a and b must have shape (N,), of the same texts, got",
        ),
        (
            lambda: paired_test(torch.zeros(3), torch.zeros(1)),
            "a and b must have shape (N,), of the same texts, got (3",
        ),
        (lambda: paired_test(torch.tensor([math.nan, 1]), torch.zeros(2)), "a and b must be numbers, got NaN"),
        (lambda: t_interval([]), "values must hold at least one number, got none"),
        (lambda: bootstrap(torch.zeros(3), level=95), "level must be between 0 and 1, such as 0.95, got 95"),
        (lambda: evaluate_scores(predict, Split(["a"], [1]), {}, EvaluationConfig()), "scores must hold those of at"),
        (
            lambda: evaluate_scores(predict, Split(["a"], [1]), {"random/0": [torch.ones(1)]}, EvaluationConfig()),
            "scores must not be named random or random/..., as the control is, got 'random/0': rename it",
        ),
    ],
)
def test_what_statistics_cannot_be_taken_of_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_average_capacity_of_words_that_are_all_important_has_no_less() -> None:
    scores = {"capacity:vmask": [torch.tensor([0.6])], "vmask": [torch.tensor([0.5])]}
    assert average_capacity(scores)["vmask"] == pytest.approx({"all": 0.6, "important": 0.6})


def test_an_interval_of_no_texts_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("values must hold at least one text, got shape (0, 2)")):
        bootstrap(torch.zeros(0, 2))


def test_the_paired_test_is_the_sign_test_of_differences_that_are_all_equal() -> None:
    a, b = torch.zeros(60), torch.zeros(60)
    a[:9], b[9:12] = 1.0, 1.0  # nine texts for a, three for b
    assert paired_test(a, b, draws=20_000) == pytest.approx(stats.binomtest(9, 12).pvalue, abs=0.01)
    assert paired_test(a, a) == 1.0
    assert paired_test(a + 1, b, draws=999) < 0.01


def test_the_interval_over_seeds_is_students() -> None:
    values = [70.0, 72.0, 71.0, 74.0]
    mean, half = t_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert half is not None
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert t_interval([70.0]) == (70.0, None)


def test_an_evaluation_of_planted_scores_finds_the_words_that_decide() -> None:
    """A rule for a predict function, the truth for its scores: deleting what decides turns or unsettles every text."""
    split = Split(["good film film film", "bad film film film"], [1, 0])
    scores = {
        "capacity:ffn1_pre": [torch.tensor([0.0, 0.3, 0.2, 0.1])] * 2,
        "planted": [torch.tensor([1.0, 0, 0, 0])] * 2,
    }
    result = evaluate_scores(predict, split, scores, EvaluationConfig(k=(30,), normalised=2))
    assert result["accuracy"][0] == 1.0
    assert result["rankers"]["planted"]["k"]["30"]["srs"][0] == 0.5  # the rest leans positive
    assert result["rankers"]["planted"]["k"]["30"]["predicted_positive"] == 1.0
    assert result["rankers"]["capacity:ffn1_pre"]["k"]["30"]["srs"][0] == 0.0
    assert result["normalised_aopc"]["rankers"]["planted"][0] == pytest.approx(1.0, abs=0.05)
    assert result["normalised_aopc"]["rankers"]["planted"][0] > result["normalised_aopc"]["rankers"]["random"][0]


def test_an_evaluation_of_three_classes_and_two_layers() -> None:
    split = Split(["good film", "bad film", "fine film"], [0, 1, 2])

    def by_word(texts: Sequence[Words]) -> Tensor:
        return torch.tensor([[float(word in words) for word in ("good", "bad", "fine")] for words in texts]).softmax(1)

    rows = [torch.tensor([0.0, 1.0])] * 3
    scores = {"capacity:layer1.ffn1_pre": rows, "capacity:layer2.ffn1_pre": rows, "vmask": rows}
    result = evaluate_scores(by_word, split, scores, EvaluationConfig(k=(30,), normalised=0))
    assert result["predicted_positive"] == pytest.approx(1 / 3)
    assert result["rankers"]["vmask"]["k"]["30"]["predicted_positive"] == pytest.approx(1 / 3)
    words = [text.split() for text in split.texts]
    draws = {str(i): random_scores(rows, i) for i in range(5)}
    by_draw = measure(by_word, words, split.labels, draws, [30])
    positive = torch.stack([by_draw[name][30]["predicted"] for name in draws]) == 1
    control = result["rankers"]["random"]["k"]["30"]["predicted_positive"]
    assert control == pytest.approx(positive.double().mean().item())
    assert 0 < control < 0.5
    assert result["reference"] == "capacity:layer2.ffn1_pre"
    with pytest.raises(
        ValueError, match=re.escape("scores['vmask'] must score as many words of each text as scores['c")
    ):
        evaluate_scores(by_word, split, scores | {"vmask": [row[:1] for row in rows]}, EvaluationConfig(k=(30,)))


def planted_run(out: Path, seed: int) -> TrainResult:
    """A small classifier that has learnt the rule of generated reviews."""
    model = ModelConfig(dim=64, heads=4, feedforward=64, mask_hidden=32)
    options: dict[str, Any] = {"learning_rate": 2e-3, "epochs": 10, "patience": 10, "lambda_importance": 0.02}
    return train(
        TrainConfig(out=out, model=model, device="cpu", threads=1, seed=seed, **options), report=lambda _: None
    )


def separation(corpus: Corpus, out: Path, name: str) -> float:
    """How often a planted word of the test texts scores above one that is not."""
    model, vocabulary, config = load_run(out)
    scores = score(model, Predictor(model, vocabulary, config).encode(corpus.test.texts))
    by_role: dict[bool, list[float]] = {True: [], False: []}
    for row, planted in zip(scores[name], corpus.test.truth or (), strict=True):
        for value, role in zip(row.tolist(), planted.roles, strict=True):
            by_role[role != "filler"].append(value)
    return above(torch.tensor(by_role[True]), torch.tensor(by_role[False]))


@pytest.mark.usefixtures("small_corpus")
def test_a_run_is_evaluated_on_the_data_and_by_the_rankers_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.train(tmp_path / "run", epochs=1)
    folders = []
    read = loop.data.load

    def load(dataset: str, data_dir: Path | None, **options: Any) -> Corpus:
        folders.append(data_dir)
        return replace(read(dataset, data_dir, **options), note="all rows")

    monkeypatch.setattr(loop.data, "load", load)
    config = EvaluationConfig(k=(30,), normalised=0, texts=4, gradients=True)
    said: list[str] = []
    result = evaluate_run(tmp_path / "run", config, data_dir="moved", file="other.json", report=said.append)
    assert said == ["all rows"]
    assert folders == [Path("moved")]
    assert result["texts"] == 4
    assert set(GRADIENT_RANKERS) < set(result["rankers"])
    assert json.loads((tmp_path / "run" / "other.json").read_text()) == json.loads(json.dumps(result))


def test_capacity_where_the_importance_term_acts_finds_the_planted_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = synthetic(0, {"train": 3_000, "dev": 300, "test": 300})
    monkeypatch.setattr(loop.data, "load", lambda *_, **__: corpus)
    runs = [planted_run(tmp_path / str(seed), seed) for seed in range(3)]
    assert sorted(run.test["accuracy"] for run in runs)[1] > 0.72
    assert all(run.agreement["pair_attention"] > 3 for run in runs)
    for name in ("vmask", "capacity:vmask"):
        worst, median, _ = sorted(separation(corpus, run.out, name) for run in runs)
        assert worst > 0.75, name  # by chance: 0.5
        assert median > 0.85, name
    out = runs[0].out
    evaluate_run(out, EvaluationConfig(k=(20, 30), normalised=3))
    result = json.loads((out / "evaluation.json").read_text())
    found, control = (result["rankers"][name]["k"]["30"] for name in ("capacity:vmask", "random"))
    assert found["srs"][1] > control["srs"][2]
    assert found["p_against_random"] < 0.01
    assert result["capacity"]["vmask"]["important"] > result["capacity"]["vmask"]["less"]
    printed = table(result)
    for expected in ("VMASK output", "300 test texts (0 of one word", "random", "average capacity"):
        assert expected in printed
