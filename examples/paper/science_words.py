"""The words of docs/science.md. Numbers in sentences are computed from the rows."""

import math
import statistics
from collections.abc import Sequence

from science_rows import Row, correlation, curves, drift_shares, lost_at, networks, of, tolerated

from tncompress.tables import markdown_table

INTRO = """# Why does tensorization hardly hurt?

Singh, Jahromi and Orús (*Tensor network compressibility of convolutional models*, arXiv 2403.14379)
truncate the kernels of trained convolutional networks along cuts (bipartitions of a kernel's legs `out`,
`in`, `kh`, `kw`), dense in and dense out, and report three things: kernels lose much of their norm
before the network loses accuracy; deeper layers more so; and after aggressive truncation a few epochs of
training bring the accuracy back. They conclude that the correlations inside trained kernels are
compressible by nature. This page asks the same questions again, with controls. Everything in it is
written by

```console
python examples/paper/run.py --network cnn4 --seeds 0 1 2
python examples/paper/run.py --network resnet20 --setting brief
python examples/paper/run.py page
```

from the rows in `science.jsonl`; `--data cifar10`, `--data cifar100` and `--network resnet50 --setting
full` run the paper's own networks and data, for those who have them and a GPU. The norm loss of a kernel
is ‖W − W′‖ / ‖W‖; an entropy is that of the normalised squared singular values across a cut, divided by
the logarithm of the full rank, so that 1 means no structure at all."""

TRUNCATION = """## How much norm can a kernel lose?

One layer at a time is truncated along one cut to a part of its full rank. Dotted: right after
truncation. Solid: with BatchNorm's statistics taken again on 1,024 unlabelled images (the dense line is
the network as it was trained). The *tolerated norm loss* in the tables is the norm loss at which one
point of accuracy is lost, interpolated between truncations, and more than the largest measured (>) where
no truncation lost a point; with it, the points lost where all cuts are left the same part of their full
rank. Medians over cuts and seeds, smallest and largest in brackets."""

DEPTH = """## Are deeper layers more compressible?

The atlas: entropies across every cut, of trained kernels, of freshly initialised ones of the same shape,
and of the trained kernel's own entries in random order. Tables have means over cuts and seeds; *loss at
1/4* is the norm loss of the best two factors with a quarter of the kernel's parameters, over the cuts
that can be so small."""

DRIFT = """## How much of the loss right after truncation is drift of BatchNorm's statistics?

Of all truncations of one layer that lose more than one point right away, the part of the loss that
re-estimation on 1,024 unlabelled images brings back (above 100 %: more than was lost; below 0: it made
things worse)."""

AGAIN = """## Does training on the truncated manifold reach what free training reaches?

All layers at once are truncated, and the network is trained for a few epochs: *freely*, from the
truncated kernels on with nothing that holds their ranks; *held in factors*, so that kernels keep them;
and, as the control, the dense network for as many epochs with the same settings (SGD, learning rate
0.02, cosine). Extra epochs change the dense network, too: it is the control that a recovered accuracy is
to be compared with. Bands are the range over seeds."""


END = """## What to make of it"""

CAUTION = """Differences of a quarter of a point between single accuracies on 10,000 images are within the
standard error (0.25 points), those on 2,000 images within 0.55. Two small networks on one data set are no
law; the commands above ask any other."""


def verdicts(rows: Sequence[Row]) -> str:
    """Return what the measurements say to each question, in numbers."""
    lines = [END, ""]
    for network, data in networks(rows):
        name = f"**{network}, {data}.**"
        before, after = (_tolerated(rows, network, data, when) for when in ("before", "after"))
        lines.append(
            f"- {name} Behind the first layer a kernel can lose {before:.0%} of its norm or more (median) "
            f"before the network loses a point, {after:.0%} once BatchNorm's statistics are taken again."
        )
        lines.append(f"- {name} {_on_depth(rows, network, data)}")
        low, high, rest = _gaps(rows, network, data)
        lines.append(
            f"- {name} Trained kernels have less entropy than random ones of their shape, by {low:.2f} of "
            f"the largest entropy in the first half of the layers and {high:.2f} in the second; shuffled, "
            f"they have {rest:.2f} less than these: what is left then comes from the sizes of the entries."
        )
        if shares := [share for _, share in drift_shares(rows, network, data)]:
            share = statistics.median(shares)
            lines.append(
                f"- {name} Of what a truncation costs right away, {share:.0%} (median) is drift of "
                "BatchNorm's statistics, and comes back without training."
            )
        if trained := of(rows, "again", network=network, data=data):
            lines.append(f"- {name} {_trained(trained)}")
    return "\n".join(lines) + f"\n\n{CAUTION}"


