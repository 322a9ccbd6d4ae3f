"""The variational word mask: which words the classifier needs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safr_fast.reference import upcast


class VMASK(nn.Module):
    r"""A gate per token, from its embedding alone.

    .. math:: p = \mathrm{softmax}(W_2 \tanh(W_1 x + b_1) + b_2), \qquad r \sim \mathrm{Bernoulli}(p_1)

    In training :math:`r` is drawn by the straight-through Gumbel-softmax (0 or 1 forward, the relaxation's gradient
    backward); in evaluation the gate is the probability :math:`p_1` itself.

    Args:
        dim: size of an embedding.
        hidden: size of the layer between.
        temperature: τ of the relaxation.

    Source: Chen & Ji 2020, Learning Variational Word Masks; SAFR (arXiv 2501.16374), whose code takes 1024 and tanh.
    """

    def __init__(self, dim: int, hidden: int = 1024, temperature: float = 1.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden)
        self.to_logits = nn.Linear(hidden, 2)
        self.temperature = temperature

    def forward(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """The gate of each token: ``(..., E)`` to ``(...)``.

        Args:
            x: embeddings ``(..., E)``, one of each token; with ``place`` one of each word type, ``(W, E)``.
            place: int64 ``(...)``, the row of ``x`` of each token. What depends on the word alone is then computed
                once per type; in training each token still draws for itself.
        """
        logits = upcast(self.to_logits(torch.tanh(self.hidden(x))))  # (..., 2): drop, keep
        if place is not None:
            logits = F.embedding(place, logits)
        if self.training:
            return F.gumbel_softmax(logits, tau=self.temperature, hard=True)[..., 1]
        return logits.softmax(-1)[..., 1]
