"""The steps of an epoch: which texts each takes, and what its loss is a mean over."""

from typing import NamedTuple

from torch import Tensor

from safr_fast.data.batches import Batch, epoch_seed, shuffled_buckets, token_buckets
from safr_fast.loss import LossParts, SAFRLoss
from safr_fast.training.config import TrainConfig


class Step(NamedTuple):
    """Batches whose gradients are added up before the weights move."""

    batches: list[list[int]]
    """Rows of each."""
    seeds: list[int]
    """Of the random numbers of each, dropout and gates: they follow from the run's seed, the epoch and the batch."""
    size: int
    """Tokens in all of them."""
    samples: float
    """What its mean over samples divides by."""
    tokens: float
    """What its mean over tokens divides by."""


def steps(lengths: Tensor, config: TrainConfig, epoch: int, processes: int = 1) -> list[Step]:
    """An epoch's steps, of ``config.accumulate`` batches for each process, the last of what is left.

    Every text is in one of them.

    A step's loss is the mean over its own texts. Of batches by tokens some hold few long texts, some many short ones:
    their loss is the sum over the texts, divided by the mean number in a step, so that every text weighs the same.
    """
    if config.batch_tokens is None:
        batches = shuffled_buckets(lengths, config.batch_size, config.seed, epoch)
    else:
        batches = token_buckets(lengths, config.batch_tokens, config.seed, epoch)
    seeds = [epoch_seed(epoch_seed(config.seed, epoch), i) for i in range(len(batches))]
    width = config.accumulate * processes
    starts = range(0, len(batches), width)
    planned = []
    for start in starts:
        own = batches[start : start + width]
        size = sum(int(lengths[rows].sum()) for rows in own)
        samples, tokens = float(sum(map(len, own))), float(size)
        if config.batch_tokens is not None:
            samples, tokens = len(lengths) / len(starts), int(lengths.sum()) / len(starts)
        planned.append(Step(own, seeds[start : start + width], size, samples, max(tokens, 1.0)))
    return planned


def share(step: Step, batch: Batch, loss: SAFRLoss, parts: LossParts) -> Tensor:
    """What one batch adds to its step's loss: each term's mean over the batch, times the batch's share of the step."""
    by_samples, by_tokens = len(batch.rows) / step.samples, len(batch.ids) / step.tokens
    total = by_samples * parts.task
    if parts.importance is not None:
        per_token = loss.variant == "released"
        total = total + (by_tokens if per_token else by_samples) * loss.lambda_importance * parts.importance
    if parts.interaction is not None:
        total = total + by_samples * loss.lambda_interaction * parts.interaction
    return total
