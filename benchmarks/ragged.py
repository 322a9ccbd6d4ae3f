"""Batches of samples of unlike lengths, as IMDB's are: the same tokens packed, and padded to the longest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import formulas
import torch
from comparison import Loss
from torch import Tensor

import safr_fast as sf

SAMPLES = 32


def imdb_lengths() -> list[int]:
    """Words of 32 reviews: the quantiles (i + ½)/32 of the log-normal law with median 188 and σ = 0.645 that fits
    IMDB's training reviews, within their 10 to 2,470; shuffled."""
    quantiles = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    words = (5.239 + 0.645 * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).exp().clamp(10, 2470).round().long()
    return words[torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))].tolist()


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each sample lie."""

    mask: Tensor  # (B, T)
    cu_seqlens: Tensor
    place: Tensor  # (N,): of each packed token in the padded batch, its samples end to end

    @classmethod
    def of(cls, lengths: Sequence[int], device: str = "cpu") -> "Layout":
        words = torch.tensor(lengths, device=device)
        mask = torch.arange(max(lengths), device=device) < words[:, None]
        return cls(mask, torch.nn.functional.pad(words.cumsum(0), (1, 0)).int(), mask.flatten().nonzero().squeeze(1))

    @property
    def description(self) -> str:
        return f"{int(self.mask.sum()):,} real tokens of {self.mask.numel():,}"

    def padded(self, x: Tensor) -> Tensor:
        """(N, ...) to (B, T, ...), zero where there is no token."""
        rows = x.new_zeros(self.mask.numel(), *x.shape[1:]).index_copy(0, self.place, x)
        return rows.unflatten(0, self.mask.shape)

    def padded_heads(self, x: Tensor) -> Tensor:
        """(N, H, D) to (B, H, T, D)."""
        return self.padded(x).transpose(1, 2)

    def importance(self) -> dict[str, Loss]:
        """Of packed tokens (N, E): ours, and what pads them first."""

        def eager(h: Tensor) -> Tensor:
            return formulas.masked_importance(self.padded(h), self.mask)

        return {
            "eager": eager,
            "compiled": formulas.compiled(eager),
            "ours": lambda h: sf.importance_loss(h, cu_seqlens=self.cu_seqlens),
            "ours padded": lambda h: sf.importance_loss(self.padded(h), self.mask),
        }

    def interaction(self) -> dict[str, Loss]:
        """Of packed queries and keys (N, H, D)."""
        longest = self.mask.shape[1]

        def eager(q: Tensor, k: Tensor) -> Tensor:
            return formulas.masked_interaction_from_qk(self.padded_heads(q), self.padded_heads(k), self.mask)

        return {
            "eager": eager,
            "compiled": formulas.compiled(eager),
            "ours": lambda q, k: sf.interaction_loss_from_qk(q, k, cu_seqlens=self.cu_seqlens, max_seqlen=longest),
            "ours padded": lambda q, k: sf.interaction_loss_from_qk(
                self.padded_heads(q), self.padded_heads(k), self.mask
            ),
        }
