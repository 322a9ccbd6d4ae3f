"""The folder of a run: what is in it, and writing it so that a kill at any moment leaves it whole."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from safr_fast.data.vocabulary import Vocabulary
from safr_fast.training.config import TrainConfig
from safr_fast.training.errors import RunError
from safr_fast.training.measure import Sum


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    epoch: int = 0
    """Whole epochs."""
    step: int = 0
    """Steps in all."""
    best_epoch: int = 0
    best_accuracy: float = -1.0
    seconds: float = 0.0
    """Of the whole epochs."""
    processes: int = 1
    begun: "Epoch" = field(default_factory=lambda: Epoch())


@dataclass(frozen=True)
class Epoch:
    """What is done of the epoch after the whole ones."""

    steps: int = 0
    seconds: float = 0.0
    whole: dict[str, Sum] = field(default_factory=dict)
    """Measured in it so far."""
    recent: dict[str, Sum] = field(default_factory=dict)
    """Measured since the last record."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. ``dev``, ``test``: accuracy, cross-entropy and regularisers of the tested epoch."""

    out: Path
    epochs: int
    best_epoch: int
    dev: dict[str, float]
    test: dict[str, float]
    agreement: dict[str, float]
    """With the planted truth of generated reviews, on the test split; empty for real ones."""
    seconds: float
    peak_memory: dict[str, int] = field(default_factory=dict)
    """Bytes, of the process that ended the run, the first of several, and of its GPU."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"out": str(self.out)}


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and their contents."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def vocabulary_file(self) -> Path:
        return self.path / "vocabulary.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model_file(self) -> Path:
        """The tested epoch's weights."""
        return self.path / "model.safetensors"

    @property
    def state_file(self) -> Path:
        """What is needed to go on after the last checkpoint; removed at the end."""
        return self.path / "state.safetensors"

    @property
    def summary_file(self) -> Path:
        """The result; written at the end."""
        return self.path / "summary.json"

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """In a run that is there, make sure that the data are the same, as far as their training words tell."""
        if self.vocabulary_file.exists() and self.load_vocabulary().words != vocabulary.words:
            raise RunError(
                f"the data are not those that {self.path} began with, their vocabulary differs: "
                "give those it began with by --data-dir, or train anew by another --out"
            )

    def open(self, config: TrainConfig, vocabulary: Vocabulary, *, resume: bool) -> None:
        """Put configuration and vocabulary into the folder, which is there and locked.

        Raises:
            RunError: another process has been here since :func:`place`.
        """
        if self.summary_file.exists() or (not resume and self.config_file.exists()):
            raise RunError(_taken(self.path))
        self._clear()
        write_json(self.config_file, config.to_json())
        write_atomically(self.vocabulary_file, lambda file: file.write_text(vocabulary.to_json(), encoding="utf-8"))

    def close(self) -> None:
        """Leave nothing of a finished run that only an unfinished one needs; its state goes last."""
        self._clear()
        self.state_file.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove what a kill left half written."""
        for file in filter(_is_temporary, self.path.iterdir()):
            file.unlink()

    def stored_config(self) -> TrainConfig:
        if not self.config_file.exists():
            raise RunError(f"{self.path} holds no run: it lacks {self.config_file.name}")
        with _undamaged(self.config_file):
            return TrainConfig.from_json(json.loads(self.config_file.read_text(encoding="utf-8")))

    def load_vocabulary(self) -> Vocabulary:
        with _undamaged(self.vocabulary_file):
            return Vocabulary.load(self.vocabulary_file)

    def load_summary(self) -> TrainResult | None:
        """The result, whatever else a version may have written beside it; None before the end."""
        fields = dataclasses.fields(TrainResult)
        needed = [option.name for option in fields if option.default is option.default_factory is dataclasses.MISSING]
        needed.remove("out")  # which may have moved
        values = self.load_result(self.summary_file.name, (*needed, "dev.accuracy", "test.accuracy"))
        if values is None:
            return None
        known = {option.name: values[option.name] for option in fields if option.name in values}
        return TrainResult(**known | {"out": self.path})

    def load_evaluation(self, name: str) -> dict[str, Any] | None:
        needed = ("config.k", "config.normalised", "texts", "rankers", "capacity")
        return self.load_result(name, needed, "remove it, and it is made anew")

    def load_result(self, name: str, needed: Sequence[str] = (), remedy: str | None = None) -> dict[str, Any] | None:
        """A file of results, which must have what is ``needed``, such as ``test.accuracy``; None if there is none."""
        file = self.path / name
        if not file.exists():
            return None
        with _undamaged(file, remedy):
            result = dict(json.loads(file.read_text(encoding="utf-8")))
            if missing := [keys for keys in needed if not _has(result, keys.split("."))]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            return result

    def append_metrics(self, record: dict[str, Any]) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def load_metrics(self) -> list[dict[str, Any]]:
        """What was recorded, but for damaged lines, such as the half one that a kill may leave at the end."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_bytes().splitlines():
                with suppress(ValueError):  # no JSON, or no UTF-8
                    records.append(json.loads(line))
        return [record for record in records if _has(record, ("event",))]

    def drop_metrics_after(self, progress: Progress) -> None:
        """Forget what was written after a checkpoint, a last half line too."""
        if not self.metrics_file.exists():
            return
        reached = {"step": progress.step, "epoch": progress.epoch}
        kept = [r for r in self.load_metrics() if r["event"] in reached and r[r["event"]] <= reached[r["event"]]]
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
        write_atomically(self.metrics_file, lambda file: file.write_text(text, encoding="utf-8"))

    def save_model(self, weights: dict[str, Tensor]) -> None:
        write_atomically(self.model_file, lambda file: save_file(weights, file))

    def digest(self) -> str:
        """Of the tested weights: what was made from them can tell whether they are still the same."""
        return hashlib.sha256(self.model_file.read_bytes()).hexdigest()

    def load_model(self) -> dict[str, Tensor]:
        if not self.model_file.exists():
            why = "it was removed" if self.summary_file.exists() else "the run has not finished an epoch"
            raise RunError(f"{self.path} holds no {self.model_file.name}: {why}")
        with _undamaged(self.model_file):
            return load_file(self.model_file)

    def save_state(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        values = {"progress": json.dumps(dataclasses.asdict(progress), allow_nan=False)}
        write_atomically(self.state_file, lambda file: save_file(tensors, file, values))

    def load_state(self) -> tuple[dict[str, Tensor], Progress] | None:
        if not self.state_file.exists():
            return None
        remedy = "remove it to begin again at the first epoch"
        with _undamaged(self.state_file, remedy), safe_open(self.state_file, "pt") as file:
            # Copied, since Windows replaces no file that is mapped into memory.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
            values = json.loads(file.metadata()["progress"])
            return tensors, Progress(**values | {"begun": Epoch(**values["begun"])})


# Where a run computes, not what: another machine may go on with it.
WHERE = ("data_dir", "device", "threads")


def place(config: TrainConfig, resume: bool) -> tuple[TrainConfig, RunFolder]:
    """The folder that a run goes to, and the configuration that it runs under: a resumed one's is its own."""
    if config.out is not None and config.out.exists() and not config.out.is_dir():
        raise RunError(f"{config.out} is a file: --out takes a folder, give another name")
    if resume:
        return _resumed(config)
    path = config.out or default_folder(config.dataset)
    if path.exists() and not all(map(_is_temporary, path.iterdir())):
        raise RunError(_taken(path))
    return dataclasses.replace(config.resolved(), out=path), RunFolder(path)


def _taken(path: Path) -> str:
    return f"{path} exists: go on with it by --resume, or give another folder by --out"


def default_folder(dataset: str) -> Path:
    return Path("runs") / f"{dataset}-{datetime.now():%Y%m%d-%H%M%S}"


def _resumed(config: TrainConfig) -> tuple[TrainConfig, RunFolder]:
    if config.out is None:
        begun = [file.parent for file in Path("runs").glob("*/config.json")]
        unfinished = sorted(str(path) for path in begun if not RunFolder(path).summary_file.exists())
        hint = f", for example --out {unfinished[-1]}" if unfinished else ""
        raise RunError(f"--resume needs --out, the folder of the run to go on with{hint}")
    folder = RunFolder(config.out)
    stored = dataclasses.replace(folder.stored_config(), out=config.out)
    moved = {name: getattr(config, name) for name in WHERE if getattr(config, name) != getattr(TrainConfig(), name)}
    stored = dataclasses.replace(stored, **moved)
    defaults = _flat(TrainConfig())
    changes = changed(stored, config, lambda name, value: value == defaults[name])
    if changes:
        raise RunError(f"{folder.path} began with {changes}: resume without these options, or start anew by --out")
    return stored, folder


def changed(stored: TrainConfig, now: TrainConfig, pardoned: Callable[[str, Any], bool]) -> str:
    """The options in which they differ, as a sentence's part; ``pardoned(name, value now)`` leaves one out."""
    before, after = _flat(stored), _flat(now)
    differing = [name for name, value in after.items() if value != before[name] and not pardoned(name, value)]
    return ", ".join(f"{name} {before[name]} (now {after[name]})" for name in differing)


def _flat(config: TrainConfig) -> dict[str, Any]:
    values = config.to_json()
    sizes = values.pop("model")
    return values | {f"model.{name}": value for name, value in sizes.items()}


def _has(values: Any, keys: Sequence[str]) -> bool:
    """Whether values that a file held are objects within objects down to the last key."""
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


@contextmanager
def _undamaged(file: Path, remedy: str | None = None) -> Iterator[None]:
    """Reading one file of a run: whatever is wrong with it becomes one sentence."""
    remedy = remedy or "put back a copy of it, or start anew by another --out"
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise RunError(f"{file} cannot be read ({error}): {remedy}") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """The file is either the old one or the new one, whenever the process is killed or the machine fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes it readable by its owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_temporary(file: Path) -> bool:
    """Half written, by this module or by safetensors, which writes ``.tmp…`` beside a file and renames it."""
    return file.name.startswith(".") and ".tmp" in file.name
