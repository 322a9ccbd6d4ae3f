"""Splits kept as parquet files with columns ``text`` and ``label``."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safr_fast.data.corpus import DataUnavailable, Split


def read(folder: Path, names: Sequence[str], alternative: str, *, paper: bool = False) -> dict[str, Split]:
    """Splits that all lie in one place: in ``folder`` itself, else in the one subfolder that holds any of them.

    Args:
        folder: where to look.
        names: the splits, each ``train.parquet`` or ``train-00000-of-00002.parquet`` and its fellows.
        alternative: what the folder might have held instead, for the error.
        paper: take only the rows that the column ``paper`` marks, which all files have.
    """
    place = _place(folder, names) or folder
    return {name: _split(place, name, alternative, paper) for name in names}


def marks_paper(folder: Path, names: Sequence[str]) -> bool:
    """Whether all files of the splits that :func:`read` gives have the column ``paper``."""
    place = _place(folder, names) or folder
    return all("paper" in _columns(file) for name in names for file in _files(place, name))


def _place(folder: Path, names: Sequence[str]) -> Path | None:
    if any(_files(folder, name) for name in names):
        return folder
    subfolders = [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
    candidates = [entry for entry in subfolders if any(_files(entry, name) for name in names)]
    if len(candidates) > 1:
        found = ", ".join(entry.name for entry in candidates)
        raise DataUnavailable(f"{str(folder)!r} holds several data sets, in {found}: give one of these folders")
    return candidates[0] if candidates else None


def _files(place: Path, name: str) -> list[Path]:
    own = re.compile(rf"{name}(-\d+-of-\d+)?\.parquet")
    return sorted(entry for entry in place.iterdir() if own.fullmatch(entry.name))


def _split(place: Path, name: str, alternative: str, paper: bool) -> Split:
    files = _files(place, name)
    if not files:
        found = ", ".join(sorted(entry.name for entry in place.iterdir())[:8]) or "nothing"
        raise DataUnavailable(f"{str(place)!r} holds neither {name}.parquet nor {alternative}, but {found}")
    counts = {int(file.stem.rpartition("-of-")[2]) if file.stem != name else 1 for file in files}
    if counts != {len(files)}:
        found = ", ".join(file.name for file in files[:8])
        raise DataUnavailable(f"{str(place)!r} must hold either {name}.parquet or all of its parts, found {found}")
    parts = [_part(file, paper) for file in files]
    texts = [text for part in parts for text in part.texts]
    if not texts:
        none = "has no rows that column paper marks: give --all-rows, or" if paper else "has no rows: give"
        raise DataUnavailable(f"{name} in {str(place)!r} {none} a folder whose files are not empty")
    return Split(texts, [label for part in parts for label in part.labels])


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    """The module that reads a file, whose errors become one sentence."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataUnavailable('parquet files need pyarrow: pip install "safr-fast[data]"') from None
    try:
        yield parquet
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataUnavailable(f"{str(file)!r} cannot be read as parquet: {error}; get it anew") from error


def _columns(file: Path) -> list[str]:
    with _parquet(file) as parquet:
        names: list[str] = parquet.read_schema(file).names
        return names


def _part(file: Path, paper: bool) -> Split:
    with _parquet(file) as parquet:
        columns = parquet.read_table(file).to_pydict()
    if not {"text", "label"} <= columns.keys():
        raise DataUnavailable(f"{str(file)!r} must have columns text and label, got {', '.join(columns)}")
    texts, labels = [], []
    for row, (text, label) in enumerate(zip(columns["text"], columns["label"], strict=True)):
        if paper and not columns["paper"][row]:
            continue
        if not isinstance(text, str):
            raise DataUnavailable(f"text in {str(file)!r} must be a string, row {row} has {text!r}: mend or remove it")
        if label not in (0, 1):
            raise DataUnavailable(
                f"labels in {str(file)!r} must be 0 (negative) or 1 (positive), row {row} has {label!r}: "
                "mend or remove it"
            )
        texts.append(text)
        labels.append(int(label))
    return Split(texts, labels)
