"""Each figure twice: by plotly to look into on the page, by matplotlib as a file for papers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure

from safr_fast.report import figures, interactive
from safr_fast.report.arrangement import Arrangement


@dataclass(frozen=True)
class Drawn:
    page: go.Figure
    paper: Figure


def curves(series: Mapping[str, Mapping[int, float]], y: str, *, log: bool = False) -> Drawn:
    return Drawn(interactive.curves(series, y, log=log), figures.curves(series, y, log=log))


def accuracy_by_k(series: Mapping[str, figures.Points]) -> Drawn:
    return Drawn(interactive.accuracy_by_k(series), figures.accuracy_by_k(series))


def allocation(
    words: Sequence[str], gram: np.ndarray, capacity: np.ndarray, importance: np.ndarray, ranked: str
) -> Drawn:
    shown = words, Arrangement.of(gram), capacity, importance, ranked
    return Drawn(interactive.allocation(*shown), figures.allocation(*shown))


def interference(words: Sequence[str], values: np.ndarray, polysemanticity: np.ndarray) -> Drawn:
    shown = words, values, polysemanticity
    return Drawn(interactive.interference(*shown), figures.interference(*shown))
