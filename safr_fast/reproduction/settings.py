"""The settings that the tables compare, and the paper's figures for them."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from safr_fast.training.errors import OptionError


class Figures(NamedTuple):
    """What the paper reports of a setting, in per cent and points."""

    accuracy: float
    random: float
    srs: float


@dataclass(frozen=True)
class Setting:
    """A row of a table: both weights, or the plain transformer without VMASK."""

    importance: float = 0.0
    interaction: float = 0.0
    gate: bool = True

    @classmethod
    def of(cls, text: str) -> "Setting":
        """``"baseline"``, or ``"importance,interaction"`` such as ``"1,0.1"``."""
        if text == "baseline":
            return BASELINE
        number = r"[0-9]*\.?[0-9]+(?:e-?[0-9]+)?"
        if not re.fullmatch(f"{number},{number}", text):
            raise OptionError(f"rows must be baseline or two weights such as 1,0.1, got {text!r}")
        importance, interaction = map(float, text.split(","))
        return cls(importance, interaction)

    def __str__(self) -> str:
        return f"{self.importance:g},{self.interaction:g}" if self.gate else "baseline"

    @property
    def folder(self) -> str:
        """Its part of a run folder's name."""
        return f"imp{self.importance:g}-inter{self.interaction:g}" if self.gate else "baseline"


BASELINE = Setting(gate=False)

# Both terms in the weights that were chosen for each data set; for generated reviews, this package's own.
_CHOSEN = {"sst2": Setting(1.0, 0.1), "imdb": Setting(0.01, 0.01), "synthetic": Setting(0.1, 0.1)}
_WEIGHTS = (0.0, 0.01, 0.1, 1.0)

PAPER = {
    ("sst2", BASELINE): Figures(71.81, 75.81, -3.15),
    ("sst2", Setting(0, 0)): Figures(71.24, 71.98, 9.26),
    ("sst2", Setting(0, 1)): Figures(71.98, 69.07, 10.12),
    ("sst2", Setting(1, 0)): Figures(71.47, 72.16, 16.12),
    ("sst2", Setting(1, 0.1)): Figures(72.96, 75.30, 18.24),
}
"""By data set and setting: accuracy, accuracy after random deletion, SRS, at 30 % (arXiv 2501.16374, Table 2)."""

PAPER_TEXTS = {"sst2": 1_743}
"""Test texts behind these figures: those of the paper's subset of SST-2."""

PAPER_CAPACITY = {("sst2", Setting(1, 0.1)): {"all": 0.193, "important": 0.414, "less": 0.098}}
"""Average capacity (Table 3); the paper does not say at which place."""


def rows(target: str, dataset: str) -> tuple[Setting, ...]:
    """A table's own rows, before the user chooses among them."""
    chosen = _CHOSEN[dataset]
    if target == "table2":
        grid = [Setting(importance, interaction) for importance in _WEIGHTS for interaction in _WEIGHTS]
        first = [BASELINE, *(setting for name, setting in PAPER if name == dataset and setting.gate)]
        return tuple(dict.fromkeys([*first, *grid]))
    plain = Setting()
    return (plain, chosen) if target == "table3" else (BASELINE, plain, chosen)
