"""What the benchmarks share: the file of rows, the machine they are from, and samples taken in turns."""

import json
import os
import statistics
import sys
from pathlib import Path

import torch

from tncompress.allocator import keeps_memory
from tncompress.noise import ADVISED, device_name, settings
from tncompress.timing import samples_in_turns

SINGLE = "float32 dense frozen"
"""What rows in bfloat16 call the dense model in float32 beside them."""
ROWS = Path(__file__).parents[2] / "docs" / "benchmarks.jsonl"


def machine(threads):
    """Return the processor, the threads and the versions that a row is from."""
    return f"{device_name()}, {threads} thread(s), torch {torch.__version__}, float32 unless said"


def environment():
    """Return ``"advised"`` where the settings of allocator and OpenMP are as advised, else ``"default"``.

    With the allocator's alone, by ``tnc.keep_memory()``, it is ``"memory kept"``.
    """
    return "advised" if settings() == ADVISED else "memory kept" if keeps_memory() else "default"


def with_advised_environment(arguments):
    """Begin this Python again with the settings that are advised, unless it has them."""
    if environment() == "default":
        os.execve(sys.executable, [sys.executable, *arguments], os.environ | ADVISED)


def append(row):
    """Add a row to the file."""
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def known():
    """Return the rows that are there."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def samples_by_name(runs, *, seconds):
    """Return the seconds of each of ``runs`` in ten rounds, in which they take turns, by name."""
    with torch.inference_mode():
        found = samples_in_turns(list(runs.values()), seconds=seconds)
    return dict(zip(runs, found, strict=True))


def summary(samples):
    """Return the median, the quartiles and the least of some seconds."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "least": min(samples)}
