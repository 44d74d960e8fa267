"""The page docs/science.md: rows out of the results, figures and tables of rows, words around them."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import science_figures
import science_words
from science_rows import (
    Row,
    by,
    collect,
    curves,
    drift_shares,
    lost_at,
    networks,
    of,
    read,
    spread,
    tolerated,
)

from tncompress.tables import markdown_table


def write_page(results: Path, docs: Path) -> None:
    """Write rows, figures and page; without results in the folder, figures and page of the rows there are."""
    rows = sorted(collect(results), key=lambda row: json.dumps(row, sort_keys=True))
    kept = docs / "science.jsonl"
    if rows:
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = read(kept)
    (docs / "figures").mkdir(exist_ok=True)
    for name, figure in science_figures.figures(rows):
        figure.savefig(docs / "figures" / f"{name}.png", dpi=110)
    (docs / "science.md").write_text(page(rows))


def page(rows: Sequence[Row]) -> str:
    """Return the page."""
    parts = [science_words.INTRO, setup(rows), science_words.TRUNCATION]
    for network, data in networks(rows):
        parts += [f"![norm loss and accuracy](figures/{network}-{data}-norm-loss.png)"]
        parts += [tolerance_table(rows, network, data)]
    parts += [science_words.DEPTH]
    for network, data in networks(rows):
        parts += [
            f"![entropy by depth](figures/{network}-{data}-entropy.png)",
            depth_table(rows, network, data),
        ]
    parts += [
        science_words.trend_table(rows),
        science_words.DRIFT,
        drift_table(rows),
        science_words.AGAIN,
    ]
    for network, data in networks(rows):
        if of(rows, "again", network=network, data=data):
            parts += [f"![training again](figures/{network}-{data}-again.png)"]
    parts += [again_table(rows), science_words.verdicts(rows)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def setup(rows: Sequence[Row]) -> str:
    """Return the table of what was measured."""
    table = []
    for network, data in networks(rows):
        dense = of(rows, "dense", network=network, data=data)
        swept = of(rows, "sweep", network=network, data=data)
        table.append(
            (
                f"{network}, {data}",
                str(len(dense)),
                spread([100 * row["before"] for row in dense]),
                f"{dense[0]['images']:,}",
                str(len({row["layer"] for row in swept})),
                str(len({row["cut"] for row in swept})),
                ", ".join(f"{part:g}" for part in sorted({row["fraction"] for row in swept})),
            )
        )
    header = ("network", "seeds", "dense accuracy", "test images", "layers", "cuts", "parts of the full rank")
    about = next(row for row in rows if row["what"] == "about")
    where = f"Measured with torch {about['torch']} and Python {about['python']} on {about['device']}."
    return markdown_table(header, table) + f"\n\n{where}"


def tolerance_table(rows: Sequence[Row], network: str, data: str) -> str:
    """Return the tolerated norm loss by layer, and points lost at one part of the rank, before and after."""
    moments = ("before", "after")
    tolerances = [_tolerances(rows, network, data, when) for when in moments]
    part, _ = lost_at(rows, network, data, "before")
    lost = [lost_at(rows, network, data, when)[1] for when in moments]
    header = (f"{network}, {data}: layer", "depth", "tolerated norm loss", "BatchNorm re-estimated")
    header += (f"points lost at {part:g} of the full rank", "BatchNorm re-estimated")
    table = []
    for depth, layer in tolerances[0]:
        cells = [_tolerance(column.get((depth, layer), [])) for column in tolerances]
        cells += [_points(column.get((depth, layer), [])) for column in lost]
        table.append((layer, str(depth), *cells))
    return markdown_table(header, table)


def _points(found: Sequence[float]) -> str:
    return f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})" if found else "–"


def _tolerances(rows: Sequence[Row], network: str, data: str, when: str) -> dict[tuple, list]:
    found = defaultdict(list)
    for (depth, layer, _, _), points in curves(rows, network, data, when).items():
        if len(points) > 1:
            found[depth, layer].append(tolerated(points))
    return dict(found)


def _tolerance(found: Sequence[tuple[float, bool]]) -> str:
    """Return median, smallest and largest; above what was measured where a point was not lost there."""
    if not found:
        return "–"
    ordered = sorted(found, key=lambda entry: (not entry[1], entry[0]))  # what was not reached is larger
    shown = [f"{'' if reached else '> '}{loss:.2f}" for loss, reached in ordered]
    return f"{shown[len(shown) // 2]} ({shown[0]} to {shown[-1]})"


def depth_table(rows: Sequence[Row], network: str, data: str) -> str:
    """Return by layer, means over cuts and seeds: entropy and norm loss at equal parameters, and controls."""
    atlas = of(rows, "atlas", network=network, data=data)
    kinds = ("trained", "random", "shuffled")
    entropies = by(atlas, "depth", "layer", "kernel", value=lambda row: row["entropy"])
    losses = by(atlas, "depth", "layer", "kernel", value=lambda row: row["quarter"])
    layers = sorted({key[:2] for key in entropies})
    header = (f"{network}, {data}: layer", "depth")
    header += tuple(f"entropy, {kind}" for kind in kinds) + tuple(f"loss at 1/4, {kind}" for kind in kinds)
    table = []
    for depth, layer in layers:
        cells = [
            f"{statistics.fmean(found[depth, layer, kind]):.3f}" if (depth, layer, kind) in found else "–"
            for found in (entropies, losses)
            for kind in kinds
        ]
        table.append((layer, str(depth), *cells))
    return markdown_table(header, table)


def drift_table(rows: Sequence[Row]) -> str:
    """Return which part of the loss right after truncation is drift of BatchNorm's statistics."""
    table = []
    for network, data in networks(rows):
        shares = [share for _, share in drift_shares(rows, network, data)]
        if len(shares) > 3:
            quarters = statistics.quantiles(shares, n=4)
            cells = (f"{100 * value:.0f} %" for value in (quarters[1], quarters[0], quarters[2]))
            table.append((f"{network}, {data}", str(len(shares)), *cells))
    header = ("network", "truncations that lose over a point", "brought back: median", "1st quartile", "3rd")
    return markdown_table(header, table)


def again_table(rows: Sequence[Row]) -> str:
    """Return accuracies before and after training again, freely, held, and of the control."""
    table = []
    groups = defaultdict(list)
    for row in of(rows, "again"):
        groups[row["network"], row["data"], ", ".join(row["cuts"]), row["fraction"]].append(row)
    for (network, data, cuts, fraction), found in sorted(groups.items()):
        cells = [spread([row["norm_loss"] for row in found])]
        for name in ("before", "after"):
            cells.append(spread([100 * row[name] for row in found]))
        for name in ("dense", "manifold", "control"):
            last = [100 * row[name][-1] for row in found if row[name]]
            cells.append(spread(last) if last else "–")
        table.append((f"{network}, {data}", cuts, f"{fraction:g}", str(len(found)), *cells))
    header = ("network", "cuts of all layers", "part of full rank", "seeds", "norm loss", "truncated")
    header += ("BatchNorm re-estimated", "trained freely", "held in factors", "dense control")
    return markdown_table(header, table)
