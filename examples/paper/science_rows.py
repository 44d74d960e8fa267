"""The rows of docs/science.jsonl out of the results of run.py, and statistics of them."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tncompress.atlas import CutAtlas
from tncompress.cuts import Cut
from tncompress.kernel_spectra import short_name
from tncompress.sweep_rows import Sweep

Row = dict[str, Any]

POINT = 0.01
"""The loss of accuracy at which a kernel's norm loss is called tolerated: one point."""


def read(path: Path) -> list[Row]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- rows ---------------------------------------------------------------------------------------------------


def collect(results: Path) -> Iterator[Row]:
    """Yield the rows of every experiment whose folder lies in ``results``."""
    for about in sorted(results.glob("*/about.json")):
        folder, key = about.parent, json.loads(about.read_text())
        yield {"what": "about"} | key
        key = {name: key[name] for name in ("network", "data", "seed")}
        atlas = CutAtlas.load(folder / "atlas.json")
        depths = {row.layer: row.depth for row in atlas.rows}
        for row in atlas.rows:
            yield {"what": "atlas"} | key | _of_atlas(row)
        sweep = Sweep.load(folder / "sweep.json")
        after = sweep.after.accuracy if sweep.after else None
        yield (
            {"what": "dense"}
            | key
            | {"before": sweep.before.accuracy, "after": after, "images": sweep.images}
        )
        for row in sweep.rows:
            found = {
                "layer": row.label,
                "depth": depths[row.label],
                "cut": short_name(Cut.parse(row.cuts[0])),
            }
            yield {"what": "sweep"} | key | found | _of_sweep(row)
        for path in sorted(folder.glob("again-*.json")):
            yield from ({"what": "again"} | key | row for row in _of_training(Sweep.load(path)))


def _of_atlas(row: Any) -> Row:
    return {
        "layer": row.layer,
        "depth": row.depth,
        "cut": row.cut,
        "kernel": row.kernel,
        "full": row.full,
        "entropy": _short(row.relative_entropy),
        "quarter": _short(row.loss_at_params(0.25)),
    }


def _of_sweep(row: Any) -> Row:
    return {
        "fraction": row.amount.to_value(),
        "norm_loss": _short(row.rel_error),
        "params": _short(row.params_ratio),
        "before": row.before.accuracy if row.before else None,
        "after": row.after.accuracy if row.after else None,
    }


def _of_training(sweep: Sweep) -> Iterator[Row]:
    for row in sweep.rows:
        yield _of_sweep(row) | {
            "cuts": list(row.cuts),
            "dense": list(row.dense.accuracies) if row.dense else [],
            "manifold": list(row.manifold.accuracies) if row.manifold else [],
            "control": list(sweep.control.accuracies) if sweep.control else [],
        }


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.5g}")


def of(rows: Iterable[Row], what: str, **wanted: Any) -> list[Row]:
    """Return the rows of one kind with these values."""
    return [
        row
        for row in rows
        if row["what"] == what and all(row.get(key) == value for key, value in wanted.items())
    ]


def networks(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return the networks and data sets there are, the small ones first."""
    return sorted({(row["network"], row["data"]) for row in rows})


# --- statistics ---------------------------------------------------------------------------------------------


def curves(rows: Sequence[Row], network: str, data: str, when: str) -> dict[tuple, list[tuple[float, float]]]:
    """Return (norm loss, accuracy lost) by layer, cut and seed, from the untouched kernel on.

    ``when`` is ``before`` or ``after`` BatchNorm re-estimation; the dense network is treated alike.
    """
    dense = {row["seed"]: row[when] for row in of(rows, "dense", network=network, data=data)}
    found = defaultdict(set)
    for row in of(rows, "sweep", network=network, data=data):
        if row[when] is not None and row["norm_loss"]:
            key = row["depth"], row["layer"], row["cut"], row["seed"]
            found[key].add((row["norm_loss"], dense[row["seed"]] - row[when]))
    return {key: [(0.0, 0.0), *sorted(points)] for key, points in sorted(found.items())}


def tolerated(points: Sequence[tuple[float, float]]) -> tuple[float, bool]:
    """Return the norm loss at which one point of accuracy is lost, and whether it was reached at all.

    Between truncations it is interpolated; where all of them lose less, the largest norm loss stands.
    """
    for (near, kept), (far, lost) in pairwise(points):
        if lost > POINT:
            part = (POINT - kept) / (lost - kept)
            return near + part * (far - near), True
    return points[-1][0], False


def lost_at(
    rows: Sequence[Row], network: str, data: str, when: str, wanted: float = 0.25
) -> tuple[float, dict[tuple, list[float]]]:
    """Return the part of the full rank nearest to ``wanted``, and the points lost there by depth and layer.

    Cuts of full rank 1, across which nothing can be truncated, are left out.
    """
    dense = {row["seed"]: row[when] for row in of(rows, "dense", network=network, data=data)}
    swept = [row for row in of(rows, "sweep", network=network, data=data) if row["norm_loss"]]
    part = min({row["fraction"] for row in swept}, key=lambda fraction: abs(fraction - wanted))
    there = [row for row in swept if row["fraction"] == part and row[when] is not None]
    return part, by(there, "depth", "layer", value=lambda row: 100 * (dense[row["seed"]] - row[when]))


def drift_shares(rows: Sequence[Row], network: str, data: str) -> list[tuple[int, float]]:
    """Return (depth, part of the loss that re-estimation brings back) where over a point was lost."""
    dense = {row["seed"]: row for row in of(rows, "dense", network=network, data=data)}
    shares = []
    for row in of(rows, "sweep", network=network, data=data):
        if row["before"] is None or row["after"] is None:
            continue
        lost = dense[row["seed"]]["before"] - row["before"]
        if lost > POINT:
            shares.append((row["depth"], (row["after"] - row["before"]) / lost))
    return shares


def by(rows: Iterable[Row], *names: str, value: Callable[[Row], float | None]) -> dict[tuple, list[float]]:
    """Return the values of rows, grouped by the columns ``names``."""
    found = defaultdict(list)
    for row in rows:
        if (number := value(row)) is not None:
            found[tuple(row[name] for name in names)].append(number)
    return dict(sorted(found.items()))


def correlation(pairs: Iterable[tuple[float, float]]) -> float:
    """Return Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean ± standard deviation; the mean alone of a single value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
