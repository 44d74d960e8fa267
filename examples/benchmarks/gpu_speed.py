"""One table of all there is to measure on a GPU: layers, whole networks, decompositions.

    python examples/benchmarks/gpu_speed.py                     # all of it, on the first CUDA device
    python examples/benchmarks/gpu_speed.py --brief             # one setting of each kind
    python examples/benchmarks/gpu_speed.py --device cpu --brief --batches 1   # to try the script

Layers of ResNet-50 and VGG-16 and both networks whole, in batches of 1, 32 and 256, in float32 (with TF32)
and bfloat16, dense beside single cuts, Tucker-2, MPS and CP with 2, 4 and 8 times fewer MACs; each as it is
(eager, channels_last), compiled, and captured as a CUDA graph. Medians of ten rounds in which the variants of
a setting take turns. Rows are appended to docs/benchmarks_gpu.jsonl as they are measured; those that are
there are not measured again. Weights are random with seed 0. Nothing but the repository is needed.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from benchmark_rows import samples_by_name, summary
from layers_speed import FORMATS, random_layer, ranks_for
from networks_speed import compressed_to
from torch import nn

from tncompress.geometry import ConvGeometry
from tncompress.noise import device_name
from tncompress.running import copy_model
from tncompress.tables import markdown_table

ROWS = Path(__file__).parents[2] / "docs" / "benchmarks_gpu.jsonl"
LAYERS = {  # channels in and out, image side, kernel
    "resnet50 layer1": (64, 64, 56, 3),
    "resnet50 layer2": (128, 128, 28, 3),
    "resnet50 layer3": (256, 256, 14, 3),
    "resnet50 layer4": (512, 512, 7, 3),
    "vgg16 2.2": (128, 128, 112, 3),
    "vgg16 3.2": (256, 256, 56, 3),
    "vgg16 4.2": (512, 512, 28, 3),
    "vgg16 5.2": (512, 512, 14, 3),
}
NETWORKS, CUTS, BATCHES = ("resnet50", "vgg16"), (2, 4, 8), (1, 32, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEP = 64
"""Ranks on a GPU are multiples of this."""


def graphed(model, x):
    """Return a call that replays ``model`` on ``x`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph.replay


def ways(name, model, x, options):
    """Return the calls to measure: the model as it is, compiled, and as a graph where there is a GPU."""
    model = model.to(memory_format=torch.channels_last)
    found = {f"{name}: eager": partial(model, x)}
    if options.compile:
        compiled = torch.compile(model)
        compiled(x)
        found[f"{name}: compiled"] = partial(compiled, x)
    if x.is_cuda:
        found[f"{name}: graphed"] = graphed(model, x)
        if options.compile:
            found[f"{name}: compiled graphed"] = graphed(compiled, x)
    return found


def input_for(shape, dtype, options):
    x = torch.randn(shape, device=options.device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def layer_row(key, options):
    """Return the seconds of one layer: dense, and in every format at one cut."""
    into, out, side, kernel = LAYERS[key["layer"]]
    conv = nn.Conv2d(into, out, kernel, padding=kernel // 2).requires_grad_(False).eval()
    dtype, cuts = DTYPES[key["dtype"]], {}
    x = input_for((key["batch"], into, side, side), dtype, options)
    runs = ways("dense", copy_model(conv).to(options.device, dtype), x, options)
    for name, format in FORMATS.items():
        ranks, cuts[name] = ranks_for(format, ConvGeometry.of(conv), key["cut"], step=min(STEP, into // 4))
        layer = random_layer(format, conv, ranks).to(options.device, dtype)
        runs |= ways(name, layer, x, options)
    return {"macs_cut": cuts, "times": measured(runs, options)}


def network_row(key, options):
    """Return the seconds of one network: dense, and in every format at one cut."""
    import torchvision

    model = getattr(torchvision.models, key["network"])(weights=None).eval().requires_grad_(False)
    dtype, cuts = DTYPES[key["dtype"]], {}
    x = input_for((key["batch"], 3, options.side, options.side), dtype, options)
    example = torch.randn(1, 3, options.side, options.side)
    runs = ways("dense", copy_model(model).to(options.device, dtype), x, options)
    for name in ("svd", "tucker", "mps", "cp")[: 1 if options.brief else 4]:
        small, cuts[name] = compressed_to(model, name, key["cut"], example)
        runs |= ways(name, small.to(options.device, dtype), x, options)
    return {"macs_cut": cuts, "times": measured(runs, options)}


def decomposition_row(key, options):
    """Return the seconds that fitting every kernel of a network takes on the device and on the CPU."""
    from decomposition_speed import kernels_of, ours, tasks

    kernels, seconds = kernels_of(key["network"]), {}
    for name in dict.fromkeys((options.device, "cpu")):
        begun = time.perf_counter()
        for kernel in kernels:
            ours(kernel.to(name), tasks(tuple(kernel.shape)))
        if "cuda" in name:
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - begun
    return {"seconds": seconds}


def measured(runs, options):
    """Return the median and the quartiles of each call."""
    found = samples_by_name(runs, seconds=options.seconds)
    return {name: summary(samples) for name, samples in found.items()}


def settings(options):
    """Yield what is measured, as keys of rows."""
    layers = list(LAYERS)[:1] if options.brief else LAYERS
    networks = NETWORKS[:1] if options.brief else NETWORKS
    dtypes, cuts = (["float32"], [4]) if options.brief else (DTYPES, CUTS)
    for batch in options.batches:
        for dtype in dtypes:
            for cut in cuts:
                for layer in layers:
                    yield {"kind": "layer", "layer": layer, "batch": batch, "dtype": dtype, "cut": cut}
    for network in networks:
        yield {"kind": "decomposition", "network": network}
        for batch in options.batches:
            for dtype in dtypes:
                for cut in cuts:
                    yield {"kind": "network", "network": network, "batch": batch, "dtype": dtype, "cut": cut}


def device_words(device):
    """Return the device and the versions that a row is from."""
    return f"{device_name(device)}, torch {torch.__version__}"


def table(rows):
    """Return all rows as Markdown: how many times faster than the fastest dense variant each way is."""
    lines = []
    for row in rows:
        what = row.get("layer") or row.get("network")
        if row["kind"] == "decomposition":
            text = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row["seconds"].items())
            lines.append([f"{what}, decomposition", "", "", "", "", text])
            continue
        medians = {name: each["median"] for name, each in row["times"].items()}
        dense = min(value for name, value in medians.items() if name.startswith("dense: "))
        for format, cut in row["macs_cut"].items():
            own = {name: value for name, value in medians.items() if name.startswith(f"{format}: ")}
            words = ", ".join(f"{name.split(': ')[1]} {dense / value:.2f}x" for name, value in own.items())
            lines.append([what, str(row["batch"]), row["dtype"], format, f"{cut:.2f}x", words])
    return markdown_table(
        ["what", "batch", "dtype", "format", "fewer MACs", "faster than the best dense"], lines
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--side", type=int, default=224, help="of the images of whole networks")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each variant")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop before the next setting after these"
    )
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--brief", action="store_true", help="one setting of each kind, no compiler")
    options = parser.parse_args()
    options.compile = not options.brief
    if "cuda" in options.device and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the script")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    begun, machine = time.monotonic(), device_words(options.device)
    measures = {"layer": layer_row, "network": network_row, "decomposition": decomposition_row}
    for key in settings(options):
        if time.monotonic() - begun > 60 * options.minutes:
            break
        key["machine"] = machine
        if any(all(row.get(name) == value for name, value in key.items()) for row in rows):
            continue
        torch.manual_seed(0)
        with torch.inference_mode():
            rows.append(key | measures[key["kind"]](key, options))
        with options.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{time.monotonic() - begun:.0f} s", *key.values(), flush=True)
    print(table([row for row in rows if row["machine"] == machine]))


if __name__ == "__main__":
    main()
