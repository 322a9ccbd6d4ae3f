"""Generated reviews against their own rule, real data sets from folders and caches."""

import itertools
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import SHARED

from safr_fast.data import DataUnavailable, Vocabulary, hub, load, sources, synthetic
from safr_fast.data.corpus import Split
from safr_fast.data.synthetic import _SIZES, NEGATIVE, NEGATORS, POSITIVE, score

needs_shared = pytest.mark.skipif(
    not (SHARED / "data").exists(), reason="the real data sets are not beside the repository"
)


@pytest.fixture(scope="module")
def reviews() -> Split:
    return synthetic(3, {"train": 2_000, "dev": 10, "test": 10}).train


def test_a_generated_label_follows_from_the_planted_words(reviews: Split) -> None:
    assert reviews.truth is not None
    for text, label, truth in zip(reviews.texts, reviews.labels, reviews.truth, strict=True):
        assert score(text, truth) != 0
        assert label == (score(text, truth) > 0)


def test_the_planted_truth_points_at_the_words_it_names(reviews: Split) -> None:
    assert reviews.truth is not None
    for text, truth in zip(reviews.texts, reviews.truth, strict=True):
        words = text.split()
        assert len(words) == len(truth.roles)
        for word, role in zip(words, truth.roles, strict=True):
            expected = "sentiment" if word in POSITIVE + NEGATIVE else "negator" if word in NEGATORS else "filler"
            assert role == expected
        assert {i for i, _ in truth.pairs} == {i for i, role in enumerate(truth.roles) if role == "negator"}
        assert all(truth.roles[j] == "sentiment" for _, j in truth.pairs)


def test_taking_a_planted_pair_apart_changes_the_label_of_a_single_opinion(reviews: Split) -> None:
    assert reviews.truth is not None
    single = [i for i, truth in enumerate(reviews.truth) if truth.roles.count("sentiment") == len(truth.pairs) == 1]
    assert single
    for i in single:
        positive = any(word in POSITIVE for word in reviews.texts[i].split())
        assert reviews.labels[i] == (not positive)


