"""Convert the same grid of layers by tltorch and by tncompress, and say which results are right.

    python examples/geometry_grid.py --out docs/geometries.md

Each convolution of the grid is converted at full rank and run in float64 against the dense layer with the
kernel that the factors stand for, which must be the original one to 1 %. (Not to rounding: least squares in
turns, as tltorch's CP has it, ends before.)
"""

import argparse
import copy
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

import tncompress as tnc
from tncompress.tables import markdown_table

OURS = {"svd": tnc.SVD(), "mps": tnc.MPS(), "tucker": tnc.Tucker(), "cp": tnc.CP()}
THEIRS = ("tucker", "cp", "tt")


class LeftDense(Exception):  # noqa: N818 - a verdict, no error
    """The layer stays dense; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """A layer of the grid and the shape of its input."""

    name: str
    layer: nn.Module
    input_shape: tuple[int, ...]


def cases():
    """Return the grid: one property after another, on a small layer."""
    torch.manual_seed(0)
    made = []

    def add(name, kind, channels, *size, lengths, **options):
        made.append(Case(name, kind(*channels, *size, **options).double(), (2, channels[0], *lengths)))

    def conv2d(name, size=3, channels=(6, 8), **options):
        add(name, nn.Conv2d, channels, size, lengths=(9, 10), **options)

    conv2d("plain")
    conv2d("no bias", bias=False)
    conv2d("stride 2", stride=2)
    conv2d("stride (1, 2)", stride=(1, 2))
    conv2d("stride (3, 1)", stride=(3, 1))
    conv2d("padding 1", padding=1)
    conv2d("padding (2, 1)", padding=(2, 1))
    conv2d("padding same", padding="same")
    conv2d("padding same, even kernel", 4, padding="same")
    conv2d("padding valid", padding="valid")
    conv2d("padding reflect", padding=1, padding_mode="reflect")
    conv2d("padding replicate", padding=(1, 2), padding_mode="replicate")
    conv2d("padding circular", padding=1, padding_mode="circular")
    conv2d("dilation 2", dilation=2)
    conv2d("dilation (1, 3)", dilation=(1, 3), padding=(0, 2))
    conv2d("kernel 1x1", 1)
    conv2d("kernel 1x5", (1, 5), padding=(0, 2))
    conv2d("kernel 3x1", (3, 1))
    conv2d("kernel 2x4", (2, 4))
    conv2d("kernel 3x2, stride (2, 1), padding (1, 0)", (3, 2), stride=(2, 1), padding=(1, 0))
    conv2d("one channel in", channels=(1, 8))
    conv2d("one channel out", channels=(6, 1))
    conv2d("2 groups", groups=2)
    conv2d(
        "3 groups, reflect, stride (2, 1)",
        channels=(6, 9),
        groups=3,
        padding=1,
        padding_mode="reflect",
        stride=(2, 1),
    )
    conv2d("depthwise", channels=(6, 6), groups=6)
    add("conv1d", nn.Conv1d, (6, 8), 4, lengths=(12,), stride=2, padding=1)
    add("conv1d, circular", nn.Conv1d, (6, 8), 3, lengths=(12,), padding=1, padding_mode="circular")
    add("conv3d", nn.Conv3d, (4, 5), 3, lengths=(5, 6, 5), padding=1)
    add("conv3d, stride (1, 2, 2)", nn.Conv3d, (4, 5), (3, 2, 1), lengths=(5, 6, 5), stride=(1, 2, 2))
    turned = {"lengths": (5, 6), "stride": 2, "padding": 1}
    add("transposed", nn.ConvTranspose2d, (6, 8), 4, **turned)
    add("transposed, output padding", nn.ConvTranspose2d, (6, 8), 3, output_padding=1, **turned)
    add("transposed, 2 groups", nn.ConvTranspose2d, (6, 8), 3, groups=2, **turned)
    add("transposed 1d", nn.ConvTranspose1d, (6, 8), 4, lengths=(7,), stride=3)
    add("transposed 3d", nn.ConvTranspose3d, (3, 4), 2, lengths=(3, 4, 3), stride=(1, 2, 2))
    return made


def verdict(convert, case):
    """Return the verdict on one conversion, and the reason where there is one."""
    x = torch.randn(case.input_shape, dtype=torch.float64)
    dense = case.layer.weight.detach()
    try:
        layer, kernel = convert(copy.deepcopy(case.layer))
        found = layer(x)
    except LeftDense as reason:
        return "dense", str(reason)
    except Exception as error:
        return "raises", f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    wanted = functional_call(case.layer, {"weight": kernel}, x)
    if found.shape != wanted.shape:
        return "wrong", f"shape {tuple(found.shape)} for {tuple(wanted.shape)}"
    if (off := float((kernel - dense).norm() / dense.norm())) > 0.01:
        return "wrong", f"relative error of the kernel {off:.2g}"
    error = float((found - wanted).norm() / wanted.norm())
    return ("pass", "") if error < 1e-9 else ("wrong", f"relative error of the output {error:.2g}")


def ours(format):
    """Return our conversion at full rank, by the public way over a plan."""

    def convert(layer):
        full = format.max_ranks(tnc.ConvGeometry.of(layer).kernel_shape)
        settings = tnc.Settings(format=format, rank=tnc.FixedRank(full))
        spec = tnc.Spec(default=settings, keep_dense=(), include=("depthwise",), allow_larger=True)
        small = tnc.compress(nn.Sequential(layer), spec)
        for skip in small.tncompress_plan.skipped:
            raise LeftDense(skip.reason)
        return small, small[0].weight.detach()

    return convert


def theirs(factorization):
    """Return tltorch's conversion at full rank, given as numbers: its rank 1.0 is not lossless."""
    import tensorly
    import tltorch
    from tltorch.factorized_layers.factorized_convolution import kernel_to_tensor, tensor_to_kernel

    tensorly.set_backend("pytorch")  # which only the first import of tltorch does by itself

    def convert(layer):
        tensor = kernel_to_tensor(factorization, layer.weight.detach())
        rank = full_ranks(factorization, tuple(tensor.shape))
        made = tltorch.FactorizedConv.from_conv(
            layer, rank=rank, factorization=factorization, implementation="factorized"
        ).double()
        return made, tensor_to_kernel(factorization, made.weight.to_tensor().detach())

    return convert


