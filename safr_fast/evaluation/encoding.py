"""Texts as a model reads them, in padded batches that fit in memory whatever their lengths."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safr_fast.data.vocabulary import PAD, Vocabulary

_TEXTS = 64
_CELLS = _TEXTS * 256**2


class Padded(NamedTuple):
    """Texts padded on the right."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, true where a token is real

    def to(self, device: torch.device) -> "Padded":
        return Padded(self.ids.to(device), self.mask.to(device))


@dataclass(frozen=True)
class Encoded:
    """Word types of each text; every batch is padded to its longest text, or to ``width`` if that is more."""

    texts: Sequence[Sequence[int]]
    width: int = 0

    @classmethod
    def of(cls, texts: Iterable[str], vocabulary: Vocabulary, max_len: int | None, width: int) -> "Encoded":
        return cls([vocabulary.encode(text, max_len) for text in texts], width)

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, rows: Sequence[int]) -> Padded:
        length = max(self.width, *(len(self.texts[row]) for row in rows), 0)
        ids = [[*self.texts[row], *[PAD] * (length - len(self.texts[row]))] for row in rows]
        lengths = torch.tensor([len(self.texts[row]) for row in rows])
        padded = torch.tensor(ids, dtype=torch.int64).view(len(rows), length)
        return Padded(padded, torch.arange(length) < lengths[:, None])

    def batches(self) -> list[list[int]]:
        """Rows of each batch in rising length: at most 64 texts, and fewer where their T×T matrices would be large."""
        found: list[list[int]] = []
        for row in sorted(range(len(self.texts)), key=lambda row: len(self.texts[row])):
            length = max(self.width, len(self.texts[row]))
            if not found or len(found[-1]) == _TEXTS or (len(found[-1]) + 1) * length**2 > _CELLS:
                found.append([])
            found[-1].append(row)
        return found