def test_generated_classes_are_balanced_and_lengths_have_a_long_tail(reviews: Split) -> None:
    assert sum(reviews.labels) / len(reviews) == pytest.approx(0.5, abs=0.05)
    lengths = sorted(len(text.split()) for text in reviews.texts)
    median = lengths[len(lengths) // 2]
    assert 10 < median < 25
    assert lengths[-1] > 3 * median
    assert lengths[-1] < 250


def test_generated_splits_follow_from_the_seed_and_differ() -> None:
    sizes = {"train": 30, "dev": 30, "test": 30}
    first, again, other = synthetic(0, sizes), synthetic(0, sizes), synthetic(1, sizes)
    assert first == again
    texts = [split.texts for corpus in (first, other) for split in (corpus.train, corpus.dev, corpus.test)]
    assert all(a != b for a, b in itertools.combinations(texts, 2))


def test_the_sizes_of_generated_splits_are_those_that_the_docstring_names() -> None:
    assert "{train:,}, {dev:,} and {test:,} if None".format(**_SIZES) in str(synthetic.__doc__)


@needs_shared
def test_sst2_parquet_gives_the_paper_subset_and_the_released_vocabulary() -> None:
    corpus = load("sst2", SHARED / "data" / "sst2")
    assert [len(split) for split in (corpus.train, corpus.dev, corpus.test)] == [6_244, 825, 1_743]
    assert len(Vocabulary.of(corpus.train.texts)) == 7_008
    assert sum(corpus.train.labels) == 3_122


def test_rows_that_may_not_be_the_papers_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation", "test"):
        write_parquet(tmp_path / f"{split}.parquet", text=["a", "b"], label=[0, 1])
    assert load("sst2", tmp_path).note.startswith("sst2: all rows, since nothing here says which are the paper's")
    assert load("sst2", tmp_path, all_rows=True).note == ""
    splits = {split: Split(["a"], [0]) for split in ("train", "validation", "test")}
    monkeypatch.setattr(sources.hub, "require", lambda *_: None)
    monkeypatch.setattr(sources.hub, "load_from_hub", lambda *_: splits)
    assert load("sst2").note == load("sst2", tmp_path).note
    for split in splits:
        write_parquet(tmp_path / f"{split}.parquet", text=["a", "b"], label=[0, 1], paper=[True, False])
    marked = load("sst2", tmp_path)
    assert (len(marked.train), marked.note) == (1, "")
    (tmp_path / "test.parquet").rename(tmp_path / "test-00000-of-00002.parquet")
    write_parquet(tmp_path / "test-00001-of-00002.parquet", text=["c"], label=[1])
    assert [len(split) for split in (load("sst2", tmp_path).train, load("sst2", tmp_path).test)] == [2, 3]
    assert load("sst2", tmp_path).note == load("sst2").note


@needs_shared
def test_sst2_gives_all_rows_when_asked() -> None:
    corpus = load("sst2", SHARED / "data" / "sst2", all_rows=True)
    assert [len(split) for split in (corpus.train, corpus.dev, corpus.test)] == [6_920, 872, 1_821]


@needs_shared
def test_imdb_parquet_gives_a_stratified_development_split_by_seed() -> None:
    corpus, other = (load("imdb", SHARED / "data" / "imdb", seed=seed) for seed in (0, 1))
    assert [len(split) for split in (corpus.train, corpus.dev, corpus.test)] == [20_000, 5_000, 25_000]
    assert sum(corpus.dev.labels) == 2_500
    assert set(corpus.dev.texts) != set(other.dev.texts)
    whole = sorted([*corpus.train.texts, *corpus.dev.texts])
    assert whole == sorted([*other.train.texts, *other.dev.texts])


def treebank(folder: Path) -> Path:
    phrases = {"A good film": 0.9, "A dull one": 0.1, "So - so": 0.5, "Fine work": 0.7, "Bad": 0.4, "Great": 0.61}
    sentences = [*phrases, "Not among the phrases"]
    folder.mkdir()
    (folder / "datasetSentences.txt").write_text(
        "sentence_index\tsentence\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(sentences, 1))
    )
    splits = {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 3, 7: 1}
    (folder / "datasetSplit.txt").write_text(
        "sentence_index,splitset_label\n" + "".join(f"{i},{split}\n" for i, split in splits.items())
    )
    (folder / "dictionary.txt").write_text("".join(f"{text}|{i}\n" for i, text in enumerate(phrases)))
    (folder / "sentiment_labels.txt").write_text(
        "phrase ids|sentiment values\n" + "".join(f"{i}|{value}\n" for i, value in enumerate(phrases.values()))
    )
    return folder


@pytest.mark.parametrize("place", [".", "stanfordSentimentTreebank"])
def test_the_raw_treebank_is_read_as_the_released_code_reads_it(tmp_path: Path, place: str) -> None:
    treebank(tmp_path / "stanfordSentimentTreebank")
    folder = tmp_path if place == "." else tmp_path / place
    corpus = load("sst2", folder)
    assert (corpus.train.texts, corpus.train.labels) == (["A dull one", "A good film"], [0, 1])
    assert (corpus.test.texts, corpus.test.labels) == (["Bad"], [0])
    assert (corpus.dev.texts, corpus.dev.labels) == (["Great"], [1])
    assert load("sst2", folder, all_rows=True).train.texts == ["A dull one", "A good film", "Fine work"]


def test_a_treebank_line_ends_at_a_newline_alone(tmp_path: Path) -> None:
    folder = treebank(tmp_path / "treebank")
    for name in ("datasetSentences.txt", "dictionary.txt"):
        text = (folder / name).read_text(encoding="utf-8").replace("A good film", "A\u0085good\u2028film")
        (folder / name).write_text(text, encoding="utf-8", newline="\r\n")
    assert load("sst2", folder).train.texts == ["A dull one", "A\u0085good\u2028film"]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("datasetSplit.txt", "4,1\n5,2\n6,3\n7,1\n", "", "datasetSplit.txt' is cut short, it has no line for number 4"),
        ("datasetSplit.txt", "6,3\n7,1\n", "6,", "line 7 of .*datasetSplit.txt' is damaged, '6,'"),
        ("dictionary.txt", "A good film|0", "A good film", "line 1 of .*dictionary.txt' is damaged, 'A good film'"),
        ("sentiment_labels.txt", "0|0.9", "0|high", "line 2 of .*sentiment_labels.txt' is damaged"),
        (
            "sentiment_labels.txt",
            "4|0.4\n5|0.61\n",
            "",
            "sentiment_labels.txt' is cut short, it has no line for number 4",
        ),
        ("datasetSentences.txt", "A dull one", "A d\xfcll one", "datasetSentences.txt' must be UTF-8"),
    ],
)
def test_a_damaged_treebank_names_the_file_and_the_remedy(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    file = treebank(tmp_path / "treebank") / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new), encoding="latin-1")
    with pytest.raises(DataUnavailable, match=f"{message}.*(unpack the treebank anew|get it anew)"):
        load("sst2", tmp_path / "treebank")


