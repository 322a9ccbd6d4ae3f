"""What share of a training step do both regularisers take? The paper's model, 8 samples of T tokens, Adam included."""

import contextlib

import pytest
import torch
from comparison import Loss, Provider, compare, every_processor, tile_gflops
from formulas import interaction_floor, row_energy_floor
from providers import precisions
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import safr_fast as sf
from safr_fast.nn import ClassifierOutput, SAFRClassifier

SAMPLES, WORDS = 8, 20_000
HEADS, WIDTH = 8, 256
LAMBDA_IMPORTANCE, LAMBDA_INTERACTION = 1.0, 0.1


def task(output: ClassifierOutput, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits, labels)


def plain(output: ClassifierOutput, labels: Tensor) -> Tensor:
    """The released code's formulas, which make T×T tensors throughout."""
    h, ((q, k),) = output.hidden, output.qk
    others = ~torch.eye(h.shape[-2], dtype=torch.bool, device=h.device)
    polysemanticity = (h @ h.mT).square().where(others, 0).sum(-1) / (h.norm(dim=-1) + 1e-5).square()
    importance = (polysemanticity / h.shape[-1]).clamp(min=1e-30).sqrt().mean()  # closed gates leave rows of zeros
    attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    interaction = (attention * (1 - (attention @ attention.mT).where(others, 0))).mean()
    return task(output, labels) + LAMBDA_IMPORTANCE * importance + LAMBDA_INTERACTION * interaction


_safr = sf.SAFRLoss(LAMBDA_IMPORTANCE, LAMBDA_INTERACTION, variant="released")


def ours(output: ClassifierOutput, labels: Tensor) -> Tensor:
    return _safr(output.logits, labels, hidden=output.hidden, qk=output.qk)


class Training:
    """The same weights and batch in every step."""

    def __init__(self, length: int, samples: int = SAMPLES, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = SAFRClassifier(WORDS).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0)
        self.ids = torch.randint(WORDS, (samples, length), device=device)
        self.labels = torch.randint(2, (samples,), device=device)
        self._exact: dict[tuple[object, torch.dtype], list[Tensor]] = {}

    def forward(self) -> ClassifierOutput:
        torch.manual_seed(1)  # of gates and dropout
        return self.model(self.ids)

    def provider(
        self, name: str, loss: Loss, exact: Loss, precision: str, dtype: torch.dtype = torch.float32
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
        warm_up = loss is ours or precision != "highest"
        return Provider(name, step, self._exact[exact, dtype], precision, lambda: results(loss, None), warm_up)


@pytest.mark.parametrize("length", [512, 1024])
def bench_training_step(benchmark: BenchmarkFixture, length: int) -> None:
    benchmark.group = f"training step of the paper's model, {SAMPLES} samples"
    benchmark.extra_info |= {"case": f"T={length}", "length": length}
    training = Training(length)
    measured = precisions()
    providers = [training.provider(f"ours {p}", ours, plain, p) for p in measured]
    providers.append(training.provider("eager", plain, plain, "highest"))
    providers += [training.provider(f"no regulariser {p}", task, task, p) for p in measured]
    compare(benchmark, providers)

    times = {name: p["ms"] for name, p in benchmark.extra_info["providers"].items()}
    without = {p: times[f"no regulariser {p}"] for p in measured}
    share = {f"ours {p}": 1 - without[p] / times[f"ours {p}"] for p in measured}
    benchmark.extra_info["regularisers_share"] = share | {"eager": 1 - without["highest"] / times["eager"]}
    if (rate := tile_gflops()) is not None:
        # No exact algorithm known does with less, were every operation of it done at the tiles' own rate.
        floor = SAMPLES * (interaction_floor(length, HEADS, WIDTH // HEADS) + row_energy_floor(length, WIDTH))
        least = floor / rate / 1e6
        benchmark.extra_info["least_share_in_float32"] = least / (least + without["highest"])
