"""Several processes over gloo: the same run as one process has, and one sequence over several ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from support import lengths_mask, normal, on_ranks, relative_error
from torch import Tensor

import safr_fast as sf
from safr_fast.training import RunError, loop
from safr_fast.training.run import RunFolder

pytestmark = [
    pytest.mark.skipif(os.name != "posix" or not torch.distributed.is_available(), reason="needs gloo"),
    pytest.mark.usefixtures("small_corpus"),
]


def numbers(value: Any) -> list[float]:
    """All numbers of a record, in order, but its times and the gradients of one process's batch."""
    if isinstance(value, dict):
        own = ("second", "memory", "gradient")
        parts = [part for name, part in value.items() if not any(word in name for word in own)]
        return [x for part in parts for x in numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


def curve(out: Path) -> list[list[float]]:
    return [numbers(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


# By texts, 13 batches: the last step has one for the first process alone.
@pytest.mark.parametrize(
    "batches",
    [
        {"batch_size": 8},
        {"batch_tokens": 150, "variant": "paper"},
        {"batch_size": 8, "protocol": "released", "max_len": 24, "log_gradients": True},
    ],
    ids=str,
)
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
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert sum("gradient_importance" in line for line in lines) == ("log_gradients" in batches) * 4 * 3
    one, two = (RunFolder(tmp_path / name).load_model() for name in ("one", "two"))
    # Softmax takes no notice of the keys' bias: its gradient is rounding, of which Adam makes whole steps.
    for weights in (one, two):
        weights["layers.0.attention.query_key_value.bias"][ranks.TINY.dim : 2 * ranks.TINY.dim] = 0
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


def by_torchrun(processes: int, device: str, out: Path) -> subprocess.CompletedProcess[str]:
    """A run of the command."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = ["--no-python", str(Path(sys.executable).with_name("safr-fast")), "train", "--device", device]
    sizes = "--model.dim 16 --model.heads 2 --model.feedforward 16 --model.mask-hidden 8 --epochs 1"
    options = [*sizes.split(), "--batch-tokens", "2000", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*torchrun, *command, *options], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))],
)
def test_torchrun_trains_by_the_command(tmp_path: Path, device: str) -> None:
    done = by_torchrun(2, device, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for said in ("epoch   1 | ", "best epoch 1 of 1, restored", "peak memory: process "):
        assert done.stdout.count(said) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_more_processes_than_gpus_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = by_torchrun(torch.cuda.device_count() + 1, "auto", tmp_path / "run")
    assert done.returncode != 0
    assert f"safr-fast: error: {torch.cuda.device_count() + 1} processes would share" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_the_losses_hold_for_a_model_sharded_by_fsdp2(variant: Any) -> None:
    model, loss, texts = ranks.small_model(variant)
    expected = [ranks.loss_of(model, loss, *own) for own in texts]
    torch.stack([parts.total for parts in expected]).mean().backward()
    for (parts, gradients), own in zip(on_ranks(2, ranks.sharded_step, variant), expected, strict=True):
        torch.testing.assert_close(torch.stack(parts), torch.stack(own).detach())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)


FORMS = [{"impl": impl, "eps": 1e-5, "reduction": r} for impl in ("reference", "auto") for r in ("mean", "sum", "none")]


def assert_spread_is_whole(h: Tensor, mask: Tensor | None, lengths: list[int], allowed: float) -> None:
    """Each rank's values and gradients against float64 in one process."""
    whole = h.double().requires_grad_()
    results = zip(*on_ranks(len(lengths), ranks.spread_importance, h, mask, lengths, FORMS), strict=True)
    for form, ours in zip(FORMS, results, strict=True):
        energy, squared_norm = sf.row_energy(whole, mask, impl="reference")
        loss = sf.importance_loss(whole, mask, **form | {"impl": "reference"})
        (gradient,) = torch.autograd.grad(loss.sum(), whole)
        energies, squared_norms, losses, gradients = zip(*ours, strict=True)
        assert relative_error(torch.cat(energies, -1), energy.detach()) < allowed
        assert relative_error(torch.cat(squared_norms, -1), squared_norm.detach()) < allowed
        assert relative_error(torch.cat(gradients, -2), gradient) < allowed
        for value in [torch.cat(losses, -1)] if form["reduction"] == "none" else losses:
            assert relative_error(value, loss.detach()) < allowed


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[20, 13], [5, 30, 11], [7, 0, 9]], ids=str)
def test_a_sequence_spread_over_ranks_has_the_importance_loss_of_one_process(lengths: list[int], masked: bool) -> None:
    h = normal(3, sum(lengths), 12)
    h[0, 3] = 0  # a closed gate
    mask = lengths_mask([sum(lengths), 6, 0], sum(lengths)) if masked else None
    if mask is not None:
        h = h.where(mask.unsqueeze(-1), math.nan)
    assert_spread_is_whole(h, mask, lengths, allowed=1e-6)


def test_rows_of_another_rank_that_are_all_but_orthogonal_are_told_from_orthogonal_ones() -> None:
    h = torch.eye(24).expand(2, 24, 24) + 1e-4 * normal(2, 24, 24)
    assert_spread_is_whole(h, None, [10, 6, 8], allowed=1e-5)


def test_spread_tokens_in_16_bits_are_as_accurate_as_16_bits_are() -> None:
    h = normal(2, 33, 12, dtype=torch.bfloat16)
    assert_spread_is_whole(h, None, [20, 13], allowed=5e-3)


def test_what_cannot_be_spread_over_ranks_says_so() -> None:
    for packed, twice, transformed in on_ranks(2, ranks.refusals, normal(2, 5, 4)):
        assert packed.startswith("group and cu_seqlens exclude each other")
        assert "differentiates once" in twice
        assert "takes no forward-mode derivatives and no torch.func transforms" in transformed
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup or None, got str 'world'"):
        sf.importance_loss(normal(2, 5, 4), group="world")  # type: ignore[arg-type]


def test_a_dtensor_is_refused_with_what_to_pass() -> None:
    (message,) = on_ranks(1, ranks.refusal_of_a_dtensor)
    assert message.startswith("h must be a plain tensor, got a DTensor: pass h.full_tensor(), or h.to_local()")
