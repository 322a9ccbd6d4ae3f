"""Exact, cheap SAFR regularisers for any PyTorch transformer."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safr_fast.errors import BackendUnavailable
    from safr_fast.functional import (
        capacity,
        importance_loss,
        interaction_loss,
        interaction_loss_from_qk,
        interference,
        polysemanticity,
        row_energy,
    )
    from safr_fast.integrations.attention import record_qk
    from safr_fast.loss import LossParts, SAFRLoss
    from safr_fast.ops.dispatch import Backend, available_backends

__version__ = "0.1.0"

PROCESS = os.getpid()
"""The process that imported the package first: a child forked from it lacks its threads."""

__all__ = [
    "Backend",
    "BackendUnavailable",
    "LossParts",
    "SAFRLoss",
    "available_backends",
    "capacity",
    "importance_loss",
    "interaction_loss",
    "interaction_loss_from_qk",
    "interference",
    "polysemanticity",
    "record_qk",
    "row_energy",
]

# Public names are imported when first asked for: torch takes seconds to load, which help and errors need not wait for.
_HOMES = ("errors", "functional", "loss", "ops.dispatch", "integrations.attention")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"{__name__}.{home}")
            if name in vars(module):
                return globals().setdefault(name, vars(module)[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
