"""The page's figures by plotly: values under the pointer, curves that can be switched off."""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from safr_fast.report.arrangement import Arrangement
from safr_fast.report.figures import LIGHT_GREENS, SIGN, Points, log_ticks, shortened

_COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3")
_LIGHT = [[i / 8, "rgb({:.0f}, {:.0f}, {:.0f})".format(*(255 * x for x in LIGHT_GREENS(i / 8)[:3]))] for i in range(9)]
_GRID = {"gridcolor": "#e5e5e5", "linecolor": "#888", "zeroline": False, "automargin": True}
_BARE = {"showgrid": False, "zeroline": False, "automargin": True}
# Without dragging, which on a phone would keep the page from being scrolled.
_LAYOUT: dict[str, Any] = {
    "template": "none",
    "dragmode": False,
    "margin": {"l": 10, "r": 10, "t": 55, "b": 10},
    "font": {"size": 12},
}
_LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


def _label(word: str) -> str:
    """A word where plotly would take ``<b>`` for markup."""
    return html.escape(shortened(word), quote=False)


def _rounded(values: np.ndarray) -> list[Any]:
    """Plain numbers of four digits, which keep the page small."""
    return np.vectorize(lambda x: float(f"{x:.4g}"), otypes=[float])(values).tolist()


def curves(series: Mapping[str, Mapping[int, float]], y: str, *, log: bool = False) -> go.Figure:
    """Of every series a value by epoch."""
    figure = go.Figure(layout={**_LAYOUT, "height": 300, "legend": _LEGEND, "showlegend": len(series) > 1})
    for (name, values), color in zip(series.items(), cycle(_COLORS), strict=False):
        figure.add_scatter(
            x=list(values), y=list(values.values()), name=name, mode="lines+markers", line={"color": color}
        )
    last = max((epoch for values in series.values() for epoch in values), default=1)
    figure.update_xaxes(_GRID, title="epoch", dtick=math.ceil(last / 10))
    figure.update_yaxes(_GRID, title=y, nticks=6)
    if log:
        every = [value for values in series.values() for value in values.values()]
        ticks = [tick for tick in log_ticks(every).tick_values(min(every), max(every)) if tick > 0]
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def accuracy_by_k(series: Mapping[str, Points]) -> go.Figure:
    """Accuracy, per cent, against the per cent of words deleted, with bands."""
    figure = go.Figure(layout={**_LAYOUT, "height": 400, "legend": _LEGEND, "hovermode": "x unified"})
    for (name, points), color in zip(series.items(), cycle(_COLORS), strict=False):
        k, y, low, high = map(list, zip(*points, strict=True))
        band = {"x": k, "mode": "lines", "line": {"width": 0}, "legendgroup": name, "showlegend": False}
        figure.add_scatter(**band, y=low, hoverinfo="skip")
        figure.add_scatter(**band, y=high, hoverinfo="skip", fill="tonexty", fillcolor=_faint(color))
        dash = "dash" if "random" in name else "solid"
        line = {"color": color, "dash": dash}
        figure.add_scatter(
            x=k, y=y, name=name, mode="lines+markers", line=line, legendgroup=name, hovertemplate="%{y:.1f}"
        )
    figure.update_xaxes(_GRID, title="words deleted, %")
    figure.update_yaxes(_GRID, title="accuracy, %")
    return figure


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"


def allocation(
    words: Sequence[str], placed: Arrangement, capacity: np.ndarray, importance: np.ndarray, ranked: str
) -> go.Figure:
    """As :func:`safr_fast.report.figures.allocation`."""
    x, y = map(_rounded, placed.xy.T)
    edges = [
        {
            "type": "line",
            "layer": "below",
            "x0": x[edge.i],
            "y0": y[edge.i],
            "x1": x[edge.j],
            "y1": y[edge.j],
            "opacity": 0.55,
            "line": {"color": SIGN[edge.aligned], "width": round(0.6 + 3 * edge.strength, 2)},
        }
        for edge in placed.edges
    ]
    layout = {**_LAYOUT, "height": 440, "shapes": edges}
    figure = go.Figure(layout=layout)
    largest = float(capacity.max())
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers+text",
        text=[_label(word) for word in words],
        hovertext=[
            f"{_label(word)}<br>capacity {own:.3g}<br>{ranked} {share:.3g}"
            for word, own, share in zip(words, capacity, importance, strict=True)
        ],
        hoverinfo="text",
        marker={
            "size": _rounded(np.maximum(capacity, 1e-9)),  # 0 would be drawn at 0, below the least size
            "sizemode": "area",
            "sizeref": 2 * largest / 38**2 if largest else 1,
            "sizemin": 3,
            "color": _rounded(importance),
            "colorscale": _LIGHT,
            "cmin": 0,
            "cmax": 1,
            "opacity": 1,
            "line": {"color": "#666", "width": 1},
            "colorbar": {"title": {"text": ranked, "side": "right"}, "len": 0.6, "thickness": 12},
        },
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def interference(words: Sequence[str], values: np.ndarray, polysemanticity: np.ndarray) -> go.Figure:
    """The interference of every pair, diagonal left out, and the polysemanticity of every word beside it."""
    n = len(words)
    places, labels = list(range(n)), [_label(word) for word in words]
    others = np.where(np.eye(n, dtype=bool), np.nan, values)
    top = float(values[~np.eye(n, dtype=bool)].max(initial=0.0))
    ticks = [share * top for share in (0, 0.25, 1)] if top else [0]
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=(0.78, 0.22), horizontal_spacing=0.02)
    figure.add_heatmap(
        z=[[None if math.isnan(x) else x for x in row] for row in _rounded(np.sqrt(others))],
        customdata=_rounded(values),
        colorscale="Magma",
        reversescale=True,
        zmin=0,
        zmax=math.sqrt(top) or 1,
        hoverongaps=False,
        hovertemplate="%{y} · %{x}: %{customdata:.3g}<extra></extra>",
        colorbar={
            "title": {"text": "interference", "side": "top"},
            "orientation": "h",
            "y": 1.0,
            "yanchor": "bottom",
            "x": 0.39,
            "len": 0.6,
            "thickness": 10,
            "tickvals": [math.sqrt(tick) for tick in ticks],
            "ticktext": [f"{tick:.3g}" for tick in ticks],
        },
    )
    bars = {"x": _rounded(polysemanticity), "y": places, "orientation": "h", "marker": {"color": "#7a5195"}}
    figure.add_bar(**bars, hovertemplate="%{y}: %{x:.3g}<extra></extra>", row=1, col=2)
    figure.update_layout({**_LAYOUT, "height": 190 + 15 * n, "showlegend": False})
    figure.update_layout(margin_t=75, font_size=10)
    figure.update_yaxes(_BARE, autorange="reversed", tickvals=places, ticktext=labels)
    figure.update_xaxes(_BARE, tickvals=places, ticktext=labels, tickangle=-90, row=1, col=1)
    figure.update_xaxes(_GRID, title="polysemanticity", nticks=3, row=1, col=2)
    return figure
