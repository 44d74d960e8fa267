"""The page docs/benchmarks.md from measured rows: no number is written by hand."""

import statistics
from collections import defaultdict

from tncompress.tables import markdown_table as table_of_text

INTRO = """# Speed

Everything here is written by `examples/benchmarks/layers_speed.py` from the rows in `docs/benchmarks.jsonl`.
All variants of one setting run in turns in one process (torch.utils.benchmark), and the least time of each
counts, because noise only ever adds; with one thread it is the time of that thread alone, since other work
ran on the machine. Speed-ups are against the fastest of three dense variants: torch's
layer, the same with channels_last, and with prepacked weights. *ours* is the layer as `tnc.freeze` makes
it, its contraction measured; ranks are the multiples of 16 at which the MACs come nearest to the cut asked
for. tltorch holds the same factors, and the fastest of its implementations counts, in either memory layout.
Weights are random, seed 0; the environment is the default one.
"""

GOALS = {("svd", 8): 3.4, ("tucker", 8): 3.4, ("mps", 8): 3.1, ("svd", 1): 2.8, ("tucker", 1): 2.8}


def markdown_table(head, lines):
    """Return a table of cells of any kind."""
    return table_of_text(head, [[str(cell) for cell in line] for line in lines])


def write_page(rows, path):
    """Write the page of all rows."""
    parts = [INTRO]
    machines = sorted({row["machine"] for row in rows})
    parts.append("Measured on: " + "; ".join(machines) + ".\n")
    sections = (("layer", layers), ("choice", choices), ("network", networks), ("training", training))
    for kind, section in sections:
        if own := [row for row in rows if row["kind"] == kind]:
            parts.append(section(own))
    path.write_text("\n".join(parts))


def speedup(row):
    """Return how many times faster than the best dense variant a layer is."""
    times = row["times"]
    return min(t for name, t in times.items() if name.startswith("dense")) / times["ours"]


def against_peer(row):
    """Return how many times faster than tltorch's best a layer is, or None where it has no such format."""
    theirs = [t for name, t in row["times"].items() if name.startswith("tltorch")]
    return min(theirs) / row["times"]["ours"] if theirs else None


def layers(rows):
    """Return the section on single layers."""
    found = defaultdict(list)
    for row in rows:
        found[row["format"], row["batch"]].append(row)
    table = []
    for (name, batch), own in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        gains, cuts = [speedup(row) for row in own], [row["macs_cut"] for row in own]
        mean, cut = statistics.geometric_mean(gains), statistics.geometric_mean(cuts)
        peers = [value for row in own if (value := against_peer(row)) is not None]
        theirs = f"{statistics.geometric_mean(peers):.2f}x (least {min(peers):.2f}x)" if peers else "–"
        goal = f"{GOALS[name, batch]}x" if (name, batch) in GOALS else "–"
        table.append(
            [batch, name, len(own), f"{cut:.2f}x", f"{mean:.2f}x", f"{min(gains):.2f}x", goal, theirs]
        )
    head = ["batch", "format", "layers", "fewer MACs", "faster than dense", "least", "goal", "than tltorch"]
    peers = [value for row in rows if (value := against_peer(row)) is not None]
    text = "## Layers\n\n" + markdown_table(head, table) + "\n"
    if peers:
        slower = sum(value < 1 for value in peers)
        text += f"\nAgainst tltorch over all {len(peers)} settings: {statistics.geometric_mean(peers):.2f}x "
        text += f"(goal 1.3x), slower on {slower} of them (goal: none).\n"
    return text + "\n" + each_layer(rows)