def test_the_raw_imdb_folder_is_read(tmp_path: Path) -> None:
    for split, label in itertools.product(("train", "test"), ("pos", "neg")):
        folder = tmp_path / "aclImdb" / split / label
        folder.mkdir(parents=True)
        for i in range(10):
            (folder / f"{i}_7.txt").write_text(f"{split} {label} {i}<br />", encoding="utf-8")
    corpus = load("imdb", tmp_path)
    assert (len(corpus.train), len(corpus.dev), len(corpus.test)) == (16, 4, 20)
    for split in (corpus.train, corpus.dev, corpus.test):
        assert all(("pos" in text) == label for text, label in zip(split.texts, split.labels, strict=True))


def test_each_class_of_a_small_imdb_gives_a_text_to_develop_on(tmp_path: Path) -> None:
    for split, label, i in itertools.product(("train", "test"), ("pos", "neg"), range(2)):
        folder = tmp_path / "aclImdb" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}_7.txt").write_text("a film", encoding="utf-8")
    assert sorted(load("imdb", tmp_path).dev.labels) == [0, 1]


def write_parquet(file: Path, **columns: list[object]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)


def test_parquet_in_the_hub_layout_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(
            tmp_path / "plain_text" / f"{split}-00000-of-00002.parquet", text=["a b", "c"] * 5, label=[0, 1] * 5
        )
        write_parquet(tmp_path / "plain_text" / f"{split}-00001-of-00002.parquet", text=["d"] * 5, label=[1] * 5)
    corpus = load("imdb", tmp_path)
    assert (len(corpus.train), len(corpus.dev), len(corpus.test)) == (12, 3, 15)


def test_files_whose_names_only_begin_like_a_split_are_not_read(tmp_path: Path) -> None:
    for name in ("train", "test", "train_backup", "train-old", "testing"):
        write_parquet(tmp_path / f"{name}.parquet", text=[name] * 10, label=[0, 1] * 5)
    corpus = load("imdb", tmp_path)
    assert {*corpus.train.texts, *corpus.dev.texts, *corpus.test.texts} == {"train", "test"}


def test_splits_come_from_the_folder_itself_before_any_subfolder(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "a", tmp_path / "b"):
        for split in ("train", "test"):
            write_parquet(place / f"{split}.parquet", text=[place.name] * 10, label=[0, 1] * 5)
    corpus = load("imdb", tmp_path)
    assert {*corpus.train.texts, *corpus.test.texts} == {tmp_path.name}


def two_data_sets(folder: Path) -> None:
    for name in ("imdb", "sst2"):
        write_parquet(folder / name / "train.parquet", text=["a", "b"], label=[0, 1])


