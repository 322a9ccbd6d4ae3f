"""What is measured: in training on every batch, in evaluation on a whole split."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from safr_fast.data.batches import Batch, EncodedSplit, by_length
from safr_fast.data.vocabulary import PAD
from safr_fast.loss import LossParts, SAFRLoss
from safr_fast.nn import ClassifierOutput, TransformerClassifier
from safr_fast.training.agreement import Agreement
from safr_fast.training.config import TrainConfig, Variant
from safr_fast.training.errors import RunError
from safr_fast.training.protocol import PROTOCOLS, Protocol

_EVALUATION_BATCH = 64


class Means:
    """Means of named values over batches, summed where the values are, so that a GPU is not waited for.

    ``variant``: of the regularisers; it says what their values are means over.
    """

    def __init__(self, variant: Variant) -> None:
        self._importance_is_per_token = variant == "released"
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | int] = {}

    def add(self, values: Mapping[str, Tensor | None], weight: Tensor | int) -> None:
        """``weight``: what each value is a mean over, for example samples. None: not measured."""
        for name, value in values.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, 0) + value.detach().double() * weight
                self._weights[name] = self._weights.get(name, 0) + weight

    def add_batch(self, batch: Batch, output: ClassifierOutput, terms: Mapping[str, Tensor | None]) -> None:
        """The terms, the accuracy, and the mean gate over real words."""
        tokens = batch.mask.sum()
        accuracy = (output.logits.argmax(dim=1) == batch.labels).double().mean()
        self.add({"accuracy": accuracy}, len(batch.rows))
        for name, value in terms.items():
            per_token = self._importance_is_per_token and name in ("importance", "importance_weighted")
            self.add({name: value}, tokens if per_token else len(batch.rows))
        if output.gate is not None:
            words = real_words(batch)
            count = words.sum()
            self.add({"gate": output.gate.where(words, 0).sum() / count.clamp(min=1)}, count)

    def read(self) -> dict[str, float]:
        return {name: float(total) / max(float(self._weights[name]), 1.0) for name, total in self._sums.items()}


def build_loss(config: TrainConfig, lambda_importance: float, lambda_interaction: float) -> SAFRLoss:
    """A run's loss under these weights. The scale is the model's own, whatever a protocol adds to queries and keys."""
    scale = math.sqrt(config.model.heads / config.model.dim)
    return SAFRLoss(lambda_importance, lambda_interaction, variant=config.variant, scale=scale, impl=config.impl)


def real_words(batch: Batch) -> Tensor:
    """(B, T): where a word is, neither padding of the batch nor a pad that the protocol has for a token."""
    return batch.ids != PAD


def forward(
    model: TransformerClassifier, loss: SAFRLoss, batch: Batch, protocol: Protocol
) -> tuple[ClassifierOutput, LossParts]:
    words = real_words(batch)
    output: ClassifierOutput = model(batch.ids, words)
    parts = loss(output.logits, batch.labels, **protocol.regularised(output, words), return_parts=True)
    return output, parts


def gradient_norms(loss: SAFRLoss, parts: LossParts, model: TransformerClassifier) -> dict[str, float]:
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
    model: TransformerClassifier, split: EncodedSplit, config: TrainConfig, agreement: Agreement | None = None
) -> dict[str, float]:
    """Accuracy, mean gate, cross-entropy and both regularisers, whatever their weights, in evaluation mode."""
    loss = build_loss(config, 1.0, 1.0)
    protocol = PROTOCOLS[config.protocol]
    device = model.classify.weight.device
    means = Means(config.variant)
    model.eval()
    with torch.inference_mode():
        for rows in by_length(split.lengths, _EVALUATION_BATCH):
            batch = split.batch(rows).to(device)
            output, parts = forward(model, loss, batch, protocol)
            terms = {"cross_entropy": parts.task, "importance": parts.importance, "interaction": parts.interaction}
            means.add_batch(batch, output, terms)
            if agreement is not None:
                agreement.add(batch._replace(mask=real_words(batch)), output)
    return means.read()


def check_finite(measured: Mapping[str, float], where: str) -> None:
    """Raise RunError where a run has diverged: every value after that would be meaningless."""
    for name, value in measured.items():
        if not math.isfinite(value):
            raise RunError(
                f"the run has diverged, {name} is {value} in {where}: start anew by another --out, "
                "with a lower --learning-rate, or lower --lambda-importance and --lambda-interaction"
            )
