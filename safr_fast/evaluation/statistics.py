"""Intervals and tests."""

import math
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor


def bootstrap(values: Tensor, *, draws: int = 2_000, level: float = 0.95, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap interval of means over texts: ``(N, ...)`` to two of ``(...)``; one resample serves all.

    Raises:
        ValueError: no texts; ``level`` is not between 0 and 1.
    """
    _check_level(level)
    generator = torch.Generator().manual_seed(seed)
    N = len(values)
    if not N:
        raise ValueError(f"values must hold at least one text, got shape {tuple(values.shape)}")
    flat = values.double().reshape(N, -1)
    means = []
    size = max(1, 5_000_000 // N)
    for start in range(0, draws, size):
        picked = torch.randint(N, (min(size, draws - start), N), generator=generator)
        one = torch.ones((), dtype=torch.float64).expand(picked.shape)
        counts = torch.zeros(picked.shape, dtype=torch.float64).scatter_add_(1, picked, one)
        means.append(counts @ flat / N)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(tails, dim=0)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def paired_test(a: Tensor, b: Tensor, *, draws: int = 9_999, seed: int = 0) -> float:
    """Two-sided p of equal means of two rankers' measures on the same texts: signs of the differences are flipped.

    Raises:
        ValueError: not one number for each text, the same texts, in both; a NaN.
    """
    if a.dim() != 1 or a.shape != b.shape:
        raise ValueError(f"a and b must have shape (N,), of the same texts, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.isnan().any() or b.isnan().any():
        raise ValueError("a and b must be numbers, got NaN")
    difference = (a - b).double().numpy()
    difference = difference[difference != 0]  # a text without a difference says nothing under any sign
    if len(difference) < 2:
        return 1.0
    test = stats.permutation_test(
        (difference,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=draws,
        batch=max(1, 5_000_000 // len(difference)),
        vectorized=True,
        rng=seed,
    )
    return float(test.pvalue)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float | None]:
    """Mean over seeds and half the width of Student's interval of it; no width from a single value.

    Raises:
        ValueError: no values; ``level`` is not between 0 and 1.
    """
    _check_level(level)
    n = len(values)
    if not n:
        raise ValueError("values must hold at least one number, got none")
    mean = sum(values) / n
    if n < 2:
        return mean, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95, got {level!r}")
