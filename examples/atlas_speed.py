"""Measure how long the atlas of a network takes, beside full SVDs of the same cuts, and how exact it is.

    python examples/atlas_speed.py     # appends to docs/atlas_speed.jsonl, writes docs/atlas_speed.md from it

Each network is measured in a process of its own, which tells its largest memory. The atlas runs in full, as
`tnc.atlas(model)` is called, before anything else is timed. Then every layer's matrix across every cut is
decomposed by `torch.linalg.svdvals` in float32 and by tensorly (`svd_interface`, its numpy backend, full
matrices of singular vectors left out), and once in float64: the reference. Cuts that give the same matrix
(kernels of 1x1) are decomposed by the others again for each cut, since they do not know; what they take
without that is stated, too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

import tncompress as tnc
from tncompress.cuts import Cut
from tncompress.linalg import unfold
from tncompress.noise import device_name
from tncompress.tables import markdown_table

NETWORKS = "torchvision:resnet50", "torchvision:vgg16"
DOCS = Path(__file__).parents[1] / "docs"
COUNTED, WITHIN = 1e-2, 1e-4
"""Truncation errors above this count, and are to be within that of the reference."""


def timed(work, *arguments):
    begun = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - begun, result


def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def errors_of(s):
    """Return the truncation errors at ranks 0 to full."""
    squares = np.square(np.asarray(s, dtype=np.float64))
    return np.sqrt(np.append(np.cumsum(squares[::-1])[::-1], 0.0) / squares.sum())


def tensorly_svd(matrix):
    """Return tensorly's singular values; its backend is chosen within a context only."""
    import tensorly as tl
    from tensorly.tenalg import svd_interface

    with tl.backend_context("numpy"):
        return svd_interface(matrix.numpy(), method="truncated_svd", n_eigenvecs=min(matrix.shape))[1]


def measure(network, repeats):
    """Return the times, the memory and the deviations of one network, and what they were measured on."""
    import tensorly

    torch.manual_seed(0)
    model = tnc.build_model(network).eval()
    tnc.atlas(nn.Sequential(nn.Conv2d(4, 4, 3)))  # the first call loads what it needs
    runs = [timed(tnc.atlas, model) for _ in range(repeats)]
    atlas, memory = runs[-1][1], peak_gib()
    kernels = {name: module.weight.detach() for name, module in model.named_modules() if name in atlas.layers}
    seconds, once, worst, worst_value = defaultdict(float), defaultdict(float), 0.0, 0.0
    seen = set()
    for row in atlas.rows:
        matrix = unfold(kernels[row.layer], Cut.parse(row.cut).modes(kernels[row.layer].ndim)[0])
        key = row.layer, row.spectrum
        took, _ = timed(torch.linalg.svdvals, matrix)
        theirs, _ = timed(tensorly_svd, matrix)
        for name, value in (("torch", took), ("tensorly", theirs)):
            seconds[name] += value
            once[name] += value * (key not in seen)
        if key not in seen:
            exact = torch.linalg.svdvals(matrix.double()).numpy()
            wanted, made = errors_of(exact), errors_of(row.spectrum)
            worst = max(worst, float(np.abs(wanted - made)[wanted > COUNTED].max()))
            off = np.abs(exact - np.array(row.spectrum)).max() / np.linalg.norm(exact)
            worst_value = max(worst_value, float(off))
        seen.add(key)
    return {
        "network": network,
        "layers": len(atlas.layers),
        "rows": len(atlas.rows),
        "atlas": [took for took, _ in runs],
        "memory": memory,
        "seconds": seconds,
        "once": once,
        "error": worst,
        "value": worst_value,
        "machine": f"{torch.get_num_threads()} threads on {os.cpu_count()} cores ({device_name()})",
        "torch": torch.__version__,
        "tensorly": tensorly.__version__,
    }


def page(rows):
    """Return what was measured last of each network as Markdown."""
    found = list({row["network"]: row for row in rows}.values())
    header = "network", "convolutions", "rows", "atlas", "memory", "svdvals", "tensorly", "error", "value"
    lines = []
    for each in found:
        best = min(each["atlas"])
        others = [
            f"{each['seconds'][name]:.1f} s, {each['seconds'][name] / best:.1f}x "
            f"({each['once'][name] / best:.1f}x)"
            for name in ("torch", "tensorly")
        ]
        lines.append(
            (
                each["network"],
                str(each["layers"]),
                str(each["rows"]),
                f"{best:.2f} s",
                f"{each['memory']:.2f} GiB",
                *others,
                f"{each['error']:.1e}",
                f"{each['value']:.1e}",
            )
        )
    words = ("{machine}, torch {torch}, tensorly {tensorly}".format(**each) for each in found)
    about = (
        "Made by `make atlas` (`examples/atlas_speed.py`) from the rows in `atlas_speed.jsonl`: all "
        "convolutions across all cuts, no controls, weights as torchvision initialises them with seed 0, "
        f"float32, {'; '.join(dict.fromkeys(words))}. The atlas is the best of {len(found[0]['atlas'])} "
        "runs; memory is the largest that its process held resident by then, torch and the model included."
    )
    notes = (
        "- **svdvals**, **tensorly**: `torch.linalg.svdvals` and `tensorly.tenalg.svd_interface` on every "
        "layer's matrix across every cut, how many times longer that takes than the atlas, and in brackets "
        "how many times if matrices that several cuts have in common were decomposed once.",
        "- **error**: the largest difference of a truncation error, over all ranks whose error is above "
        f"{COUNTED:g}, from that of a full SVD in float64; {WITHIN:g} is the goal.",
        "- **value**: the largest difference of a singular value, over the norm of the kernel.",
    )
    return "\n".join(
        ["# How long an atlas takes", "", about, "", markdown_table(header, lines), "", *notes, ""]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", action="append", help="as --model of the command; may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="cores that torch may use; default: as torch begins")
    parser.add_argument("--results", type=Path, default=DOCS / "atlas_speed.jsonl", help="rows are appended")
    parser.add_argument("--page", type=Path, default=DOCS / "atlas_speed.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, options.repeats)))
        return
    for network in options.network or NETWORKS:
        command = [sys.executable, __file__, "--one", network, "--repeats", str(options.repeats)]
        command += ["--threads", str(options.threads)] if options.threads else []
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{network}: {min(row['atlas']):.2f} s")
    options.page.write_text(page(read(options.results)), encoding="utf-8")


def read(path):
    """Return the rows measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
