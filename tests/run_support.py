"""Runs of tests: reading what they leave, interrupting them, scripting what they measure."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safr_fast.training import loop
from safr_fast.training.measure import evaluate
from safr_fast.training.run import RunFolder


def records(out: Path, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["event"] == event]


def without_times(values: Any) -> Any:
    """The same without what differs between two runs of one configuration."""
    if isinstance(values, dict):
        varying = ("seconds", "evaluation_seconds", "tokens_per_second", "out", "peak_memory")
        return {name: without_times(value) for name, value in values.items() if name not in varying}
    return [without_times(value) for value in values] if isinstance(values, list) else values


def contents(out: Path) -> tuple[dict[str, Tensor], Any]:
    """Everything that a run leaves, times apart."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return RunFolder(out).load_model(), without_times(lines)


def assert_same_runs(a: Path, b: Path) -> None:
    (weights_a, lines_a), (weights_b, lines_b) = contents(a), contents(b)
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)
    assert lines_a == lines_b


def interrupt_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    calls = iter(range(1, 1_000_000))

    def forward(*arguments: Any) -> Any:
        if next(calls) == step:
            raise KeyboardInterrupt
        return original(*arguments)

    original = loop.forward
    monkeypatch.setattr(loop, "forward", forward)


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every training step."""
    steps: list[int] = []

    def forward(*arguments: Any) -> Any:
        steps.append(len(steps))
        return original(*arguments)

    original = loop.forward
    monkeypatch.setattr(loop, "forward", forward)
    return steps


def script_accuracy(monkeypatch: pytest.MonkeyPatch, *accuracies: float) -> list[dict[str, Tensor]]:
    """Evaluations of an epoch give these, in turn; the weights that they saw."""
    left = iter(accuracies)
    seen: list[dict[str, Tensor]] = []

    def scripted(model: Any, *arguments: Any) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate(model, *arguments) | {"accuracy": next(left, 0.0)}

    monkeypatch.setattr(loop, "evaluate", scripted)
    return seen
