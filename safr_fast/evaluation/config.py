"""What an evaluation is told."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safr_fast.training.errors import OptionError


def wrong_ks(ks: Sequence[float]) -> str:
    """What is wrong with these per cents, or nothing."""
    if any(not 0 < k <= 100 for k in ks):
        return f"k must be per cents above 0 and at most 100, got {list(ks)}"
    if ks and max(ks) < 1:
        return f"k is in per cent, got {list(ks)}: pass {[100 * k for k in ks]}"
    return f"k must name each per cent once, got {list(ks)}" if len(set(ks)) < len(ks) else ""


@dataclass(frozen=True)
class EvaluationConfig:
    """How a run is evaluated."""

    k: tuple[float, ...] = (10, 20, 30, 40, 50)
    """Per cents of a text's words to delete; AOPC is the mean over them."""
    draws: int = 5
    """Random deletions that the control is the mean of."""
    rankers: tuple[str, ...] = ()
    """Names of those to measure, such as capacity:ffn1_pre and vmask; all by default."""
    gradients: bool = False
    """Also rank by gradient x input and by integrated gradients; needs captum."""
    sufficiency: bool = True
    """Also predict the deleted words alone."""
    normalised: int = 50
    """Short texts on which AOPC is normalised by a search for its limits; 0: none."""
    texts: int | None = None
    """Test texts, drawn by the seed; all by default."""
    seed: int = 0
    """Of the random deletions, the drawn texts and the resampling."""

    def __post_init__(self) -> None:
        if wrong := wrong_ks(self.k):
            raise OptionError(wrong)
        if not self.k:
            raise OptionError("k must name at least one per cent")
        least = {"draws": 5, "normalised": 0, "texts": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise OptionError(f"{name} must be at least {bound}, got {value!r}")
        if self.seed >= 2**50:
            raise OptionError(f"seed must be below 2^50, got {self.seed}")

    def differs(self, stored: Mapping[str, Any]) -> str:
        """The options in which a stored configuration differs, as a sentence's part."""
        now = self.to_json()
        return ", ".join(
            f"{name} {stored.get(name)} (now {value})" for name, value in now.items() if stored.get(name) != value
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they come back from a file."""
        values = dataclasses.asdict(self)
        return values | {"k": list(self.k), "rankers": list(self.rankers)}
