"""The command ``safr-fast``: reads options, hands them to the Python interface, and says errors in one line."""

import ctypes
import dataclasses
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, NoReturn

from safr_fast.data import DataUnavailable, check
from safr_fast.errors import BackendUnavailable
from safr_fast.training.errors import OptionError, RunError

if TYPE_CHECKING:
    from safr_fast.training import TrainConfig

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3

_EXTRA = ("tyro", "tqdm", "safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Leaves by SystemExit with 2 for what the user can mend, 130 after an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch is loaded. Otherwise its idle threads spin on cores that others need, such as this package's own
    # threads: on a busy machine of two cores an epoch took three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if arguments == ["env"]:  # serves bug reports, so without the option parser's package too
        _env()
        return
    try:
        _parse(arguments)()
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        _fail(f'{error.name} is not installed: pip install "safr-fast[train]"')
    except (BackendUnavailable, DataUnavailable, OptionError, OSError, RunError) as error:
        _fail(str(error))


def _parse(arguments: list[str]) -> Callable[[], None]:
    import tyro

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
        """
        return partial(_train, config, resume)

    def env() -> Callable[[], None]:
        """Show versions, back ends with the reason for each, devices and threads; useful in a bug report."""
        return _env

    return tyro.extras.subcommand_cli_from_dict(
        {"train": train, "env": env},
        prog="safr-fast",
        description="Exact, cheap SAFR regularisers for PyTorch transformers.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _env() -> None:
    from safr_fast.env import describe

    print(describe())


def _train(config: "TrainConfig", resume: bool) -> None:
    if not resume:
        check(config.dataset, config.data_dir)
    _keep_memory()
    # Only now: this waits for torch, which a missing data set should not.
    from safr_fast.training.loop import train
    from safr_fast.training.run import default_folder

    if not resume and config.out is None:
        config = dataclasses.replace(config, out=default_folder(config.dataset))
    try:
        train(config, resume=resume, report=partial(print, flush=True))
    except KeyboardInterrupt:
        command = f"safr-fast train --out {shlex.quote(str(config.out))} --resume"
        print(f"\ninterrupted; to go on after the last checkpoint: {command}", file=sys.stderr)
        sys.exit(130)


def _keep_memory() -> None:
    """Have glibc keep what it got from the system, instead of giving large blocks back and faulting them in anew.

    Each step makes a gradient for every word type, about 100 MB on IMDB: on whole reviews this saves 8 % of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _fail(message: str) -> NoReturn:
    print(f"safr-fast: error: {message}", file=sys.stderr)
    sys.exit(2)
