"""The steps of an epoch: which texts each takes, and what its loss is a mean over."""

from typing import NamedTuple

from torch import Tensor

from safr_fast.data.batches import Batch, EncodedSplit, PaddedBatch, epoch_seed, shuffled_buckets, token_buckets
from safr_fast.loss import LossParts, SAFRLoss
from safr_fast.training.config import TrainConfig


class Step(NamedTuple):
    """Batches whose gradients are added up before the weights move."""

    batches: list[list[int]]
    """Rows of each."""
    seeds: list[int]
    """Of the random numbers of each, dropout and gates: they follow from the run's seed, the epoch and the batch."""
    size: int
    """Real tokens in all of them."""
    samples: float
    """What its mean over samples divides by."""
    tokens: float
    """What its mean over tokens divides by."""


def steps(split: EncodedSplit, config: TrainConfig, epoch: int, processes: int = 1) -> list[Step]:
    """An epoch's steps, of ``config.accumulate`` batches for each process, the last of what is left.

    Every text is in one of them.

    A step's loss is the mean over its own texts. Of batches by tokens some hold few long texts, some many short ones:
    their loss is the sum over the texts, divided by the mean number in a step, so that every text weighs the same.
    """
    widths = split.widths
    if config.batch_tokens is None:
        batches = shuffled_buckets(widths, config.batch_size, config.seed, epoch)
    else:
        batches = token_buckets(widths, config.batch_tokens, config.seed, epoch)
    seeds = [epoch_seed(epoch_seed(config.seed, epoch), i) for i in range(len(batches))]
    width = config.accumulate * processes
    starts = range(0, len(batches), width)
    planned = []
    for start in starts:
        own = batches[start : start + width]
        size, positions = (sum(int(x[rows].sum()) for rows in own) for x in (split.lengths, widths))
        samples, tokens = float(sum(map(len, own))), float(positions)
        if config.batch_tokens is not None:
            samples, tokens = len(split) / len(starts), int(widths.sum()) / len(starts)
        planned.append(Step(own, seeds[start : start + width], size, samples, max(tokens, 1.0)))
    return planned


def share(step: Step, batch: Batch | PaddedBatch, loss: SAFRLoss, parts: LossParts) -> Tensor:
    """What one batch adds to its step's loss: each term's mean over the batch, times the batch's share of the step."""
    by_samples, by_tokens = len(batch.rows) / step.samples, batch.ids.numel() / step.tokens
    total = by_samples * parts.task
    if parts.importance is not None:
        per_token = loss.variant == "released"
        total = total + (by_tokens if per_token else by_samples) * loss.lambda_importance * parts.importance
    if parts.interaction is not None:
        total = total + by_samples * loss.lambda_interaction * parts.interaction
    return total
