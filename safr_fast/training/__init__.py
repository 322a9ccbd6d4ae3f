"""Training the paper's classifier: ``train(TrainConfig(dataset="sst2", data_dir="…"))``.

A run leaves a folder with its configuration, vocabulary, metrics (JSON lines) and the best epoch's weights
(safetensors), from which :func:`load_run` builds the model again.
"""

from safr_fast.training.config import ModelConfig, TrainConfig
from safr_fast.training.loop import TrainResult, train
from safr_fast.training.model import build_model, load_run
from safr_fast.training.run import RunError

__all__ = ["ModelConfig", "RunError", "TrainConfig", "TrainResult", "build_model", "load_run", "train"]
