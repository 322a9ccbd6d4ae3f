"""Ours, at every precision that makes a difference on this machine, beside the formulas of a user without us."""

from collections.abc import Sequence

from comparison import Loss, Provider, exact_gradients, gradients
from formulas import compiled
from torch import Tensor

import safr_fast as sf


def precisions() -> tuple[str, ...]:
    """Float32 products differ by precision where they are made of bfloat16 splits, on AMX; else one will do."""
    cpp = next(backend for backend in sf.available_backends() if backend.name == "cpp")
    return ("highest", "high", "medium") if "level amx" in cpp.detail else ("highest",)


def all_providers(ours: Loss, plain: Loss, inputs: Sequence[Tensor], algebra: Loss | None = None) -> list[Provider]:
    """Forward and backward; the first is ours at ``highest``. What is rounded to bfloat16 is so before the oracle."""
    exact = exact_gradients(plain, inputs)
    rounded = [x.bfloat16() for x in inputs]

    def provider(name: str, loss: Loss, precision: str = "highest") -> Provider:
        return Provider(name, lambda: gradients(loss, inputs), exact, precision)

    return [
        *(provider(f"ours {precision}", ours, precision) for precision in precisions()),
        Provider("ours bfloat16", lambda: gradients(ours, rounded), exact_gradients(plain, rounded)),
        provider("eager", plain),
        provider("compiled", compiled(plain)),
        *([] if algebra is None else [provider("algebra compiled", compiled(algebra))]),
    ]
