"""What share of a training step do both regularisers take? The paper's model, Adam included."""

import contextlib
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from comparison import Loss, Provider, compare, every_processor, tile_gflops
from formulas import interaction_floor, row_energy_floor
from providers import own_precision, precisions
from pytest_benchmark.fixture import BenchmarkFixture
from ragged import Layout, imdb_lengths
from torch import Tensor, nn

import safr_fast as sf
from safr_fast.nn import ClassifierOutput, SAFRClassifier

WORDS = 20_000
HEADS, WIDTH, FEEDFORWARD, GATE = 8, 256, 1024, 1024
# Lengths of a batch's texts. A share depends on them, hardly on how many there are: few keep the long cases short.
BATCHES = {
    "32 samples, T=128": [128] * 32,
    "32 samples, T=256": [256] * 32,
    "8 samples, T=512": [512] * 8,
    "2 samples, T=1024": [1024] * 2,
    "1 sample, T=2048": [2048],
    "32 samples with IMDB's lengths, cut at 256": [min(words, 256) for words in imdb_lengths()],
    "1 sample, T=4096": [4096],
}
LONG = {"1 sample, T=4096"}
LAMBDA_IMPORTANCE, LAMBDA_INTERACTION = 1.0, 0.1


def task(output: ClassifierOutput, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits, labels)


def plain(output: ClassifierOutput, labels: Tensor) -> Tensor:
    """The released code's formulas, which make T×T tensors throughout."""
    h, ((q, k),) = output.hidden, output.qk
    importance = importance_of(h).mean()
    interaction = interaction_of((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)).mean()
    return task(output, labels) + LAMBDA_IMPORTANCE * importance + LAMBDA_INTERACTION * interaction


def masked_plain(output: ClassifierOutput, labels: Tensor, mask: Tensor) -> Tensor:
    """The same of the real tokens of a padded batch."""
    h, ((q, k),) = output.hidden.masked_fill(~mask[..., None], 0), output.qk
    importance = importance_of(h).masked_fill(~mask, 0).sum() / mask.sum()
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, None, :], -torch.inf)
    attention = scores.softmax(-1).masked_fill(~mask[:, None, :, None], 0)
    interaction = (interaction_of(attention).sum((-1, -2)) / mask.sum(-1).square()[:, None]).mean()
    return task(output, labels) + LAMBDA_IMPORTANCE * importance + LAMBDA_INTERACTION * interaction


def importance_of(h: Tensor) -> Tensor:
    others = ~torch.eye(h.shape[-2], dtype=torch.bool, device=h.device)
    polysemanticity = (h @ h.mT).square().where(others, 0).sum(-1) / (h.norm(dim=-1) + 1e-5).square()
    return (polysemanticity / h.shape[-1]).clamp(min=1e-30).sqrt()  # closed gates leave rows of zeros


def interaction_of(attention: Tensor) -> Tensor:
    others = ~torch.eye(attention.shape[-1], dtype=torch.bool, device=attention.device)
    return attention * (1 - (attention @ attention.mT).where(others, 0))


_safr = sf.SAFRLoss(LAMBDA_IMPORTANCE, LAMBDA_INTERACTION, variant="released")


