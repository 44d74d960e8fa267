"""Training steps of single layers: dense in its best layout against ours, in one process.

    python examples/benchmarks/training_speed.py layers --threads 1
    python examples/benchmarks/training_speed.py layers --threads 1 --advised --batch 32
    python examples/benchmarks/training_speed.py page

The first two append rows to docs/benchmarks.jsonl (those that are there are not measured again), the last
writes docs/benchmarks.md from all rows. A step is a forward and a backward pass to the input and the
parameters, then the same with SGD with momentum; weights are random. Layers have 256 channels or more, as
nothing much is to be gained on smaller ones. Activations are what autograd keeps for the backward pass.
"""

import argparse
import copy
import math
import sys

import torch
from benchmark_rows import ROWS, append, environment, known, machine, with_advised_environment
from benchmarks_page import write_page
from layers_speed import FORMATS, random_layer, ranks_for
from torch import nn

import tncompress as tnc
from tncompress.cost_model import in_turns
from tncompress.geometry import ConvGeometry
from tncompress.strategies import all_contractions

LAYERS = [(256, 256, 14), (512, 512, 7), (256, 256, 28), (512, 512, 14), (256, 512, 14)]


def step(layer, x, optimizer=None):
    """Return a function that takes one training step of a layer on ``x``."""
    with torch.no_grad():
        gradient = torch.randn_like(layer(x))
    x = x.clone().requires_grad_()

    def run():
        with torch.inference_mode(False), torch.enable_grad():
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None
            layer(x).backward(gradient)
            if optimizer is not None:
                optimizer.step()

    return run


def variants(name, conv, cut):
    """Return the layers to be measured, by name, and by how many times the chain takes fewer MACs."""
    ranks, real = ranks_for(FORMATS[name], ConvGeometry.of(conv), cut)
    layer = random_layer(FORMATS[name], conv, ranks).requires_grad_().train()
    made = {"dense": conv, "dense channels_last": copy.deepcopy(conv).to(memory_format=torch.channels_last)}
    for way in all_contractions(layer.stages)[:-1]:
        made[f"ours {way}"] = copy.deepcopy(layer).contract(way)
    made["checkpointed chain"] = tnc.checkpoint_activations_(copy.deepcopy(layer))
    return made, real, ranks


def measure_layer(name, shape, batch, cut, seconds):
    into, out, side = shape
    made, real, ranks = variants(name, nn.Conv2d(into, out, 3, padding=1), cut)
    x = torch.randn(batch, into, side, side)
    last = x.contiguous(memory_format=torch.channels_last)
    inputs = {key: x if key == "dense" else last for key in made}
    steps = [step(layer, inputs[key]) for key, layer in made.items()]
    times = dict(zip(made, in_turns(steps, seconds=seconds, hopeless=math.inf), strict=True))
    best = min((key for key in made if key.startswith("ours")), key=lambda key: times[key])
    kept = ["dense channels_last", best, "checkpointed chain"]
    optimized = [
        step(made[key], inputs[key], torch.optim.SGD(made[key].parameters(), lr=1e-9, momentum=0.9))
        for key in kept
    ]
    with_optimizer = in_turns(optimized, seconds=seconds, hopeless=math.inf)
    return {
        "times": times,
        "optimizer_times": dict(zip(kept, with_optimizer, strict=True)),
        "activations": {key: tnc.activation_bytes(made[key], last) for key in kept},
        "best": best,
        "macs_cut": real,
        "ranks": ranks,
    }


def run_layers(options):
    keys = [
        {
            "kind": "training",
            "format": name,
            "layer": list(shape),
            "batch": options.batch,
            "cut": options.cut,
            "machine": machine(options.threads),
            "environment": environment(),
        }
        for shape in LAYERS
        for name in FORMATS
    ]
    done = [{key: row.get(key) for key in keys[0]} for row in known() if row["kind"] == "training"]
    for key in [key for key in keys if key not in done][: options.most]:
        torch.manual_seed(0)
        found = measure_layer(key["format"], key["layer"], key["batch"], key["cut"], options.seconds)
        if options.dry:
            print(key, found)
        else:
            append(key | found)
        told = {name: round(1e3 * seconds, 2) for name, seconds in found["times"].items()}
        print(key["format"], key["layer"], told, flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["layers", "page"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cut", type=float, default=4.0, help="how many times fewer MACs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each variant")
    parser.add_argument("--most", type=int, default=1000, help="how many settings to measure now")
    parser.add_argument("--advised", action="store_true", help="with the settings that are advised")
    parser.add_argument("--dry", action="store_true", help="print rows, and append none")
    options = parser.parse_args()
    if options.advised:
        with_advised_environment(sys.argv)
    torch.set_num_threads(options.threads)
    if options.what == "page":
        write_page(known(), ROWS.with_suffix(".md"))
    else:
        run_layers(options)


if __name__ == "__main__":
    main()
