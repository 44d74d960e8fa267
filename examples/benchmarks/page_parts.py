"""What the sections of docs/benchmarks.md share: tables, medians, spread, goals in words."""

import statistics

from tncompress.tables import markdown_table as table_of_text


def markdown_table(head, lines):
    """Return a table of cells of any kind."""
    return table_of_text(head, [[str(cell) for cell in line] for line in lines])


def median(row, name):
    """Return the median seconds of a variant."""
    return row["times"][name]["median"]


def best_dense(row):
    """Return the median seconds of the fastest dense variant."""
    return min(median(row, name) for name in row["times"] if name.startswith("dense"))


def spread(row):
    """Return the mean distance of the quartiles of a row's variants, over the median."""
    return statistics.mean((each["high"] - each["low"]) / each["median"] for each in row["times"].values())


def met(value, goal, *, at_most=False):
    """Return a goal beside a value, in words."""
    if goal is None:
        return "–"
    return f"{goal}x {'met' if (value <= goal if at_most else value >= goal) else 'missed'}"
