"""Where each data set comes from: generated, a local folder, or the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal, get_args

from safr_fast.data import hub
from safr_fast.data.corpus import Corpus, DataUnavailable, Split
from safr_fast.data.synthetic import synthetic

Dataset = Literal["synthetic", "sst2", "imdb"]
DATASETS: tuple[str, ...] = get_args(Dataset)

_REPOSITORIES = {"sst2": "SetFit/sst2", "imdb": "stanfordnlp/imdb"}
_IMDB_DEV_SHARE = 0.2


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


def load(dataset: Dataset, data_dir: str | Path | None = None, *, seed: int = 0, all_rows: bool = False) -> Corpus:
    """A data set by name.

    Args:
        dataset: ``"synthetic"``, ``"sst2"`` or ``"imdb"``.
        data_dir: folder to read instead of the Hugging Face hub. SST-2: ``train``, ``validation`` and ``test.parquet``,
            or the Stanford treebank's ``datasetSentences.txt`` and its companions. IMDB: ``train`` and
            ``test.parquet``, or ``aclImdb`` with its ``pos`` and ``neg`` folders. Parquet has columns ``text`` and
            ``label``.
        seed: of the generated texts, and of IMDB's development split (a fifth of each class).
        all_rows: SST-2: also take the rows that a column ``paper`` marks as not in the paper's subset.

    Raises:
        DataUnavailable: no such folder or file, wrong columns, no network; the message says what to do.
    """
    check(dataset, data_dir)
    if dataset == "synthetic":
        return synthetic(seed)
    folder = None if data_dir is None else Path(data_dir)
    return _sst2(folder, all_rows) if dataset == "sst2" else _imdb(folder, seed)


def _sst2(folder: Path | None, all_rows: bool) -> Corpus:
    if folder is None:
        splits = hub.load_from_hub(_REPOSITORIES["sst2"], "sst2")
    elif treebank := _first_with(folder, "datasetSentences.txt", "stanfordSentimentTreebank"):
        splits = _treebank(treebank, balanced=not all_rows)
    else:
        names = ("train", "validation", "test")
        splits = {name: _parquet(folder, name, "datasetSentences.txt", paper=not all_rows) for name in names}
    return Corpus("sst2", splits["train"], splits["validation"], splits["test"])


def _imdb(folder: Path | None, seed: int) -> Corpus:
    if folder is None:
        splits = hub.load_from_hub(_REPOSITORIES["imdb"], "imdb")
    elif raw := _first_with(folder, "train/pos", "aclImdb"):
        splits = {name: _review_files(raw / name) for name in ("train", "test")}
    else:
        splits = {name: _parquet(folder, name, "aclImdb") for name in ("train", "test")}
    train, dev = _stratified(splits["train"], _IMDB_DEV_SHARE, seed)
    return Corpus("imdb", train, dev, splits["test"])


def _stratified(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Most of a split, and a share of each class drawn from it; both keep the split's order."""
    random = Random(f"{seed}/dev")
    drawn: set[int] = set()
    for label in sorted(set(split.labels)):
        rows = [i for i, other in enumerate(split.labels) if other == label]
        drawn.update(random.sample(rows, round(share * len(rows))))
    kept = [i for i in range(len(split)) if i not in drawn]
    return _rows(split, kept), _rows(split, sorted(drawn))


def _rows(split: Split, rows: Sequence[int]) -> Split:
    return Split([split.texts[i] for i in rows], [split.labels[i] for i in rows])


def _first_with(folder: Path, content: str, subfolder: str) -> Path | None:
    return next((place for place in (folder, folder / subfolder) if (place / content).exists()), None)


def _parquet(folder: Path, name: str, alternative: str, paper: bool = False) -> Split:
    """All files ``name*.parquet`` of a folder, or of its subfolders as the hub lays them out."""
    files = sorted(folder.glob(f"{name}*.parquet")) or sorted(folder.glob(f"*/{name}*.parquet"))
    if not files:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise DataUnavailable(f"{str(folder)!r} holds neither {name}.parquet nor {alternative}, but {found}")
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise DataUnavailable('parquet files need pyarrow: pip install "safr-fast[data]"') from None
    texts: list[str] = []
    labels: list[int] = []
    for file in files:
        try:
            columns = parquet.read_table(file).to_pydict()
        except (ArrowException, OSError) as error:
            raise DataUnavailable(f"{str(file)!r} cannot be read as parquet: {error}") from error
        if not {"text", "label"} <= columns.keys():
            raise DataUnavailable(f"{str(file)!r} must have columns text and label, got {', '.join(columns)}")
        marked = columns.get("paper") if paper else None
        taken = [i for i in range(len(columns["text"])) if marked is None or marked[i]]
        texts += [columns["text"][i] for i in taken]
        labels += [columns["label"][i] for i in taken]
    return _checked(Split(texts, labels), folder)


def _checked(split: Split, place: Path) -> Split:
    wrong = set(split.labels) - {0, 1}
    if wrong or not split.labels:
        found = f"labels {sorted(map(str, wrong))[:5]}" if wrong else "no rows"
        raise DataUnavailable(f"labels in {str(place)!r} must be 0 (negative) or 1 (positive), found {found}")
    return split


def _review_files(folder: Path) -> Split:
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(("neg", "pos")):
        files = sorted((folder / name).glob("*.txt"))
        if not files:
            raise DataUnavailable(f"{str(folder / name)!r} holds no .txt files: give the unpacked aclImdb folder")
        texts += [file.read_text(encoding="utf-8") for file in files]
        labels += [label] * len(files)
    return Split(texts, labels)


def _treebank(folder: Path, balanced: bool) -> dict[str, Split]:
    """The released reading of the Stanford treebank.

    A sentence takes part if a phrase equals it word for word, negative up to a sentiment of 0.4 and positive above
    0.6. With ``balanced`` the larger class of the training split is cut to the size of the smaller.
    """
    for name in ("datasetSplit.txt", "dictionary.txt", "sentiment_labels.txt"):
        if not (folder / name).exists():
            raise DataUnavailable(f"{str(folder)!r} lacks {name}: give the whole unpacked stanfordSentimentTreebank")
    phrases = dict(line.rsplit("|", 1) for line in _lines(folder / "dictionary.txt"))
    sentiment = {number: float(value) for number, value in _records(folder / "sentiment_labels.txt", "|")}
    sentence_split = dict(_records(folder / "datasetSplit.txt", ","))
    names = {"1": "train", "2": "test", "3": "validation"}
    by_class: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in names.values()}
    for number, sentence in _records(folder / "datasetSentences.txt", "\t"):
        value = sentiment[phrases[sentence]] if sentence in phrases else 0.5
        if value <= 0.4 or value > 0.6:
            by_class[names[sentence_split[number]]][value > 0.6].append(sentence)
    if balanced:
        size = min(map(len, by_class["train"]))
        by_class["train"] = (by_class["train"][0][:size], by_class["train"][1][:size])
    return {
        name: _checked(Split(negative + positive, [0] * len(negative) + [1] * len(positive)), folder)
        for name, (negative, positive) in by_class.items()
    }


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _records(file: Path, separator: str) -> list[tuple[str, str]]:
    """The two columns of a file that has a header."""
    return [(left, right) for left, _, right in (line.partition(separator) for line in _lines(file)[1:])]
