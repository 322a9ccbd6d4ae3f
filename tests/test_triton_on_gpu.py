"""What only a GPU can show: no waiting for the device, capture into a graph, streams, several devices, whole runs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from run_support import interrupt_at_step, records
from support import lengths_mask, normal, offsets
from torch import Tensor

import safr_fast as sf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
TOKENS = [40, 200, 600]  # one program a head; tiles; the feature moment


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    value = loss(*inputs)
    return [value, *torch.autograd.grad(value, inputs)]


def calls(tokens: int, device: str = "cuda") -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Losses on leaves, one of each kind."""
    mask = lengths_mask([tokens, tokens // 3], tokens).to(device)
    cu_seqlens = offsets([tokens, tokens // 3], device)
    h = normal(2, tokens, 64, dtype=torch.bfloat16, device=device)
    q, k = (normal(2, 4, tokens, 64, seed=seed, dtype=torch.bfloat16, device=device) for seed in (1, 2))
    packed = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k)]
    attention = (q @ k.mT).float().softmax(-1)
    cases = {
        "importance": (lambda h: sf.importance_loss(h, mask), [h]),
        "importance, packed": (lambda h: sf.importance_loss(h, cu_seqlens=cu_seqlens), [h.flatten(0, 1)]),
        "stored attention": (lambda a: sf.interaction_loss(a, mask), [attention]),
        "interaction": (lambda q, k: sf.interaction_loss_from_qk(q, k, mask, is_causal=True), [q, k]),
        "interaction, packed": (lambda q, k: sf.interaction_loss_from_qk(q, k, cu_seqlens=cu_seqlens), packed),
    }
    return {name: (loss, [x.detach().requires_grad_() for x in leaves]) for name, (loss, leaves) in cases.items()}


each_length = pytest.mark.parametrize("tokens", TOKENS)
each_loss = pytest.mark.parametrize("name", calls(8, "cpu"))


@each_length
@each_loss
def test_nothing_waits_for_the_device(name: str, tokens: int) -> None:
    loss, leaves = calls(tokens)[name]
    gradients(loss, *leaves)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(loss, *leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_length
@each_loss
def test_a_graph_replays_on_new_input(name: str, tokens: int) -> None:
    loss, leaves = calls(tokens)[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(loss, *leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(loss, *leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(0) * 0.5)
    graph.replay()
    for replayed, expected in zip(captured, gradients(loss, *leaves), strict=True):
        assert torch.equal(replayed, expected)


@each_length
def test_it_compiles_to_graphs(tokens: int) -> None:
    """What a launch leaves for the next must not come from a graph's pool, nor be shared by replays."""
    loss, leaves = calls(tokens)["importance"]
    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    expected = gradients(loss, *leaves)
    for _ in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        for result, eager in zip(gradients(compiled, *leaves), expected, strict=True):
            assert torch.equal(result, eager)


@each_length
@each_loss
def test_two_streams_do_not_disturb_each_other(name: str, tokens: int) -> None:
    loss, leaves = calls(tokens)[name]
    expected = gradients(loss, *leaves)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(gradients(loss, *leaves))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@each_loss
def test_work_goes_to_the_tensors_own_device(name: str) -> None:
    loss, leaves = calls(200)[name]
    expected = gradients(loss, *leaves)
    loss, leaves = calls(200, "cuda:1")[name]
    for result, other in zip(gradients(loss, *leaves), expected, strict=True):
        assert result.device.index == 1
        assert torch.equal(result.cpu(), other.cpu())


# Without random numbers, which each device draws in its own way.
STILL = dataclasses.replace(ranks.TINY, gate=False, dropout=0.0)


def steps(out: Path, **options: Any) -> list[dict[str, float]]:
    """What a run measured, step by step."""
    ranks.train(out, model=STILL, epochs=2, log_every=1, **options)
    names = ("cross_entropy", "importance", "interaction")
    return [{name: record["train"][name] for name in names} for record in records(out, "step")]


@pytest.mark.usefixtures("small_corpus")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"protocol": "released", "max_len": 24}], ids=str)
def test_a_run_has_the_terms_of_one_on_the_cpu(tmp_path: Path, options: dict[str, Any]) -> None:
    on_gpu, on_cpu = (steps(tmp_path / device, device=device, **options) for device in ("cuda", "cpu"))
    for ours, expected in zip(on_gpu, on_cpu, strict=True):
        assert ours == pytest.approx(expected, rel=0.05 if "bf16" in options else 1e-3)


@pytest.mark.usefixtures("small_corpus")
def test_a_run_begun_on_the_cpu_goes_on_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        interrupt_at_step(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            steps(tmp_path / "run", checkpoint_every=1)
    resumed = steps(tmp_path / "run", checkpoint_every=1, resume=True, device="cuda")
    for ours, expected in zip(resumed, steps(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(expected, rel=1e-3)
