"""Deletion and AOPC against slow implementations of their own."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from evaluation_support import WEIGHT, predict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safr_fast.evaluation import EvaluationConfig, Words, aopc, limits, measure, normalised
from safr_fast.evaluation.deletion import count, random_scores, without
from safr_fast.training import OptionError

WORDS = st.lists(st.sampled_from(sorted(WEIGHT)), min_size=1, max_size=7)


@pytest.mark.parametrize(
    ("words", "k", "deleted"),
    [
        (10, 30, 3),
        (9, 30, 2),
        (3, 30, 1),
        (1, 30, 0),
        (0, 30, 0),
        (2, 100, 1),
        (100, 29, 29),
        (7, 1, 1),
        (20, 35, 7),
        (375, 18.4, 69),
    ],
)
def test_how_many_words_k_per_cent_are(words: int, k: float, deleted: int) -> None:
    assert count(words, words, k) == deleted


@pytest.mark.parametrize(("words", "scored", "deleted"), [(600, 256, 180), (900, 256, 256), (5, 4, 1), (3, 0, 0)])
def test_k_per_cent_are_of_the_whole_text_chosen_among_the_scored_words(words: int, scored: int, deleted: int) -> None:
    assert count(words, scored, 30) == deleted


def test_words_are_deleted_by_score_then_position_and_later_ones_slide_into_the_window() -> None:
    seen: list[list[str]] = []

    def spy(texts: Sequence[Sequence[str]]) -> Tensor:
        seen.extend(map(list, texts))
        return predict(texts)

    text = ["good", "bad", "not", "fine", "film"]
    measure(spy, [text], torch.tensor([1]), {"tied": [torch.tensor([0.0, 1.0, 1.0, 1.0])]}, [50])
    assert seen == [text, ["good", "fine", "film"], ["bad", "not"]]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.sampled_from([10, 30, 50, 100]))
def test_measures_agree_with_a_slow_implementation(data: st.DataObject, k: int) -> None:
    texts = data.draw(st.lists(WORDS, min_size=1, max_size=4))
    labels = [data.draw(st.integers(0, 1)) for _ in texts]
    scores = [[data.draw(st.integers(0, 3)) / 2 for _ in words] for words in texts]
    measured = measure(predict, texts, torch.tensor(labels), {"r": [torch.tensor(row) for row in scores]}, [k])["r"][k]
    for t, (words, label, row) in enumerate(zip(texts, labels, scores, strict=True)):
        ranked = sorted(range(len(words)), key=lambda i: (-row[i], i))
        taken = ranked[: max(1, k * len(words) // 100)]
        if len(words) == 1:
            taken = []
        elif len(taken) == len(words):
            taken = taken[:-1]
        before = predict([words])[0]
        after = predict([[word for i, word in enumerate(words) if i not in taken]])[0]
        kept = predict([[word for i, word in enumerate(words) if i in taken] or words])[0]
        y = int(before.argmax())
        expected = {
            "correct": float(int(after.argmax()) == label),
            "srs": float(y == label) - float(int(after.argmax()) == label),
            "predicted": float(after.argmax()),
            "comprehensiveness": float(before[y] - after[y]),
            "sufficiency": float(before[y] - kept[y]),
            "log_odds": math.log(float(after[y])) - math.log(float(before[y])),
        }
        assert {name: float(values[t]) for name, values in measured.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"texts": ["good film"]}, "texts must be sequences of words, got a string: pass text.split()"),
        ({"labels": ["good"]}, "labels must be numbers, got list of (str)"),
        ({"labels": torch.tensor([1, 0])}, "labels must have shape (1,), one for each text, got (2,)"),
        (
            {"labels": torch.tensor([1.0])},
            "labels must be the numbers of classes, whole, got float32 (1,) on cpu: pass",
        ),
        ({"labels": [2]}, "labels must be among the 2 classes of predict, from 0, got [2]"),
        ({"labels": [-1]}, "labels must be among the 2 classes of predict, from 0, got [-1]"),
        ({"scores": [[0.0, 1.0]]}, "scores must be by the rankers' names, such as {'vmask': [...]}, got list of (list"),
        ({"scores": {"r": [["a", "b"]]}}, "scores['r'][0] must be numbers, got list of (str, str)"),
        ({"texts": [], "labels": [], "scores": {"r": []}}, "texts must hold at least one text, got none"),
        ({"ks": 30}, "ks must be a list of per cents, got int 30"),
        ({"ks": [0.1, 0.5]}, "k is in per cent, got [0.1, 0.5]: pass [10.0, 50.0]"),
        ({"scores": {"r": []}}, "scores['r'] must hold a row for each of 1 texts, got 0"),
        ({"scores": {"r": [torch.zeros(3)]}}, "scores['r'][0] must score at most the text's 2 words, got (3,)"),
        ({"scores": {"r": [torch.full((2,), math.nan)]}}, "scores['r'][0] must be numbers, got NaN"),
        ({"predict": lambda texts: 5 * predict(texts)}, "predict must give class probabilities (3, classes)"),
        ({"predict": lambda texts: predict(texts)[:, 1]}, "each row summing to 1, got shape (3,): of scores take"),
        (
            {"predict": lambda texts: predict(texts)[1:]},
            "probabilities (3, classes), each row summing to 1, got shape (2",
        ),
    ],
)
def test_input_that_would_give_plausible_nonsense_is_named(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "predict": predict,
        "texts": [["good", "film"]],
        "labels": torch.tensor([1]),
        "scores": {"r": [torch.zeros(2)]},
        "ks": [30],
    }
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        measure(*(arguments | changed).values())


def test_lists_arrays_16_bits_and_batches_give_the_same() -> None:
    texts = [["good", "film"], ["bad"], ["not", "bad", "fine", "film"]]
    scores = [[0.1, 0.9], [1.0], [0.3, 0.2, 0.9, 0.4]]
    sizes = []

    def counting(texts: Sequence[Words]) -> Any:
        sizes.append(len(texts))
        return predict(texts).numpy()

    expected = measure(predict, texts, torch.tensor([1, 0, 1]), {"r": [torch.tensor(row) for row in scores]}, [30, 60])
    by_list = measure(counting, texts, [1, 0, 1], {"r": scores}, (30, 60), batch_size=4)
    assert max(sizes) == 4
    half = measure(lambda texts: predict(texts).bfloat16(), texts, [1, 0, 1], {"r": scores}, [30, 60])
    for k in (30, 60):
        for name, values in expected["r"][k].items():
            assert torch.equal(values, by_list["r"][k][name])
            torch.testing.assert_close(values, half["r"][k][name], atol=0.02, rtol=0.02)


def test_a_predict_that_gives_classes_is_one_that_is_certain() -> None:
    texts, scores = [["good", "film"], ["film", "bad"]], {"r": [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]}
    hard = measure(lambda texts: (predict(texts) > 0.5).long(), texts, [1, 0], scores, [30])["r"][30]
    assert hard["comprehensiveness"].tolist() == [0, 1]  # of the second text the rest, "film", is positive


def test_a_k_that_is_no_per_cent_is_named() -> None:
    with pytest.raises(ValueError, match=r"k must be per cents above 0 and at most 100, got \[0\]"):
        measure(predict, [["good"]], torch.tensor([1]), {"r": [torch.zeros(1)]}, [0])
    with pytest.raises(ValueError, match=r"k must name each per cent once, got \[30, 30\]"):
        measure(predict, [["good"]], torch.tensor([1]), {"r": [torch.zeros(1)]}, [30, 30])
    with pytest.raises(OptionError, match=r"k must name each per cent once, got \[30, 20, 30\]"):
        EvaluationConfig(k=(30, 20, 30))
    with pytest.raises(OptionError, match=r"k is in per cent, got \[0.3\]: pass \[30.0\]"):
        EvaluationConfig(k=(0.3,))
    with pytest.raises(OptionError, match=r"k must name at least one per cent"):
        EvaluationConfig(k=())


@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.sampled_from(sorted(WEIGHT)), min_size=2, max_size=5), outside=st.booleans())
def test_limits_of_aopc_are_those_of_all_orders(words: list[str], outside: bool) -> None:
    scored = len(words)
    words = [*words, "film"] if outside else words
    values = [
        aopc(predict, words, torch.tensor([float(-place.index(i)) for i in range(scored)]))
        for place in itertools.permutations(range(scored))
    ]
    low, high = limits(predict, words, scored, beam=math.comb(scored, scored // 2))
    assert (low, high) == pytest.approx((min(values), max(values)), abs=1e-9)
    narrow = limits(predict, words, scored, beam=1)
    assert low - 1e-9 <= narrow[0] <= narrow[1] <= high + 1e-9


def test_normalised_aopc_is_one_at_the_best_order_and_zero_at_the_worst() -> None:
    assert (normalised(0.3, 0.1, 0.3), normalised(0.1, 0.1, 0.3), normalised(0.2, 0.1, 0.3)) == pytest.approx(
        (1, 0, 0.5)
    )
    assert normalised(0.5, 0.1, 0.3) == 1.0  # better than the beam found
    assert normalised(0.0, 0.0, 0.0) == 0.5


@pytest.mark.parametrize("words", [["good"] * 4, ["film", "film"], ["fine"] * 5])
def test_where_no_order_is_better_an_aopc_lies_in_the_middle(words: list[str]) -> None:
    def by_count(texts: Sequence[Words]) -> Tensor:
        positive = torch.tensor([0.3 * len(text) for text in texts], dtype=torch.float64).sigmoid()
        return torch.stack((1 - positive, positive), 1)

    value = aopc(by_count, words, [0.1 * i for i in range(len(words))])
    assert normalised(value, *limits(by_count, words, len(words))) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aopc(predict, ["good", "film"], []), "scores must score at least one word, got none"),
        (lambda: aopc(predict, ["good", "film"], [1, 0, 2]), "scores must score at most the text's 2 words, got (3,)"),
        (lambda: aopc(predict, ["good", "film"], [1, math.nan]), "scores must be numbers, got NaN"),
        (lambda: aopc(predict, "good film", [1, 0]), "words must be a sequence of words, got a string: pass text.spl"),
        (lambda: limits(predict, ["good", "film"], 3), "scored must be from 1 to 2, the words to delete among, got 3"),
        (lambda: limits(predict, ["good", "film"], 2, beam=0), "beam must be at least 1, got 0"),
        (
            lambda: measure(predict, [["good"]], [1], {"r": [[0.0]]}, [30], batch_size=0),
            "batch_size must be at least 1, or None for no limit, got 0",
        ),
    ],
)
def test_what_aopc_cannot_take_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


def test_a_text_of_one_word_has_no_aopc() -> None:
    assert aopc(predict, ["good", "bad"], [0.0, 1.0]) == aopc(predict, ["good", "bad"], torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="words must be at least two, since a text keeps its last, got 1"):
        aopc(predict, ["good"], torch.zeros(1))
    with pytest.raises(ValueError, match="words must be at least two, since a text keeps its last, got 1"):
        limits(predict, ["good"], 1)
    with pytest.raises(ValueError, match="scored must be from 1 to 2"):
        limits(predict, ["good", "film"], 0)


def test_random_control_takes_other_words_in_every_draw_and_is_repeatable() -> None:
    lengths = [torch.zeros(30)] * 3
    a, b, again = random_scores(lengths, 0), random_scores(lengths, 1), random_scores(lengths, 0)
    assert all(torch.equal(x, y) for x, y in zip(a, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in itertools.combinations([*a, *b], 2))


def test_removing_words_keeps_the_order_of_the_rest() -> None:
    assert without(["a", "b", "c", "d"], [2, 0]) == ["b", "d"]
