"""What the benchmarks share: the file of rows, the machine they are from, and samples taken in turns."""

import json
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

from tncompress.measure import benchmark_classes
from tncompress.noise import ADVISED, settings

ROWS = Path(__file__).parents[2] / "docs" / "benchmarks.jsonl"


def machine(threads):
    """Return the processor, the threads and the versions that a row is from."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {threads} thread(s), torch {torch.__version__}, float32 unless said"


def environment():
    """Return ``"advised"`` where the settings of allocator and OpenMP are as advised, else ``"default"``."""
    return "advised" if settings() == ADVISED else "default"


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


def samples_in_turns(runs, *, seconds, rounds=10):
    """Return the seconds of each of ``runs`` (by name) in ``rounds`` rounds, in which they take turns."""
    Timer, _ = benchmark_classes()  # noqa: N806
    threads = torch.get_num_threads()
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in runs.items()}
    found = {name: [] for name in runs}
    with torch.inference_mode():
        once = {name: min(timer.timeit(1).median for _ in range(2)) for name, timer in timers.items()}
        for _ in range(rounds):
            for name, timer in timers.items():
                count = max(1, int(seconds / rounds / max(once[name], 1e-6)))
                found[name].append(float(timer.timeit(count).median))
    return found


def summary(samples):
    """Return the median, the quartiles and the least of some seconds."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "least": min(samples)}
