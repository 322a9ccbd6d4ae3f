"""AOPC between its limits, so that different models can be compared.

How far a probability can fall at all by deleting words differs from model to model, and with it every deletion score.
Between the worst and the best order of the same words a score has a scale of its own.

Source: Edin et al. 2024, *Normalized AOPC* (arXiv 2408.08137).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safr_fast.evaluation.deletion import Predict, Words, checked_row, order, probabilities_of, without

# The limits and the value are sums of the same probabilities in different orders.
_ALIKE = 1e-9


def aopc(predict: Predict, words: Words, scores: Tensor | Sequence[float]) -> float:
    """Mean fall of p(ŷ) over deleting 1, 2, … of the scored words, highest first, down to the last word of the text.

    Raises:
        TypeError, ValueError: fewer than two words, of which none can be deleted; not one score, a number, for each of
            the first words.
    """
    _check(words)
    ranked = order(checked_row("scores", scores, words))
    if not ranked:
        raise ValueError("scores must score at least one word, got none")
    steps = min(len(ranked), len(words) - 1)
    probabilities = probabilities_of(predict, [words, *(without(words, ranked[:i]) for i in range(1, steps + 1))])
    curve = probabilities[:, probabilities[0].argmax()]
    return (curve[0] - curve[1:].mean()).item()


def limits(predict: Predict, words: Words, scored: int, *, beam: int = 5) -> tuple[float, float]:
    """The lowest and the highest :func:`aopc` that any order of the first ``scored`` words reaches.

    A beam search over the sets of deleted words keeps the ``beam`` best of each size: exact where no size has more
    sets, else an inner bound.

    Raises:
        TypeError, ValueError: fewer than two words, of which none can be deleted; ``scored`` is none or more of them;
            ``beam`` is below 1.
    """
    _check(words)
    if not 1 <= scored <= len(words):
        raise ValueError(f"scored must be from 1 to {len(words)}, the words to delete among, got {scored}")
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    whole = probabilities_of(predict, [words])[0]
    target = whole.argmax()
    steps = min(scored, len(words) - 1)
    found = []
    for sign in (1.0, -1.0):
        paths: dict[frozenset[int], float] = {frozenset(): 0.0}  # deleted words: the sum of sign · p(ŷ) on the way
        for _ in range(steps):
            grown: dict[frozenset[int], float] = {}
            for gone, total in paths.items():
                for i in range(scored):
                    if i not in gone:
                        grown[gone | {i}] = min(total, grown.get(gone | {i}, total))
            sets = list(grown)
            p = probabilities_of(predict, [without(words, tuple(gone)) for gone in sets])[:, target]
            totals = torch.tensor([grown[gone] for gone in sets], dtype=torch.float64) + sign * p
            best = totals.argsort(stable=True)[:beam].tolist()
            paths = {sets[i]: totals[i].item() for i in best}
        found.append(whole[target].item() - sign * min(paths.values()) / steps)
    return found[1], found[0]


def _check(words: Words) -> None:
    if isinstance(words, str):
        raise TypeError("words must be a sequence of words, got a string: pass text.split()")
    if len(words) < 2:
        raise ValueError(f"words must be at least two, since a text keeps its last, got {len(words)}")


def normalised(value: float, low: float, high: float) -> float:
    """Where ``value`` lies between its limits, 0 worst and 1 best, 0.5 where no order is better than another.

    A beam's inner bounds are widened to hold it.
    """
    low, high = min(low, value), max(high, value)
    return (value - low) / (high - low) if high - low > _ALIKE else 0.5
