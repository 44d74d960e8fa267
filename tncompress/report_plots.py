"""The interactive figures of a report, as plain descriptions that plotly.js draws: curve, spectra, entropies.

Texts of a figure are read as markup by plotly.js, so that names are escaped here. Lines and letters take
their colours from the page, which knows light from dark; the colours here can be read on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from tncompress.atlas_plots import cuts_of, line_of
from tncompress.cut_atlas import CutAtlas
from tncompress.cut_rows import CutRow
from tncompress.recovery_record import Point, Recovery
from tncompress.tables import percent
from tncompress.textfiles import one_line

BLUE, ORANGE, GREEN, GREY = "#3b86d1", "#d9702b", "#2c9c6a", "#8a929c"
"""Of compressed, control, and dense: each of contrast 3 at least with white and with black paper."""
KERNELS = {"trained": (BLUE, "circle"), "random": (ORANGE, "x"), "shuffled": (GREEN, "cross")}
MOST_LINES, POINTS = 24, 32
"""Of spectra in one figure, and of points on each; where there are more layers, some are drawn."""


MOST_LINKED = 60
"""Up to so many layers their entropies are joined by a line."""


@dataclass(frozen=True)
class Plot:
    """A figure: what it is, what it shows in words, and what plotly.js draws."""

    title: str
    alt: str
    figure: dict[str, Any]


def recovery_plot(recovery: Recovery) -> Plot:
    """Return accuracy by epoch beside the dense model and its control; the loss where there is none."""
    if not recovery.has_accuracies:
        known = [point for point in recovery.points if point.loss is not None]
        alt = f"Training loss by epoch: from {known[0].loss:.4g} to {known[-1].loss:.4g}."
        lines = [_trace("training loss", known, [point.loss for point in known], BLUE, "circle")]
        return Plot("Training loss by epoch", alt, _figure(lines, "epoch", "loss"))
    known = [point for point in recovery.points if point.accuracy is not None]
    lines = [_trace("compressed", known, _percents(point.accuracy for point in known), BLUE, "circle")]
    beside = [point for point in recovery.points if point.control is not None]
    if beside:
        values = _percents(point.control for point in beside)
        lines.append(_trace("dense control", beside, values, ORANGE, "square", dash="dot"))
    if recovery.dense is not None:
        ends = [known[0].place, known[-1].place]
        level = {"x": ends, "y": _percents([recovery.dense] * 2), "mode": "lines", "name": "dense"}
        lines.append(level | {"line": {"color": GREEN, "dash": "dash"}, "hovertemplate": "dense %{y:.2f} %"})
    alt = f"Accuracy by epoch: {percent(known[0].accuracy)} {known[0].what}, "
    alt += f"{percent(known[-1].accuracy)} after {known[-1].what}"
    alt += f"; the dense model has {percent(recovery.dense)}." if recovery.dense is not None else "."
    figure = _figure(lines, "epoch", "accuracy, %")
    figure["layout"] |= {"showlegend": True, "legend": {"orientation": "h", "y": 1.12, "x": 0}}
    figure["layout"]["xaxis"] |= {"dtick": 1} if known[-1].place <= 15 else {}
    return Plot("Accuracy by epoch", alt, figure)


def spectra_plots(atlas: CutAtlas) -> list[Plot]:
    """Return a figure for each cut: singular values over the largest by their place in the full rank."""
    shown = drawn_layers(atlas)
    kept = {
        cut: [row for row in rows if row.kernel == "trained" and row.norm > 0 and row.layer in shown]
        for cut, rows in _by_cut(atlas)
    }
    lines = {cut: [_spectrum(row, atlas) for row in rows] for cut, rows in kept.items() if rows}
    plots = []
    for cut, own in lines.items():
        low = math.log10(max(0.8 * min(value for line in own for value in line["y"]), 1e-7))
        half = sorted(row.rank_for(0.5) / row.full for row in kept[cut])
        alt = (
            f"Singular values across {cut}, a line for each of {len(own)} layers. A norm loss of a half "
            f"leaves {percent(half[0], 0)} to {percent(half[-1], 0)} of the full rank."
        )
        figure = _figure(own, "place k / full rank", "σₖ / σ₁")
        figure["layout"]["xaxis"] |= {"range": [0, 1]}
        ticks = {"dtick": "D2" if low > -1.5 else 1, "tickformat": "~g"}
        figure["layout"]["yaxis"] |= {"type": "log", "range": [min(low, -1.05), 0.08], **ticks}
        plots.append(Plot(cut, alt, figure))
    return plots


def entropy_plots(atlas: CutAtlas) -> list[Plot]:
    """Return a figure for each cut: the correlation entropy by depth, beside the largest that it can have."""
    plots = []
    for cut, rows in _by_cut(atlas):
        lines, words = [], []
        for kernel in atlas.kernels:
            own = [row for row in rows if row.kernel == kernel]
            many = len(own) > MOST_LINKED
            if kernel == "trained" and own:
                tops = [math.log(row.full) for row in own]
                marks = {
                    "symbol": "line-ew-open",
                    "color": GREY,
                    "size": 4 if many else 9,
                    "line": {"width": 2},
                }
                lines.append(_by_depth("log(full rank)", own, tops, "markers", marker=marks))
                parts = [row.entropy / math.log(row.full) for row in own]
                words = [f"{percent(min(parts), 0)} to {percent(max(parts), 0)} of the largest possible"]
            colour, symbol = KERNELS.get(kernel, (GREY, "circle"))
            style = {
                "marker": {"color": colour, "symbol": symbol, "size": 3 if many else 6},
                "line": {"color": colour},
            }
            mode = "lines+markers" if kernel == "trained" and not many else "markers"
            entropies = [row.entropy for row in own]
            lines.append(_by_depth(f"{kernel} kernels", own, entropies, mode, **style))
        alt = f"Correlation entropy across {cut} by depth: {', '.join(words)}."
        figure = _figure(lines, "depth (number of the layer)", "entropy, nats")
        figure["layout"]["yaxis"] |= {"rangemode": "tozero"}
        plots.append(Plot(cut, alt, figure))
    return plots


def drawn_layers(atlas: CutAtlas) -> tuple[str, ...]:
    """Return the layers whose spectra are drawn: all, or some of them evenly by depth."""
    layers = atlas.layers
    places = np.linspace(0, len(layers) - 1, min(len(layers), MOST_LINES)).round().astype(int)
    return tuple(layers[place] for place in places)


def colour_of(depth: int, deepest: int) -> str:
    """Return the colour of a depth: from blue, the first layer, over violet to orange, the last."""
    stops = ((47, 126, 216), (150, 102, 178), (217, 98, 43))
    at = 2 * (depth - 1) / max(deepest - 1, 1)
    low = min(int(at), 1)
    mixed = (round(a + (at - low) * (b - a)) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


# --- parts --------------------------------------------------------------------------------------------------


def _by_cut(atlas: CutAtlas) -> Iterable[tuple[str, list[CutRow]]]:
    """Yield each cut with the rows of the kernels' norm that have more than rank 1 there."""
    rows = [row for row in atlas.rows if row.metric == "norm" and row.full > 1]
    for cut in cuts_of(rows) if rows else ():
        yield cut, [row for row in rows if row.cut == cut]


