"""The page docs/benchmarks.md from measured rows: no number is written by hand."""

import statistics
from collections import defaultdict

from tncompress.tables import markdown_table as table_of_text

INTRO = """# Speed

Everything here is written by `examples/benchmarks/layers_speed.py page` from the rows in
`docs/benchmarks.jsonl`, which the scripts in that folder append. All variants of one setting take turns in
one process (torch.utils.benchmark), ten rounds of about the same length each; medians count, and speed-ups
are ratios of medians of one run. Weights are random with seed 0.

The *advised* environment, to be set before Python starts:

```console
{settings}
```
"""

LAYERS = """## Layers

Speed-ups are against the fastest of three dense variants: torch's layer, the same with channels_last, and
with prepacked weights. *ours* is the layer as `tnc.freeze` makes it, its contraction measured; ranks are the
multiples of 16 at which the MACs come nearest to a quarter. tltorch holds the same factors, and the fastest
of its implementations counts, in either memory layout. *spread* is the mean distance of the quartiles, over
the median.
"""

NETWORKS = """## Whole networks

Compressed under a budget on the MACs, ranks in steps of 16. *best dense* is the fastest of
torch's model as it is, with channels_last, frozen by `tnc.freeze` and, where it was measured, compiled
by `torch.compile` with freezing. *eager* is the compressed model as `compress` returns it.
"""

DECOMPOSITIONS = """## Decomposition

Every convolution across its seven cuts, as an MPS and as Tucker-2, at a quarter of its parameters:
the layers side by side on all cores, beside tensorly at the same ranks (the faster of its numpy and PyTorch
backends). *excess* is the largest amount, relative, by which an error of ours is above tensorly's (negative:
below). *memory*: the most that one decomposition took beyond what was there, over the size of the largest
kernel.
"""

GOALS = {("svd", 8): 3.4, ("tucker", 8): 3.4, ("mps", 8): 3.1, ("svd", 1): 2.8, ("tucker", 1): 2.8}
NETWORK_GOALS = {
    ("vgg16", 8, False): 3.0,
    ("vgg16", 8, True): 6.0,
    ("resnet50", 8, False): 2.7,
    ("resnet50", 1, False): 2.1,
}
WITHIN, FASTER, CP_FASTER, LONGEST, MEMORY = 1e-5, 8, 3, 3.0, 6


def markdown_table(head, lines):
    """Return a table of cells of any kind."""
    return table_of_text(head, [[str(cell) for cell in line] for line in lines])


def write_page(rows, path, settings):
    """Write the page of all rows."""
    words = " \\\n".join(f"{key}={value}" for key, value in settings.items())
    parts = [INTRO.format(settings=f"{words} \\\npython ...")]
    parts.append("Measured on: " + "; ".join(sorted({row["machine"] for row in rows})) + ".\n")
    for kind, section in SECTIONS.items():
        if own := [row for row in rows if row["kind"] == kind]:
            parts.append(section(own))
    path.write_text("\n".join(parts))


def median(row, name):
    """Return the median seconds of a variant."""
    return row["times"][name]["median"]


def best_dense(row):
    """Return the median seconds of the fastest dense variant."""
    return min(median(row, name) for name in row["times"] if name.startswith("dense"))


def speedup(row):
    """Return how many times faster than the best dense variant a layer is."""
    return best_dense(row) / median(row, "ours")


def against_peer(row):
    """Return how many times faster than tltorch's best a layer is, or None where it has no such format."""
    theirs = [median(row, name) for name in row["times"] if name.startswith("tltorch")]
    return min(theirs) / median(row, "ours") if theirs else None


def spread(row):
    """Return the mean distance of the quartiles of a row's variants, over the median."""
    return statistics.mean((each["high"] - each["low"]) / each["median"] for each in row["times"].values())


def met(value, goal, *, at_most=False):
    """Return a goal beside a value, in words."""
    if goal is None:
        return "–"
    return f"{goal}x {'met' if (value <= goal if at_most else value >= goal) else 'missed'}"


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
        goal = met(mean, GOALS.get((name, batch)))
        line = [where, batch, name, len(own), f"{cut:.2f}x", f"{mean:.2f}x", f"{min(gains):.2f}x", goal]
        table.append([*line, theirs, f"{100 * noise:.0f} %"])
    head = ["environment", "batch", "format", "layers", "fewer MACs", "faster than dense", "least", "goal"]
    text = LAYERS + "\n" + markdown_table([*head, "than tltorch", "spread"], table) + "\n"
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


