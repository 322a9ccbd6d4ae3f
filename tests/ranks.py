"""What tests run in processes of their own: imported there, so apart from the tests themselves."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import safr_fast as sf
from safr_fast.data import Corpus, synthetic
from safr_fast.data.batches import Batch
from safr_fast.loss import LossParts, SAFRLoss
from safr_fast.nn import SAFRClassifier
from safr_fast.training import ModelConfig, TrainConfig, TrainResult, loop

TINY = ModelConfig(dim=16, heads=2, feedforward=32, mask_hidden=16)
SIZES = {"train": 100, "dev": 40, "test": 40}


def small_corpus(dataset: str, data_dir: Path | None, *, seed: int, all_rows: bool, imdb_dev: str) -> Corpus:
    return synthetic(seed, SIZES)


def train(out: Path, *, resume: bool = False, **options: Any) -> TrainResult:
    """A run of seconds, on the CPU unless told otherwise."""
    defaults: dict[str, Any] = {"epochs": 4, "patience": 4, "learning_rate": 1e-3, "log_every": 2, "model": TINY}
    config = TrainConfig(out=out, **({"device": "cpu"} | defaults | options))
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


class Recording(loop.Means):
    """Keeps which texts were trained on."""

    rows: list[int] = []  # noqa: RUF012

    def add_batch(self, batch: Batch, *arguments: Any) -> None:
        self.rows.extend(batch.rows)
        super().add_batch(batch, *arguments)


def train_together(out: Path, options: dict[str, Any]) -> tuple[TrainResult, list[int]]:
    """A rank's result, and the texts that it measured, each twice: for the epoch, and for the latest record."""
    loop.data.load = small_corpus
    loop.Means = Recording
    result = train(out, **options)
    return result, Recording.rows


def refusal_of_a_dtensor() -> str:
    from torch.distributed.tensor import Replicate, distribute_tensor

    h = distribute_tensor(torch.ones(2, 3, 4), dist.init_device_mesh("cpu", (1,)), [Replicate()])
    try:
        sf.importance_loss(h)
    except TypeError as error:
        return str(error)
    return "none"


def sharded_step(variant: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Loss terms and whole gradients of a model sharded by FSDP2, of this rank's half of four texts."""
    from torch.distributed.fsdp import fully_shard  # loads the compiler, which the other tests do without

    model, loss, texts = small_model(variant)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))  # by itself it would take a GPU
    fully_shard(model.layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    parts = loss_of(model, loss, *texts[dist.get_rank()])
    parts.total.backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    return [part.detach() for part in parts], gradients


def small_model(variant: Any) -> tuple[SAFRClassifier, SAFRLoss, list[tuple[Tensor, Tensor, Tensor]]]:
    """A classifier in evaluation mode, whose gates and dropout are at rest; and two batches of packed texts."""
    torch.manual_seed(0)
    model = SAFRClassifier(30, dim=16, heads=2, feedforward=32, mask_hidden=16).eval()
    lengths = [(9, 4), (6, 7)]
    texts = [
        (torch.randint(30, (sum(own),)), torch.tensor([0, own[0], sum(own)], dtype=torch.int32), torch.tensor([0, 1]))
        for own in lengths
    ]
    return model, SAFRLoss(1.0, 1.0, variant=variant), texts


def loss_of(model: SAFRClassifier, loss: SAFRLoss, ids: Tensor, cu_seqlens: Tensor, labels: Tensor) -> LossParts:
    output = model(ids, cu_seqlens=cu_seqlens)
    return loss(output.logits, labels, hidden=output.hidden, qk=output.qk, cu_seqlens=cu_seqlens, return_parts=True)


def spread_importance(
    h: Tensor, mask: Tensor | None, lengths: list[int], forms: list[dict[str, Any]]
) -> list[list[Tensor]]:
    """For each form: row energy, squared norm, importance loss and its gradient, of this rank's share of the tokens."""
    rank = dist.get_rank()
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    results = []
    for form in forms:
        x = h[..., own, :].clone().requires_grad_()
        given: dict[str, Any] = {"mask": None if mask is None else mask[..., own], "group": dist.group.WORLD}
        energy, squared_norm = sf.row_energy(x, **given, impl=form["impl"])
        loss = sf.importance_loss(x, **given, **form)
        (gradient,) = torch.autograd.grad(3 * loss.sum(), x)  # as where a weight stands before the loss
        results.append([energy.detach(), squared_norm.detach(), loss.detach(), gradient / 3])
    return results


def refusals(h: Tensor) -> list[str]:
    """What calls say that cannot be served."""
    group = dist.group.WORLD
    packed = torch.tensor([0, h.shape[-2]], dtype=torch.int32)

    def twice() -> None:
        (gradient,) = torch.autograd.grad(sf.importance_loss(h.requires_grad_(), group=group), h, create_graph=True)
        gradient.sum().backward()

    messages = []

    def transformed() -> None:
        torch.func.grad(lambda x: sf.importance_loss(x, group=group, impl="reference"))(h.detach())

    for attempt in (lambda: sf.row_energy(h[0], cu_seqlens=packed, group=group), twice, transformed):
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    return messages
