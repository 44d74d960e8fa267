"""Whole networks side by side: dense in its best variant, ours compressed and frozen.

    python examples/benchmarks/networks_speed.py one --network vgg16 --cut 3.65
    python examples/benchmarks/networks_speed.py one --network resnet50 --cut 3.4 --batch 1 --advised
    python examples/benchmarks/networks_speed.py one --network vgg16 --cut 3.65 --format auto --latency 0.3
    python examples/benchmarks/networks_speed.py every        # all of torchvision: never slower than dense
    python examples/benchmarks/layers_speed.py page

Rows are appended to docs/benchmarks.jsonl. Dense variants are torch's model as it is, with channels_last,
frozen by `tnc.freeze`, and compiled by `torch.compile` with inductor's freezing; all of them, and the
compressed model as it is, frozen and compiled, take turns in one process. Weights are random with seed 0, as
torchvision initialises them: speed does not depend on them. `--bf16` measures all in bfloat16, beside the
frozen dense model in float32. `--latency` puts a budget on the convolutions'
time by the model of the machine, too. `--advised` begins again with the settings of the allocator and of
OpenMP that the documentation advises; `--keep-memory` goes on with the allocator's alone.
"""

import argparse
import gc
import sys

import torch
from benchmark_rows import (
    SINGLE,
    append,
    environment,
    known,
    machine,
    samples_by_name,
    summary,
    with_advised_environment,
)

import tncompress as tnc
from tncompress.measure import macs, num_params
from tncompress.running import copy_model

LARGEST, ODD = 100e6, ("inception_v3", "maxvit_t")
"""Networks of more parameters are left out of ``every``; the odd ones want images of their own size."""
SMALLER_CUTS = 2.0, 1.5
"""How many times fewer MACs are tried where a network can't be brought to those that ``every`` asks for."""


def compressed_to(model, format, cut, latency, x):
    """Return ``model`` compressed under a budget of a ``cut``-th of its MACs, and the cut that it has."""
    budget = {"macs": 1 / cut}
    if latency is not None:
        budget |= {"latency": latency, "latency_from": "model"}
    spec = {"default": {"format": format, "round_to": 16}, "budget": budget}
    small = tnc.compress(model, spec, example_inputs=x[:1])
    return small, macs(model, x[:1]) / macs(small, x[:1])


def compiled(model):
    """Return ``model`` compiled, its weights taken for constants."""
    copy = copy_model(model).eval().requires_grad_(False)
    return torch.compile(copy.to(memory_format=torch.channels_last), options={"freezing": True})


def variants(model, small, x, options):
    """Return what is measured, by name: a module and its input."""
    last = x.contiguous(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if options.bf16 else None
    cast = (lambda m: copy_model(m).to(dtype)) if dtype else copy_model
    x, last = (x.to(dtype), last.to(dtype)) if dtype else (x, last)
    made = {"dense": (cast(model), x), "dense channels_last": (_last(cast(model)), last)}
    if options.compile:
        made["dense compiled"] = compiled(cast(model)), last
    made["compressed"] = cast(small), last
    if options.compile:
        made["compressed compiled"] = compiled(cast(small)), last
    if dtype:
        made[SINGLE] = tnc.freeze(model, last.float(), seconds=options.seconds), last.float()
    for name, each in (("dense frozen", model), ("compressed frozen", small)):
        made[name] = tnc.freeze(each, last.float(), dtype=dtype, seconds=options.seconds), last.float()
    return made


def _last(model):
    return model.to(memory_format=torch.channels_last)


def measure(network, options):
    """Return the row of one network at one setting."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, network)(weights=None).eval().requires_grad_(False)
    x = torch.randn(options.batch, 3, options.side, options.side)
    small, cut = compressed_to(model, options.format, options.cut, options.latency, x)
    made = variants(model, small, x, options)
    runs = {name: (lambda m=m, given=given: m(given)) for name, (m, given) in made.items()}
    found = samples_by_name(runs, seconds=options.seconds)
    frozen = made["compressed frozen"][0]
    return {
        "kind": "network",
        "network": network,
        "format": options.format if options.latency is None else f"{options.format}, latency",
        "latency": options.latency,
        "batch": options.batch,
        "side": options.side,
        "bf16": options.bf16,
        "environment": environment(),
        "macs_cut": cut,
        "params_cut": num_params(model) / num_params(small),
        "times": {name: summary(samples) for name, samples in found.items()},
        "rel_error": frozen.rel_error,
        "way": frozen.way,
        "machine": machine(options.threads),
    }


KEYS = ("kind", "network", "format", "batch", "side", "bf16", "environment", "machine")


def run_one(options):
    row = measure(options.network, options)
    append(row)
    show(row)


def measured_where_it_can_be(name, options):
    """Return the row at the cut that is asked for, or at a smaller one where that can't be reached."""
    for cut in (options.cut, *(cut for cut in SMALLER_CUTS if cut < options.cut)):
        try:
            return measure(name, argparse.Namespace(**vars(options) | {"cut": cut}))
        except ValueError as error:
            print(f"{name} at {cut}x: {error}", flush=True)
    return None


def run_every(options):
    """Measure each of torchvision's classification networks that is not there yet."""
    from torchvision import models

    rows = [row for row in known() if row["kind"] == "network"]
    done = {tuple(row.get(key) for key in KEYS) for row in rows}
    elsewhere = {row["network"] for row in rows if row.get("every")} if options.new else set()
    options.compile = False
    names = [name for name in models.list_models(module=models) if "quantized" not in name]
    told = {name: models.get_model_weights(name).DEFAULT.meta for name in names}
    for name in sorted(names, key=lambda name: told[name]["_ops"]):  # the quick ones first
        setting = options.format, options.batch, options.side, options.bf16
        key = ("network", name, *setting, environment(), machine(options.threads))
        if name in ODD or told[name]["num_params"] > LARGEST or key in done or name in elsewhere:
            continue
        row = measured_where_it_can_be(name, options)
        if row is None:
            continue
        append(row | {"every": True})
        show(row)
        gc.collect()


def show(row):
    """Print what a row says."""
    times = {name: round(1e3 * each["median"], 2) for name, each in row["times"].items()}
    dense = min(each["median"] for name, each in row["times"].items() if name.startswith("dense"))
    ours = row["times"]["compressed frozen"]["median"]
    print(
        f"{row['network']} batch {row['batch']} {row['format']} {row['macs_cut']:.2f}x: "
        f"{dense / ours:.2f}x {times} {row['way']}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["one", "every"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--network", default="resnet18", help="one of torchvision's")
    parser.add_argument("--format", default="tucker")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224, help="of the images")
    parser.add_argument("--cut", type=float, default=3.4, help="how many times fewer MACs")
    parser.add_argument("--latency", type=float, help="at most this part of the convolutions' time, too")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each variant")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="measure compiled variants, too: minutes")
    parser.add_argument("--new", action="store_true", help="of every: those that no machine has measured")
    parser.add_argument("--advised", action="store_true", help="with the settings that are advised")
    parser.add_argument("--keep-memory", action="store_true", help="after tnc.keep_memory()")
    options = parser.parse_args()
    if options.keep_memory and not tnc.keep_memory():
        parser.error("--keep-memory takes Linux with glibc")
    if options.advised:
        with_advised_environment(sys.argv)
    torch.set_num_threads(options.threads)
    {"one": run_one, "every": run_every}[options.what](options)


if __name__ == "__main__":
    main()
