"""The section of docs/benchmarks.md on whole networks."""

from benchmark_rows import SINGLE
from page_parts import best_dense, markdown_table, median, met, spread

NETWORKS = """## Whole networks

Compressed under a budget on the MACs, ranks in steps of 16. *best dense* is the fastest of
torch's model as it is, with channels_last, frozen by `tnc.freeze` and, where it was measured, compiled
by `torch.compile` with freezing. *eager* is the compressed model as `compress` returns it. Where a setting
was measured again, the last row counts. The goal in bfloat16 is one over the frozen dense model in float32.
"""

SETTING = ("environment", "network", "batch", "bf16", "format", "side")

NETWORK_GOALS = {
    ("vgg16", 8, False): 3.0,
    ("vgg16", 8, True): 6.0,
    ("resnet50", 8, False): 2.7,
    ("resnet50", 1, False): 2.1,
}


def networks(rows):
    """Return the section on whole networks, and on all of torchvision's."""
    own = {setting(row): row for row in rows if not row.get("every")}
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
        own.values(), key=lambda r: (r["environment"], r["network"], -r["batch"], r["bf16"], r["format"])
    ):
        best, ours, aimed_at = best_dense(row), network_best(row), goal_ratio(row)
        goal = met(aimed_at, NETWORK_GOALS.get((row["network"], row["batch"], row["bf16"])))
        if row["bf16"]:
            goal = f"{aimed_at:.2f}x over float32" + (f", {goal}" if goal != "–" else "")
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
                goal,
                f"{100 * spread(row):.0f} %",
            ]
        )
    text = NETWORKS + "\n" + markdown_table(head, table) + "\n"
    every = [row for row in rows if row.get("every")]
    return text + (all_networks(every) if every else "")


def setting(row):
    """Return what a row is about: a later row of the same takes its place."""
    return *(row[key] for key in SETTING), round(row["macs_cut"], 1)


def goal_ratio(row):
    """Return how many times faster the compressed model is than what the goals are set beside."""
    return (median(row, SINGLE) if row["bf16"] else best_dense(row)) / network_best(row)


def network_best(row):
    """Return the median seconds of the compressed model, frozen or compiled."""
    names = [name for name in row["times"] if name.startswith("compressed") and name != "compressed"]
    return min(median(row, name) for name in names)


def all_networks(rows):
    """Return the table of those of torchvision's networks that were measured: frozen against frozen."""
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
{len(rows)} of torchvision's classification networks of at most 100 million parameters, each compressed and
frozen against dense and frozen. Slower by more than the spread: {slower} (goal: none).

"""
    return text + markdown_table(head, table) + "\n"
