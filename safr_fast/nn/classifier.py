"""The paper's text classifier, with and without the word mask."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safr_fast import arguments, reference
from safr_fast.nn.attention import SelfAttention
from safr_fast.nn.packed_attention import longest
from safr_fast.nn.vmask import VMASK


class ClassifierOutput(NamedTuple):
    """What a classifier gives back: its scores, and what the regularisers are taken on."""

    logits: Tensor
    """(B, classes); packed: (S, classes)"""
    hidden: Tensor
    """(B, T, E), packed (N, E): gate · √E · embedding, before positions. Padded rows hold anything."""
    qk: list[tuple[Tensor, Tensor]]
    """A pair of queries and keys (B, H, T, D), packed (N, H, D), for each layer."""
    gate: Tensor | None
    """(B, T), packed (N,): 0 or 1 in training, the probability to keep in evaluation; None without a mask module."""


class TransformerClassifier(nn.Module):
    """Embedding · √E, sinusoidal positions, post-norm transformer layers, mean over real tokens, a linear layer.

    Args:
        vocabulary: number of word types.
        classes: number of labels.
        dim, heads, feedforward, layers, dropout: sizes, by default the released ones. Dropout acts after positions,
            on the attention's output and on the feed-forward's.
        gate: module that gives a gate (...) to multiply the embeddings by. Called with embeddings (..., E); or with
            those of the batch's word types (W, E) and the place (...) of each token among them. None: no gate.
        pads_count: the mean of padded texts is over all T positions, pads too, as in the released code.
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

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        embedded: Tensor | None = None,
    ) -> ClassifierOutput:
        """Padded texts or packed ones.

        Args:
            ids: int64, or int32, ``(B, T)`` word types; or ``(N,)``, packed end to end, with ``cu_seqlens``.
            mask: bool ``(B, T)``, true where a token is real; None: all are.
            cu_seqlens: int32 ``(S + 1,)`` offsets of packed texts, from 0 to N; excludes ``mask``.
            max_seqlen: tokens of the longest packed text; found out if None, for which a GPU has to be waited for.
            embedded: ``(B, T, E)`` or ``(N, E)``, taken for the embeddings of ``ids``, to attribute scores to them.

        Raises:
            TypeError, ValueError: ``ids``, ``mask`` or ``cu_seqlens`` of the wrong dtype, shape or device; ``mask``
                beside ``cu_seqlens``; ``max_seqlen`` without; on the CPU also, offsets not from 0 to N, or a sequence
                longer than ``max_seqlen``.
        """
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be an int64 or int32 tensor of word types, got {arguments.describe(ids)}")
        arguments.check_cu_seqlens(cu_seqlens, mask, ids, "(N)")
        if cu_seqlens is None:
            if ids.dim() != 2:
                raise ValueError(f"ids must have shape (B, T), or (N,) with cu_seqlens, got {tuple(ids.shape)}")
            arguments.check_mask(mask, ids.shape, ids)
        arguments.check_max_seqlen(max_seqlen, cu_seqlens)
        arguments.check_offsets(cu_seqlens, len(ids), to_the_end=True, max_seqlen=max_seqlen)
        if cu_seqlens is not None and max_seqlen is None:
            max_seqlen = longest(cu_seqlens)
        x, gate = self._embed(ids, embedded)
        hidden = x if gate is None else gate.unsqueeze(-1) * x  # (B, T, E) or (N, E)

        layout: dict[str, Any]
        if cu_seqlens is None:
            positions = sinusoidal_positions(ids.shape[1], hidden)
            # A sample without any real token attends to all of its pads: finite, and never read.
            layout = {"keys": None if mask is None else mask | ~mask.any(dim=1, keepdim=True)}
        else:
            segment = reference.segment_ids(cu_seqlens, len(ids))
            positions = packed_positions(cu_seqlens, segment, hidden, cast(int, max_seqlen))
            layout = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        x = self.dropout(hidden + positions)
        qk = []
        for layer in self.layers:
            x, q, k = layer(x, **layout)
            qk.append((q, k))
        if cu_seqlens is None:
            pooled = mean_of_real(x, None if self.pads_count else mask)
        else:
            pooled = mean_of_sequences(x, cu_seqlens, segment)
        return ClassifierOutput(self.classify(pooled), hidden, qk, gate)

    def _embed(self, ids: Tensor, embedded: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """√E · embedding and gate of each token."""
        scale = math.sqrt(self.embedding.embedding_dim)
        # On a GPU, finding the word types would have to be waited for.
        if embedded is not None or ids.device.type != "cpu":
            x = (self.embedding(ids) if embedded is None else embedded) * scale
            return x, None if self.gate is None else self.gate(x)
        # Words repeat: what follows from the word alone is computed once for each type in the batch.
        types, place = ids.unique(return_inverse=True)
        rows = self.embedding(types) * scale  # (W, E)
        return F.embedding(place, rows), None if self.gate is None else self.gate(rows, place)


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

    def forward(self, x: Tensor, **layout: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Output, queries and keys; ``layout``: which tokens attend to which, as :class:`SelfAttention` takes it."""
        attended, q, k = self.attention(x, **layout)
        x = self.norm_attention(x + self.dropout(attended))
        return self.norm_feedforward(x + self.dropout(self.feedforward(x))), q, k


def sinusoidal_positions(length: int, like: Tensor) -> Tensor:
    """(T, E): sine and cosine of the position at wavelengths from 2π to 10,000 · 2π, interleaved."""
    dim = like.shape[-1]
    position = torch.arange(length, device=like.device, dtype=torch.float32)
    frequency = torch.arange(0, dim, 2, device=like.device, dtype=torch.float32).mul(-math.log(10_000.0) / dim).exp()
    angle = position[:, None] * frequency  # (T, E / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(like.dtype)


def packed_positions(cu_seqlens: Tensor, segment: Tensor, like: Tensor, max_seqlen: int) -> Tensor:
    """(N, E): the same for each packed token's position within its own sequence."""
    position = torch.arange(len(segment), device=segment.device) - cu_seqlens[segment]
    return F.embedding(position, sinusoidal_positions(max_seqlen, like))


def mean_of_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, E) to (B, E): the mean over real tokens, 0 where there is none."""
    if mask is None:
        return x.mean(dim=1) if x.shape[1] else x.sum(dim=1)
    total = x.masked_fill(~mask.unsqueeze(-1), 0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def mean_of_sequences(x: Tensor, cu_seqlens: Tensor, segment: Tensor) -> Tensor:
    """(N, E) to (S, E): the mean over each packed sequence, 0 for an empty one."""
    lengths = cu_seqlens.diff().unsqueeze(-1)
    total = x.new_zeros(len(lengths), x.shape[-1]).index_add(0, segment, x)
    return total / lengths.clamp(min=1)
