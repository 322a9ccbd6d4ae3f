"""Texts as numbers: the vocabulary, packed batches, and buckets of like lengths."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safr_fast.data import Vocabulary
from safr_fast.data.batches import EncodedSplit, by_length, shuffled_buckets, token_buckets
from safr_fast.data.corpus import Split


def test_a_vocabulary_keeps_words_seen_twice_and_comes_back_from_json(tmp_path: Path) -> None:
    vocabulary = Vocabulary.of(["the film <br /> the", "<pad> Film film <br /> <pad>"])
    assert vocabulary.words == ("<pad>", "<unk>", "the", "film", "<br", "/>", "<pad>")
    assert vocabulary.encode("the Film <pad> film", max_len=3) == [2, 1, 6]
    file = tmp_path / "vocabulary.json"
    file.write_text(vocabulary.to_json(), encoding="utf-8")
    assert Vocabulary.load(file).words == vocabulary.words
    assert "the" in json.loads(file.read_text())


def test_a_batch_holds_its_texts_end_to_end() -> None:
    split = Split(["a b c", "", "b", "a x"], [1, 0, 1, 0])
    encoded = EncodedSplit.of(split, Vocabulary(["a", "b", "c"]))
    batch = encoded.batch([3, 1, 0])
    assert batch.ids.tolist() == [2, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.labels.tolist() == [0, 0, 1]
    assert batch.max_seqlen == 3
    assert encoded.batch([1]).ids.shape == (0,)


@pytest.fixture(scope="module")
def lengths() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3_001, generator=generator).mul(0.6).add(math.log(20)).exp().long() + 1


def test_buckets_hold_every_text_once(lengths: torch.Tensor) -> None:
    order = shuffled_buckets(lengths, 32, 0, 1)
    assert sorted(row for rows in order for row in rows) == list(range(3_001))
    assert max(map(len, order)) == 32
    assert len(order) == math.ceil(3_001 / 32)


@pytest.mark.parametrize("budget", [1, 50, 1_000, 1_000_000])
def test_buckets_by_tokens_hold_every_text_once_and_keep_to_the_budget(lengths: torch.Tensor, budget: int) -> None:
    for order in (token_buckets(lengths, budget, 0, 1), by_length(lengths, budget)):
        assert sorted(row for rows in order for row in rows) == list(range(3_001))
        assert all(len(rows) == 1 or lengths[rows].sum() <= budget for rows in order)
    sizes = [int(lengths[rows].sum()) for rows in token_buckets(lengths, 1_000, 0, 1)]
    assert sum(sizes) / len(sizes) > 900


def test_texts_of_no_token_find_a_batch() -> None:
    order = token_buckets(torch.tensor([0, 3, 0]), 3, 0, 1)
    assert sorted(row for rows in order for row in rows) == [0, 1, 2]
    assert token_buckets(torch.tensor([], dtype=torch.int64), 3, 0, 1) == []


def test_the_incomplete_batch_is_a_sample_of_all_texts(lengths: torch.Tensor) -> None:
    short = lengths[:2_985]  # 93 batches and 9 texts
    means = []
    for epoch in range(200):
        (rest,) = (rows for rows in shuffled_buckets(short, 32, 0, epoch) if len(rows) < 32)
        assert len(rest) == 9
        means.append(short[rest].double().mean())
    standard_error = short.double().std() / math.sqrt(200 * 9)
    assert abs(torch.stack(means).mean() - short.double().mean()) < 4 * standard_error


@pytest.mark.parametrize(("buckets", "size"), [(shuffled_buckets, 32), (token_buckets, 700)])
def test_buckets_follow_from_seed_and_epoch_and_differ_between_them(
    lengths: torch.Tensor, buckets: Callable[..., list[list[int]]], size: int
) -> None:
    first = buckets(lengths, size, 0, 1)
    assert first == buckets(lengths, size, 0, 1)
    others = [buckets(lengths, size, 0, 2), buckets(lengths, size, 1, 1)]
    partners = {row: rows for rows in first for row in rows}
    for other in others:
        assert first != other
        company = [len(set(rows) & set(partners[rows[0]])) / len(rows) for rows in other]
        assert sum(company) / len(company) < 0.5


@pytest.mark.parametrize(("buckets", "size"), [(shuffled_buckets, 32), (token_buckets, 700)])
def test_buckets_hold_like_lengths_and_come_in_no_order_of_length(
    lengths: torch.Tensor, buckets: Callable[..., list[list[int]]], size: int
) -> None:
    def spread(order: list[list[int]]) -> float:
        return 1 - lengths.sum().item() / sum(len(rows) * int(lengths[rows].max()) for rows in order)

    order = buckets(lengths, size, 0, 1)
    unsorted = torch.randperm(len(lengths)).split(32)
    assert spread(order) < 0.15
    assert spread([rows.tolist() for rows in unsorted]) > 0.5
    longest = torch.tensor([float(lengths[rows].max()) for rows in order])
    neighbours = torch.corrcoef(torch.stack((longest[:-1], longest[1:])))[0, 1]
    assert abs(neighbours) < 0.3


@pytest.mark.parametrize("count", [0, 1, 32, 33])
def test_buckets_of_few_texts(count: int) -> None:
    order = shuffled_buckets(torch.ones(count, dtype=torch.int64), 32, 0, 0)
    assert sorted(row for rows in order for row in rows) == list(range(count))
    assert all(order)
