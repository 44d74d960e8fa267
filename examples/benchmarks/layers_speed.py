"""Layers side by side in one process: dense in its best variant, ours as frozen, tltorch at its best.

    python examples/benchmarks/layers_speed.py layers --threads 1
    python examples/benchmarks/layers_speed.py choices --threads 1
    python examples/benchmarks/layers_speed.py page

The first two append rows to docs/benchmarks.jsonl (those that are there are not measured again), the last
writes docs/benchmarks.md from all rows that are there. Weights are
random: speed does not depend on them. tltorch's layers hold the same factors, which is checked by their
outputs.
"""

import argparse
import math
import random
import sys
from functools import partial

import torch
from benchmark_rows import (
    ROWS,
    append,
    environment,
    known,
    machine,
    samples_by_name,
    summary,
    with_advised_environment,
)
from benchmarks_page import write_page
from torch import nn

import tncompress as tnc
from tncompress.contraction import dense_stage, macs_ratio
from tncompress.cost_model import choose_packing_, fastest_chain, in_turns, modelled_contraction
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.prepacked import FrozenChain, own_weights
from tncompress.strategies import all_contractions, merged_stages

LAYERS = [  # channels in, out, image side: of ResNets and VGGs
    (128, 128, 28),
    (256, 256, 14),
    (512, 512, 7),
    (64, 64, 56),
    (256, 256, 28),
    (64, 128, 56),
    (512, 512, 14),
    (128, 128, 56),
]
FORMATS = {
    "svd": tnc.SVD(),
    "svd separable": tnc.SVD("out kw|in kh"),
    "tucker": tnc.Tucker(),
    "mps": tnc.MPS(),
    "cp": tnc.CP(),
}


STEP = 8
"""Ranks are multiples of it: as many floats as a vector of AVX2 holds, half of what one of AVX-512 does."""


def ranks_for(format, geometry, cut, step=STEP):
    """Return equal ranks, in steps, with which the chain's MACs are nearest to a ``cut``-th of the dense."""
    tops = format.max_ranks(geometry.kernel_shape)
    found = []
    for rank in range(step, max(tops) + step, step):
        ranks = format.feasible(geometry.kernel_shape, tuple(min(rank, top) for top in tops))
        ratio = macs_ratio(geometry, format.stages(geometry.kernel_shape, ranks))
        found.append((abs(math.log(ratio * cut)), ranks, 1 / ratio))
    return min(found)[1:]


def random_layer(format, conv, ranks):
    geometry = ConvGeometry.of(conv)
    shapes = format.factor_shapes(geometry.kernel_shape, ranks)
    factors = [torch.randn(shape) / math.prod(shape) ** 0.25 for shape in shapes]
    return TNConv(format, geometry, factors, conv.bias.detach().clone()).requires_grad_(False).eval()


def frozen(layer, way, x):
    """Return a layer as `tnc.freeze` makes it for such inputs, with one contraction."""
    stages = merged_stages(layer.stages, way.merged)
    chain = FrozenChain(layer.geometry, stages, own_weights(layer, way), layer.bias)
    with torch.inference_mode():
        choose_packing_(chain, partial(chain, x))
    return chain


def dense_variants(conv):
    geometry = ConvGeometry.of(conv)
    last = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).requires_grad_(False)
    weight = [conv.weight.detach()]
    return {
        "dense": conv,
        "dense channels_last": last.to(memory_format=torch.channels_last),
        "dense packed": FrozenChain(geometry, [dense_stage(geometry)], weight, conv.bias.detach()),
    }


def peers(name, layer):
    """Return tltorch's layers with the factors of ``layer``, in both of its ways to run."""
    import tensorly
    from tltorch import FactorizedConv

    tensorly.set_backend("pytorch")  # which only the first import of tltorch does by itself
    rank, (out, into, _, _) = layer.ranks, layer.geometry.kernel_shape
    own = {"tucker": (rank[-1], rank[0], 3, 3), "mps": (1, *rank, 1), "cp": rank[0]}[name]
    made = {}
    for way in ("factorized", "reconstructed"):
        conv = FactorizedConv(
            into,
            out,
            3,
            order=2,
            padding=1,
            has_bias=True,
            bias=True,
            factorization={"tucker": "tucker", "mps": "tt", "cp": "cp"}[name],
            rank=own,
            implementation=way,
        )
        put_factors(name, conv.weight, [t.detach() for t in layer.tensors()])
        conv.bias.data.copy_(layer.bias.reshape(conv.bias.shape))
        made[f"tltorch {way}"] = conv.requires_grad_(False).eval()
    return made


def put_factors(name, weight, tensors):
    """Write our factors into tltorch's: modes (out, in, kh, kw) in Tucker and CP, (in, kh, kw, out) in TT."""
    if name == "tucker":
        first, core, last = tensors  # (r0 in), (r1 r0 kh kw), (out r1)
        weight.core.data.copy_(core)
        for factor, value in zip(weight.factors, (last, first.T, torch.eye(3), torch.eye(3)), strict=True):
            factor.data.copy_(value)
    elif name == "mps":
        into, high, wide, out = tensors  # (r0 in), (r1 r0 kh), (r2 r1 kw), (out r2)
        values = (into.T[None], high.permute(1, 2, 0), wide.permute(1, 2, 0), out.T[..., None])
        for factor, value in zip(weight.factors, values, strict=True):
            factor.data.copy_(value)
    else:
        into, high, wide, out = tensors  # (r in), (r kh), (r kw), (out r)
        weight.weights.data.fill_(1.0)
        for factor, value in zip(weight.factors, (out, into.T, high.T, wide.T), strict=True):
            factor.data.copy_(value)


