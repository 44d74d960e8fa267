"""The section of docs/benchmarks.md on training steps."""

import statistics
from collections import defaultdict

from page_parts import markdown_table

STEP = 3.0
"""How many times faster a step is to be at four times fewer MACs."""


def training(rows):
    """Return the section on training steps."""
    found = defaultdict(list)
    for row in rows:
        found[row["batch"], row["environment"], row["format"]].append(row)
    table = []
    for (batch, environment, name), own in sorted(found.items()):
        gains = step_gains(own)
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


def step_gains(rows):
    """Return for each row how many times faster than the dense layer's its best step is."""
    return [training_speedup(row["times"], row["best"]) for row in rows]


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