def networks(rows):
    """Return the section on whole networks, and on all of torchvision's."""
    own = [row for row in rows if not row.get("every")]
    head = [
        "environment",
        "network",
        "batch",
        "format",
        "fewer MACs",
        "dense",
        "best dense",
        "eager",
        "frozen",
    ]
    head += ["against the best dense", "goal", "spread"]
    table = []
    for row in sorted(
        own, key=lambda r: (r["environment"], r["network"], -r["batch"], r["bf16"], r["format"])
    ):
        best, ours = best_dense(row), network_best(row)
        goal = NETWORK_GOALS.get((row["network"], row["batch"], row["bf16"]))
        table.append(
            [
                row["environment"],
                row["network"] + (" bf16" if row["bf16"] else ""),
                row["batch"],
                row["format"],
                f"{row['macs_cut']:.2f}x",
                f"{1e3 * median(row, 'dense'):.1f} ms",
                f"{1e3 * best:.1f} ms",
                f"{1e3 * median(row, 'compressed'):.1f} ms",
                f"{1e3 * ours:.1f} ms",
                f"{best / ours:.2f}x",
                met(best / ours, goal),
                f"{100 * spread(row):.0f} %",
            ]
        )
    text = NETWORKS + "\n" + markdown_table(head, table) + "\n"
    every = [row for row in rows if row.get("every")]
    return text + (all_networks(every) if every else "")


def network_best(row):
    """Return the median seconds of the compressed model, frozen or compiled."""
    names = [name for name in row["times"] if name.startswith("compressed") and name != "compressed"]
    return min(median(row, name) for name in names)


def all_networks(rows):
    """Return the table of all of torchvision's networks: frozen against frozen."""
    table, slower = [], 0
    for row in sorted(rows, key=lambda r: (r["network"], r["batch"])):
        ratio = median(row, "dense frozen") / median(row, "compressed frozen")
        slower += ratio < 1 - spread(row)
        line = [row["network"], row["batch"], row["format"], f"{row['macs_cut']:.2f}x", f"{ratio:.2f}x"]
        table.append([*line, f"{100 * spread(row):.0f} %", row["way"], f"{row['rel_error']:.0e}"])
    head = [
        "network",
        "batch",
        "format",
        "fewer MACs",
        "frozen against frozen dense",
        "spread",
        "way",
        "error",
    ]
    text = f"""
All of torchvision's classification networks with at most 100 million parameters: the compressed one frozen
against the dense one frozen. Slower by more than the spread: {slower} of {len(rows)} (goal: none).

"""
    return text + markdown_table(head, table) + "\n"


def decompositions(rows):
    """Return the section on decomposing whole networks."""
    table = []
    for row in rows:
        seconds = row["seconds"]
        theirs = min(value for name, value in seconds.items() if name.startswith("tensorly"))
        memory = row["memory"] / row["largest"]
        table.append(
            [
                row["network"],
                row["layers"],
                f"{seconds['ours']:.2f} s ({LONGEST:g} s {'met' if seconds['ours'] < LONGEST else 'missed'})",
                f"{seconds['in turn']:.2f} s",
                f"{theirs:.2f} s",
                f"{theirs / seconds['ours']:.1f}x ({met(theirs / seconds['ours'], FASTER)})",
                f"{row['worst_excess']:.1e} ({'met' if row['worst_excess'] <= WITHIN else 'missed'})",
                f"{memory:.1f}x ({met(memory, MEMORY, at_most=True)})",
            ]
        )
    head = [
        "network",
        "convolutions",
        "ours",
        "one layer at a time",
        "tensorly",
        "faster",
        "excess",
        "memory",
    ]
    return DECOMPOSITIONS + "\n" + markdown_table(head, table) + "\n"


def cps(rows):
    """Return the section on CP."""
    table = []
    for row in rows:
        for name, seconds in row["seconds"].items():
            ratio = seconds / row["seconds"]["ours"]
            table.append([name, f"{seconds:.2f} s", f"{ratio:.1f}x", f"{row['errors'][name]:.4f}"])
    text = (
        f"## CP\n\nA 3x3 kernel with 512 channels at rank {rows[0]['rank']}; the goal is {CP_FASTER}x at no "
    )
    text += "higher an error.\n\n"
    return text + markdown_table(["by", "time", "against ours", "relative error"], table) + "\n"


def compressing(rows):
    """Return the section on planning and compressing."""
    table = [
        [row["network"], name, row["rel_error"], f"{each['plan']:.2f} s", f"{each['compress']:.2f} s"]
        for row in rows
        for name, each in row["seconds"].items()
    ]
    text = (
        "## Planning and compressing\n\nWith a policy on the error; the goal for ResNet-50 is 5 s in all.\n\n"
    )
    return text + markdown_table(["network", "format", "error", "plan", "compress"], table) + "\n"


SECTIONS = {
    "layer": layers,
    "choice": choices,
    "network": networks,
    "decomposition": decompositions,
    "cp": cps,
    "compress": compressing,
}
