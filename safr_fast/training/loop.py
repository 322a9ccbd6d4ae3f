"""The training loop: epochs, early stopping on development accuracy, the protocol's epoch restored and tested."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from safr_fast import data
from safr_fast.data.batches import EncodedSplit, epoch_seed
from safr_fast.data.vocabulary import Vocabulary
from safr_fast.integrations.distributed import ALONE, Processes, processes
from safr_fast.ops.dispatch import resolve
from safr_fast.training import report as lines
from safr_fast.training.agreement import Agreement
from safr_fast.training.config import TrainConfig
from safr_fast.training.errors import RunError
from safr_fast.training.lock import locked
from safr_fast.training.measure import (
    Means,
    Sum,
    build_loss,
    check_finite,
    evaluate,
    forward,
    gradient_norms,
    training_terms,
)
from safr_fast.training.meter import Meter, peak_memory
from safr_fast.training.model import build_model
from safr_fast.training.plan import Step, share, steps
from safr_fast.training.protocol import PROTOCOLS
from safr_fast.training.run import Epoch, Progress, RunFolder, TrainResult, place, write_json
from safr_fast.training.settings import settings


def train(
    config: TrainConfig | None = None, *, resume: bool = False, report: Callable[[str], None] = print
) -> TrainResult:
    """Train, restore the epoch that the protocol tests, test it. A run that cannot start writes nothing.

    Called in every process of ``torchrun``, or of a process group, they train one model together; the first writes.

    Args:
        config: the run; the defaults if None.
        resume: go on with the run in ``config.out`` after its last checkpoint, under the configuration it began with.
            An option of ``config`` that is not a default must agree with it, but for where it runs: ``data_dir``,
            ``device`` and ``threads`` may be others. A finished run gives its result again.
        report: takes the lines for the reader.

    Raises:
        RunError: the folder holds another run, none to go on with, or a damaged one; no such device; the run diverged.
        BackendUnavailable: ``config.impl`` cannot serve on the run's device.
        DataUnavailable: see :func:`safr_fast.data.load`.
    """
    with processes() as team:
        config, folder, finished = team.from_first(lambda: _placed(config or TrainConfig(), resume))
        say = report if team.first else lambda line: None
        if finished is not None:
            result = finished
            say(f"{folder.path} is finished")
            if team.first and folder.state_file.exists():
                folder.close()
        else:
            with settings(config) as device:
                result = _Run(config, folder, device, team, say).go(resume)
    last = PROTOCOLS[config.protocol].tests_last_epoch
    say(lines.result(result.best_epoch, result.epochs, last, result.dev, result.test, result.agreement))
    if result.peak_memory:
        say(lines.peak_memory(result.peak_memory))
    return result


def _placed(config: TrainConfig, resume: bool) -> tuple[TrainConfig, RunFolder, TrainResult | None]:
    config, folder = place(config, resume)
    return config, folder, folder.load_summary()


def load_corpus(config: TrainConfig) -> data.Corpus:
    """The data that a run trains and tests on."""
    split = PROTOCOLS[config.protocol].imdb_dev
    return data.load(config.dataset, config.data_dir, seed=config.data_seed, all_rows=config.all_rows, imdb_dev=split)


def corpus_of_run(run: str | Path, config: TrainConfig, data_dir: str | Path | None) -> data.Corpus:
    """The data that a run was trained on, from ``data_dir`` if they were moved.

    Raises:
        RunError: other words are in the training split.
        DataUnavailable: see :func:`safr_fast.data.load`.
    """
    corpus = load_corpus(config if data_dir is None else dataclasses.replace(config, data_dir=Path(data_dir)))
    RunFolder(Path(run)).check_vocabulary(Vocabulary.of(corpus.train.texts))
    return corpus


class _Run:
    """A model, its optimiser and its data between the first epoch and the last; ``config`` is resolved.

    Every process of ``team`` has one; the first writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        device: torch.device,
        team: Processes,
        report: Callable[[str], None],
    ) -> None:
        resolve(config.impl, device, torch.float32)
        self.config, self.folder, self.device, self.team, self.report = config, folder, device, team, report
        self.protocol = PROTOCOLS[config.protocol]
        corpus = load_corpus(config)
        self.note = corpus.note
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
        self.progress = Progress(processes=team.count)

    def go(self, resume: bool) -> TrainResult:
        if self.team.first:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.path) if self.team.first else nullcontext():
            self._begin(resume)
            while self._goes_on():
                self._epoch(self.progress.epoch + 1)
            return self._finish()

    def _begin(self, resume: bool) -> None:
        self.folder.check_vocabulary(self.vocabulary)
        stored = self.folder.load_state()
        if stored is not None:
            tensors, progress = stored
            if progress.processes != self.team.count:
                raise RunError(
                    f"{self.folder.path} began with {progress.processes} processes, now there are {self.team.count}: "
                    "resume with as many, or start anew by another --out"
                )
            self.progress = progress
            self._restore(tensors)
        self.network = self._network()
        self.team.wait()  # before the first process writes what others still read
        if self.team.first:
            self.folder.open(self.config, self.vocabulary, resume=resume)
            self.folder.drop_metrics_after(self.progress)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.report(
            f"{self.config.dataset}: {len(self.train):,} / {len(self.dev):,} / {len(self.test):,} texts, "
            f"{len(self.train.ids):,} training tokens, {len(self.vocabulary):,} word types; "
            f"{parameters:,} parameters on {self.device}; run folder {self.folder.path}"
        )
        if self.note:
            self.report(self.note)
        if self.progress.step:
            begun = f" and {self.progress.begun.steps} steps" if self.progress.begun.steps else ""
            self.report(f"going on after epoch {self.progress.epoch}{begun}")

    def _goes_on(self) -> bool:
        progress = self.progress
        return progress.epoch < self.epochs and progress.epoch - progress.best_epoch < self.config.patience

    def _network(self) -> nn.Module:
        """The model as training steps call it."""
        network: nn.Module = self.model
        if self.config.compile:
            network = cast(nn.Module, torch.compile(network, dynamic=True))
        if self.team.count > 1:
            network = DistributedDataParallel(network)
        return network

    def _epoch(self, epoch: int) -> None:
        """All randomness of an epoch follows from the seed and its number, so that a resumed run repeats it."""
        begun = self.progress.begun
        started = time.perf_counter() - begun.seconds
        plan = steps(self.train.lengths, self.config, epoch, self.team.count)
        whole, recent = self._means(), self._means()
        if self.team.first:
            whole, recent = self._means(begun.whole), self._means(begun.recent)
        step, done = self.progress.step, sum(planned.size for planned in plan[: begun.steps])
        self.network.train()
        with Meter(epoch, len(self.train.ids), done, self.report if self.team.first else None) as meter:
            for i, planned in enumerate(plan[begun.steps :], begun.steps + 1):
                step += 1
                logged = step % self.config.log_every == 0
                norms = self._step(planned, logged and self.config.log_gradients, whole, recent)
                meter.add(planned.size)
                if logged:
                    self._record_step(epoch, step, recent.read(self.team) | norms)
                    recent = self._means()
                if step % self.config.checkpoint_every == 0:
                    measured = whole.collected(self.team), recent.collected(self.team)
                    check_finite({name: total for name, (total, _) in measured[0].items()}, f"training, epoch {epoch}")
                    state = Epoch(i, time.perf_counter() - started, *measured)
                    self._save(dataclasses.replace(self.progress, step=step, begun=state))
        trained = whole.read(self.team)
        check_finite(trained, f"training, epoch {epoch}")
        self._close_epoch(epoch, step, trained, time.perf_counter() - started)

    def _means(self, begun: Mapping[str, Sum] | None = None) -> Means:
        return Means(self.config.variant, self.protocol, begun)

    def _step(self, step: Step, norms_asked: bool, *measured: Means) -> dict[str, float]:
        """Move the weights; the norms, if asked for, are of the first process's last batch."""
        norms: dict[str, float] = {}
        self.optimizer.zero_grad()
        own = list(zip(step.batches, step.seeds, strict=True))[self.team.rank :: self.team.count]
        # The last step of an epoch may have no batch for a process, which yet has to take part: with one of weight 0.
        idle = not own
        for i, (rows, seed) in enumerate(own or [(step.batches[0], step.seeds[0])], 1):
            torch.manual_seed(seed)
            batch = self.train.batch(rows).to(self.device)
            last = i >= len(own)
            with self._gradients_exchanged(last):
                output, parts = forward(self.network, self.loss, batch, self.protocol, self.config.bf16)
                if norms_asked and last and self.team.first:
                    norms = gradient_norms(self.loss, parts, self.model)
                # DistributedDataParallel takes the mean over processes, where the step's loss is a sum.
                weight = 0 if idle else self.team.count
                (weight * share(step, batch, self.loss, parts)).backward()
            for means in () if idle else measured:
                means.add_batch(batch, output, training_terms(self.loss, parts))
        self.optimizer.step()
        return norms

    def _gradients_exchanged(self, exchanged: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients once a step, in its last batch."""
        if isinstance(self.network, DistributedDataParallel) and not exchanged:
            return self.network.no_sync()
        return nullcontext()

    def _record_step(self, epoch: int, step: int, latest: dict[str, float]) -> None:
        check_finite(latest, f"training, steps up to {step}")
        if self.team.first:
            self.folder.append_metrics({"event": "step", "epoch": epoch, "step": step, "train": latest})

    def _save(self, progress: Progress) -> None:
        if self.team.first:
            self.folder.save_state(self._tensors(), progress)

    def _close_epoch(self, epoch: int, step: int, trained: dict[str, float], seconds: float) -> None:
        started = time.perf_counter()
        dev = evaluate(self.model, self.dev, self.config, self.team)
        check_finite(dev, f"evaluation after epoch {epoch}")
        evaluation_seconds = time.perf_counter() - started
        best = dev["accuracy"] > self.progress.best_accuracy
        self.progress = Progress(
            epoch=epoch,
            step=step,
            best_epoch=epoch if best else self.progress.best_epoch,
            best_accuracy=dev["accuracy"] if best else self.progress.best_accuracy,
            seconds=self.progress.seconds + seconds + evaluation_seconds,
            processes=self.team.count,
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
        if self.team.first:
            self.folder.append_metrics(record)
            # The weights go first: a kill between the two repeats the epoch and writes the same weights again.
            if best or self.protocol.tests_last_epoch:
                self.folder.save_model(_on_cpu(self.model.state_dict()))
        self._save(self.progress)
        self.team.wait()
        left = (self.epochs - epoch) * self.progress.seconds / epoch if self._goes_on() else None
        self.report(lines.epoch(record, left))

    def _finish(self) -> TrainResult:
        self.model.load_state_dict(self.folder.load_model())
        agreement = None if self.truth is None else Agreement(self.truth)
        # Whoever compares a model with the truth has to see all texts.
        readers = self.team if agreement is None else ALONE
        result = TrainResult(
            out=self.folder.path,
            epochs=self.progress.epoch,
            best_epoch=self.progress.best_epoch,
            dev=evaluate(self.model, self.dev, self.config, self.team),
            test=evaluate(self.model, self.test, self.config, readers, agreement),
            agreement={} if agreement is None else agreement.summary(),
            seconds=self.progress.seconds,
            peak_memory=peak_memory(self.device),
        )
        check_finite(result.test, "the test")
        if self.team.first:
            self.folder.append_metrics({"event": "end", "epoch": result.epochs, **result.to_json()})
            write_json(self.folder.summary_file, result.to_json())
            self.folder.close()
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
