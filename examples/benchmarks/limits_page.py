"""The last section of docs/benchmarks.md: goals not reached everywhere, what was tried, the limits."""

import statistics
from collections import defaultdict

from decomposition_page import FASTER, LONGEST, MEMORY, PLANNED, WITHIN, faster_than_tensorly, latest
from networks_page import NETWORK_GOALS, goal_ratio
from page_parts import best_dense, markdown_table, median
from training_page import STEP, step_gains

LAYER_GOALS = {("svd", 8): 3.4, ("tucker", 8): 3.4, ("mps", 8): 3.1, ("svd", 1): 2.8, ("tucker", 1): 2.8}
TRAINED = "svd", "svd separable", "tucker", "mps", "cp"
CHOICE = 0.98
"""The share of settings in which the choice is to be within 10 % of the best."""
TIMES, PERCENT, SECONDS, FOLD, EXCESS = "{:.2f}x", "{:.1f} %", "{:.2f} s", "{:.1f} kernels", "{:.0e}"
AT_MOST = (SECONDS, FOLD, EXCESS)
"""What values are written in; of these less is better."""

LIMITS = """## Goals that are not reached everywhere

The goals were set on two cores of a Zen 4 with AVX-512 and bfloat16, in the advised environment. Figures are
those in that environment (in the default one where a machine has no others), the last that were measured;
where there are several, of formats, networks or kernels, the lowest and the highest. Bold ones miss the goal.

"""

REASONS = """
What was tried, and what the limit is:

- **Layers.** Ranks in steps of 8, weights packed or not, 1x1 stages as products of matrices, neighbours
  merged or not and either memory layout are measured for each layer, and the best is kept. What is missing
  from the cut is the start of each convolution (`tncompress bench --calibrate` fits 58 us to the Xeon at 2.80
  GHz, where the built-in model has 10), maps in between that are written and read again, and convolutions of
  few channels, which run below the rate of the dense one; an MPS has four of them. At batch 1 all three weigh
  more. Chains run image by image, to keep what is in between in the cache, or with half of the images on each
  core, were slower. What is left is a convolution of our own in place of oneDNN's, which holds what is in
  between.
- **Networks.** First layers, pooling and what else is not a convolution stay as they are. In ResNet-50 at
  batch 1 nearly all of the dense time is in oneDNN's convolutions already; the compressed model has more than
  twice as many, of so few channels that they run at a lower rate, and each has a start. Single cuts
  in place of Tucker (two stages, not three) and formats chosen under a budget on the time by the built-in
  model of a machine came to the same. Compiling with inductor's freezing was not faster than `tnc.freeze`,
  dense or compressed. Batches run in pieces of 1, 2 or 4 images were slower than whole ones.
- **Training steps.** A chain of four convolutions has four starts and keeps four maps, forward and backward;
  weights can't stay packed while they change.
- **bfloat16.** Processors without instructions for it emulate it, which would say nothing: no rows there.
- **The choice of the contraction.** It is measured, and the check is a measurement of its own: what is left
  of the difference is of the size of the spread. Among contractions within a few per cent of each other more
  rounds change the choice and not the time.
- **Decompositions.** The largest part is LAPACK's reduction of symmetric matrices to tridiagonal form, above
  all for the two cuts with 1,536 rows. Tried: block Krylov spaces and Chebyshev filters from nothing (some
  gain for those two cuts, none elsewhere, and wrong where singular values are equal), LAPACK's partial
  eigenvectors (torch has none of them). Kept since the rows of the machines without bfloat16: sweeps
  that are extrapolated, and that follow their subspaces by polynomials. Trained kernels, whose spectra fall,
  take fewer sweeps than these random ones.
- **GPU.** Nothing here was measured on one: `examples/benchmarks/gpu_speed.py` prints the table where there
  is one.
"""


def limits(rows):
    """Return the section: the goals that some machine misses, and why."""
    machines = sorted({row["machine"] for row in rows}, key=lambda name: (not is_of_the_goals(name), name))
    measured = [list(goals(advised(rows, machine))) for machine in machines]
    lines = []
    for same in zip(*measured, strict=True):  # the same goal on each machine
        name, words, aim, _ = same[0]
        if any(is_missed(words, aim, values) for *_, values in same):
            lines.append([name, words.format(aim), *(told(words, aim, values) for *_, values in same)])
    head = ["goal", "aim", *(name.split(", torch")[0] for name in machines)]
    return LIMITS + markdown_table(head, lines) + "\n" + REASONS


def advised(rows, machine):
    """Return a machine's rows in the advised environment, of a kind without such rows all."""
    own = [row for row in rows if row["machine"] == machine]
    there = {row["kind"] for row in own if row.get("environment") == "advised"}
    return [row for row in own if row["kind"] not in there or row["environment"] == "advised"]


def is_of_the_goals(machine):
    """Say whether a machine has what the one had that the goals were set on."""
    return "AVX-512" in machine and "bfloat16" in machine


def is_missed(words, aim, values):
    """Say whether some value misses its goal."""
    return bool(values) and (max(values) > aim if words in AT_MOST else min(values) < aim)


def told(words, aim, values):
    """Return the lowest and the highest of some values in words, bold where one misses the goal."""
    ends = list(dict.fromkeys(words.format(value) for value in (min(values), max(values)))) if values else []
    text = " to ".join(ends) or "–"
    return f"**{text}**" if is_missed(words, aim, values) else text


def goals(rows):
    """Yield goals: a name, how its values are written, the aim, and what a machine's rows say."""
    of = defaultdict(list)
    for row in rows:
        of[row["kind"]].append(row)
    for (name, batch), aim in LAYER_GOALS.items():
        own = [row for row in of["layer"] if (row["format"], row["batch"]) == (name, batch)]
        gains = [best_dense(row) / median(row, "ours") for row in own]
        yield f"layers, {name}, batch {batch}", TIMES, aim, mean(gains)
    for (network, batch, bf16), aim in NETWORK_GOALS.items():
        last = {
            row["format"]: goal_ratio(row)
            for row in of["network"]
            if (row["network"], row["batch"], row["bf16"]) == (network, batch, bf16) and not row.get("every")
        }
        name = f"{network}, batch {batch}" + (", bfloat16 over float32" if bf16 else "")
        yield name, TIMES, aim, list(last.values())
    for name in TRAINED:
        own = [row for row in of["training"] if row["format"] == name]
        yield f"training step, {name}", TIMES, STEP, mean(step_gains(own))
    near = [100 * (row["regret"]["measured"] <= 1.1) for row in of["choice"]]
    yield "choices within 10 % of the best", PERCENT, 100 * CHOICE, [statistics.mean(near)] if near else []
    rows = latest(of["decomposition"])
    seconds = [row["seconds"]["ours"] for row in rows]
    yield "decompositions of a network", SECONDS, LONGEST, seconds
    yield "the same, faster than tensorly", TIMES, FASTER, [faster_than_tensorly(row) for row in rows]
    yield "the same, peak memory", FOLD, MEMORY, [row["memory"] / row["largest"] for row in rows]
    yield "the same, error above tensorly's", EXCESS, WITHIN, [row["worst_excess"] for row in rows]
    planned = [
        each["plan"] + each["compress"] for row in latest(of["compress"]) for each in row["seconds"].values()
    ]
    yield "planning and compressing ResNet-50", SECONDS, PLANNED, planned


def mean(gains):
    """Return the geometric mean of some gains in a list; an empty list of none."""
    return [statistics.geometric_mean(gains)] if gains else []
