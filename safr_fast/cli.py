"""The command ``safr-fast``: reads options, hands them to the Python interface, and says errors in one line."""

import dataclasses
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from safr_fast.data import DataUnavailable, check
from safr_fast.errors import BackendUnavailable
from safr_fast.training.errors import OptionError, RunError

if TYPE_CHECKING:
    from safr_fast.evaluation.config import EvaluationConfig
    from safr_fast.reproduction.config import ReproductionConfig, Target
    from safr_fast.training import TrainConfig

_EXTRA = {
    "train": ("tyro", "tqdm", "safetensors"),
    "evaluation": ("captum", "scipy"),
    "report": ("jinja2", "matplotlib", "networkx", "plotly"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Leaves by SystemExit with 2 for what the user can mend, 130 after an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # one redirected on Windows may know no λ
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    # Read when torch is loaded. Otherwise its idle threads spin on cores that others need, such as this package's own
    # threads: on a busy machine of two cores an epoch took three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if arguments == ["env"]:  # serves bug reports, so without the option parser's package too
        _env()
        return
    try:
        _parse(arguments)()
    except ModuleNotFoundError as error:
        extra = next((extra for extra, names in _EXTRA.items() if error.name in names), None)
        if extra is None:
            raise
        _fail(f'{error.name} is not installed: pip install "safr-fast[{extra}]"')
    except KeyboardInterrupt as interrupt:
        hint = f"; {interrupt}" if interrupt.args else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        sys.exit(130)
    except (BackendUnavailable, DataUnavailable, OptionError, OSError, RunError) as error:
        _fail(str(error))


def _parse(arguments: list[str]) -> Callable[[], None]:
    import tyro

    from safr_fast.evaluation.config import EvaluationConfig
    from safr_fast.reproduction.config import ReproductionConfig, Target
    from safr_fast.training import TrainConfig

    def train(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),  # noqa: B008, it is frozen
        resume: bool = False,
    ) -> Callable[[], None]:
        """Train the paper's classifier with both regularisers, and test its best epoch.

        Without options it trains on generated reviews: no network and no files needed, a few minutes on two cores.

        For example:

        safr-fast train

        safr-fast train --dataset sst2 --data-dir data/sst2

        safr-fast train --dataset imdb --full-length --seed 1 --out runs/imdb-1

        safr-fast train --out runs/imdb-1 --resume

        safr-fast train --lambda-importance 0 --lambda-interaction 0 --model.no-gate

        Args:
            config: The run.
            resume: Go on with the run in --out after its last checkpoint. It keeps its own settings whatever else is
                given: an option that contradicts them is refused, but one that equals the default reads as not given.
                --data-dir, --device and --threads may be others.
        """
        return partial(_train, config, resume)

    def evaluate(
        run: tyro.conf.Positional[Path],
        config: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = EvaluationConfig(),  # noqa: B008, it is frozen
        data_dir: Path | None = None,
        device: str = "auto",
    ) -> Callable[[], None]:
        """Measure how faithful a run's model is to its words: SRS, AOPC and others, for every ranker.

        Prints a table, and writes evaluation.json into the run's folder.

        For example:

        safr-fast evaluate runs/sst2-1

        safr-fast evaluate runs/imdb-1 --k 30 --texts 2000 --gradients

        Args:
            run: Folder of a run of safr-fast train.
            config: How it is evaluated.
            data_dir: Folder with the data set's files, if it is no longer where the run was trained from.
            device: auto: the GPU if there is one.
        """
        return partial(_evaluate, run, config, data_dir, device)

    def reproduce(
        target: tyro.conf.Positional[Target],
        config: Annotated[ReproductionConfig, tyro.conf.arg(name="")] = ReproductionConfig(),  # noqa: B008, it is frozen
    ) -> Callable[[], None]:
        """Make a table or figure of the paper: train and evaluate what is missing, set it beside the paper's figures.

        Writes JSON and Markdown after every run; what is done is not done again.

        For example:

        safr-fast reproduce table2 --data-dir data/sst2 --seeds 5

        safr-fast reproduce table1 --dataset synthetic --seeds 2 --rows baseline 0.1,0.1

        Args:
            target: table1, table2, table3 or figure3.
            config: Which runs it is made of.
        """
        return partial(_reproduce, target, config)

    def report(
        run: tyro.conf.Positional[Path],
        text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
        data_dir: Path | None = None,
    ) -> Callable[[], None]:
        """Write one page of HTML that shows what a run's model does with words; it needs no network to open.

        Writes report.html and figures/*.svg into the run's folder. What safr-fast evaluate left there is shown too.

        For example:

        safr-fast report runs/sst2-1

        safr-fast report runs/sst2-1 --text "a fine film , never dull ." --text "dull ."

        Args:
            run: Folder of a run of safr-fast train.
            text: A text to look into, split at spaces and written as the data set writes them (SST-2: lower case,
                punctuation apart); by default one of each class from the test split.
            data_dir: Folder with the data set's files, if it is no longer where the run was trained from.
        """
        return partial(_report, run, text, data_dir)

    def env() -> Callable[[], None]:
        """Show versions, back ends with the reason for each, devices and threads; useful in a bug report."""
        return _env

    return tyro.extras.subcommand_cli_from_dict(
        {"train": train, "evaluate": evaluate, "reproduce": reproduce, "report": report, "env": env},
        prog="safr-fast",
        description="Exact, cheap SAFR regularisers for PyTorch transformers.",
        args=arguments,
    )


def _env() -> None:
    from safr_fast.env import describe

    print(describe())


def _train(config: "TrainConfig", resume: bool) -> None:
    if not resume:
        check(config.dataset, config.data_dir)
    # Only now: this waits for torch, which a missing data set should not.
    from safr_fast.training.loop import train
    from safr_fast.training.run import RunFolder, default_folder
    from safr_fast.training.settings import keep_memory

    keep_memory()
    if not resume and config.out is None:
        config = dataclasses.replace(config, out=default_folder(config.dataset))
    try:
        train(config, resume=resume, report=partial(print, flush=True))
    except KeyboardInterrupt:
        if config.out is None or not RunFolder(config.out).config_file.exists():
            raise
        command = f"safr-fast train --out {shlex.quote(str(config.out))} --resume"
        raise KeyboardInterrupt(f"to go on after the last checkpoint: {command}") from None


def _evaluate(run: Path, config: "EvaluationConfig", data_dir: Path | None, device: str) -> None:
    from safr_fast.evaluation.run import FILE, evaluate_run
    from safr_fast.evaluation.table import table

    print(table(evaluate_run(run, config, data_dir=data_dir, device=device, report=partial(print, flush=True))))
    print(f"\nwritten: {run / FILE}")


def _reproduce(target: "Target", config: "ReproductionConfig") -> None:
    if not config.finished_only:
        check(config.dataset, config.data_dir)
    from safr_fast.reproduction.run import reproduce
    from safr_fast.training.settings import keep_memory

    keep_memory()
    try:
        print(reproduce(target, config, report=partial(print, flush=True)))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on, and what is done is in {config.out}") from None


def _report(run: Path, texts: Sequence[str], data_dir: Path | None) -> None:
    from safr_fast.report.page import report_run

    written = report_run(run, texts, data_dir=data_dir)
    print(f"written: {written.page} and the figures in {written.figures}")


def _fail(message: str) -> NoReturn:
    print(f"safr-fast: error: {message}", file=sys.stderr)
    sys.exit(2)
