"""The figures of an atlas: spectra, entropy by depth, and layers x cuts as a heat map.

Figures are made without pyplot, so that neither its list of open figures nor a backend is touched. Colours
are Okabe and Ito's for kinds of kernels and viridis and cividis for numbers, which colour-blind readers can
tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tncompress.cut_atlas import CutAtlas
from tncompress.cut_rows import MEASURES, CutRow, cut_order, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
LOOKS: dict[str, dict[str, Any]] = {
    "trained": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "random": {"color": ORANGE, "marker": "x", "linestyle": "--"},
    "shuffled": {"color": GREEN, "marker": "+", "linestyle": ":"},
}
"""Kinds of kernels differ in colour, marker and line."""

_GREY = {
    "entropy": "full rank 1",
    "rank": "full rank 1",
    "params": "full rank 1, or rank 1 holds more than a quarter",
}

COLUMNS, PANEL = 4, (3.3, 2.7)
MOST_TICKS, MOST_POINTS = 12, 300


def plot_spectra(atlas: CutAtlas, *, metric: str = "norm") -> Figure:
    """Return a panel for each cut: singular values over the largest, by their place in the full rank.

    Each line is a layer, coloured by depth. The range of the controls' lines is shaded.
    """
    rows = _rows(atlas, metric)
    fig, panels = _grid(cuts_of(rows), sharex=True)
    colours = _colours(atlas)
    for cut, ax in panels.items():
        for kind in (name for name in atlas.kernels if name != "trained"):
            _shade(ax, [row for row in rows if (row.cut, row.kernel) == (cut, kind)], kind)
        for row in rows:
            if row.cut == cut and row.kernel == "trained" and row.full > 1 and row.norm > 0:
                x, y = line_of(row)
                ax.plot(x, y, color=colours(row.depth), linewidth=1.1, alpha=0.9)
        ax.set(title=cut, yscale="log", xlim=(0, 1))
        lowest = min((y for line in ax.lines for y in np.asarray(line.get_ydata())), default=1e-2)
        ax.set_ylim(max(min(float(lowest) / 2, 0.06), 1e-6), 1.5)
    _label(panels, "place k / full rank", "σₖ / σ₁")
    _colour_bar(fig, panels, atlas, colours)
    _legend_of_shades(fig, atlas)
    fig.suptitle(f"Singular values across each cut{_norm_words(metric)}")
    return fig


def plot_entropy(atlas: CutAtlas, *, metric: str = "norm") -> Figure:
    """Return a panel for each cut: the correlation entropy of the layers, in nats, by depth.

    Grey bars are the largest that the layer's kernel can have, log(full rank). Layers with full rank 1
    across a cut are not drawn.
    """
    rows = _rows(atlas, metric)
    fig, panels = _grid(cuts_of(rows), sharex=True)
    for cut, ax in panels.items():
        for kind in atlas.kernels:
            own = [row for row in rows if (row.cut, row.kernel) == (cut, kind) and row.full > 1]
            depths = [row.depth for row in own]
            if kind == "trained" and own:
                tops = [math.log(row.full) for row in own]
                ends = [depth - 0.45 for depth in depths], [depth + 0.45 for depth in depths]
                ax.hlines(tops, *ends, color=GREY, linewidth=1.2, label="log(full rank)")
                ax.set_ylim(0, 1.07 * max(tops))
            size = 4 if len(own) <= 60 else 2.5
            ax.plot(
                depths,
                [row.entropy for row in own],
                label=f"{kind} kernels",
                markersize=size,
                linewidth=0.9 if len(own) <= 25 else 0.4,
                **LOOKS[kind],
            )
        ax.set_title(cut)
        if len(atlas.layers) <= MOST_TICKS:
            ax.set_xticks(sorted({row.depth for row in rows}))
    _label(panels, "depth (number of the layer)", "entropy (nats)")
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    fig.suptitle(f"Correlation entropy across each cut, by depth{_norm_words(metric)}")
    return fig


def plot_heatmap(
    atlas: CutAtlas, measure: str = "entropy", *, kernel: str = "trained", metric: str = "norm"
) -> Figure:
    """Return layers x cuts as colours, with the number in each field. What can't be measured is left grey."""
    from matplotlib.figure import Figure

    rows = atlas.select(kernel=kernel, metric=metric)
    layers, cuts = list(dict.fromkeys(row.layer for row in rows)), list(cuts_of(rows))
    values = np.full((len(layers), len(cuts)), np.nan)
    for row in rows:
        value = measured(row, measure)
        if value is not None:
            values[layers.index(row.layer), cuts.index(row.cut)] = value
    shapes = {row.layer: "×".join(map(str, row.shape)) for row in rows}
    fig = Figure(figsize=(3.4 + 0.85 * len(cuts), 1.7 + 0.22 * max(len(layers), 10)), layout="constrained")
    ax = fig.subplots()
    ax.set_facecolor("#d9d9d9")
    image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="cividis")
    image.set_clim(*_range(values))
    _write_values(ax, values, image)
    ax.set_xticks(range(len(cuts)), [_two_lines(cut) for cut in cuts], fontsize=8)
    ax.xaxis.set_ticks_position("top")
    ax.set_yticks(range(len(layers)), [f"{name}  {shapes[name]}" for name in layers], fontsize=7)
    ax.set_xlabel(f"cut (grey: {_GREY[measure]})", fontsize=8)
    ax.set_ylabel("layer and kernel, by depth", fontsize=9)
    bar = fig.colorbar(image, ax=ax, fraction=0.05, aspect=20 if len(layers) < 20 else 40)
    bar.set_label(MEASURES[measure], fontsize=9)
    fig.suptitle(f"{MEASURES[measure].capitalize()},\n{kernel} kernels{_norm_words(metric)}", fontsize=11)
    return fig


