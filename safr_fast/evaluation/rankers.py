"""Scores of each word of each text, by what a model gives: capacity by place, VMASK, attention, gradients."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from safr_fast.evaluation.encoding import Encoded, Padded
from safr_fast.evaluation.places import exact_capacity, hidden_states
from safr_fast.nn import TransformerClassifier

_STEPS = 32
GRADIENT_RANKERS = ("gradient_x_input", "integrated_gradients")

Scores = dict[str, list[Tensor]]
Progress = Callable[[list[list[int]]], Iterator[list[int]]]


def score(
    model: TransformerClassifier, texts: Encoded, *, gradients: bool = False, progress: Progress = iter
) -> Scores:
    """By ranker, for each text the scores of its real tokens.

    ``capacity:<place>`` for each of :data:`safr_fast.evaluation.places.PLACES`; ``vmask``, the probability to keep a
    word; ``attention``, what a word receives of it, mean over heads and queries of the last layer. With ``gradients``,
    for the predicted class's score and the embedding: ``gradient_x_input`` and ``integrated_gradients`` by captum.
    """
    device = model.classify.weight.device
    scores: dict[str, dict[int, Tensor]] = {}
    training = model.training
    model.eval()
    try:
        for rows in progress(texts.batches()):
            batch = texts.batch(rows).to(device)
            for name, values in _of_batch(model, batch, gradients).items():
                found = scores.setdefault(name, {})
                for row, value in zip(rows, values.cpu(), strict=True):
                    found[row] = value[: len(texts.texts[row])].clone()
    finally:
        model.train(training)
    return {name: [found[row] for row in range(len(texts))] for name, found in scores.items()}


def _of_batch(model: TransformerClassifier, batch: Padded, gradients: bool) -> dict[str, Tensor]:
    output, states = hidden_states(model, batch.ids, batch.mask)
    scores = {f"capacity:{place}": _rounded(exact_capacity(h, batch.mask)) for place, h in states.items()}
    if output.gate is not None:
        scores["vmask"] = output.gate
    scores["attention"] = _received(*output.qk[-1], batch.mask)
    if gradients:
        scores |= _attributions(model, batch, output.logits.argmax(1))
    return scores


def _rounded(x: Tensor) -> Tensor:
    """To 40 bits: equal vectors are ties, and what the order of a float64 sum leaves in its last digits is no order."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**40).round(), exponent - 40)


def _received(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """(B, T): attention that real tokens pay to each, mean over heads."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, None, :], torch.finfo(q.dtype).min)
    paid = scores.softmax(-1).mean(1)  # (B, T, T)
    return paid.masked_fill(~mask[:, :, None], 0).sum(1)


def _attributions(model: TransformerClassifier, batch: Padded, target: Tensor) -> dict[str, Tensor]:
    from captum.attr import InputXGradient, IntegratedGradients

    def logits(embedded: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = model(ids, mask, embedded=embedded).logits
        return out

    embedded = model.embedding(batch.ids).detach().requires_grad_()
    others = (batch.ids, batch.mask)
    by_input = InputXGradient(logits).attribute(embedded, target=target, additional_forward_args=others)
    integrated = IntegratedGradients(logits).attribute(
        embedded, target=target, additional_forward_args=others, n_steps=_STEPS, internal_batch_size=len(batch.ids)
    )
    values = (attribution.sum(-1).detach() for attribution in (by_input, integrated))
    return dict(zip(GRADIENT_RANKERS, values, strict=True))
