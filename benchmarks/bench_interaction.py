"""What does the interaction cost at my length? One sample of 8 heads, from stored weights and from queries and keys."""

import pytest
import torch
from comparison import Provider, compare
from torch import Tensor

import safr_fast as sf

HEADS, WIDTH = 8, 64
# How far apart the scores are: a fresh model with embeddings scaled by √E attends nearly one-hot, and its small weights
# and their products are denormal.
SHARPNESS = {"fresh": 8.0, "trained": 1.0}


def plain(attention: Tensor) -> Tensor:
    overlap = attention @ attention.mT
    return (attention * (1 - overlap.square())).mean((-1, -2)).mean()


def plain_from_qk(q: Tensor, k: Tensor) -> Tensor:
    return plain((q @ k.mT / WIDTH**0.5).softmax(-1))


def query_key(length: int, sharpness: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(2))
    return q * sharpness, k


each_length = pytest.mark.parametrize("length", [128, 256, 512, 1024])
each_sharpness = pytest.mark.parametrize("sharpness", SHARPNESS)


@each_length
@each_sharpness
def bench_from_attention(benchmark, length: int, sharpness: str, precision: str, threads: int) -> None:
    benchmark.group = f"interaction from attention, {HEADS} heads, {sharpness}"
    q, k = query_key(length, SHARPNESS[sharpness])
    attention = (q @ k.mT / WIDTH**0.5).softmax(-1)
    subject, rivals = Provider("safr_fast", sf.interaction_loss), [Provider("eager", plain)]
    compare(benchmark, subject, rivals, [attention], plain, rounds=15 if length < 1024 else 7)


@each_length
@each_sharpness
def bench_from_qk(benchmark, length: int, sharpness: str, precision: str, threads: int) -> None:
    benchmark.group = f"interaction from queries and keys, {HEADS} heads of {WIDTH}, {sharpness}"
    inputs = query_key(length, SHARPNESS[sharpness])
    subject, rivals = Provider("safr_fast", sf.interaction_loss_from_qk), [Provider("eager", plain_from_qk)]
    compare(benchmark, subject, rivals, inputs, plain_from_qk, rounds=15 if length < 1024 else 7)
