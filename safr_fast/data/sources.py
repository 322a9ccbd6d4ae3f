"""Where each data set comes from: generated, a local folder, or the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal, get_args

from safr_fast.data import hub, raw, tables
from safr_fast.data.corpus import Corpus, DataUnavailable, Split
from safr_fast.data.synthetic import synthetic

Dataset = Literal["synthetic", "sst2", "imdb"]
DATASETS: tuple[str, ...] = get_args(Dataset)

_REPOSITORIES = {"sst2": "SetFit/sst2", "imdb": "stanfordnlp/imdb"}
_IMDB_DEV_SHARE = 0.2
_ALL_ROWS = (
    "sst2: all rows, since nothing here says which are the paper's 6,244 / 825 / 1,743; for those give --data-dir with "
    "the treebank's datasetSentences.txt and its companions"
)


def check(dataset: Dataset, data_dir: str | Path | None = None) -> None:
    """Raise what :func:`load` would raise at its beginning: no such data set or folder, no network. Needs no torch."""
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {DATASETS}, got {dataset!r}")
    if data_dir is None:
        if dataset in _REPOSITORIES:
            hub.require(_REPOSITORIES[dataset], dataset)
    elif dataset == "synthetic":
        raise DataUnavailable(f"data_dir is for sst2 and imdb; synthetic takes none, got {str(data_dir)!r}")
    elif not Path(data_dir).is_dir():
        raise DataUnavailable(f"data_dir {str(data_dir)!r} is no folder: give the one that holds the data set's files")


def load(
    dataset: Dataset,
    data_dir: str | Path | None = None,
    *,
    seed: int = 0,
    all_rows: bool = False,
    imdb_dev: Literal["drawn", "last"] = "drawn",
) -> Corpus:
    """A data set by name.

    Args:
        dataset: ``"synthetic"``, ``"sst2"`` or ``"imdb"``.
        data_dir: folder to read instead of the Hugging Face hub. SST-2: ``train``, ``validation`` and ``test.parquet``,
            or the Stanford treebank's ``datasetSentences.txt`` and its companions. IMDB: ``train`` and
            ``test.parquet``, or ``aclImdb`` with its ``pos`` and ``neg`` folders. Parquet has columns ``text`` and
            ``label``; ``train-00000-of-00002.parquet`` and its like are parts of ``train``; where the folder itself
            holds none of these, one of its subfolders may hold them all.
        seed: of the generated texts, and of IMDB's development split.
        all_rows: SST-2: also take the rows outside the paper's subset. What belongs to it follows from the treebank's
            own files, or a column ``paper`` of all parquet files says; without it, and from the hub, all rows come
            with a note in the corpus.
        imdb_dev: the fifth of each class that IMDB's development split takes: ``"drawn"`` by the seed, or the
            ``"last"`` in the order of the files, as in the released code.

    Raises:
        DataUnavailable: no such folder or file, damaged files, no network; the message says what to do.
    """
    check(dataset, data_dir)
    if dataset == "synthetic":
        return synthetic(seed)
    folder = None if data_dir is None else Path(data_dir)
    corpus = _sst2(folder, all_rows) if dataset == "sst2" else _imdb(folder, seed if imdb_dev == "drawn" else None)
    for name, split in (("train", corpus.train), ("development", corpus.dev), ("test", corpus.test)):
        if not any(text.split() for text in split.texts):
            place = repr(str(folder)) if folder else _REPOSITORIES[dataset]
            raise DataUnavailable(f"no text of the {name} split in {place} has a word: give a folder whose texts do")
    return corpus


def _sst2(folder: Path | None, all_rows: bool) -> Corpus:
    known = True  # which rows are the paper's
    if folder is None:
        splits, known = hub.load_from_hub(_REPOSITORIES["sst2"], "sst2"), False
    elif treebank := _first_with(folder, "datasetSentences.txt", "stanfordSentimentTreebank"):
        splits = raw.treebank(treebank, balanced=not all_rows)
    else:
        names = ("train", "validation", "test")
        known = tables.marks_paper(folder, names)
        splits = tables.read(folder, names, "datasetSentences.txt", paper=known and not all_rows)
    note = "" if known or all_rows else _ALL_ROWS
    return Corpus("sst2", splits["train"], splits["validation"], splits["test"], note)


def _imdb(folder: Path | None, seed: int | None) -> Corpus:
    if folder is None:
        splits = hub.load_from_hub(_REPOSITORIES["imdb"], "imdb")
    elif unpacked := _first_with(folder, "train/pos", "aclImdb"):
        splits = {name: raw.reviews(unpacked / name) for name in ("train", "test")}
    else:
        splits = tables.read(folder, ("train", "test"), "aclImdb")
    train, dev = _stratified(splits["train"], _IMDB_DEV_SHARE, seed)
    if not len(dev):
        raise DataUnavailable("train must hold at least two texts of a class, one of them to develop on: add texts")
    return Corpus("imdb", train, dev, splits["test"])


def _stratified(split: Split, share: float, seed: int | None) -> tuple[Split, Split]:
    """Most of a split, and a share of each class, at least one of several texts: drawn, or without a seed the last.

    Both keep the split's order.
    """
    random = Random(f"{seed}/dev")
    taken: set[int] = set()
    for label in sorted(set(split.labels)):
        rows = [i for i, other in enumerate(split.labels) if other == label]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        taken.update(rows[len(rows) - count :] if seed is None else random.sample(rows, count))
    kept = [i for i in range(len(split)) if i not in taken]
    return _rows(split, kept), _rows(split, sorted(taken))


def _rows(split: Split, rows: Sequence[int]) -> Split:
    return Split([split.texts[i] for i in rows], [split.labels[i] for i in rows])


def _first_with(folder: Path, content: str, subfolder: str) -> Path | None:
    return next((place for place in (folder, folder / subfolder) if (place / content).exists()), None)