# --- parts --------------------------------------------------------------------------------------------------


def _rows(atlas: CutAtlas, metric: str) -> tuple[CutRow, ...]:
    return atlas.select(metric=metric)


def cuts_of(rows: Sequence[CutRow]) -> tuple[str, ...]:
    """Return the cuts across which some kernel has more than rank 1, those of single legs first."""
    names = {row.cut for row in rows if row.full > 1} or {row.cut for row in rows}
    return tuple(sorted(names, key=cut_order))


def _grid(cuts: Sequence[str], **options: Any) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel for each cut, and the panels; places that are left over are empty."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(cuts))
    lines = -(-len(cuts) // columns)
    fig = Figure(figsize=(PANEL[0] * max(columns, 2), PANEL[1] * lines + 1), layout="constrained")
    axes = fig.subplots(lines, columns, squeeze=False, **options).ravel()
    for ax in axes[len(cuts) :]:
        ax.remove()
    return fig, dict(zip(cuts, axes, strict=False))


def _label(panels: dict[str, Axes], x: str, y: str) -> None:
    """Write axis labels at the left and below the lowest panel of each column, and light grid lines."""
    columns = min(COLUMNS, len(panels))
    for number, ax in enumerate(panels.values()):
        ax.grid(color="#dddddd", linewidth=0.5)
        ax.set_axisbelow(True)
        if number % columns == 0:
            ax.set_ylabel(y)
        if number + columns >= len(panels):
            ax.set_xlabel(x)
            ax.tick_params(labelbottom=True)


def line_of(row: CutRow, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return what is drawn of a spectrum: at most so many points, without what is no more than rounding."""
    s = np.array(row.spectrum) / row.spectrum[0]
    places = (np.arange(row.full) + 0.5) / row.full
    kept = np.unique(np.linspace(0, row.full - 1, min(row.full, most)).round().astype(int))
    kept = kept[s[kept] > 1e-7]
    return places[kept], s[kept]


def _shade(ax: Axes, rows: Sequence[CutRow], kind: str) -> None:
    """Shade between the lowest and the highest line of a control."""
    at = np.linspace(0, 1, 101)
    lines = [np.interp(at, *line_of(row)) for row in rows if row.full > 1 and row.norm > 0]
    if lines:
        look: dict[str, Any] = {"color": LOOKS[kind]["color"], "linewidth": 0.8}
        ax.fill_between(at, np.min(lines, 0), np.max(lines, 0), alpha=0.18, **look)
        for edge in (np.min(lines, 0), np.max(lines, 0)):
            ax.plot(at, edge, linestyle=LOOKS[kind]["linestyle"], **look)


def _colours(atlas: CutAtlas) -> Any:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    depths = [row.depth for row in atlas.rows]
    scale = ScalarMappable(Normalize(min(depths), max(max(depths), min(depths) + 1)), colormaps["viridis"])

    def colour(depth: int) -> Any:
        return scale.to_rgba(depth)  # type: ignore[arg-type]

    colour.scale = scale  # type: ignore[attr-defined]
    return colour


def _colour_bar(fig: Figure, panels: dict[str, Axes], atlas: CutAtlas, colours: Any) -> None:
    depths = sorted({row.depth for row in atlas.rows})
    bar = fig.colorbar(colours.scale, ax=list(panels.values()), fraction=0.03, aspect=40)
    bar.set_label("depth (number of the layer)")
    if len(depths) <= MOST_TICKS:
        bar.set_ticks(depths)


def _legend_of_shades(fig: Figure, atlas: CutAtlas) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Any] = [Line2D([], [], color=GREY, label="trained kernels, one line a layer")]
    for kind in atlas.kernels:
        if kind != "trained":
            look = LOOKS[kind]
            marks.append(
                Patch(
                    facecolor=f"{look['color']}2e",
                    edgecolor=look["color"],
                    linestyle=look["linestyle"],
                    label=f"{kind} kernels, range over layers",
                )
            )
    fig.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of a colour scale; values that are all alike get one of some width."""
    seen = values[np.isfinite(values)]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
    middle = (low + high) / 2
    half = max((high - low) / 2, 0.005)
    return middle - half, middle + half


def _write_values(ax: Axes, values: np.ndarray, image: Any) -> None:
    """Write each value into its field, dark on light and light on dark."""
    for (line, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = image.norm(value) < 0.5
            shown = f"{value:.2f}" if value < 0.995 or value >= 1 else f"{value:.3f}"
            ax.text(column, line, shown, ha="center", va="center", fontsize=6.5, color="w" if dark else "k")


def _two_lines(cut: str) -> str:
    left, right = cut.split("|")
    return f"{left}\n| {right}"


def _norm_words(metric: str) -> str:
    return ", in the norm of the layer's output" if metric == "data" else ""