def _spectrum(row: CutRow, atlas: CutAtlas) -> dict[str, Any]:
    x, y = line_of(row, POINTS)
    deepest = max(each.depth for each in atlas.rows)
    return {
        "x": _short(x),
        "y": _short(y),
        "mode": "lines",
        "name": _name(row.layer),
        "line": {"color": colour_of(row.depth, deepest), "width": 1.6},
        "hovertemplate": f"place %{{x:.0%}} of {row.full}: %{{y:.3g}}",
    }


def _by_depth(
    name: str, rows: Sequence[CutRow], values: Iterable[float], mode: str, **style: Any
) -> dict[str, Any]:
    return {
        "x": [row.depth for row in rows],
        "y": _short(values),
        "text": [_name(row.layer) for row in rows],
        "mode": mode,
        "name": name,
        "hovertemplate": "%{text}: %{y:.3g}",
    } | style


def _trace(
    name: str, points: Sequence[Point], values: Iterable[Any], colour: str, symbol: str, dash: str = "solid"
) -> dict[str, Any]:
    return {
        "x": [point.place for point in points],
        "y": list(values),
        "text": [_name(point.what) for point in points],
        "mode": "lines+markers",
        "name": name,
        "line": {"color": colour, "dash": dash},
        "marker": {"color": colour, "symbol": symbol, "size": 8},
        "hovertemplate": "%{text}: %{y:.4g}",
    }


def _figure(lines: list[dict[str, Any]], x: str, y: str) -> dict[str, Any]:
    clear = "rgba(0,0,0,0)"
    axis = {"automargin": True, "zeroline": False}
    return {
        "data": [{"type": "scatter", **line} for line in lines],
        "layout": {
            "xaxis": {"title": {"text": x, "standoff": 8}, **axis},
            "yaxis": {"title": {"text": y, "standoff": 8}, **axis},
            "margin": {"l": 48, "r": 10, "t": 10, "b": 42},
            "paper_bgcolor": clear,
            "plot_bgcolor": clear,
            "font": {"family": "system-ui, sans-serif", "size": 12},
            "hovermode": "closest",
            "showlegend": False,
        },
    }


def _percents(values: Iterable[float | None]) -> list[float]:
    return [round(100 * value, 4) for value in values if value is not None]


def _short(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _name(text: str) -> str:
    """Return a name as plotly.js shows it letter by letter."""
    return escape(one_line(text, 60), quote=False)
