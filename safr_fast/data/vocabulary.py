"""Words to numbers and back."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

PAD = 0
UNKNOWN = 1


class Vocabulary:
    """Word types in a fixed order; number 0 is padding, number 1 any word that is not listed."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = ("<pad>", "<unk>", *words)
        self._number = {word: number for number, word in enumerate(self.words) if number > UNKNOWN}

    @classmethod
    def of(cls, texts: Iterable[str], min_count: int = 2) -> "Vocabulary":
        """The words seen at least ``min_count`` times, in the order of their first appearance."""
        counts = Counter(word for text in texts for word in text.split())
        return cls(word for word, count in counts.items() if count >= min_count)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        return [self._number.get(word, UNKNOWN) for word in text.split()[:max_len]]

    def decode(self, numbers: Sequence[int]) -> str:
        return " ".join(self.words[number] for number in numbers)

    def to_json(self) -> str:
        return json.dumps(self.words[UNKNOWN + 1 :], ensure_ascii=False, indent=0)

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        words = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("it must be a list of words")
        return cls(words)
