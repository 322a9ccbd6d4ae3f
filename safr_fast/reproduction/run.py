"""Training and evaluating what a table lacks, and writing the table after every run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safr_fast.evaluation.config import EvaluationConfig
from safr_fast.evaluation.run import evaluate_run
from safr_fast.reproduction.config import ReproductionConfig, Target
from safr_fast.reproduction.gradients import gradient_shares
from safr_fast.reproduction.tables import figure, markdown, summarise
from safr_fast.training.config import TrainConfig
from safr_fast.training.errors import RunError
from safr_fast.training.loop import train
from safr_fast.training.run import WHERE, RunFolder, changed, write_atomically, write_json
from safr_fast.training.settings import settings


def reproduce(target: Target, config: ReproductionConfig, *, report: Callable[[str], None] = print) -> str:
    """Make a table or figure from runs, of which those that are missing are trained; gives it as Markdown.

    Writes ``<target>-<dataset>.json`` and ``.md`` into ``config.out`` (``<target>-<dataset>-paper`` for that variant),
    for ``figure3`` an ``.svg`` for each protocol too, again after every run: what is done is there whenever the work is
    interrupted, and is not done again. Of a finished run that is evaluated the small files are enough, its weights may
    be gone.

    Raises:
        RunError: a run in ``config.out`` was trained by other options, or has to be evaluated anew and its weights are
            gone; or ``finished_only``, and none is.
    """
    evaluation = config.evaluation(target)
    results: list[dict[str, Any]] = []
    stem = config.stem(target)
    plan = [
        (protocol, setting, seed)
        for seed in range(config.seeds)
        for protocol in config.protocols(target)
        for setting in config.settings(target)
    ]
    text = ""
    for number, (protocol, setting, seed) in enumerate(plan, 1):
        training = config.training(protocol, setting, seed)
        assert training.out is not None
        folder = RunFolder(training.out)
        if config.finished_only and not folder.summary_file.exists():
            continue
        report(f"{number}/{len(plan)}: {folder.path}")
        _trained(training, report)
        results.append(
            {
                "protocol": protocol,
                "setting": setting,
                "seed": seed,
                "evaluation": _evaluated(target, training, evaluation, config),
                "gradients": gradient_shares(folder),
            }
        )
        summary = summarise(target, config.dataset, results, config.departures())
        text = markdown(summary)
        write_json(stem.with_suffix(".json"), summary)
        write_atomically(stem.with_suffix(".md"), partial(Path.write_text, data=text, encoding="utf-8"))
        if target == "figure3":
            figure(summary, stem)
    if not results:
        raise RunError(f"no run of {target} is finished in {config.out}: leave out --finished-only to train them")
    return text


def _trained(config: TrainConfig, report: Callable[[str], None]) -> None:
    """A run that is finished stays; one that was begun goes on."""
    assert config.out is not None
    folder = RunFolder(config.out)
    begun = folder.config_file.exists()
    if begun:
        _check_options(folder, config)
    finished = folder.summary_file.exists()
    train(config, resume=begun, report=(lambda _: None) if finished else report)


def _check_options(folder: RunFolder, wanted: TrainConfig) -> None:
    """A row is the mean over runs that differ in their seed alone."""
    recorded = folder.stored_config().log_gradients

    def pardoned(name: str, value: object) -> bool:
        return name in (*WHERE, "out") or (name == "log_gradients" and recorded)

    changes = changed(folder.stored_config(), wanted.resolved(), pardoned)
    if changes:
        raise RunError(
            f"{folder.path} was trained with {changes}: give the same options, or another folder of runs by --out"
        )


def _evaluated(
    target: Target, training: TrainConfig, evaluation: EvaluationConfig, config: ReproductionConfig
) -> dict[str, Any]:
    assert training.out is not None
    folder = RunFolder(training.out)
    name = "evaluation-figure3.json" if target == "figure3" else "evaluation-tables.json"
    stored = folder.load_result(name)
    if stored is not None and stored["config"] == evaluation.to_json():
        return stored
    if not folder.model_file.exists():
        why = f"it has no {name}"
        if stored is not None:
            why = f"{name} was made with {evaluation.differs(stored['config'])}"
        raise RunError(f"{folder.path} cannot be evaluated, its weights are gone; {why}")
    with settings(training):
        return evaluate_run(training.out, evaluation, data_dir=config.data_dir, device=config.device, file=name)
