"""The sections of docs/benchmarks.md on decompositions, CP, planning and compressing."""

from page_parts import markdown_table, met

DECOMPOSITIONS = """## Decomposition

Every convolution across its seven cuts, as an MPS and as Tucker-2, at a quarter of its parameters:
the layers side by side on all cores, beside tensorly at the same ranks (the faster of its numpy and PyTorch
backends). *excess* is the largest amount, relative, by which an error of ours is above tensorly's (negative:
below). *memory*: the most that one decomposition took beyond what was there, over the size of the largest
kernel.
"""

WITHIN, FASTER, CP_FASTER, LONGEST, MEMORY, PLANNED = 1e-5, 8, 3, 3.0, 6, 5.0


def latest(rows):
    """Return the last row of each network."""
    return list({row["network"]: row for row in rows}.values())


def faster_than_tensorly(row):
    """Return how many times faster than the faster of tensorly's backends a network is decomposed."""
    seconds = row["seconds"]
    return min(value for name, value in seconds.items() if name.startswith("tensorly")) / seconds["ours"]


def decompositions(rows):
    """Return the section on decomposing whole networks."""
    table = []
    for row in latest(rows):
        seconds, faster = row["seconds"], faster_than_tensorly(row)
        memory = row["memory"] / row["largest"]
        table.append(
            [
                row["network"],
                row["layers"],
                f"{seconds['ours']:.2f} s ({LONGEST:g} s {'met' if seconds['ours'] < LONGEST else 'missed'})",
                f"{seconds['in turn']:.2f} s",
                f"{faster * seconds['ours']:.2f} s",
                f"{faster:.1f}x ({met(faster, FASTER)})",
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
        for row in latest(rows)
        for name, each in row["seconds"].items()
    ]
    text = (
        "## Planning and compressing\n\nWith a policy on the error; the goal for ResNet-50 is "
        f"{PLANNED:g} s in all.\n\n"
    )
    return text + markdown_table(["network", "format", "error", "plan", "compress"], table) + "\n"
