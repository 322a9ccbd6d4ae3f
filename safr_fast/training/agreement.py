"""How far a model has found what was planted in generated reviews."""

from collections.abc import Sequence

import torch
from torch import Tensor

from safr_fast.data.corpus import Truth
from safr_fast.training.protocol import TextOutput


class Agreement:
    """Collects, over texts in evaluation mode, gates by planted role and attention on planted pairs."""

    def __init__(self, truth: Sequence[Truth]) -> None:
        self.truth = truth
        self._gates: dict[str, list[float]] = {}
        self._shares: list[float] = []

    def add(self, row: int, text: TextOutput) -> None:
        """``row``: which text of the split it is."""
        truth = self.truth[row]
        if text.gate is not None:
            for role, gate in zip(truth.roles, text.gate.tolist(), strict=False):
                self._gates.setdefault(role, []).append(gate)
        attention = _mean_attention(text.q, text.k)
        length = len(attention)
        self._shares += [attention[j, i].item() * length for i, j in truth.pairs if max(i, j) < length]

    def summary(self) -> dict[str, float]:
        """Mean gate by role; how often a planted word's gate is above a filler's; attention on planted pairs."""
        values = {f"gate_{role}": sum(gates) / len(gates) for role, gates in sorted(self._gates.items())}
        planted = [gate for role, gates in self._gates.items() if role != "filler" for gate in gates]
        filler = self._gates.get("filler", [])
        if planted and filler:
            values["gate_auc"] = above(torch.tensor(planted), torch.tensor(filler))
        if self._shares:
            values["pair_attention"] = sum(self._shares) / len(self._shares)
        return values


def above(a: Tensor, b: Tensor) -> float:
    """Probability that a value of ``a`` is above one of ``b``, ties counted half (area under the ROC curve)."""
    b = b.sort().values
    below = torch.searchsorted(b, a) + torch.searchsorted(b, a, right=True)
    return (below.double().mean() / (2 * len(b))).item()


def _mean_attention(q: Tensor, k: Tensor) -> Tensor:
    """(T, T): mean over heads of the weights of one text's queries and keys (H, T, D)."""
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (H, T, T)
    return scores.softmax(-1).mean(dim=0)
