"""Encoded texts, and batches of texts of about the same length."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safr_fast.data.corpus import Split
from safr_fast.data.vocabulary import PAD, Vocabulary


class Batch(NamedTuple):
    """Texts packed end to end: N tokens of S texts, and no padding."""

    ids: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (S + 1,) int32: text i from cu_seqlens[i] to cu_seqlens[i + 1]
    labels: Tensor  # (S,) int64
    max_seqlen: int
    """Tokens of the longest text."""
    rows: list[int]
    """Which texts of the split these are."""

    def to(self, device: torch.device) -> "Batch":
        ids, cu_seqlens, labels = (x.to(device, non_blocking=True) for x in self[:3])
        return Batch(ids, cu_seqlens, labels, *self[3:])


@dataclass(frozen=True)
class EncodedSplit:
    """A split as numbers: all texts in one row, text i from ``offsets[i]`` to ``offsets[i + 1]``."""

    ids: Tensor  # (tokens,) int64
    offsets: Tensor  # (texts + 1,) int64
    labels: Tensor  # (texts,) int64

    @classmethod
    def of(cls, split: Split, vocabulary: Vocabulary, max_len: int | None = None, *, width: int = 0) -> "EncodedSplit":
        """``width``: texts that are shorter get pads up to it, which from then on are tokens like others."""
        encoded = [vocabulary.encode(text, max_len) for text in split.texts]
        encoded = [numbers + [PAD] * (width - len(numbers)) for numbers in encoded]
        ids = torch.tensor([number for numbers in encoded for number in numbers], dtype=torch.int64)
        lengths = torch.tensor([0, *map(len, encoded)], dtype=torch.int64)
        return cls(ids, lengths.cumsum(0), torch.tensor(split.labels, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def batch(self, rows: list[int]) -> Batch:
        index = torch.tensor(rows)
        lengths = self.lengths[index]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # (S + 1,)
        shift = (self.offsets[index] - cu_seqlens[:-1]).repeat_interleave(lengths)  # (N,)
        ids = self.ids[torch.arange(len(shift)) + shift]
        return Batch(ids, cu_seqlens.int(), self.labels[index], int(lengths.max()), rows)


def shuffled_buckets(lengths: Tensor, batch_size: int, seed: int, epoch: int, pool: int = 50) -> list[list[int]]:
    """Rows of each batch of one epoch, a function of ``seed`` and ``epoch`` alone.

    All rows are shuffled; every ``pool`` batches' worth of them is sorted by length and cut into batches; the batches
    are shuffled. So batches hold texts of similar length, yet differ from epoch to epoch. What does not fill a batch
    is taken off before the sort: a sample of all texts, not always the longest.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    rows = torch.randperm(len(lengths), generator=generator)
    whole = len(rows) // batch_size * batch_size
    batches = [batch.tolist() for batch in _cut(rows[whole:], batch_size)]
    for group in _cut(rows[:whole], pool * batch_size):
        batches += [batch.tolist() for batch in _cut(group[lengths[group].argsort(stable=True)], batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def token_buckets(lengths: Tensor, budget: int, seed: int, epoch: int, pool: int = 50) -> list[list[int]]:
    """The same, for batches of at most ``budget`` tokens; a longer text is a batch of its own."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    rows = torch.randperm(len(lengths), generator=generator)
    batches: list[list[int]] = []
    for group in _within(lengths, rows.tolist(), pool * budget):
        shortest_first = lengths[group].argsort(stable=True).tolist()
        batches += _within(lengths, [group[i] for i in shortest_first], budget)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def by_length(lengths: Tensor, budget: int) -> list[list[int]]:
    """Rows of each batch in rising length, for evaluation: at most ``budget`` tokens, a longer text by itself."""
    return _within(lengths, lengths.argsort(stable=True).tolist(), budget)


def _within(lengths: Tensor, rows: list[int], budget: int) -> list[list[int]]:
    """``rows`` cut, in their order, where the next would exceed ``budget`` tokens."""
    groups: list[list[int]] = []
    room = -1
    for row, length in zip(rows, lengths[rows].tolist(), strict=True):
        if not groups or length > room:
            groups.append([])
            room = budget
        groups[-1].append(row)
        room -= length
    return groups


def _cut(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def epoch_seed(seed: int, epoch: int) -> int:
    """One 63-bit number for a seed and an epoch, different for every pair that a run can meet."""
    return (seed * 1_000_003 + epoch) % 2**63
