"""What a run is told before it starts: options, data, devices, folders."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import TINY
from ranks import train as run
from run_support import contents

from safr_fast.errors import BackendUnavailable
from safr_fast.reproduction.config import ReproductionConfig
from safr_fast.training import ModelConfig, OptionError, RunError, TrainConfig, loop, settings, train

pytestmark = pytest.mark.usefixtures("small_corpus")


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"dataset": "sst2", "all_rows": True}, {"seed": 0, "all_rows": True, "imdb_dev": "drawn"}),
        ({"dataset": "imdb", "data_seed": 7}, {"seed": 7, "all_rows": False, "imdb_dev": "drawn"}),
        ({"dataset": "imdb", "protocol": "released"}, {"seed": 0, "all_rows": False, "imdb_dev": "last"}),
    ],
    ids=str,
)
def test_a_run_reads_the_data_it_was_asked_for(
    options: dict[str, Any], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(loop.data, "load", lambda *places, **options: calls.append((places, options)))
    loop.load_corpus(TrainConfig(data_dir=Path("texts"), **options))
    assert calls == [((options["dataset"], Path("texts")), asked)]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", epochs=1)
    before = contents(tmp_path / "empty")[1]
    with pytest.raises(RunError, match=r"exists: go on with it by --resume, or give another folder by --out"):
        run(tmp_path / "empty", epochs=1)
    assert contents(tmp_path / "empty")[1] == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_the_place_of_the_run_folder_is_named(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file is a file: --out takes a folder, give another name"):
        run(tmp_path / "file", resume=resume)


def test_a_run_that_cannot_start_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(impl: str, device_type: str, dtype: torch.dtype) -> str:
        raise BackendUnavailable(f"{impl} {device_type} {dtype}")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "resolve", unavailable)
        with pytest.raises(BackendUnavailable, match=r"triton cpu torch.float32"):
            run(tmp_path / "run", impl="triton")
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "sst3"}, "dataset must be one of synthetic, sst2, imdb, got 'sst3'"),
        ({"protocol": "paper"}, "protocol must be one of masked, released, got 'paper'"),
        ({"variant": ["paper"]}, r"variant must be one of released, paper, got \['paper'\]"),
        ({"impl": "cuda"}, "impl must be one of auto, reference, cpp, triton, got 'cuda'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and above 0, got nan"),
        ({"lambda_importance": -0.1}, "lambda_importance must be finite and at least 0, got -0.1"),
        ({"model": ModelConfig(heads=7)}, "dim must be even and a multiple of heads, got dim 256 and 7 heads"),
        ({"model": ModelConfig(dropout=1.0)}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainConfig(**options)


def test_options_that_would_do_nothing_are_named() -> None:
    for options, message in (
        ({"batch_size": 64, "batch_tokens": 100}, "batch_size counts texts, but batch_tokens makes batches by tokens"),
        ({"batch_size": 64, "full_length": True}, "batch_size counts texts, but full_length makes batches by tokens"),
        ({"dataset": "imdb", "all_rows": True}, "all_rows is for sst2, got it for imdb: leave it out"),
    ):
        with pytest.raises(OptionError, match=message):
            TrainConfig(**options).resolved()  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["tpu0", "meta", "mps", "xpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x"])
def test_other_kinds_of_device_are_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(RunError, match=f"device must be auto, cpu, cuda or cuda:<number>, got '{device}'"):
        train(TrainConfig(device=device, out=tmp_path / "run"))


@pytest.mark.parametrize(
    ("count", "device", "seen"),
    [(0, "cuda", "no GPU"), (0, "cuda:0", "no GPU"), (2, "cuda:2", "cuda:0, cuda:1"), (1, "cuda:700", "cuda:0")],
)
def test_devices_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, device: str, seen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(RunError, match=f"device '{device}' is not there: this PyTorch sees {seen}; use"):
        train(TrainConfig(device=device, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("others", "shared"), [(["A", "A"], "1 GPU,"), (["A", "B"], "2 GPUs,")])
def test_processes_that_would_share_a_gpu_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: list[str], shared: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="A"))
    monkeypatch.setattr(settings, "by_nccl", lambda: True)
    monkeypatch.setattr(settings, "of_each_process", lambda gpu: [gpu, *others])
    with pytest.raises(RunError, match=f"3 processes would share {shared}.* start one process a GPU"):
        train(TrainConfig(device="auto", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_configuration_comes_back_from_json() -> None:
    config = TrainConfig(dataset="imdb", data_dir=Path("a/b"), out=Path("c"), model=TINY).resolved()
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert (config.max_len, config.lambda_importance, config.epochs) == (256, 0.01, 100)


def test_folders_may_be_strings() -> None:
    for config in (TrainConfig(data_dir="data", out="runs/a"), ReproductionConfig(data_dir="data", out="runs/a")):
        assert (config.data_dir, config.out) == (Path("data"), Path("runs/a"))