def measure_layer(name, shape, batch, cut, seconds):
    into, out, side = shape
    conv = nn.Conv2d(into, out, 3, padding=1).requires_grad_(False)
    ranks, real = ranks_for(FORMATS[name], ConvGeometry.of(conv), cut)
    layer = random_layer(FORMATS[name], conv, ranks)
    x = torch.randn(batch, into, side, side)
    last = x.contiguous(memory_format=torch.channels_last)
    way, _, _ = fastest_chain(layer, [tuple(x.shape)])
    runs = {key: (model, x if key == "dense" else last) for key, model in dense_variants(conv).items()}
    runs["ours"] = (frozen(layer, way, last), last)
    if name in ("tucker", "mps", "cp"):
        with torch.no_grad():
            for key, model in peers(name, layer).items():
                gap = float((model(x) - layer(x)).norm() / layer(x).norm())
                assert gap < 1e-4, f"{key} of {name} computes something else: {gap}"
                runs[key] = (model, x)
                runs[f"{key} channels_last"] = (model, last)
    found = samples_by_name({key: partial(m, given) for key, (m, given) in runs.items()}, seconds=seconds)
    return {
        "times": {key: summary(samples) for key, samples in found.items()},
        "macs_cut": real,
        "contraction": str(way),
        "ranks": ranks,
    }


def measure_choice(rng, seconds):
    """Measure every contraction of a layer that nothing was fitted on, and what the choosers take."""
    name = rng.choice(list(FORMATS))
    into, out = (rng.choice(range(32, 513, 16)) for _ in range(2))
    kernel, side = rng.choice([3, 3, 3, 5]), rng.choice([7, 10, 14, 20, 28])
    conv = nn.Conv2d(into, out, kernel, stride=rng.choice([1, 1, 2]), padding=kernel // 2).requires_grad_(
        False
    )
    ranks, real = ranks_for(FORMATS[name], ConvGeometry.of(conv), rng.choice([2, 3, 4, 6, 8]))
    layer, shape = random_layer(FORMATS[name], conv, ranks), (rng.choice([1, 1, 2, 4, 8]), into, side, side)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    measured, modelled = fastest_chain(layer, [shape])[0], modelled_contraction(layer, [shape])
    ways = all_contractions(layer.stages)
    chains = [frozen(layer, way, x) for way in ways]
    times = in_turns([lambda chain=chain: chain(x) for chain in chains], seconds=seconds)
    best = min(times)
    return {
        "format": name,
        "shape": shape,
        "out": out,
        "kernel": kernel,
        "macs_cut": real,
        "best": str(ways[times.index(best)]),
        "ways": len(ways),
        "regret": {
            "measured": times[ways.index(measured)] / best,
            "model": times[ways.index(modelled)] / best,
            "chain": times[0] / best,
        },
    }


def run_layers(options):
    keys = [
        {
            "kind": "layer",
            "format": name,
            "layer": list(shape),
            "batch": batch,
            "cut": options.cut,
            "step": STEP,
            "machine": machine(options.threads),
            "environment": environment(),
        }
        for names in (("svd", "tucker", "mps"), ("svd separable", "cp"))
        for shape in LAYERS
        for batch in (8, 1)
        for name in names
    ]
    done = [{key: row.get(key) for key in keys[0]} for row in known() if row["kind"] == "layer"]
    for key in [key for key in keys if key not in done][: options.most]:
        torch.manual_seed(0)
        found = measure_layer(key["format"], key["layer"], key["batch"], key["cut"], options.seconds)
        append(key | found)
        print(
            key["format"],
            key["layer"],
            key["batch"],
            {name: round(1e3 * each["median"], 2) for name, each in found["times"].items()},
            found["contraction"],
            flush=True,
        )


def run_choices(options):
    own = [row for row in known() if row["kind"] == "choice" and row["machine"] == machine(options.threads)]
    start = len(own)
    for seed in range(start, start + options.most):
        torch.manual_seed(seed)
        found = measure_choice(random.Random(seed), options.seconds)
        append(
            {"kind": "choice", "seed": seed}
            | found
            | {"machine": machine(options.threads), "environment": environment()}
        )
        print(found["format"], found["best"], found["regret"], flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["layers", "choices", "page"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cut", type=float, default=4.0, help="how many times fewer MACs")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each variant")
    parser.add_argument("--most", type=int, default=1000, help="how many settings to measure now")
    parser.add_argument("--advised", action="store_true", help="with the settings that are advised")
    options = parser.parse_args()
    if options.advised:
        with_advised_environment(sys.argv)
    torch.set_num_threads(options.threads)
    if options.what == "page":
        write_page(known(), ROWS.with_suffix(".md"))
        return
    {"layers": run_layers, "choices": run_choices}[options.what](options)


if __name__ == "__main__":
    main()
