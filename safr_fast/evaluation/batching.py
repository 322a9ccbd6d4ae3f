"""Batches that fit in memory whatever the lengths of their texts."""

from torch import Tensor

_TEXTS = 64
_CELLS = _TEXTS * 256**2


def batches(lengths: Tensor) -> list[list[int]]:
    """Rows of each batch in rising length: at most 64 texts, and fewer where their T×T matrices would be large."""
    found: list[list[int]] = []
    for row in lengths.argsort(stable=True).tolist():
        length = max(int(lengths[row]), 1)
        if not found or len(found[-1]) == _TEXTS or (len(found[-1]) + 1) * length**2 > _CELLS:
            found.append([])
        found[-1].append(row)
    return found
