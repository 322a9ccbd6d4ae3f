"""Each figure by matplotlib, as a file for papers."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter

from safr_fast.report.arrangement import Arrangement

Points = Sequence[tuple[float, float, float, float]]
"""Of a curve: x, y, and the band's low and high."""

# Words are shown as they are: a dollar is no formula, and text stays text.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "safr-fast",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9.0,
    "legend.frameon": False,
}
_WIDTH = 4.6
_LABEL = 18
# Black words are read on all of them.
LIGHT_GREENS = ListedColormap(mpl.colormaps["YlGn"](np.linspace(0, 0.65, 256)), "light greens")
SIGN = {True: "#b2182b", False: "#2166ac"}


def _plain(value: float, _: float | None = None) -> str:
    """A tick's label without formula markup."""
    return f"{value:.4g}"


def svg(figure: Figure) -> bytes:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # The viewer's fonts draw the text, not matplotlib's.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        file = io.BytesIO()
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
        return file.getvalue()


def shortened(word: str) -> str:
    """A word as a figure shows it, in which an address would leave no room for anything else."""
    return word if len(word) <= _LABEL else word[: _LABEL - 1] + "…"


def log_ticks(values: Sequence[float]) -> Locator:
    """Finds ticks for a logarithmic axis that has numbers even where all values lie within a decade."""
    return MaxNLocator(5) if max(values) < 10 * min(values) else LogLocator(subs=(1, 2, 5))


def curves(series: Mapping[str, Mapping[int, float]], y: str, *, log: bool = False) -> Figure:
    """Of every series a value by epoch."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.7))
        axes = figure.subplots()
        for name, values in series.items():
            axes.plot(list(values), list(values.values()), marker="o", markersize=3, label=name)
        axes.set(xlabel="epoch", ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(log_ticks([value for values in series.values() for value in values.values()]))
            axes.yaxis.set_major_formatter(_plain)
            axes.yaxis.set_minor_formatter(NullFormatter())
        if len(series) > 1:
            axes.legend()
        return figure


def accuracy_by_k(series: Mapping[str, Points]) -> Figure:
    """Accuracy, per cent, against the per cent of words deleted, with bands."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.4))
        axes = figure.subplots()
        for name, points in series.items():
            k, y, low, high = np.array(points).T
            (line,) = axes.plot(k, y, marker="o", markersize=3, label=name, linestyle="--" if "random" in name else "-")
            axes.fill_between(k, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.set(xlabel="words deleted, %", ylabel="accuracy, %")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        return figure


def capacities(words: Sequence[str], values: Mapping[str, np.ndarray]) -> Figure:
    """Capacity by place (rows) and word (columns)."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(_WIDTH, 0.28 * len(words)), 2.6))
        axes = figure.subplots()
        image = axes.imshow(np.stack(list(values.values())), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(values)), list(values))
        axes.set_xticks(range(len(words)), [shortened(word) for word in words], rotation=90)
        figure.colorbar(image, label="capacity")
        return figure


def allocation(
    words: Sequence[str], placed: Arrangement, capacity: np.ndarray, importance: np.ndarray, ranked: str
) -> Figure:
    """Words as circles, their area the share of the largest capacity and their colour the importance, which ``ranked``
    names; edges by sign of ``h_i · h_j``."""
    xy = placed.xy
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.2))
        axes = figure.subplots()
        axes.add_collection(
            LineCollection(
                [(xy[edge.i], xy[edge.j]) for edge in placed.edges],
                colors=[SIGN[edge.aligned] for edge in placed.edges],
                linewidths=[0.4 + 2.2 * edge.strength for edge in placed.edges],
                alpha=0.55,
                zorder=1,
            )
        )
        dots = axes.scatter(
            xy[:, 0],
            xy[:, 1],
            s=10 + 500 * capacity / (capacity.max() or 1.0),
            c=importance,
            cmap=LIGHT_GREENS,
            vmin=0,
            vmax=1,
            edgecolors="0.4",
            linewidths=0.6,
        )
        for (x, y), word in zip(xy, words, strict=True):
            axes.annotate(shortened(word), (x, y), ha="center", va="center", fontsize=8, zorder=3)
        axes.margins(0.12)
        axes.set_axis_off()
        figure.colorbar(dots, label=ranked, shrink=0.6)
        return figure


def interference(words: Sequence[str], values: np.ndarray, polysemanticity: np.ndarray) -> Figure:
    """The interference of every pair, diagonal left out, and the polysemanticity of every word beside it."""
    with mpl.rc_context(_STYLE):
        size = max(2.8, 0.15 * len(words))
        figure = Figure(figsize=(1.45 * size, size))
        matrix, bars = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
        shown = np.where(np.eye(len(words), dtype=bool), np.nan, values)
        image = matrix.imshow(shown, cmap="magma_r", norm=PowerNorm(0.5, vmin=0), aspect="auto")
        labels = [shortened(word) for word in words]
        matrix.set_yticks(range(len(words)), labels)
        matrix.set_xticks(range(len(words)), labels, rotation=90)
        matrix.tick_params(labelsize=7)
        bars.barh(range(len(words)), polysemanticity, color="#7a5195")
        bars.tick_params(labelleft=False, labelsize=7)
        bars.set_xlabel("polysemanticity", fontsize=8)
        ticks = MaxNLocator(3)
        figure.colorbar(
            image, ax=matrix, location="top", shrink=0.8, label="interference", pad=0.02, ticks=ticks, format=_plain
        )
        return figure


def series_of(records: Sequence[Mapping[str, Any]], split: str, name: str) -> dict[int, float]:
    """A value of every epoch of a run's metrics, if each has it."""
    values = {record["epoch"]: record[split][name] for record in records if name in record[split]}
    return values if len(values) == len(records) else {}
