"""What is measured: in training on every batch, in evaluation on a whole split."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from safr_fast.data.batches import Batch, EncodedSplit, by_length
from safr_fast.integrations.distributed import ALONE, Processes
from safr_fast.loss import LossParts, SAFRLoss
from safr_fast.nn import ClassifierOutput, TransformerClassifier
from safr_fast.training.agreement import Agreement
from safr_fast.training.config import TrainConfig, Variant
from safr_fast.training.errors import RunError
from safr_fast.training.protocol import PROTOCOLS, Protocol

_EVALUATION_TOKENS = 8192

Sum = tuple[float, int]
"""A weighted sum, and the sum of the weights."""


class Means:
    """Means of named values over batches, summed where the values are, so that a GPU is not waited for.

    Args:
        variant: of the regularisers; it says what their values are means over.
        protocol: it says which tokens are words.
        begun: what :meth:`collected` gave, to go on from.
    """

    def __init__(self, variant: Variant, protocol: Protocol, begun: Mapping[str, Sum] | None = None) -> None:
        self._importance_is_per_token = variant == "released"
        self._protocol = protocol
        self._sums: dict[str, Tensor | float] = {name: total for name, (total, _) in (begun or {}).items()}
        self._weights: dict[str, Tensor | int] = {name: weight for name, (_, weight) in (begun or {}).items()}

    def add(self, values: Mapping[str, Tensor | None], weight: Tensor | int) -> None:
        """``weight``: what each value is a mean over, for example samples. None: not measured."""
        for name, value in values.items():
            if value is not None:
                self._add_sum(name, value.detach().double() * weight, weight)

    def _add_sum(self, name: str, total: Tensor, weight: Tensor | int) -> None:
        self._sums[name] = self._sums.get(name, 0) + total
        self._weights[name] = self._weights.get(name, 0) + weight

    def add_batch(self, batch: Batch, output: ClassifierOutput, terms: Mapping[str, Tensor | None]) -> None:
        """The terms, the accuracy, and the mean gate over words."""
        # Counted: early stopping asks whether it is better, and a sum of means is only nearly the same.
        self._add_sum("accuracy", (output.logits.argmax(dim=1) == batch.labels).double().sum(), len(batch.rows))
        for name, value in terms.items():
            per_token = self._importance_is_per_token and name in ("importance", "importance_weighted")
            self.add({name: value}, len(batch.ids) if per_token else len(batch.rows))
        if output.gate is not None:
            mean, words = self._protocol.mean_gate(output.gate, batch)
            self.add({"gate": mean}, words)

    def collected(self, team: Processes = ALONE) -> dict[str, Sum]:
        """Sums and their weights over all processes."""
        own = {name: (float(total), int(self._weights[name])) for name, total in self._sums.items()}
        everyone = team.gather(own)
        names = dict.fromkeys(name for sums in everyone for name in sums)
        return {name: _added(sums[name] for sums in everyone if name in sums) for name in names}

    def read(self, team: Processes = ALONE) -> dict[str, float]:
        return {name: total / max(weight, 1) for name, (total, weight) in self.collected(team).items()}


def _added(sums: Iterable[Sum]) -> Sum:
    totals, weights = zip(*sums, strict=True)
    return sum(totals), sum(weights)


def build_loss(config: TrainConfig, lambda_importance: float, lambda_interaction: float) -> SAFRLoss:
    """A run's loss under these weights. The scale is the model's own, whatever a protocol adds to queries and keys."""
    scale = 1 / math.sqrt(config.model.dim // config.model.heads)
    return SAFRLoss(lambda_importance, lambda_interaction, variant=config.variant, scale=scale, impl=config.impl)


def forward(
    model: nn.Module, loss: SAFRLoss, batch: Batch, protocol: Protocol, bf16: bool = False
) -> tuple[ClassifierOutput, LossParts]:
    """``model``: a classifier, compiled or spread over processes or not; its output and the loss of a batch."""
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=bf16):
        output = protocol.forward(model, batch)
        terms = protocol.regularised(output, batch)
        return output, loss(output.logits, batch.labels, **terms, return_parts=True)


def gradient_norms(loss: SAFRLoss, parts: LossParts, model: nn.Module) -> dict[str, float]:
    """Norm of the gradient of each term, over all parameters; regularisers before and after their weights.

    The graph is kept: the step's own backward pass comes after.
    """
    parameters = list(model.parameters())
    norms = {}
    terms = (("cross_entropy", parts.task, None), ("importance", parts.importance, loss.lambda_importance))
    for name, term, weight in (*terms, ("interaction", parts.interaction, loss.lambda_interaction)):
        if term is not None:
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item()
            norms[f"gradient_{name}"] = norm
            if weight is not None:
                norms[f"gradient_{name}_weighted"] = weight * norm
    return norms


def training_terms(loss: SAFRLoss, parts: LossParts) -> dict[str, Tensor | None]:
    """The total and every term; regularisers before and after their weights, None where they were not computed."""
    importance, interaction = parts.importance, parts.interaction
    return {
        "total": parts.total,
        "cross_entropy": parts.task,
        "importance": importance,
        "importance_weighted": None if importance is None else loss.lambda_importance * importance,
        "interaction": interaction,
        "interaction_weighted": None if interaction is None else loss.lambda_interaction * interaction,
    }


def evaluate(
    model: TransformerClassifier,
    split: EncodedSplit,
    config: TrainConfig,
    team: Processes = ALONE,
    agreement: Agreement | None = None,
) -> dict[str, float]:
    """Accuracy, mean gate, cross-entropy and both regularisers, whatever their weights, in evaluation mode.

    The batches are shared out among the processes of ``team``; ``agreement`` gets to see this process's share.
    """
    loss = build_loss(config, 1.0, 1.0)
    protocol = PROTOCOLS[config.protocol]
    device = model.classify.weight.device
    means = Means(config.variant, protocol)
    model.eval()
    with torch.inference_mode():
        for rows in by_length(split.lengths, _EVALUATION_TOKENS)[team.rank :: team.count]:
            batch = split.batch(rows).to(device)
            output, parts = forward(model, loss, batch, protocol, config.bf16)
            terms = {"cross_entropy": parts.task, "importance": parts.importance, "interaction": parts.interaction}
            means.add_batch(batch, output, terms)
            if agreement is not None:
                for row, text in zip(rows, protocol.texts(output, batch), strict=True):
                    agreement.add(row, text)
    return means.read(team)


def check_finite(measured: Mapping[str, float], where: str) -> None:
    """Raise RunError where a run has diverged: every value after that would be meaningless."""
    for name, value in measured.items():
        if not math.isfinite(value):
            raise RunError(
                f"the run has diverged, {name} is {value} in {where}: start anew by another --out, "
                "with a lower --learning-rate, or lower --lambda-importance and --lambda-interaction"
            )
