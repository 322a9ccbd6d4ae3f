"""How faithful a model's own account of its words is: capacity by place, deletion, and other rankers beside it.

On any predict function and any scores: :func:`measure`, what deletion does to each text; :func:`aopc`, :func:`limits`
and :func:`normalised`, one text's AOPC and where it lies between the least and the most that any order reaches;
:func:`bootstrap`, :func:`paired_test` and :func:`t_interval`; :func:`evaluate_scores`, all of these for a split.

On the paper's classifier: :func:`hidden_states` and :func:`exact_capacity`, :func:`score` with every ranker,
:class:`Predictor`, and :func:`evaluate_run`, all of it for a run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safr_fast.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from safr_fast.evaluation.deletion import Predict, Words, measure
    from safr_fast.evaluation.normalised_aopc import aopc, limits, normalised
    from safr_fast.evaluation.places import PLACES, exact_capacity, hidden_states
    from safr_fast.evaluation.predictor import Predictor
    from safr_fast.evaluation.rankers import score
    from safr_fast.evaluation.run import evaluate_run, evaluate_scores
    from safr_fast.evaluation.statistics import bootstrap, paired_test, t_interval

# Loaded when first asked for: the command line reads its options before it waits for torch.
_HOME = {
    "deletion": ("Predict", "Words", "measure"),
    "normalised_aopc": ("aopc", "limits", "normalised"),
    "places": ("PLACES", "exact_capacity", "hidden_states"),
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
    "evaluate_run",
    "evaluate_scores",
    "exact_capacity",
    "hidden_states",
    "limits",
    "measure",
    "normalised",
    "paired_test",
    "score",
    "t_interval",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOME.items():
        if name in names:
            try:
                return getattr(import_module(f"{__name__}.{home}"), name)
            except ModuleNotFoundError as error:
                remedy = f'{error.name} is not installed: pip install "safr-fast[evaluation]"'
                raise ModuleNotFoundError(remedy, name=error.name) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
