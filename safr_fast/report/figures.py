"""Each figure by matplotlib: for the page, and as a file for papers."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import networkx as nx
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
_EDGES = 40
_SIGN = {True: "#b2182b", False: "#2166ac"}


def svg(figure: Figure) -> bytes:
    with mpl.rc_context(_STYLE):
        file = io.BytesIO()
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
        return file.getvalue()


def data_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode()


def save(figure: Figure, path: Path) -> None:
    path.write_bytes(svg(figure))


def curves(series: Mapping[str, Sequence[float]], y: str, *, log: bool = False) -> Figure:
    """One value for each epoch of every series, from epoch 1."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.7))
        axes = figure.subplots()
        for name, values in series.items():
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
        axes.set(xlabel="epoch", ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            axes.set_yscale("log")
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
        axes.set_xticks(range(len(words)), words, rotation=90)
        figure.colorbar(image, label="capacity")
        return figure


def allocation(words: Sequence[str], gram: np.ndarray, capacity: np.ndarray, importance: np.ndarray) -> Figure:
    """Words as circles, their area the capacity and their colour the importance; edges by sign of ``h_i · h_j``.

    Only the strongest edges are drawn, and the shorter the stronger.
    """
    strength = np.abs(gram - np.diag(np.diag(gram)))
    largest = strength.max() or 1.0
    pairs = np.argwhere(np.triu(strength, 1) > 0)
    strongest = sorted(pairs.tolist(), key=lambda pair: -strength[pair[0], pair[1]])[:_EDGES]
    graph = nx.Graph()
    graph.add_nodes_from(range(len(words)))
    graph.add_weighted_edges_from((i, j, float(strength[i, j] / largest)) for i, j in strongest)
    place = nx.spring_layout(graph, seed=0, k=2.2 / max(len(words), 1) ** 0.5, iterations=200)
    xy = np.array([place[i] for i in range(len(words))])
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.2))
        axes = figure.subplots()
        axes.add_collection(
            LineCollection(
                [(xy[i], xy[j]) for i, j in strongest],
                colors=[_SIGN[bool(gram[i, j] > 0)] for i, j in strongest],
                linewidths=[0.4 + 2.2 * float(strength[i, j] / largest) for i, j in strongest],
                alpha=0.55,
                zorder=1,
            )
        )
        dots = axes.scatter(
            xy[:, 0],
            xy[:, 1],
            s=25 + 500 * capacity,
            c=importance,
            cmap="YlGn",
            vmin=0,
            vmax=1,
            edgecolors="0.4",
            linewidths=0.6,
        )
        for (x, y), word in zip(xy, words, strict=True):
            axes.annotate(word, (x, y), ha="center", va="center", fontsize=8, zorder=3)
        axes.margins(0.12)
        axes.set_axis_off()
        figure.colorbar(dots, label="importance", shrink=0.6)
        return figure


def interference(words: Sequence[str], values: np.ndarray, polysemanticity: np.ndarray) -> Figure:
    """The interference of every pair, diagonal left out, and the polysemanticity of every word beside it."""
    with mpl.rc_context(_STYLE):
        size = max(2.8, 0.15 * len(words))
        figure = Figure(figsize=(1.45 * size, size))
        matrix, bars = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
        shown = np.where(np.eye(len(words), dtype=bool), np.nan, values)
        image = matrix.imshow(shown, cmap="magma_r", norm=mpl.colors.PowerNorm(0.5, vmin=0), aspect="auto")
        matrix.set_yticks(range(len(words)), words)
        matrix.set_xticks(range(len(words)), words, rotation=90)
        matrix.tick_params(labelsize=7)
        bars.barh(range(len(words)), polysemanticity, color="#7a5195")
        bars.tick_params(labelleft=False, labelsize=7)
        bars.set_xlabel("polysemanticity", fontsize=8)
        figure.colorbar(image, ax=matrix, location="top", shrink=0.8, label="interference", pad=0.02)
        return figure


def series_of(records: Sequence[Mapping[str, Any]], split: str, name: str) -> list[float]:
    """A value of every epoch of a run's metrics, if each has it."""
    values = [record[split][name] for record in records if name in record[split]]
    return values if len(values) == len(records) else []
