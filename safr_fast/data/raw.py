"""SST-2 and IMDB as their authors publish them: a treebank in tables of text, and a folder of reviews."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safr_fast.data.corpus import DataUnavailable, Split

_SPLITS = {"1": "train", "2": "test", "3": "validation"}

Value = TypeVar("Value")


def reviews(folder: Path) -> Split:
    """The reviews below one of ``aclImdb``'s folders ``train`` and ``test``."""
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(("neg", "pos")):
        files = sorted((folder / name).glob("*.txt"))
        if not files:
            raise DataUnavailable(f"{str(folder / name)!r} holds no .txt files: give the unpacked aclImdb folder")
        texts += map(_text, files)
        labels += [label] * len(files)
    return Split(texts, labels)


def treebank(folder: Path, *, balanced: bool) -> dict[str, Split]:
    """The released reading of the Stanford treebank.

    A sentence takes part if a phrase equals it word for word, negative up to a sentiment of 0.4 and positive above
    0.6. With ``balanced`` the larger class of the training split is cut to the size of the smaller.
    """
    sentences, splits, dictionary, sentiments = (
        folder / name for name in ("datasetSentences.txt", "datasetSplit.txt", "dictionary.txt", "sentiment_labels.txt")
    )
    for file in (splits, dictionary, sentiments):
        if not file.exists():
            raise DataUnavailable(
                f"{str(folder)!r} lacks {file.name}: give the whole unpacked stanfordSentimentTreebank"
            )
    phrase_number = _records(dictionary, "|", str, header=False)
    sentiment = _records(sentiments, "|", float)
    split_of = _records(splits, ",", _SPLITS.__getitem__)
    by_class: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in _SPLITS.values()}
    for number, sentence in _records(sentences, "\t", str).items():
        if sentence not in phrase_number:
            continue
        value = _entry(sentiment, phrase_number[sentence], sentiments)
        if value <= 0.4 or value > 0.6:
            by_class[_entry(split_of, number, splits)][value > 0.6].append(sentence)
    if balanced:
        size = min(map(len, by_class["train"]))
        by_class["train"] = (by_class["train"][0][:size], by_class["train"][1][:size])
    for name, classes in by_class.items():
        if not any(classes):
            raise DataUnavailable(f"{str(folder)!r} has no sentences for {name}: unpack the treebank anew")
    return {
        name: Split(negative + positive, [0] * len(negative) + [1] * len(positive))
        for name, (negative, positive) in by_class.items()
    }


def _records(file: Path, separator: str, read: Callable[[str], Value], *, header: bool = True) -> dict[str, Value]:
    """What is left of the last separator of each line, and what ``read`` makes of the rest."""
    records: dict[str, Value] = {}
    # Not splitlines(), which also parts at characters that stand in the texts, such as U+0085.
    for number, line in enumerate(_text(file).split("\n"), 1):
        line = line.rstrip("\r")
        if not line or (header and number == 1):
            continue
        key, found, rest = line.rpartition(separator)
        try:
            value = read(rest) if found else None
        except (KeyError, ValueError):
            value = None
        if value is None:
            raise DataUnavailable(f"line {number} of {str(file)!r} is damaged, {line[:80]!r}: unpack the treebank anew")
        records[key] = value
    return records


def _entry(records: Mapping[str, Value], number: str, file: Path) -> Value:
    if number not in records:
        raise DataUnavailable(
            f"{str(file)!r} is cut short, it has no line for number {number}: unpack the treebank anew"
        )
    return records[number]


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataUnavailable(f"{str(file)!r} must be UTF-8: {error}; convert the file, or get it anew") from error
