"""Training and evaluating what a table lacks, and writing the table after every run."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safr_fast.evaluation.config import EvaluationConfig
from safr_fast.evaluation.run import evaluate_run
from safr_fast.reproduction.config import ReproductionConfig, Target
from safr_fast.reproduction.gradients import gradient_shares
from safr_fast.reproduction.settings import Setting
from safr_fast.reproduction.tables import figure, markdown, summarise
from safr_fast.training.config import TrainConfig, check_choice
from safr_fast.training.errors import RunError
from safr_fast.training.loop import train
from safr_fast.training.run import WHERE, RunFolder, changed, write_atomically, write_json
from safr_fast.training.settings import settings


@dataclass(frozen=True)
class _Run:
    """One of the runs that a table is made of."""

    target: Target
    config: ReproductionConfig
    protocol: Literal["masked", "released"]
    setting: Setting
    seed: int

    @property
    def training(self) -> TrainConfig:
        return self.config.training(self.protocol, self.setting, self.seed)

    @property
    def folder(self) -> RunFolder:
        assert self.training.out is not None
        return RunFolder(self.training.out)

    @property
    def finished(self) -> bool:
        return self.folder.summary_file.exists()

    @property
    def file(self) -> str:
        """Of its evaluation."""
        return "evaluation-figure3.json" if self.target == "figure3" else "evaluation-tables.json"

    def asked(self, stored: Mapping[str, Any]) -> EvaluationConfig:
        """What is asked of its evaluation; where normalised AOPC is not, one that has it serves too."""
        asked = self.config.evaluation(self.target)
        return asked if asked.normalised else replace(asked, normalised=stored["config"]["normalised"])

    def stored(self) -> dict[str, Any] | None:
        """Its evaluation, if there is one as it is asked for."""
        stored = self.folder.load_evaluation(self.file)
        return stored if stored and stored["config"] == self.asked(stored).to_json() else None

    def result(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        gradients = gradient_shares(self.folder)
        return {
            "protocol": self.protocol,
            "setting": self.setting,
            "seed": self.seed,
            "evaluation": evaluation,
            "gradients": gradients,
        }


def reproduce(target: Target, config: ReproductionConfig, *, report: Callable[[str], None] = print) -> str:
    """Make a table or figure from runs, of which those that are missing are trained; gives it as Markdown.

    Writes ``<target>-<dataset>.json`` and ``.md`` into ``config.out``, with ``-paper`` for that variant and with the
    protocol where it is not the table's usual one; for ``figure3`` an ``.svg`` for each protocol too. First from all
    runs that are done, then again after every other: what is done is there whenever the work is interrupted, and is not
    done again. Of a finished run that is evaluated the small files are enough, its weights may be gone. Where a table
    replaces one that had more, ``report`` is told what.

    Raises:
        OptionError: no such ``target``.
        RunError: a run in ``config.out`` was trained by other options, was evaluated on other data than the rest, or
            has to be evaluated anew and its weights are gone; or ``finished_only``, and none is.
    """
    check_choice("target", target, Target)
    plan = [
        _Run(target, config, protocol, setting, seed)
        for seed in range(config.seeds)
        for protocol in config.protocols(target)
        for setting in config.settings(target)
    ]
    config.evaluation(target)  # what is wrong with it is said before the work
    results: dict[_Run, dict[str, Any]] = {}
    text = ""
    for run in plan:
        if run.finished and (stored := run.stored()):
            _check_options(run)
            results[run] = run.result(stored)
    if results:
        text = _written(target, config, plan, results, report)
    for number, run in enumerate(plan, 1):
        if run in results or (config.finished_only and not run.finished):
            continue
        report(f"{number}/{len(plan)}: {run.folder.path}")
        if config.finished_only and (obstacle := _obstacle(run)):
            report(f"left out: {obstacle}")
            continue
        _train(run, report)
        results[run] = run.result(_evaluated(run))
        text = _written(target, config, plan, results, report)
    if not results:
        raise RunError(f"no run of {target} is finished in {config.out}: leave out --finished-only to train them")
    return text


def _written(
    target: Target,
    config: ReproductionConfig,
    plan: Sequence[_Run],
    results: Mapping[_Run, dict[str, Any]],
    report: Callable[[str], None],
) -> str:
    """The table of the runs that are done, in the plan's order."""
    done = [run for run in plan if run in results]
    _check_data([(run.folder.path, results[run]["evaluation"]["texts"]) for run in done])
    summary = summarise(target, config.dataset, [results[run] for run in done], config.departures())
    text, stem = markdown(summary), config.stem(target)
    table = stem.with_name(f"{stem.name}.json")
    if lost := _lost(table, summary["rows"]):
        report(f"replaces {table}, which also had {lost}")
    write_json(table, summary)
    write_atomically(stem.with_name(f"{stem.name}.md"), partial(Path.write_text, data=text, encoding="utf-8"))
    if target == "figure3":
        figure(summary, stem)
    return text