def splits_in_two_folders(folder: Path) -> None:
    for name in ("train", "test"):
        write_parquet(folder / name / f"{name}.parquet", text=["a", "b"], label=[0, 1])


def train_alone(folder: Path) -> None:
    write_parquet(folder / "train.parquet", text=["a", "b"], label=[0, 1])
    write_parquet(folder / "other" / "test.parquet", text=["a", "b"], label=[0, 1])


def a_part_missing(folder: Path) -> None:
    write_parquet(folder / "train-00000-of-00002.parquet", text=["a", "b"], label=[0, 1])


def whole_and_parts(folder: Path) -> None:
    a_part_missing(folder)
    write_parquet(folder / "train.parquet", text=["a", "b"], label=[0, 1])


def no_text(folder: Path) -> None:
    write_parquet(folder / "train.parquet", text=["a", None], label=[0, 1])


def no_label(folder: Path) -> None:
    write_parquet(folder / "train.parquet", text=["a", "b"], label=[0, None])


def no_rows(folder: Path) -> None:
    write_parquet(folder / "train.parquet", text=[], label=[])


def latin_1(folder: Path) -> None:
    for name in ("neg", "pos"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / "0_3.txt").write_text("caf\xe9", encoding="latin-1")


def empty(folder: Path) -> None:
    (folder / "notes.md").touch()


def without_labels(folder: Path) -> None:
    write_parquet(folder / "train.parquet", sentence=["a"], label=[1])


def unknown_labels(folder: Path) -> None:
    write_parquet(folder / "train.parquet", text=["a", "b"], label=[-1, 1])


def one_of_each(folder: Path) -> None:
    for name in ("train", "test"):
        write_parquet(folder / f"{name}.parquet", text=["a", "b"], label=[0, 1])


def no_words_in_reviews(folder: Path) -> None:
    for split, label, i in itertools.product(("train", "test"), ("pos", "neg"), range(2)):
        file = folder / split / label / f"{i}_7.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a film" if split == "train" else " ", encoding="utf-8")


def no_words_in_tables(folder: Path) -> None:
    for name, text in (("train", " "), ("test", "a film")):
        write_parquet(folder / f"{name}.parquet", text=[text] * 4, label=[0, 0, 1, 1])


def no_parquet(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    (folder / "train.parquet").write_text("text,label")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (empty, "holds neither train.parquet nor aclImdb, but notes.md"),
        (without_labels, "must have columns text and label, got sentence, label"),
        (unknown_labels, "train.parquet' must be 0 .* or 1 .*, row 0 has -1: mend"),
        (no_label, "train.parquet' must be 0 .* or 1 .*, row 1 has None: mend"),
        (no_text, "train.parquet' must be a string, row 1 has None: mend"),
        (no_rows, "train in .* has no rows: give a folder"),
        (one_of_each, "train must hold at least two texts of a class"),
        (no_parquet, "train.parquet' cannot be read as parquet: .* get it anew"),
        (two_data_sets, "holds several data sets, in imdb, sst2: give one"),
        (splits_in_two_folders, "holds several data sets, in test, train: give one"),
        (train_alone, "holds neither test.parquet nor aclImdb, but other, train.parquet"),
        (a_part_missing, "must hold either train.parquet or all of its parts, found train-00000-of-00002.parquet"),
        (whole_and_parts, "or all of its parts, found train-00000-of-00002.parquet, train.parquet"),
        (no_words_in_reviews, "no text of the test split in .* has a word: give a folder"),
        (no_words_in_tables, "no text of the train split in .* has a word: give a folder"),
        (latin_1, "neg/0_3.txt' must be UTF-8: .* convert"),
    ],
)
def test_a_folder_that_does_not_serve_says_why(tmp_path: Path, fill: Callable[[Path], None], message: str) -> None:
    fill(tmp_path)
    with pytest.raises(DataUnavailable, match=message):
        load("imdb", tmp_path)


