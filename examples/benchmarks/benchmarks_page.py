"""The page docs/benchmarks.md from measured rows: no number is written by hand."""

import statistics
from collections import defaultdict

from decomposition_page import compressing, cps, decompositions
from limits_page import LAYER_GOALS, is_of_the_goals, limits
from networks_page import networks
from page_parts import best_dense, markdown_table, median, met, spread
from training_page import training

from tncompress.noise import ADVISED

INTRO = """# Speed

Everything here is written by `examples/benchmarks/layers_speed.py page` from the rows in
`docs/benchmarks.jsonl`, which the scripts in that folder append. All variants of one setting take turns in
one process (torch.utils.benchmark), ten rounds of about the same length each; medians count, and speed-ups
are ratios of medians of one run. Weights are random with seed 0. Each machine has a section of its own, the
kind that the goals were set on first.

The *advised* environment, to be set before Python starts:

```console
{settings}
```

*memory kept* is the default one after a call of `tnc.keep_memory()`, which does in a running Python what the
first three do.
"""

LAYERS = """## Layers

Speed-ups are against the fastest of three dense variants: torch's layer, the same with channels_last, and
with prepacked weights. *ours* is the layer as `tnc.freeze` makes it, its contraction measured; ranks are the
multiples of {step} at which the MACs come nearest to a quarter. tltorch holds the same factors, and the
fastest of its implementations counts, in either memory layout. *spread* is the mean distance of the
quartiles, over the median.
"""


def write_page(rows, path):
    """Write the page of all rows, machine by machine."""
    words = " \\\n".join(f"{key}={value}" for key, value in ADVISED.items())
    parts = [INTRO.format(settings=f"{words} \\\npython ...")]
    machines = dict.fromkeys(row["machine"] for row in rows)
    for machine in sorted(machines, key=lambda name: not is_of_the_goals(name)):
        parts.append(f"## On {machine}\n")
        for kind, section in SECTIONS.items():
            if own := [row for row in rows if row["kind"] == kind and row["machine"] == machine]:
                parts.append(f"#{section(own)}")  # one level down
    parts.append(limits(rows))
    path.write_text("\n".join(parts))


def speedup(row):
    """Return how many times faster than the best dense variant a layer is."""
    return best_dense(row) / median(row, "ours")


def against_peer(row):
    """Return how many times faster than tltorch's best a layer is, or None where it has no such format."""
    theirs = [median(row, name) for name in row["times"] if name.startswith("tltorch")]
    return min(theirs) / median(row, "ours") if theirs else None


def layers(rows):
    """Return the section on single layers."""
    found = defaultdict(list)
    for row in rows:
        found[row["environment"], row["batch"], row["format"]].append(row)
    table = []
    for (where, batch, name), own in sorted(found.items()):
        gains, cuts = [speedup(row) for row in own], [row["macs_cut"] for row in own]
        mean, cut = statistics.geometric_mean(gains), statistics.geometric_mean(cuts)
        peers = [value for row in own if (value := against_peer(row)) is not None]
        theirs = f"{statistics.geometric_mean(peers):.2f}x (least {min(peers):.2f}x)" if peers else "–"
        noise = statistics.mean(spread(row) for row in own)
        goal = met(mean, LAYER_GOALS.get((name, batch)))
        line = [where, batch, name, len(own), f"{cut:.2f}x", f"{mean:.2f}x", f"{min(gains):.2f}x", goal]
        table.append([*line, theirs, f"{100 * noise:.0f} %"])
    head = ["environment", "batch", "format", "layers", "fewer MACs", "faster than dense", "least", "goal"]
    steps = " or ".join(sorted({str(row["step"]) for row in rows}, key=int))
    text = LAYERS.format(step=steps) + "\n"
    text += markdown_table([*head, "than tltorch", "spread"], table) + "\n"
    for where in sorted({row["environment"] for row in rows}):
        own = [row for row in rows if row["environment"] == where]
        peers = [value for row in own if (value := against_peer(row)) is not None]
        slower = sum(value < 1 for value in peers)
        text += f"\nAgainst tltorch over all {len(peers)} settings in the {where} environment: "
        text += (
            f"{statistics.geometric_mean(peers):.2f}x (goal 1.3x), slower on {slower} of them (goal: none).\n"
        )
        text += "\n" + each_layer(own, where)
    return text


def each_layer(rows, where):
    """Return the table of every layer setting."""
    formats = sorted({row["format"] for row in rows})
    settings = defaultdict(dict)
    for row in rows:
        settings[row["batch"], tuple(row["layer"])][row["format"]] = row
    table = []
    for (batch, (into, out, side)), own in sorted(settings.items()):
        cells = [
            f"{speedup(own[name]):.2f}x of {own[name]['macs_cut']:.1f}x ({own[name]['contraction']})"
            if name in own
            else "–"
            for name in formats
        ]
        table.append([batch, f"{into}→{out}, {side}x{side}", *cells])
    text = (
        f"Each layer in the {where} environment: faster than dense, of the cut in MACs, and the contraction\n"
    )
    text += "that was chosen (how many stages each convolution merges):\n\n"
    return text + markdown_table(["batch", "layer", *formats], table) + "\n"


def choices(rows):
    """Return the section on what the choosers took."""
    table = []
    for name, words in (("measured", "measurement"), ("model", "cost model"), ("chain", "always the chain")):
        regrets = [row["regret"][name] for row in rows]
        within = sum(value <= 1.1 for value in regrets) / len(regrets)
        table.append(
            [words, f"{statistics.mean(regrets):.3f}", f"{max(regrets):.2f}", f"{100 * within:.1f} %"]
        )
    head = ["chosen by", "mean time / best", "worst", "within 10 % of the best"]
    text = f"""## Choice of the contraction

{len(rows)} random layers (channels 32 to 512, kernels 3 and 5, strides 1 and 2, batches 1 to 8, cuts of 2x
to 8x) that nothing was fitted on; all ways to merge neighbours were then measured beside the one that was
chosen. The goal is 98 % within 10 %. The choice and the check are two measurements, so that noise counts
against it.

"""
    return text + markdown_table(head, table) + "\n"


SECTIONS = {
    "layer": layers,
    "choice": choices,
    "network": networks,
    "training": training,
    "decomposition": decompositions,
    "cp": cps,
    "compress": compressing,
}