def each_layer(rows):
    """Return the table of every layer setting."""
    formats = sorted({row["format"] for row in rows})
    settings = defaultdict(dict)
    for row in rows:
        settings[row["batch"], tuple(row["layer"])][row["format"]] = row
    table = []
    for (batch, (into, out, side)), own in sorted(settings.items()):
        cells = [
            f"{speedup(own[name]):.2f}x ({own[name]['contraction']})" if name in own else "–"
            for name in formats
        ]
        table.append([batch, f"{into}→{out}, {side}x{side}", *cells])
    text = "Each layer, with the contraction that was chosen (how many stages each convolution merges):\n\n"
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
    """Return the section on whole networks."""
    table = []
    for row in rows:
        times = row["times"]
        dense, ours = times["dense frozen"], times["compressed frozen"]
        table.append(
            [
                row["network"] + (" bf16" if row["bf16"] else ""),
                row["format"],
                row["batch"],
                f"{row['macs_cut']:.2f}x",
                f"{1e3 * times['dense']:.1f} ms",
                f"{1e3 * dense:.1f} ms",
                f"{1e3 * times['compressed']:.1f} ms",
                f"{1e3 * ours:.1f} ms",
                f"{dense / ours:.2f}x",
                f"{row['rel_error']:.1e}",
            ]
        )
    head = ["network", "format", "batch", "fewer MACs", "dense", "dense frozen", "compressed"]
    head += ["compressed frozen", "frozen against frozen", "difference of outputs"]
    return "## Whole networks\n\n" + markdown_table(head, table) + "\n"


def training(rows):
    """Return the section on training steps."""
    found = defaultdict(list)
    for row in rows:
        found[row["batch"], row["environment"], row["format"]].append(row)
    table = []
    for (batch, environment, name), own in sorted(found.items()):
        gains = [training_speedup(row["times"], row["best"]) for row in own]
        optimized = [training_speedup(row["optimizer_times"], row["best"]) for row in own]
        again = [training_speedup(row["times"], "checkpointed chain") for row in own]
        table.append(
            [
                batch,
                name,
                environment,
                len(own),
                f"{statistics.geometric_mean([row['macs_cut'] for row in own]):.2f}x",
                f"{statistics.geometric_mean(gains):.2f}x (least {min(gains):.2f}x)",
                f"{statistics.geometric_mean(optimized):.2f}x",
                f"{statistics.geometric_mean(again):.2f}x (least {min(again):.2f}x)",
                f"{max(activations(row, row['best']) for row in own):.2f}x",
                f"{max(activations(row, 'checkpointed chain') for row in own):.2f}x",
            ]
        )
    head = ["batch", "format", "environment", "layers", "fewer MACs", "step faster than dense"]
    head += ["with SGD", "checkpointed", "activations", "checkpointed"]
    text = """## Training steps

Forward and backward pass of single layers of 256 channels and more, in float32, against the faster of dense
and dense with channels_last; the goal is 3x at 4x fewer MACs. *With SGD* adds the optimizer, with momentum,
and *checkpointed* is the chain under `tnc.checkpoint_activations_`. Activations are the bytes that autograd
keeps for the backward pass, the largest share of the dense layer's; the goal is 1.1x with checkpointing.
By `examples/benchmarks/training_speed.py`.

"""
    return text + markdown_table(head, table) + "\n\n" + each_training_layer(rows)


def training_speedup(times, name):
    """Return how many times faster than the best dense variant a training step is."""
    return min(t for key, t in times.items() if key.startswith("dense")) / times[name]


def activations(row, name):
    """Return the bytes kept for the backward pass, over those of the dense layer."""
    return row["activations"][name] / row["activations"]["dense channels_last"]


def each_training_layer(rows):
    """Return the table of every training setting."""
    table = []
    for row in sorted(rows, key=lambda row: (row["batch"], row["environment"], row["layer"], row["format"])):
        into, out, side = row["layer"]
        table.append(
            [
                row["batch"],
                row["environment"],
                f"{into}→{out}, {side}x{side}",
                row["format"],
                f"{row['macs_cut']:.2f}x",
                f"{training_speedup(row['times'], row['best']):.2f}x ({row['best'].removeprefix('ours ')})",
                f"{training_speedup(row['times'], 'checkpointed chain'):.2f}x",
                f"{activations(row, row['best']):.2f}x",
            ]
        )
    head = ["batch", "environment", "layer", "format", "fewer MACs", "faster", "checkpointed", "activations"]
    return markdown_table(head, table) + "\n"
