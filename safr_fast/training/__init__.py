"""Training the paper's classifier: ``train(TrainConfig(dataset="sst2", data_dir="…"))``.

A run leaves a folder with its configuration, vocabulary, metrics (JSON lines) and the tested epoch's weights
(safetensors), from which :func:`load_run` builds the model again.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safr_fast.training.config import ModelConfig, TrainConfig
from safr_fast.training.errors import OptionError, RunError

if TYPE_CHECKING:
    from safr_fast.training.loop import train
    from safr_fast.training.model import build_model, load_run
    from safr_fast.training.run import TrainResult

__all__ = ["ModelConfig", "OptionError", "RunError", "TrainConfig", "TrainResult", "build_model", "load_run", "train"]

# Loaded when first asked for: the command line reads its options and finds missing data before it waits for torch.
_HOME = {"TrainResult": "run", "train": "loop", "build_model": "model", "load_run": "model"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
