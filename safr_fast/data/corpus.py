"""What a data set is: texts with labels in three splits, and the planted truth where there is one."""

from collections.abc import Sequence
from dataclasses import dataclass


class DataUnavailable(RuntimeError):
    """A data set cannot be had here; the message says why and what to do."""


@dataclass(frozen=True)
class Truth:
    """What was planted in one text: a role for each token, and the pairs of tokens that act together."""

    roles: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Split:
    """Texts, a label for each (0 negative, 1 positive), and the truth for each where it is known."""

    texts: Sequence[str]
    labels: Sequence[int]
    truth: Sequence[Truth] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Corpus:
    """A data set. A text's tokens are ``text.split()``, case and punctuation kept."""

    name: str
    train: Split
    dev: Split
    test: Split
    note: str = ""
    """What a reader of results on it should know."""
