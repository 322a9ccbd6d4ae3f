"""How many times as fast as rivals each case must be, and is aimed to be, on one core.

The rival is the plain formula in eager float32; and, of OVER_PLAIN, the best of plain PyTorch under torch.compile:
OVER_PLAIN_HIGH for products faster than float32's.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

ROW_ENERGY = "row energy, 8,192 tokens of width 256"
FROM_ATTENTION = "interaction from stored attention, one sample"
OVER_PLAIN, OVER_PLAIN_HIGH = 2.0, 3.3
FROM_QK = "interaction from q and k of width 64, one sample"


class Target(NamedTuple):
    title: str
    group: str
    provider: str
    length: int
    must: float
    aim: float

    @property
    def over_plain(self) -> float:
        return OVER_PLAIN if self.provider == "ours highest" else OVER_PLAIN_HIGH


Row = tuple[str, str, str, dict[int, tuple[float, float]]]  # title, group, provider, {T: (must, aim)}
_BFLOAT16: Row = (
    "interaction from q and k, bfloat16", FROM_QK, "ours bfloat16",
    {128: (6.5, 10), 256: (9.5, 14), 512: (9, 14), 1024: (9.5, 14)},
)  # fmt: skip
_AMX: list[Row] = [
    ("row energy, `highest`", ROW_ENERGY, "ours highest",
     {128: (4.5, 6), 256: (4, 5.5), 512: (4.3, 6), 1024: (8.5, 11), 4096: (30, 38)}),
    ("row energy, `high`", ROW_ENERGY, "ours high",
     {128: (6, 8), 256: (6, 8), 512: (6, 8), 1024: (12, 16), 4096: (40, 50)}),
    ("interaction from A, `high`", FROM_ATTENTION, "ours high",
     {128: (6, 7), 256: (5, 6.5), 512: (4.4, 6), 1024: (4.6, 6.5)}),
    ("interaction from q and k, `high`", FROM_QK, "ours high",
     {128: (3.7, 5), 256: (4.8, 6.5), 512: (4.5, 6.5), 1024: (4.6, 6.5)}),
    _BFLOAT16,
]  # fmt: skip
_AVX512: list[Row] = [
    ("row energy", ROW_ENERGY, "ours highest",
     {128: (3.5, 5), 256: (3, 4), 512: (3.3, 4.5), 1024: (6.5, 8), 4096: (24, 30)}),
    ("interaction from A", FROM_ATTENTION, "ours highest",
     {128: (3, 3.5), 256: (2.4, 3), 512: (1.9, 2.5), 1024: (1.9, 2.4)}),
]  # fmt: skip


def targets(run: dict[str, Any]) -> Iterator[Target]:
    """Those of the run's instruction-set level."""
    tables = {"amx": _AMX, "avx512": _AVX512, "avx512_bf16": [*_AVX512, _BFLOAT16]}
    for title, group, provider, cells in tables.get(run["level"], []):
        for length, (must, aim) in cells.items():
            yield Target(title, group, provider, length, must, aim)
