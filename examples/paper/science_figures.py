"""The figures of docs/science.md, from its rows."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

LEGS = ("out", "in", "kh", "kw")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FEW = 6
"""Up to so many layers get a panel each; of more, cuts get the panels and depth the colour."""


def figures(rows: Sequence[dict]) -> Iterator[tuple[str, Figure]]:
    """Yield name and figure: norm loss, entropy and training again, of each network and data set."""
    for network, data in sorted({(row["network"], row["data"]) for row in rows}):
        own = [row for row in rows if (row["network"], row["data"]) == (network, data)]
        yield f"{network}-{data}-norm-loss", norm_loss(own, f"{network} on {data}")
        yield f"{network}-{data}-entropy", entropy(own, f"{network} on {data}")
        if any(row["what"] == "again" for row in own):
            yield f"{network}-{data}-again", again(own, f"{network} on {data}")


def norm_loss(rows: Sequence[dict], title: str) -> Figure:
    """Return accuracy over norm loss, before and after BatchNorm re-estimation; mean over seeds."""
    swept = [row for row in rows if row["what"] == "sweep"]
    depths = sorted({(row["depth"], row["layer"]) for row in swept})
    cuts = sorted({row["cut"] for row in swept}, key=_order)
    by_layer = len(depths) <= FEW
    panels: list[Any] = [depth for depth, _ in depths] if by_layer else cuts
    figure, axes = _grid(len(panels), title)
    dense = [row["before"] for row in rows if row["what"] == "dense"]
    for panel, axis in zip(panels, axes, strict=True):
        axis.axhline(100 * fmean(dense), color="0.6", linewidth=1)
        lines = cuts if by_layer else [depth for depth, _ in depths]
        for number, line in enumerate(lines):
            depth, cut = (panel, line) if by_layer else (line, panel)
            own = [row for row in swept if row["depth"] == depth and row["cut"] == cut]
            colour = COLOURS[number % 7] if by_layer else colormaps["viridis"](number / (len(lines) - 1))
            for when, style in (("before", ":"), ("after", "-")):
                points = _means(own, when)
                axis.plot(
                    *points,
                    style,
                    color=colour,
                    marker=MARKERS[number % 7] if by_layer else ".",
                    markersize=4,
                    linewidth=1.2,
                    label=line if when == "after" and by_layer else None,
                )
        axis.set_title(dict(depths)[panel] if by_layer else panel, fontsize=10)
        axis.set_xlim(0, 1)
    _label(figure, axes, "norm loss ‖W−W′‖ / ‖W‖", "test accuracy, %")
    if by_layer:
        handles, labels = axes[-1].get_legend_handles_labels()
    else:
        handles, labels = [], []
        _depth_bar(figure, axes, len(depths))
    styles = {"-": "BatchNorm re-estimated", ":": "right after truncation"}
    handles += [Line2D([], [], color="0.3", linestyle=style) for style in styles]
    figure.legend(handles, [*labels, *styles.values()], loc="outside lower center", ncols=5, fontsize=9)
    return figure


def _means(rows: Sequence[dict], when: str) -> tuple[list[float], list[float]]:
    found = defaultdict(list)
    for row in rows:
        if row[when] is not None:
            found[row["fraction"]].append((row["norm_loss"], 100 * row[when]))
    points = sorted((fmean(x for x, _ in own), fmean(y for _, y in own)) for own in found.values())
    return [x for x, _ in points], [y for _, y in points]


def entropy(rows: Sequence[dict], title: str) -> Figure:
    """Return the relative entropy over depth, a panel each cut, trained kernels and both controls."""
    atlas = [row for row in rows if row["what"] == "atlas" and row["entropy"] is not None]
    cuts = sorted({row["cut"] for row in atlas}, key=_order)
    figure, axes = _grid(len(cuts), title)
    for cut, axis in zip(cuts, axes, strict=True):
        for number, kind in enumerate(("trained", "random", "shuffled")):
            found = defaultdict(list)
            for row in atlas:
                if (row["cut"], row["kernel"]) == (cut, kind):
                    found[row["depth"]].append(row["entropy"])
            depths = sorted(found)
            low, high = ([pick(found[depth]) for depth in depths] for pick in (min, max))
            axis.fill_between(depths, low, high, color=COLOURS[number], alpha=0.2, linewidth=0)
            means = [fmean(found[depth]) for depth in depths]
            axis.plot(
                depths,
                means,
                ("-", "--", ":")[number],
                color=COLOURS[number],
                marker=MARKERS[number],
                markersize=4,
                linewidth=1.4,
                label=kind,
            )
        axis.set_title(cut, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _label(figure, axes, "depth", "entropy / log(full rank)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, title="kernels")
    return figure


def again(rows: Sequence[dict], title: str) -> Figure:
    """Return accuracy over epochs of training again, a panel each truncation; mean and range over seeds."""
    trained = [row for row in rows if row["what"] == "again"]
    panels = list(dict.fromkeys((tuple(row["cuts"]), row["fraction"]) for row in trained))
    figure, axes = _grid(len(panels), title)
    dense = 100 * fmean(row["before"] for row in rows if row["what"] == "dense")
    for (cuts, fraction), axis in zip(panels, axes, strict=True):
        own = [row for row in trained if (tuple(row["cuts"]), row["fraction"]) == (cuts, fraction)]
        for number, (name, words) in enumerate(
            (("dense", "trained freely"), ("manifold", "held in factors"), ("control", "dense control"))
        ):
            start = [dense / 100 if name == "control" else row["before"] for row in own]
            tracks = [[first, *row[name]] for first, row in zip(start, own, strict=True) if row[name]]
            if not tracks:
                continue
            epochs = range(len(tracks[0]))
            columns = [[100 * track[epoch] for track in tracks] for epoch in epochs]
            axis.fill_between(
                epochs,
                [*map(min, columns)],
                [*map(max, columns)],
                color=COLOURS[number],
                alpha=0.2,
                linewidth=0,
            )
            axis.plot(
                epochs,
                [*map(fmean, columns)],
                ("-", "--", ":")[number],
                color=COLOURS[number],
                marker=MARKERS[number],
                markersize=5,
                label=words,
            )
        after = 100 * fmean(row["after"] for row in own)
        axis.plot([0], [after], "*", color="#000000", markersize=9, label="BatchNorm re-estimated only")
        axis.set_title(f"{', then '.join(cuts)}\nto {fraction:g} of the full rank, all layers", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _label(figure, axes, "epochs of training again", "test accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if len(axes) > 2 else 2, fontsize=9)
    return figure


def _order(cut: str) -> tuple[int, list[int]]:
    """Return where a cut stands: by the size of its smaller side, then in the order of the legs."""
    left = cut.partition("|")[0].split()
    return len(left), [LEGS.index(leg) for leg in left]


def _grid(count: int, title: str) -> tuple[Figure, list[Any]]:
    across = min(4, count) if count != 6 else 3
    down = -(-count // across)
    figure = Figure(figsize=(3.1 * across + 0.6, 2.7 * down + 1.1), layout="constrained")
    axes = [figure.add_subplot(down, across, number + 1) for number in range(count)]
    for axis in axes:
        axis.grid(color="0.9")
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=12)
    return figure, axes


def _label(figure: Figure, axes: Sequence[Any], x: str, y: str) -> None:
    figure.supylabel(y, fontsize=10)
    lowest = {axis.get_subplotspec().colspan.start: axis for axis in axes}
    for axis in lowest.values():  # a label of the whole figure would lie under the legend
        axis.set_xlabel(x, fontsize=9)
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)


def _depth_bar(figure: Figure, axes: Sequence[Any], depths: int) -> None:
    bar = figure.colorbar(ScalarMappable(Normalize(1, depths), colormaps["viridis"]), ax=list(axes))
    bar.set_label("depth (number of the convolution)", fontsize=9)
