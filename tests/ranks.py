"""What tests run in processes of their own: imported there, so apart from the tests themselves."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from safr_fast.data import Corpus, synthetic
from safr_fast.training import ModelConfig, TrainConfig, TrainResult, loop

TINY = ModelConfig(dim=16, heads=2, feedforward=32, mask_hidden=16)
SIZES = {"train": 100, "dev": 40, "test": 40}


def small_corpus(dataset: str, data_dir: Path | None, *, seed: int, all_rows: bool) -> Corpus:
    return synthetic(seed, SIZES)


def train(out: Path, *, resume: bool = False, **options: Any) -> TrainResult:
    """A run of seconds."""
    defaults: dict[str, Any] = {"epochs": 4, "patience": 4, "learning_rate": 1e-3, "log_every": 2, "model": TINY}
    config = TrainConfig(out=out, device="cpu", **(defaults | options))
    return loop.train(config, resume=resume, report=lambda line: None)


def train_alone(out: Path, resume: bool, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    loop.data.load = small_corpus
    train(out, resume=resume, **options)


def joined(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
