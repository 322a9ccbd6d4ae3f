"""The paper's text classifier, with and without the word mask."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safr_fast.nn.attention import SelfAttention
from safr_fast.nn.vmask import VMASK


class ClassifierOutput(NamedTuple):
    """What a classifier gives back: its scores, and what the regularisers are taken on."""

    logits: Tensor
    """(B, classes)"""
    hidden: Tensor
    """(B, T, E): gate · √E · embedding, before positions. Padded rows hold anything."""
    qk: tuple[tuple[Tensor, Tensor], ...]
    """A pair of queries and keys (B, H, T, D) for each layer."""
    gate: Tensor | None
    """(B, T): 0 or 1 in training, the probability to keep in evaluation; None without a mask module."""


class TransformerClassifier(nn.Module):
    """Embedding · √E, sinusoidal positions, post-norm transformer layers, mean over real tokens, a linear layer.

    Args:
        vocabulary: number of word types.
        classes: number of labels.
        dim, heads, feedforward, layers, dropout: sizes, by default the released ones. Dropout acts after positions,
            on the attention's output and on the feed-forward's.
        gate: module that maps embeddings (B, T, E) to a gate (B, T) that multiplies them; None: no gate.
        pads_count: the mean is over all T positions, pads too, as in the released code.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int = 2,
        *,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        layers: int = 1,
        dropout: float = 0.1,
        gate: nn.Module | None = None,
        pads_count: bool = False,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, since positions are sine and cosine pairs, got {dim}")
        self.embedding = nn.Embedding(vocabulary, dim)
        self.gate = gate
        self.pads_count = pads_count
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, feedforward, dropout) for _ in range(layers))
        self.classify = nn.Linear(dim, classes)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> ClassifierOutput:
        """``ids``: (B, T) word types. ``mask``: bool (B, T), true where a token is real; None: all are."""
        x = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)  # (B, T, E)
        gate = None if self.gate is None else self.gate(x)
        hidden = x if gate is None else gate.unsqueeze(-1) * x

        # A sample without any real token attends to all of its pads: finite, and never read.
        keys = None if mask is None else mask | ~mask.any(dim=1, keepdim=True)
        x = self.dropout(hidden + sinusoidal_positions(ids.shape[1], hidden))
        qk = []
        for layer in self.layers:
            x, q, k = layer(x, keys)
            qk.append((q, k))
        pooled = mean_of_real(x, None if self.pads_count else mask)
        return ClassifierOutput(self.classify(pooled), hidden, tuple(qk), gate)


class SAFRClassifier(TransformerClassifier):
    """The paper's classifier: a transformer whose embeddings pass a VMASK of ``mask_hidden`` units."""

    def __init__(
        self,
        vocabulary: int,
        classes: int = 2,
        *,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        layers: int = 1,
        dropout: float = 0.1,
        mask_hidden: int = 1024,
        pads_count: bool = False,
    ) -> None:
        super().__init__(
            vocabulary,
            classes,
            dim=dim,
            heads=heads,
            feedforward=feedforward,
            layers=layers,
            dropout=dropout,
            gate=VMASK(dim, mask_hidden),
            pads_count=pads_count,
        )


class TransformerLayer(nn.Module):
    """Attention, then a ReLU feed-forward; each is added to its input, and the sum is normalised."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads)
        self.norm_attention = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, feedforward), nn.ReLU(), nn.Linear(feedforward, dim))
        self.norm_feedforward = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        attended, q, k = self.attention(x, keys)
        x = self.norm_attention(x + self.dropout(attended))
        return self.norm_feedforward(x + self.dropout(self.feedforward(x))), q, k


def sinusoidal_positions(length: int, like: Tensor) -> Tensor:
    """(T, E): sine and cosine of the position at wavelengths from 2π to 10,000 · 2π, interleaved."""
    dim = like.shape[-1]
    position = torch.arange(length, device=like.device, dtype=torch.float32)
    frequency = torch.arange(0, dim, 2, device=like.device, dtype=torch.float32).mul(-math.log(10_000.0) / dim).exp()
    angle = position[:, None] * frequency  # (T, E / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(like.dtype)


def mean_of_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, E) to (B, E): the mean over real tokens, 0 where there is none."""
    if mask is None:
        return x.mean(dim=1) if x.shape[1] else x.sum(dim=1)
    total = x.masked_fill(~mask.unsqueeze(-1), 0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)
