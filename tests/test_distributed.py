"""Several processes over gloo: the same run as one process has, and one sequence over several ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from support import on_ranks

from safr_fast.training import RunError, loop
from safr_fast.training.run import RunFolder

pytestmark = pytest.mark.skipif(os.name != "posix" or not torch.distributed.is_available(), reason="needs gloo")


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.data, "load", ranks.small_corpus)


def numbers(value: Any) -> list[float]:
    """All numbers of a record but its times, in order."""
    if isinstance(value, dict):
        parts = [part for name, part in value.items() if "second" not in name and "memory" not in name]
        return [x for part in parts for x in numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


def curve(out: Path) -> list[list[float]]:
    return [numbers(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


# By texts, 13 batches: the last step has one for the first process alone.
@pytest.mark.parametrize("batches", [{"batch_size": 8}, {"batch_tokens": 150, "variant": "paper"}], ids=str)
def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(
    tmp_path: Path, batches: dict[str, Any]
) -> None:
    options = batches | {"epochs": 3, "log_every": 1, "checkpoint_every": 3}
    alone = ranks.train(tmp_path / "one", accumulate=4, **options)
    together = on_ranks(2, ranks.train_together, tmp_path / "two", options | {"accumulate": 2})
    expected, actual = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(expected) == len(actual) > 10
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for result, _ in together:
        assert numbers(result.to_json()) == pytest.approx(numbers(alone.to_json()), rel=1e-4, abs=1e-6)
    trained_on = sorted(row for _, rows in together for row in rows)
    assert trained_on == sorted(6 * list(range(ranks.SIZES["train"])))
    assert all(rows for _, rows in together)
    one, two = (RunFolder(tmp_path / name).load_model() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    files = [{file.name for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


def test_a_run_goes_on_with_as_many_processes_as_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ranks.train(tmp_path / "run", checkpoint_every=1)
    with pytest.raises(RunError, match="began with 1 processes, now there are 2: resume with as many"):
        on_ranks(2, ranks.train_together, tmp_path / "run", {"resume": True})


def test_torchrun_trains_by_the_command(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("safr-fast")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    sizes = "--model.dim 16 --model.heads 2 --model.feedforward 16 --model.mask-hidden 8 --epochs 1 --device cpu"
    options = [*sizes.split(), "--batch-tokens", "2000", "--out", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, str(command), "train", *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said in ("epoch   1 | ", "best epoch 1 of 1, restored", "peak memory: process "):
        assert done.stdout.count(said) == 1


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_the_losses_hold_for_a_model_sharded_by_fsdp2(variant: Any) -> None:
    model, loss, texts = ranks.small_model(variant)
    expected = [ranks.loss_of(model, loss, *own) for own in texts]
    torch.stack([parts.total for parts in expected]).mean().backward()
    for (parts, gradients), own in zip(on_ranks(2, ranks.sharded_step, variant), expected, strict=True):
        torch.testing.assert_close(torch.stack(parts), torch.stack(own).detach())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)
