"""Scores of each word of each text, by what a model gives: capacity by place, VMASK, attention, gradients."""

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from safr_fast.data.batches import EncodedSplit, PaddedBatch, by_length
from safr_fast.evaluation.places import capacity, hidden_states
from safr_fast.nn import TransformerClassifier
from safr_fast.training.agreement import mean_attention

_TOKENS = 8192
_STEPS = 32

Scores = dict[str, list[Tensor]]
Progress = Callable[[list[list[int]]], Iterator[list[int]]]


def score(
    model: TransformerClassifier, split: EncodedSplit, *, gradients: bool = False, progress: Progress = iter
) -> Scores:
    """By ranker, for each text the scores of its real tokens.

    ``capacity:<place>`` for each of :data:`safr_fast.evaluation.places.PLACES`; ``vmask``, the probability to keep a
    word; ``attention``, what a word receives of it, mean over heads and queries of the last layer. With ``gradients``,
    for the predicted class's score and the embedding: ``gradient_x_input`` and ``integrated_gradients`` by captum.
    """
    device = model.classify.weight.device
    scores: dict[str, dict[int, Tensor]] = {}
    for rows in progress(by_length(split.widths, _TOKENS)):
        batch = split.padded(rows).to(device)
        for name, values in _of_batch(model, batch, gradients).items():
            found = scores.setdefault(name, {})
            for row, length, value in zip(rows, batch.lengths, values.cpu(), strict=True):
                found[row] = value[:length].clone()
    return {name: [found[row] for row in range(len(split))] for name, found in scores.items()}


def _of_batch(model: TransformerClassifier, batch: PaddedBatch, gradients: bool) -> dict[str, Tensor]:
    output, states = hidden_states(model, batch.ids, batch.mask)
    scores = {f"capacity:{place}": capacity(h, batch.mask) for place, h in states.items()}
    if output.gate is not None:
        scores["vmask"] = output.gate
    q, k = output.qk[-1]
    received = [mean_attention(q[b, :, :n], k[b, :, :n]).sum(0) for b, n in enumerate(batch.lengths)]
    scores["attention"] = pad_sequence(received, batch_first=True)  # (B, T)
    if gradients:
        scores |= _attributions(model, batch, output.logits.argmax(1))
    return scores


def _attributions(model: TransformerClassifier, batch: PaddedBatch, target: Tensor) -> dict[str, Tensor]:
    from captum.attr import InputXGradient, IntegratedGradients

    def logits(embedded: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = model(ids, mask, embedded=embedded).logits
        return out

    embedded = model.embedding(batch.ids).detach().requires_grad_()
    others = (batch.ids, batch.mask)
    by_input = InputXGradient(logits).attribute(embedded, target=target, additional_forward_args=others)
    integrated = IntegratedGradients(logits).attribute(
        embedded, target=target, additional_forward_args=others, n_steps=_STEPS, internal_batch_size=len(batch.rows)
    )
    return {
        "gradient_x_input": by_input.sum(-1).detach(),
        "integrated_gradients": integrated.sum(-1).detach(),
    }