def ours(output: ClassifierOutput, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    return _safr(output.logits, labels, hidden=output.hidden, qk=output.qk, mask=mask)


class Training:
    """The same weights and batch in every step; texts shorter than the longest are padded."""

    def __init__(self, lengths: Sequence[int], device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.device = device
        self.lengths = lengths
        self.model = SAFRClassifier(WORDS, dim=WIDTH, heads=HEADS, feedforward=FEEDFORWARD, mask_hidden=GATE).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0)
        self.mask = Layout.of(lengths, device).mask if len(set(lengths)) > 1 else None
        self.ids = torch.randint(WORDS, (len(lengths), max(lengths)), device=device)
        self.labels = torch.randint(2, (len(lengths),), device=device)
        self._exact: dict[tuple[object, torch.dtype], list[Tensor]] = {}

    def forward(self) -> ClassifierOutput:
        torch.manual_seed(1)  # of gates and dropout
        return self.model(self.ids, self.mask)

    def task_floor(self) -> float:
        """Operations of the model's products, forward and backward. The gate is made once for each word type."""
        types = len(self.ids.unique() if self.mask is None else self.ids[self.mask].unique())
        layer = sum(self.lengths) * (4 * WIDTH + 2 * FEEDFORWARD) * WIDTH
        attention = 2 * WIDTH * sum(length**2 for length in self.lengths)
        return 6.0 * (layer + attention + types * GATE * WIDTH)

    def regularisers_floor(self) -> float:
        """Of both terms: no exact algorithm known does with less."""
        width = WIDTH // HEADS
        return sum(interaction_floor(n, HEADS, width) + row_energy_floor(n, WIDTH) for n in self.lengths)

    def provider(
        self,
        name: str,
        loss: Loss,
        exact: Loss,
        precision: str = "highest",
        dtype: torch.dtype = torch.float32,
        floor: float | None = None,
    ) -> Provider:
        """16-bit dtypes by autocast. Held against float64: the loss, and the gradients of both terms by themselves."""
        autocast = torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

        def step() -> list[Tensor]:
            with autocast:
                value = loss(self.forward(), self.labels)
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            return [value.detach()]

        with torch.no_grad(), autocast:
            logits, hidden, ((q, k),), gate = self.forward()

        def results(loss: Loss, dtype: torch.dtype | None) -> list[Tensor]:
            leaves = h, own_q, own_k = tuple(x.to(dtype or x.dtype).requires_grad_() for x in (hidden, q, k))
            output = ClassifierOutput(logits.to(dtype or logits.dtype), h, [(own_q, own_k)], gate)
            with autocast if dtype is None else contextlib.nullcontext():
                value = loss(output, self.labels)
            terms = torch.autograd.grad(value, leaves, materialize_grads=True) if value.requires_grad else ()
            return [value.detach(), *terms]

        if (exact, dtype) not in self._exact:
            with every_processor():
                self._exact[exact, dtype] = results(exact, torch.float64)
        # Adam's state is there after the first provider's first step.
        warm_up = loss is not exact or precision != "highest"
        return Provider(name, step, self._exact[exact, dtype], precision, lambda: results(loss, None), warm_up, floor)


@pytest.mark.parametrize("batch", [pytest.param(b, marks=[pytest.mark.long] * (b in LONG)) for b in BATCHES])
def bench_training_step(benchmark: BenchmarkFixture, batch: str) -> None:
    benchmark.group = "training step of the paper's model"
    benchmark.extra_info |= {"case": batch}
    training = Training(BATCHES[batch])
    mask, measured = training.mask, precisions()
    without_terms, floor = training.task_floor(), training.regularisers_floor()
    eager = plain if mask is None else partial(masked_plain, mask=mask)
    own = partial(ours, mask=mask)
    providers = [training.provider(f"ours {p}", own, eager, p) for p in measured]
    providers.append(training.provider("eager", eager, eager))
    models = {p: own_precision(p) for p in measured}
    distinct = dict.fromkeys(models.values())
    providers += [training.provider(f"no regulariser {p}", task, task, p, floor=without_terms) for p in distinct]
    compare(benchmark, providers, without_terms + floor)

    times = {name: p["ms"] for name, p in benchmark.extra_info["providers"].items()}
    without = {p: times[f"no regulariser {models[p]}"] for p in measured}
    timed = [p for p in measured if times[f"ours {p}"] is not None]  # medium's attention may be too flat for 8 bits
    share = {f"ours {p}": 1 - without[p] / times[f"ours {p}"] for p in timed}
    benchmark.extra_info["regularisers_share"] = share | {"eager": 1 - without["highest"] / times["eager"]}
    if (rate := tile_gflops()) is not None:  # were every operation done at the tiles' own rate
        least = floor / rate / 1e6
        benchmark.extra_info["least_share_in_float32"] = least / (least + without["highest"])