def test_a_table_of_sst2_that_is_damaged_is_named(tmp_path: Path) -> None:
    no_parquet(tmp_path)
    with pytest.raises(DataUnavailable, match=r"train.parquet' cannot be read as parquet: .* get it anew"):
        load("sst2", tmp_path)


def test_names_and_folders_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset must be one of .* got 'sst3'"):
        load("sst3")  # type: ignore[arg-type]
    with pytest.raises(DataUnavailable, match="nowhere' is no folder"):
        load("sst2", tmp_path / "nowhere")
    with pytest.raises(DataUnavailable, match="synthetic takes none"):
        load("synthetic", tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packets vanish: neither a name nor a connection is ever answered; the caches are empty, and nothing was tried."""
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("datasets")

    def never(*_: object, **__: object) -> None:
        time.sleep(5)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", never)
    monkeypatch.setattr(hub, "_tried", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("dataset", ["sst2", "imdb"])
def test_no_network_and_no_folder_is_an_error_in_under_two_seconds(dataset: sources.Dataset) -> None:
    started = time.perf_counter()
    with pytest.raises(DataUnavailable, match=r"no connection to .* give --data-dir"):
        load(dataset)
    assert time.perf_counter() - started < 2


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "leftover",
    [
        "datasets/SetFit___sst2/",
        "datasets/SetFit___sst2/default/0.0.0/abc/dataset_info.json",
        "datasets/SetFit___sst2/default/0.0.0/abc.incomplete/sst2-train.arrow",
        "hub/datasets--SetFit--sst2/refs/main",
        "hub/datasets--SetFit--sst2/snapshots/abc/README.md",
    ],
)
def test_a_cache_without_data_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftover: str) -> None:
    monkeypatch.setattr(hub, "_PATIENCE_SECONDS", 0.01)
    folder, _, file = leftover.rpartition("/")
    (tmp_path / folder).mkdir(parents=True)
    if file:
        (tmp_path / folder / file).touch()
    with pytest.raises(DataUnavailable, match="is not in the local cache"):
        load("sst2")


@pytest.mark.usefixtures("no_network")
def test_a_snapshot_with_data_counts_as_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_PATIENCE_SECONDS", 0.01)
    file = tmp_path / "hub" / "datasets--SetFit--sst2" / "snapshots" / "abc" / "data" / "train.jsonl"
    file.parent.mkdir(parents=True)
    file.touch()
    assert "no connection" in str(hub.require("SetFit/sst2", "sst2"))


@pytest.mark.usefixtures("no_network")
def test_the_network_is_tried_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    monkeypatch.setattr(hub, "_reachable", lambda address: tries.append(address))
    for _ in range(2):
        with pytest.raises(DataUnavailable, match="no connection"):
            load("imdb")
    assert len(tries) == 1
    now = time.monotonic()
    monkeypatch.setattr(hub.time, "monotonic", lambda: now + 3_600)
    with pytest.raises(DataUnavailable, match="no connection"):
        load("imdb")
    assert len(tries) == 2


@pytest.mark.usefixtures("no_network")
def test_a_cached_data_set_loads_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    prepared = tmp_path / "datasets" / "SetFit___sst2" / "default" / "0.0.0" / ("0" * 40)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for split in ("train", "validation", "test"):
        write_parquet(tmp_path / "source" / f"{split}.parquet", text=["good one", "bad one"], label=[1, 0])
    builder = datasets.load_dataset_builder(
        "parquet",
        data_files={split: str(tmp_path / "source" / f"{split}.parquet") for split in ("train", "validation", "test")},
        cache_dir=str(tmp_path / "built"),
    )
    builder.download_and_prepare(str(prepared))
    for file in prepared.glob("parquet-*.arrow"):  # named after the data set when it comes from the hub
        file.rename(prepared / file.name.replace("parquet", "sst2"))
    corpus = load("sst2")
    assert (corpus.dev.texts, corpus.dev.labels) == (["good one", "bad one"], [1, 0])


def test_a_missing_data_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataUnavailable, match=r'pip install "safr-fast\[data\]"'):
        load("sst2")
