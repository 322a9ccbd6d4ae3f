"""Exact, cheap SAFR regularisers for any PyTorch transformer."""

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
from safr_fast.loss import LossParts, SAFRLoss
from safr_fast.ops.dispatch import Backend, available_backends

__version__ = "0.1.0"

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
    "row_energy",
]
