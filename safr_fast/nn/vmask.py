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

    What it gates goes into the model and, as ``hidden``, into the importance loss. That loss is in units of ``hidden``:
    where a norm layer follows, the model can shrink it without closing a gate. So put the gate behind the norm. If a
    text's gates all close, its rows are 0: a norm layer without a bias that comes later divides by its ε alone.

    Args:
        dim: size of an embedding.
        hidden: size of the layer between.
        temperature: τ of the relaxation, above 0.

    Raises:
        ValueError: a size below 1, or a temperature that is not above 0.

    Example::

        hidden = vmask(embedded).unsqueeze(-1) * embedded  # (B, T, E)

    Source: Chen & Ji 2020, Learning Variational Word Masks; SAFR (arXiv 2501.16374), whose code takes 1024 and tanh.
    """

    def __init__(self, dim: int, hidden: int = 1024, temperature: float = 1.0) -> None:
        super().__init__()
        if min(dim, hidden) < 1:
            raise ValueError(f"dim and hidden must be at least 1, got {dim} and {hidden}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}")
        self.hidden = nn.Linear(dim, hidden)
        self.to_logits = nn.Linear(hidden, 2)
        self.temperature = temperature

    def forward(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """The gate of each token, in the dtype of ``x``: ``(..., E)`` to ``(...)``.

        Args:
            x: embeddings ``(..., E)``, one of each token; with ``place`` one of each word type, ``(W, E)``.
            place: int64 ``(...)``, the row of ``x`` of each token. What depends on the word alone is then computed
                once per type; in training each token still draws for itself.
        """
        logits = self._logits(x)
        if place is not None:
            logits = F.embedding(place, logits)
        if self.training:
            return F.gumbel_softmax(logits, tau=self.temperature, hard=True)[..., 1].to(x.dtype)
        return logits.softmax(-1)[..., 1].to(x.dtype)

    def probability(self, x: Tensor) -> Tensor:
        """:math:`p_1` of each embedding ``(..., E)``, ``(...)``, in training too."""
        return self._logits(x).softmax(-1)[..., 1].to(x.dtype)

    def _logits(self, x: Tensor) -> Tensor:
        """``(..., 2)``: drop, keep."""
        return upcast(self.to_logits(torch.tanh(self.hidden(x))))
