"""Time single layers: dense, tncompress's formats and tltorch's, at the same cut in parameters.

    python examples/benchmark_layers.py --ratio 0.25 --batch 8

All variants of a layer run in turns in one process; the table gives medians and how many times faster than
the dense layer each one is. Weights are random: speed does not depend on them.
"""

import argparse
import statistics

import torch
from torch import nn

import tncompress as tnc
from tncompress.measure import latencies, num_params
from tncompress.report import environment
from tncompress.tables import markdown_table

LAYERS = [(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)]  # channels in, out, image side
FORMATS = {
    "svd": tnc.SVD(),
    "svd kw|kh": tnc.SVD("out kw|in kh"),
    "tucker": tnc.Tucker(),
    "mps": tnc.MPS(),
    "cp": tnc.CP(),
}


def tltorch_layer(conv, name, ratio):
    """Return tltorch's layer at that fraction of the parameters, in the faster of its two ways to run."""
    import tltorch

    return tltorch.FactorizedConv.from_conv(
        conv, rank=ratio, factorization=name, implementation="factorized", decompose_weights=False
    )


def variants(channels_in, channels_out, ratio, peers):
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    made = {"dense": conv}
    for name, fmt in FORMATS.items():
        settings = tnc.Settings(format=fmt, rank=tnc.ParamsRatio(ratio))
        spec = tnc.Spec(default=settings, keep_dense=())
        made[name] = tnc.compress(nn.Sequential(conv), spec)
    if peers:
        for name in ("tucker", "cp", "tt"):
            made[f"tltorch {name}"] = tltorch_layer(conv, name, ratio)
    return {name: model.to(memory_format=torch.channels_last).eval() for name, model in made.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=0.25, help="parameters, compressed / dense")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each variant of each layer")
    parser.add_argument("--no-peers", action="store_true", help="leave tltorch out")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows, speedups, sizes = [], {}, {}
    for channels_in, channels_out, side in LAYERS:
        models = variants(channels_in, channels_out, options.ratio, not options.no_peers)
        x = torch.randn(options.batch, channels_in, side, side).to(memory_format=torch.channels_last)
        found = dict(zip(models, latencies(list(models.values()), x, seconds=options.seconds), strict=True))
        row = [f"{channels_in}→{channels_out}, {side}x{side}"]
        for name, latency in found.items():
            faster = found["dense"].median / latency.median
            speedups.setdefault(name, []).append(faster)
            sizes.setdefault(name, []).append(num_params(models[name]) / num_params(models["dense"]))
            row.append(f"{1e3 * latency.median:.2f} ± {1e3 * latency.iqr / 2:.2f} ms ({faster:.2f}x)")
        rows.append(row)
    mean = [f"{statistics.geometric_mean(values):.2f}x" for values in speedups.values()]
    size = [f"{statistics.mean(values):.2f}" for values in sizes.values()]
    print(markdown_table(["layer", *speedups], [*rows, ["geometric mean", *mean], ["parameters", *size]]))
    print(f"\nbatch {options.batch}, ratio {options.ratio}, channels_last;", environment())


if __name__ == "__main__":
    main()
