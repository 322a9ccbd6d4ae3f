"""The command line: help, errors in one line, a real kill and what comes after it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safr_fast import cli, training
from safr_fast.training import TrainConfig

TINY = "--model.dim 16 --model.heads 2 --model.feedforward 16 --model.mask-hidden 8 --device cpu --threads 1"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of one command in this process."""
    try:
        cli.main(arguments)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_shows_the_commands_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert "train" in out
    assert "env" in out
    status, out, _ = call(capsys, "train", "--help")
    assert status == 0
    for expected in ("For example", "--lambda-importance", "--resume", "--model.dim", "safr-fast train --dataset sst2"):
        assert expected in out


def test_options_reach_the_configuration(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[TrainConfig, bool]] = []
    monkeypatch.setattr(cli, "_train", lambda config, resume: seen.append((config, resume)))
    options = "--lambda-interaction 0.5 --max-len 64 --out here --model.no-gate --resume --threads 2"
    assert call(capsys, "train", *options.split())[0] == 0
    model = training.ModelConfig(gate=False)
    expected = TrainConfig(lambda_interaction=0.5, max_len=64, out=Path("here"), threads=2, model=model)
    assert seen == [(expected, True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--model.heads 7", "dim must be even and a multiple of heads, got dim 256 and 7 heads"),
        ("--data-dir x", "data_dir is for sst2 and imdb; synthetic takes none, got 'x'"),
        ("--dataset sst2 --data-dir x", "data_dir 'x' is no folder"),
        ("--resume", "--resume needs --out"),
        ("--resume --out x", "x holds no run"),
        ("--device tpu0", "device must be auto, cpu"),
        ("--device meta", "device must be auto, cpu, cuda or cuda:<number>, got 'meta'"),
        ("--device cuda:1000", "device 'cuda:1000' is not there: this PyTorch sees"),
        ("--out {file}", "{file} is a file: --out takes a folder, give another name"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.touch()
    status, _, err = call(capsys, "train", *options.format(file=file).split())
    assert status == 2
    assert err.startswith(f"safr-fast: error: {message.format(file=file)}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate nowhere", "nowhere holds no run: it lacks config.json"),
        ("report nowhere", "nowhere holds no run: it lacks config.json"),
        ("evaluate nowhere --k 0", "k must be per cents above 0 and at most 100, got [0"),
        ("evaluate nowhere --draws 4", "draws must be at least 5, got 4"),
        ("reproduce table2 --rows 1", "rows must be baseline or two weights such as 1,0.1, got '1'"),
        ("reproduce table2 --data-dir nowhere", "data_dir 'nowhere' is no folder"),
    ],
)
def test_a_mistake_in_looking_at_runs_is_one_line_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *command.split())
    assert status == 2
    assert err.startswith(f"safr-fast: error: {message}")
    assert err.count("\n") == 1


def test_gradients_without_captum_name_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate_run(*_: object, **__: object) -> None:
        import captum  # noqa: F401

    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setattr("safr_fast.evaluation.run.evaluate_run", evaluate_run)
    status, _, err = call(capsys, "evaluate", "run", "--gradients")
    assert status == 2
    assert 'captum is not installed: pip install "safr-fast[evaluation]"' in err


def test_an_unknown_option_value_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "train", "--dataset", "sst3")
    assert status == 2
    assert "sst3" in out + err


def test_help_says_that_a_resumed_run_keeps_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "train", "--help")
    assert "It keeps its own settings whatever else is given" in " ".join(out.replace("│", " ").split())


def test_a_back_end_that_cannot_serve_fails_before_anything_is_written(tmp_path: Path) -> None:
    """In a process of its own: the tests have Triton interpreted, so that it would serve."""
    code = "import sys; from safr_fast.cli import main; main(sys.argv[1:])"
    options = ["train", *TINY.split(), "--impl", "triton", "--out", str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('safr-fast: error: impl="triton" cannot serve')
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Runs the command with imports behind it; afterwards says how long it took, and whether it waited for torch.
TIMED = """
import socket, sys, time
import huggingface_hub.constants, tyro
import safr_fast.cli, safr_fast.training

def never(*_, **__):
    time.sleep(60)

socket.create_connection = never
started = time.perf_counter()
try:
    safr_fast.cli.main(["train", "--dataset", "sst2"])
finally:
    print(time.perf_counter() - started, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("offline", "reason"), [("1", "HF_HUB_OFFLINE is set"), ("0", "no connection to ")], ids=["told so", "no answer"]
)
def test_a_data_set_without_a_network_is_an_error_in_about_a_second(tmp_path: Path, offline: str, reason: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "datasets" / "SetFit___sst2").mkdir(parents=True)
    caches = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": offline}
    environment = os.environ | caches | {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run([sys.executable, "-c", TIMED], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "give --data-dir with sst2's files, or use --dataset synthetic" in done.stderr
    seconds, waited_for_torch = done.stdout.split()
    assert waited_for_torch == "False"
    assert float(seconds) < 2.5


def test_an_existing_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _, err = call(capsys, "train", "--out", str(tmp_path))
    assert status == 2
    assert "exists: go on with it by --resume, or give another folder by --out" in err


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    status, _, err = call(capsys, "train")
    assert status == 2
    assert 'pip install "safr-fast[train]"' in err


def test_env_works_without_the_option_parser(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.setenv("SAFR_FAST_TEST", "shown")
    status, out, _ = call(capsys, "env")
    assert status == 0
    for expected in ("safr-fast", "torch", "reference", "cpp", "triton", "threads", "GPU", "SAFR_FAST_TEST"):
        assert expected in out


def test_an_interrupt_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safr_fast.training.loop.train", interrupted)
    command = ("train", "--out", str(tmp_path / "my run"))
    assert call(capsys, *command)[::2] == (130, "\ninterrupted\n")  # before the folder is made there is no going on
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "config.json").touch()
    status, _, err = call(capsys, *command)
    assert status == 130
    assert f"safr-fast train --out '{tmp_path}/my run' --resume" in err
    monkeypatch.setattr("safr_fast.evaluation.run.evaluate_run", interrupted)
    assert call(capsys, "evaluate", str(tmp_path))[::2] == (130, "\ninterrupted\n")


def epochs(out: Path) -> int:
    """How many whole epochs a run has written."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return sum(json.loads(line)["event"] == "epoch" for line in lines if line.endswith("\n"))


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_killed_process_is_taken_up_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["train", *TINY.split(), "--epochs", "4", "--patience", "4", "--batch-size", "64"]
    code = "import sys; from safr_fast.cli import main; main(sys.argv[1:])"
    out = tmp_path / "killed"
    with subprocess.Popen([sys.executable, "-c", code, *options, "--out", str(out)], stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while epochs(out) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    status, text, _ = call(capsys, *options, "--out", str(out), "--resume")
    assert status == 0
    assert "going on after epoch" in text
    status, whole, _ = call(capsys, *options, "--out", str(tmp_path / "whole"))
    assert status == 0
    assert text.splitlines()[-5:-1] == whole.splitlines()[-5:-1]  # the last line is peak memory
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_output_that_knows_no_greek_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    cli.main(["env"])
    print("λ 0.1", flush=True)
    assert written.getvalue().endswith(b"? 0.1" + os.linesep.encode())