def full_ranks(factorization, shape):
    """Return ranks at which the factorization is exact."""
    if factorization == "tucker":
        return list(shape)
    if factorization == "cp":
        return math.prod(shape) // max(shape)
    left, total = 1, math.prod(shape)
    ranks = [1]
    for size in shape[:-1]:
        left *= size
        ranks.append(min(left, total // left))
    return [*ranks, 1]


INTRODUCTION = """
# Geometries

The same layers converted by tncompress and by tltorch (`FactorizedConv.from_conv`), at full rank, and run in
float64 against the dense layer with the kernel that the factors stand for. *pass*: the outputs agree to 1e-9;
*wrong*: another output, shape or kernel, without a word; *raises*: an error, in the conversion or in the
forward pass; *dense*: left as it is, with a reason in the plan. The page is written by
`python examples/geometry_grid.py --out docs/geometries.md`; `--reasons` prints why what fails, fails.
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-peers", action="store_true", help="leave tltorch out")
    parser.add_argument("--reasons", action="store_true", help="print why what raises, raises")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = {f"tncompress {name}": ours(format) for name, format in OURS.items()}
    if not options.no_peers:
        columns |= {f"tltorch {name}": theirs(name) for name in THEIRS}
    rows, reasons = [], []
    tally = {column: Counter() for column in columns}
    for case in cases():
        cells = []
        for column, convert in columns.items():
            result, reason = verdict(convert, case)
            tally[column][result] += 1
            cells.append(result)
            if reason:
                reasons.append(f"{case.name}, {column}: {result}: {reason}")
        rows.append((case.name, *cells))
    for result in ("pass", "wrong", "raises", "dense"):
        rows.append((f"*{result}*", *(str(tally[column][result]) for column in columns)))
    table = markdown_table(("layer", *columns), rows)
    print(table)
    if options.reasons:
        print("\n" + "\n".join(reasons))
    if options.out:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "tensorly", "tensorly-torch"))
        options.out.write_text(f"{INTRODUCTION.strip()}\n\n{table}\n\nMade with {versions}.\n")


if __name__ == "__main__":
    main()
