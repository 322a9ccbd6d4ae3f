"""A predict function whose answer is known: what the tests of evaluation delete words from."""

from collections.abc import Sequence

import torch
from torch import Tensor

WEIGHT = {"good": 1.5, "bad": -2.0, "not": -0.5, "fine": 0.7, "film": 0.1}


def predict(texts: Sequence[Sequence[str]]) -> Tensor:
    """Any predict function: positions count a little, so that order matters."""
    logits = [sum(WEIGHT[word] * (1 + 0.1 * i) for i, word in enumerate(words)) for words in texts]
    positive = torch.tensor(logits, dtype=torch.float64).sigmoid()
    return torch.stack((1 - positive, positive), 1)
