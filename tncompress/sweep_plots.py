"""Figures of a sweep: accuracy over norm loss, and over the epochs of training again.

They are matplotlib ``Figure`` objects without pyplot, so that no global state is touched: write them with
``figure.savefig``. Colours are those of Okabe and Ito, which colour-blind readers can tell apart; markers
and line styles say the same once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tncompress.retraining import Training
from tncompress.sweep_points import amount_text
from tncompress.sweep_rows import Sweep, SweepRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F"
MARKERS = "o", "s", "^", "D", "v", "P", "X", "*"
LINES = "-", "--", "-.", ":"

ACROSS, PANELS = 4, 8
"""Panels beside each other, and the most of them in one figure of training."""


def norm_loss_figures(sweep: Sweep) -> list[Figure]:
    """Return accuracy over norm loss, a panel for each set of layers and a line for each cut.

    The upper panels are before BatchNorm re-estimation, the lower ones after it, where there is one. A figure
    holds four sets of layers.
    """
    cuts = list(dict.fromkeys(row.cuts for row in sweep.rows))
    return [_norm_loss(sweep, labels, cuts) for labels in _pages(sweep.labels, ACROSS)]


def training_figures(sweep: Sweep) -> list[Figure]:
    """Return accuracy over the epochs of training again, a panel for each truncation, beside the control.

    Epoch 0 is the truncated network as it is. A figure holds eight truncations; there is none where nothing
    was trained.
    """
    rows = [row for row in sweep.rows if row.truncated and (row.dense or row.manifold)]
    seen: dict[str, SweepRow] = {}
    for row in rows:
        seen.setdefault(row.unit, row)
    return [_training(sweep, page) for page in _pages(list(seen.values()), PANELS)]


def _pages(entries: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


# --- accuracy over norm loss --------------------------------------------------------------------------------


def _norm_loss(sweep: Sweep, labels: Sequence[str], cuts: Sequence[tuple[str, ...]]) -> Figure:
    heights = 2 if sweep.after is not None else 1
    figure, axes = _panels(heights, len(labels))
    for column, label in enumerate(labels):
        for line in range(heights):
            axis, after = axes[line][column], line == 1
            dense = sweep.after if after else sweep.before
            assert dense is not None
            axis.axhline(100 * dense.accuracy, color="0.45", linewidth=1, linestyle=(0, (1, 1.5)))
            for number, steps in enumerate(cuts):
                _line(axis, sweep.of(label, steps), number, after=after)
            axis.set_title(f"{label}{', BatchNorm re-estimated' if after else ''}", fontsize=9)
            axis.set_xlim(0, 1)
            axis.set_ylim(0, 102)
            if line == heights - 1:
                axis.set_xlabel("norm loss ‖W − W′‖ / ‖W‖")
            if not column:
                axis.set_ylabel("test accuracy (%)")
    handles = [_handle(number, "; ".join(steps)) for number, steps in enumerate(cuts)]
    _legend(figure, [*handles, _dense_handle("dense network")])
    return figure


def _line(axis: Any, rows: Sequence[SweepRow], number: int, *, after: bool) -> None:
    points = set()
    for row in rows:
        found = row.after if after else row.before
        if found is not None:
            points.add((row.rel_error, 100 * found.accuracy))
    if points:
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, **_style(number))


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def _handle(number: int, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **_style(number))


def _dense_handle(label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, color="0.45", linewidth=1, linestyle=(0, (1, 1.5)))


# --- accuracy over epochs -----------------------------------------------------------------------------------


def _training(sweep: Sweep, rows: Sequence[SweepRow]) -> Figure:
    across = min(ACROSS, len(rows))
    high = -(-len(rows) // across)
    figure, axes = _panels(high, across)
    kinds = ("trained freely", "held on the manifold", "dense control")
    for place in range(high * across):
        axis = axes[place // across][place % across]
        if place >= len(rows):
            axis.set_axis_off()
            continue
        row = rows[place]
        start = row.before.accuracy if row.before is not None else None
        for number, (trained, first) in enumerate(
            [(row.dense, start), (row.manifold, start), (sweep.control, sweep.before.accuracy)]
        ):
            _epochs(axis, trained, first, number)
        axis.set_title(f"{row.label}, {'; '.join(row.cuts)}, {_how_far(row)}", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if place + across >= len(rows):
            axis.set_xlabel("epoch of training again")
        if place % across == 0:
            axis.set_ylabel("test accuracy (%)")
    drawn = any(row.dense for row in rows), any(row.manifold for row in rows), sweep.control is not None
    _legend(figure, [_handle(number, kind) for number, kind in enumerate(kinds) if drawn[number]])
    return figure


def _how_far(row: SweepRow) -> str:
    if len(row.layers) == 1:
        return "rank " + ", ".join(f"{cut.rank}/{cut.full}" for cut in row.layers[0].cuts)
    return amount_text(row.amount)


def _epochs(axis: Any, trained: Training | None, start: float | None, number: int) -> None:
    if trained is None or not trained.accuracies:
        return
    values = [(epoch, 100 * accuracy) for epoch, accuracy in enumerate(trained.accuracies, 1)]
    if start is not None:
        values.insert(0, (0, 100 * start))
    x, y = zip(*values, strict=True)
    axis.plot(x, y, **_style(number))


# --- both ---------------------------------------------------------------------------------------------------


def _panels(high: int, across: int) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install matplotlib") from None
    size = (max(2.9 * across + 0.6, 4.5), 2.5 * high + 1.0)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(high, across, squeeze=False, sharey=True)
    for axis in axes.flat:
        axis.grid(color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    width = figure.get_size_inches()[0]
    columns = max(1, min(len(handles), int(width / 1.9)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