def _tolerated(rows: Sequence[Row], network: str, data: str, when: str) -> float:
    found = curves(rows, network, data, when).items()
    return statistics.median(tolerated(points)[0] for key, points in found if key[0] > 1)


def _gaps(rows: Sequence[Row], network: str, data: str) -> tuple[float, float, float]:
    """Return how much less than random kernels trained ones have, in both halves, and shuffled ones."""
    atlas = [row for row in of(rows, "atlas", network=network, data=data) if row["entropy"] is not None]
    middle = max(row["depth"] for row in atlas) / 2
    means = {
        (kind, deep): statistics.fmean(
            row["entropy"] for row in atlas if row["kernel"] == kind and (row["depth"] > middle) is deep
        )
        for kind in ("trained", "random")
        for deep in (False, True)
    }
    shallow, deep = (means["random", deep] - means["trained", deep] for deep in (False, True))
    whole = {
        kind: statistics.fmean(row["entropy"] for row in atlas if row["kernel"] == kind)
        for kind in ("random", "shuffled")
    }
    return shallow, deep, whole["random"] - whole["shuffled"]


def _trained(rows: Sequence[Row]) -> str:
    held = [100 * (row["manifold"][-1] - row["dense"][-1]) for row in rows if row["manifold"]]
    free = [100 * (row["dense"][-1] - row["control"][-1]) for row in rows if row["dense"]]
    epochs = len(rows[0]["control"])
    return (
        f"After {epochs} epochs networks that were trained freely are {_points(free)} the dense control, "
        f"those held in factors {_points(held)} those trained freely (means over truncations and seeds, "
        f"{min(held):+.2f} to {max(held):+.2f} points)."
    )


def _points(gaps: Sequence[float]) -> str:
    mean = statistics.fmean(gaps)
    return f"{abs(mean):.2f} points {'above' if mean > 0 else 'below'}"


def trend_table(rows: Sequence[Row]) -> str:
    """Return how depth goes with entropy, norm loss at equal parameters, and points lost."""
    lines = [
        (f"{network}, {data}", *(f"{trend:+.2f}" for trend in trends(rows, network, data)))
        for network, data in networks(rows)
    ]
    header = ("Spearman correlation with depth", "entropy", "norm loss at 1/4 of the parameters")
    header += ("points lost at one part of the rank", "the same, BatchNorm re-estimated")
    return markdown_table(header, lines)


def trends(rows: Sequence[Row], network: str, data: str) -> list[float]:
    """Return correlations with depth: entropy, norm loss (medians over cuts), points before and after."""
    atlas = of(rows, "atlas", network=network, data=data, kernel="trained")
    found = []
    for name in ("entropy", "quarter"):
        by_cut = [
            [(row["depth"], row[name]) for row in atlas if row["cut"] == cut and row[name] is not None]
            for cut in sorted({row["cut"] for row in atlas})
        ]
        long = [correlation(pairs) for pairs in by_cut if len({depth for depth, _ in pairs}) > 1]
        found.append(statistics.median(long) if long else math.nan)
    for when in ("before", "after"):
        lost = lost_at(rows, network, data, when)[1]
        found.append(correlation((key[0], v) for key, own in lost.items() for v in own))
    return found


def _on_depth(rows: Sequence[Row], network: str, data: str) -> str:
    entropy, quarter, before, after = trends(rows, network, data)
    part, _ = lost_at(rows, network, data, "before")
    random = [
        row["quarter"]
        for row in of(rows, "atlas", network=network, data=data, kernel="random")
        if row["quarter"] is not None and row["depth"] > 1
    ]
    points, norm = ("fewer" if before < 0 else "no fewer"), ("less" if quarter < 0 else "no less")
    agrees = "as" if before < 0 and quarter < 0 else "not as"
    return (
        f"Deeper layers lose {points} points at {part:g} of the full rank (Spearman {before:+.2f}; "
        f"{after:+.2f} with BatchNorm re-estimated), and {norm} norm at a quarter of the parameters "
        f"({quarter:+.2f}), where random kernels lose {min(random):.2f} to {max(random):.2f} of theirs at "
        f"any depth. That is {agrees} the paper says, as a trend: neighbours stand in either order, and "
        f"entropy goes with depth by {entropy:+.2f} only."
    )