def _lost(table: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The runs of a table's file that are not in these rows, as a sentence's part."""
    kept = {(row["protocol"], row["setting"], seed) for row in rows for seed in row["seeds"]}
    lost = []
    try:
        for row in json.loads(table.read_text(encoding="utf-8"))["rows"]:
            protocol, setting = row["protocol"], row["setting"]
            if seeds := [seed for seed in row["seeds"] if (protocol, setting, seed) not in kept]:
                lost.append(f"{protocol} {setting} of seed {', '.join(map(str, seeds))}")
    except (OSError, ValueError, TypeError, KeyError):
        return ""  # there is none, or a damaged one, which had nothing for a reader
    return "; ".join(lost)


def _check_data(texts: Sequence[tuple[Path, int]]) -> None:
    """SST-2's rows are the paper's in one place and all of them in another."""
    (first, count), *others = texts
    for path, other in others:
        if other != count:
            raise RunError(
                f"{first} was evaluated on {count:,} test texts, {path} on {other:,}: their data are not the same; "
                "move the runs on one of them to another folder, and make a table of each by --out"
            )


def _train(run: _Run, report: Callable[[str], None]) -> None:
    """A run that is finished stays; one that was begun goes on."""
    begun = run.folder.config_file.exists()
    if begun:
        _check_options(run)
    train(run.training, resume=begun, report=(lambda _: None) if run.finished else report)


def _check_options(run: _Run) -> None:
    """A row is the mean over runs that differ in their seed alone."""
    before = run.folder.stored_config()

    def pardoned(name: str, value: object) -> bool:
        return name in (*WHERE, "out") or (name == "log_gradients" and before.log_gradients)

    changes = changed(before, run.training.resolved(), pardoned)
    if changes:
        raise RunError(
            f"{run.folder.path} was trained with {changes}: give the same options, or another folder of runs by --out"
        )


def _evaluated(run: _Run) -> dict[str, Any]:
    evaluation, folder = run.config.evaluation(run.target), run.folder
    if stored := run.stored():
        return stored
    if obstacle := _obstacle(run):
        raise RunError(f"{obstacle}; leave it out by --finished-only, or train it anew by another --out")
    with settings(run.training):
        return evaluate_run(
            folder.path,
            evaluation,
            data_dir=run.config.data_dir,
            device=run.config.device,
            file=run.file,
            report=lambda line: None,  # training has said it
        )


def _obstacle(run: _Run) -> str | None:
    """Why a run can be in no table."""
    folder = run.folder
    if folder.model_file.exists():
        return None
    other = folder.load_evaluation(run.file)
    why = f"{run.file} was made with {run.asked(other).differs(other['config'])}" if other else f"it has no {run.file}"
    return f"{folder.path} cannot be evaluated, its weights are gone; {why}"
