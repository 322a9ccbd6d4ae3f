"""The training loop: epochs, early stopping on development accuracy, the protocol's epoch restored and tested."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from safr_fast import data
from safr_fast.data.batches import EncodedSplit, epoch_seed, shuffled_buckets
from safr_fast.data.vocabulary import Vocabulary
from safr_fast.ops.dispatch import resolve
from safr_fast.training import report as lines
from safr_fast.training.agreement import Agreement
from safr_fast.training.config import TrainConfig
from safr_fast.training.errors import RunError
from safr_fast.training.measure import (
    Means,
    build_loss,
    check_finite,
    evaluate,
    forward,
    gradient_norms,
    training_terms,
)
from safr_fast.training.model import build_model
from safr_fast.training.protocol import PROTOCOLS
from safr_fast.training.run import Progress, RunFolder, place, write_json


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

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"out": str(self.out)}


def train(
    config: TrainConfig | None = None, *, resume: bool = False, report: Callable[[str], None] = print
) -> TrainResult:
    """Train, restore the epoch that the protocol tests, test it. A run that cannot start writes nothing.

    Args:
        config: the run; the defaults if None.
        resume: go on with the run in ``config.out`` after its last whole epoch, under the configuration it began with.
            An option of ``config`` that is not a default must agree with it. A finished run gives its result again.
        report: takes the lines for the reader.

    Raises:
        RunError: the folder holds another run, none to go on with, or a damaged one; no such device; the run diverged.
        BackendUnavailable: ``config.impl`` cannot serve on the run's device.
        DataUnavailable: see :func:`safr_fast.data.load`.
    """
    config, folder = place(config or TrainConfig(), resume)
    summary = folder.load_summary()
    if summary is not None:
        result = TrainResult(**summary | {"out": folder.path})
        report(f"{folder.path} is finished")
    else:
        with _settings(config) as device:
            result = _Run(config, folder, device, report).go()
    last = PROTOCOLS[config.protocol].tests_last_epoch
    report(lines.result(result.best_epoch, result.epochs, last, result.dev, result.test, result.agreement))
    return result


def load_corpus(config: TrainConfig) -> data.Corpus:
    """The data that a run trains and tests on."""
    split = PROTOCOLS[config.protocol].imdb_dev
    return data.load(config.dataset, config.data_dir, seed=config.data_seed, all_rows=config.all_rows, imdb_dev=split)


class _Run:
    """A model, its optimiser and its data between the first epoch and the last; ``config`` is resolved."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, device: torch.device, report: Callable[[str], None]
    ) -> None:
        resolve(config.impl, device.type, torch.float32)
        self.config, self.folder, self.device, self.report = config, folder, device, report
        self.protocol = PROTOCOLS[config.protocol]
        corpus = load_corpus(config)
        self.vocabulary = Vocabulary.of(corpus.train.texts)
        self.train, self.dev, self.test = (
            EncodedSplit.of(split, self.vocabulary, config.max_len or None, width=self.protocol.width(config.max_len))
            for split in (corpus.train, corpus.dev, corpus.test)
        )
        self.truth = corpus.test.truth
        self.loss = build_loss(config, cast(float, config.lambda_importance), cast(float, config.lambda_interaction))
        torch.manual_seed(epoch_seed(config.seed, 0))
        model = build_model(len(self.vocabulary), config.model, pads_count=self.protocol.pads_count)
        self.model = model.to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, fused=True)
        self.epochs = cast(int, config.epochs)
        self.progress = Progress()

    def go(self) -> TrainResult:
        self.folder.check_vocabulary(self.vocabulary)
        stored = self.folder.load_state()
        if stored is not None:
            tensors, self.progress = stored
            self._restore(tensors)
        self.folder.open(self.config, self.vocabulary)
        self.folder.drop_metrics_after(self.progress.epoch)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.report(
            f"{self.config.dataset}: {len(self.train):,} / {len(self.dev):,} / {len(self.test):,} texts, "
            f"{len(self.train.ids):,} training tokens, {len(self.vocabulary):,} word types; "
            f"{parameters:,} parameters on {self.device}; run folder {self.folder.path}"
        )
        if self.progress.epoch:
            self.report(f"going on after epoch {self.progress.epoch}")
        while self._goes_on():
            self._epoch(self.progress.epoch + 1)
        return self._finish()

    def _goes_on(self) -> bool:
        progress = self.progress
        return progress.epoch < self.epochs and progress.epoch - progress.best_epoch < self.config.patience

    def _epoch(self, epoch: int) -> None:
        started = time.perf_counter()
        # All randomness of an epoch follows from the seed and its number, so that a resumed run repeats it.
        torch.manual_seed(epoch_seed(self.config.seed, epoch))
        order = shuffled_buckets(self.train.lengths, self.config.batch_size, self.config.seed, epoch)
        whole, recent, step = Means(self.config.variant), Means(self.config.variant), self.progress.step
        self.model.train()
        for rows in tqdm(order, f"epoch {epoch}", leave=False, unit="step", disable=None):
            batch = self.train.batch(rows).to(self.device)
            output, parts = forward(self.model, self.loss, batch, self.protocol)
            self.optimizer.zero_grad()
            logged = (step + 1) % self.config.log_every == 0
            norms = gradient_norms(self.loss, parts, self.model) if logged and self.config.log_gradients else {}
            parts.total.backward()
            self.optimizer.step()
            step += 1
            terms = training_terms(self.loss, parts)
            for means in (whole, recent):
                means.add_batch(batch, output, terms)
            if logged:
                latest = recent.read() | norms
                check_finite(latest, f"training, steps up to {step}")
                self.folder.append_metrics({"event": "step", "epoch": epoch, "step": step, "train": latest})
                recent = Means(self.config.variant)
        trained = whole.read()
        check_finite(trained, f"training, epoch {epoch}")
        self._close_epoch(epoch, step, trained, time.perf_counter() - started)

    def _close_epoch(self, epoch: int, step: int, trained: dict[str, float], seconds: float) -> None:
        started = time.perf_counter()
        dev = evaluate(self.model, self.dev, self.config)
        check_finite(dev, f"evaluation after epoch {epoch}")
        evaluation_seconds = time.perf_counter() - started
        best = dev["accuracy"] > self.progress.best_accuracy
        self.progress = Progress(
            epoch=epoch,
            step=step,
            best_epoch=epoch if best else self.progress.best_epoch,
            best_accuracy=dev["accuracy"] if best else self.progress.best_accuracy,
            seconds=self.progress.seconds + seconds + evaluation_seconds,
        )
        record = {
            "event": "epoch",
            "epoch": epoch,
            "step": step,
            "seconds": seconds,
            "evaluation_seconds": evaluation_seconds,
            "tokens_per_second": len(self.train.ids) / seconds,
            "train": trained,
            "dev": dev,
            "best": best,
        }
        self.folder.append_metrics(record)
        # The weights go first: a kill between the two repeats the epoch and writes the same weights again.
        if best or self.protocol.tests_last_epoch:
            self.folder.save_model(_on_cpu(self.model.state_dict()))
        self.folder.save_state(self._tensors(), self.progress)
        left = (self.epochs - epoch) * self.progress.seconds / epoch if self._goes_on() else None
        self.report(lines.epoch(record, left))

    def _finish(self) -> TrainResult:
        self.model.load_state_dict(self.folder.load_model())
        agreement = None if self.truth is None else Agreement(self.truth)
        result = TrainResult(
            out=self.folder.path,
            epochs=self.progress.epoch,
            best_epoch=self.progress.best_epoch,
            dev=evaluate(self.model, self.dev, self.config),
            test=evaluate(self.model, self.test, self.config, agreement),
            agreement={} if agreement is None else agreement.summary(),
            seconds=self.progress.seconds,
        )
        check_finite(result.test, "the test")
        self.folder.append_metrics({"event": "end", "epoch": result.epochs, **result.to_json()})
        write_json(self.folder.summary_file, result.to_json())
        self.folder.state_file.unlink(missing_ok=True)
        return result

    def _tensors(self) -> dict[str, Tensor]:
        """Weights and the optimiser's state, under flat names."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for i, (name, _) in enumerate(self.model.named_parameters()):
            tensors |= {f"optimizer.{name}/{key}": value for key, value in state[i].items()}
        return _on_cpu(tensors)

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(_below("model.", tensors))
        state = self.optimizer.state_dict()
        for i, (name, _) in enumerate(self.model.named_parameters()):
            state["state"][i] = _below(f"optimizer.{name}/", tensors)
        self.optimizer.load_state_dict(state)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


@contextmanager
def _settings(config: TrainConfig) -> Iterator[torch.device]:
    """The run's device; its threads and random numbers, which are the caller's own again afterwards."""
    device = choose_device(config.device)
    threads = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield device
    finally:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """The device of that name, if it is there; ``auto``: the GPU if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    known = re.fullmatch("cpu|cuda(?::(0|[1-9][0-9]*))?", name)
    if known is None:
        raise RunError(f"device must be auto, cpu, cuda or cuda:<number>, got {name!r}")
    if name != "cpu" and int(known[1] or 0) >= count:
        seen = ", ".join(f"cuda:{index}" for index in range(count)) or "no GPU"
        raise RunError(f"device {name!r} is not there: this PyTorch sees {seen}; use --device cpu or auto")
    return torch.device(name)
