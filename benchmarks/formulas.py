"""What a user would write without this package: the plain formulas, and the best algebra in plain PyTorch.

Beside each, what the cheapest known exact algorithm costs, forward and backward, in additions and multiplications.
"""

from functools import cache

import torch
from comparison import Loss
from torch import Tensor


def row_energy(h: Tensor) -> Tensor:
    """Σ_i (R_i + n2_i) / E: R with the diagonal left out before the sum, as exact as the definition."""
    gram = h @ h.mT
    overlap = gram.square().masked_fill(torch.eye(h.shape[-2], dtype=torch.bool, device=h.device), 0)
    return (overlap.sum(-1) + h.square().sum(-1)).sum() / h.shape[-1]


def row_energy_by_moment(h: Tensor) -> Tensor:
    """The same from R = hᵀ(hᵀh)h − n2²: linear in T, and what cancels is lost."""
    squared_norm = h.square().sum(-1)
    energy = ((h @ (h.mT @ h)) * h).sum(-1) - squared_norm.square()
    return (energy + squared_norm).sum() / h.shape[-1]


def importance(h: Tensor) -> Tensor:
    gram = h @ h.mT
    overlap = gram.square().masked_fill(torch.eye(h.shape[-2], dtype=torch.bool, device=h.device), 0)
    return (overlap.sum(-1) / h.square().sum(-1) / h.shape[-1]).sqrt().mean()


def importance_by_moment(h: Tensor) -> Tensor:
    squared_norm = h.square().sum(-1)
    energy = ((h @ (h.mT @ h)) * h).sum(-1) - squared_norm.square()
    return (energy / squared_norm / h.shape[-1]).sqrt().mean()


def masked_importance_by_moment(h: Tensor, mask: Tensor) -> Tensor:
    h = h.masked_fill(~mask[..., None], 0)
    squared_norm = h.square().sum(-1)
    energy = ((h @ (h.mT @ h)) * h).sum(-1) - squared_norm.square()
    ratio = (energy / squared_norm.masked_fill(~mask, 1) / h.shape[-1]).masked_fill(~mask, 1)
    return ratio.sqrt().masked_fill(~mask, 0).sum() / mask.sum()


def masked_importance(h: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens of a padded batch."""
    h = h.masked_fill(~mask[..., None], 0)
    gram = h @ h.mT
    overlap = gram.square().masked_fill(torch.eye(h.shape[-2], dtype=torch.bool, device=h.device), 0)
    squared_norm = h.square().sum(-1).masked_fill(~mask, 1)
    # The square root has no derivative at 0.
    ratio = (overlap.sum(-1) / squared_norm / h.shape[-1]).masked_fill(~mask, 1)
    return ratio.sqrt().masked_fill(~mask, 0).sum() / mask.sum()


def interaction(attention: Tensor) -> Tensor:
    overlap = attention @ attention.mT
    return (attention * (1 - overlap.square())).mean((-1, -2)).mean()


def interaction_from_qk(q: Tensor, k: Tensor) -> Tensor:
    return interaction((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))


def masked_interaction_from_qk(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Mean over samples and heads; padded keys get no weight, padded queries do not count."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, None, :], -torch.inf)
    attention = scores.softmax(-1).masked_fill(~mask[:, None, :, None], 0)
    overlap = attention @ attention.mT
    pairs = mask.sum(-1).square()[:, None]
    return ((attention * (1 - overlap.square())).sum((-1, -2)) / pairs).mean()


@cache
def compiled(loss: Loss, dynamic: bool = True) -> Loss:
    """``dynamic``: one code for all shapes, which is as fast or faster but where a softmax is in it."""
    torch._dynamo.config.recompile_limit = 64  # of fixed shapes, beyond which it would go on without being compiled
    return torch.compile(loss, dynamic=dynamic, fullgraph=True)


def row_energy_floor(T: int, E: int, backward: bool = True) -> float:
    """Of one sequence. By tokens: half of the Gram matrix; then again, and (α_i + α_j) G times h. By the moment: half
    of S and of h S h; or, with the gradient, half of S and S h, kept, then half of S_α and S_α h."""
    by_tokens = T * T * E * (4 if backward else 1)
    by_moment = T * E * E * (6 if backward else 2)
    return float(min(by_tokens, by_moment))


def interaction_floor(T: int, heads: int, width: int = 0) -> float:
    """Half of A Aᵀ and (W + Wᵀ) A for each head; from q and k also the scores and both their gradients."""
    return float(heads * (3 * T**3 + 6 * T * T * width))
