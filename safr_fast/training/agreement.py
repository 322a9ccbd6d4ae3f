"""How far a model has found what was planted in generated reviews."""

from collections.abc import Sequence

import torch
from torch import Tensor

from safr_fast.data.batches import Batch
from safr_fast.data.corpus import Truth
from safr_fast.nn import ClassifierOutput


class Agreement:
    """Collects, over batches in evaluation mode, gates by planted role and attention on planted pairs."""

    def __init__(self, truth: Sequence[Truth]) -> None:
        self.truth = truth
        self._gates: dict[str, list[float]] = {}
        self._shares: list[float] = []

    def add(self, batch: Batch, output: ClassifierOutput) -> None:
        lengths = batch.mask.sum(dim=1).tolist()
        attention = _mean_attention(output.qk, batch.mask)
        for b, (row, length) in enumerate(zip(batch.rows, lengths, strict=True)):
            truth = self.truth[row]
            if output.gate is not None:
                for role, gate in zip(truth.roles, output.gate[b, :length].tolist(), strict=False):
                    self._gates.setdefault(role, []).append(gate)
            self._shares += [attention[b, j, i].item() * length for i, j in truth.pairs if max(i, j) < length]

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


def _mean_attention(qk: Sequence[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
    """(B, T, T): the last layer's weights over real keys, mean over heads."""
    q, k = qk[-1]
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, T, T)
    return scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1).mean(dim=1)
