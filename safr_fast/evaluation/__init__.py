"""How faithful a model's own account of its words is: capacity by place, deletion, and other rankers beside it.

:mod:`~safr_fast.evaluation.deletion` and :mod:`~safr_fast.evaluation.normalised` work on any predict function and any
scores; :mod:`~safr_fast.evaluation.places` and :mod:`~safr_fast.evaluation.rankers` read the paper's classifier;
:func:`evaluate_run` does all of it for a run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safr_fast.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from safr_fast.evaluation.deletion import Predict, Words, measure
    from safr_fast.evaluation.normalised import aopc, limits
    from safr_fast.evaluation.places import PLACES, capacity, hidden_states
    from safr_fast.evaluation.predictor import Predictor
    from safr_fast.evaluation.rankers import score
    from safr_fast.evaluation.run import evaluate_run, evaluate_scores
    from safr_fast.evaluation.statistics import bootstrap, paired_test, t_interval

# Loaded when first asked for: the command line reads its options before it waits for torch.
_HOME = {
    "deletion": ("Predict", "Words", "measure"),
    "normalised": ("aopc", "limits"),
    "places": ("PLACES", "capacity", "hidden_states"),
    "predictor": ("Predictor",),
    "rankers": ("score",),
    "run": ("evaluate_run", "evaluate_scores"),
    "statistics": ("bootstrap", "paired_test", "t_interval"),
}

__all__ = [
    "PLACES",
    "EvaluationConfig",
    "Predict",
    "Predictor",
    "Words",
    "aopc",
    "bootstrap",
    "capacity",
    "evaluate_run",
    "evaluate_scores",
    "hidden_states",
    "limits",
    "measure",
    "paired_test",
    "score",
    "t_interval",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
