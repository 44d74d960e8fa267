"""Open a compressed layer in other tensor-network libraries, work on it there, and put it back.

    python examples/open_a_layer.py --channels 64 --keep 24 --draw layer.png

A bond is truncated with tensornetwork's `split_node`, the network is brought into canonical form in quimb
(and drawn), and the cost of the contraction that opt_einsum finds is put beside that of our convolutions.
Every way back gives an ordinary layer again; what it computes is compared with what it was.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import tensornetwork
import torch
from torch import nn

import tncompress as tnc
from tncompress.contraction import chain_macs, dense_macs
from tncompress.tables import count


def off(found, wanted):
    """Return how far an output is off, relative to the norm."""
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def truncate_bond(layer, keep):
    """Return the layer with its first bond cut down to `keep`, by tensornetwork's `split_node`."""
    nodes, _ = tnc.to_tensornetwork(layer)
    first, second, *others = nodes
    sides = [first["in"]], [second["kh"], second["r1"]]
    left, right, _ = tensornetwork.split_node(first @ second, *sides, max_singular_values=keep)
    print(f"tensornetwork: bond r0 cut from {layer.ranks[0]} to {keep}")
    return tnc.from_tensornetwork([left, right, *others], layer)


def canonise(layer, draw):
    """Return the same layer in another gauge: all cores but the one with `out` isometries, made by quimb."""
    network = tnc.to_quimb(layer)
    tags = [tensor.tags for tensor in network.tensors]
    for here, there in pairwise(tags):
        network.canonize_between(here, there)
    *isometries, centre = network.tensors
    legs = ("out", "in", "kh", "kw")
    kernel = network.contract(output_inds=legs).data
    print(f"quimb: {len(isometries)} isometries; the norm lies in one core: ", end="")
    print(f"{float(centre.data.norm()):.4f}, of the kernel {float(kernel.norm()):.4f}")
    if draw is not None:
        figure = network.draw(color=[*legs[1:], "out"], show_inds="all", legend=False, return_fig=True)
        figure.savefig(draw, bbox_inches="tight")
        print(f"quimb: drawn to {draw}")
    return tnc.from_quimb(network, layer)


def costs(layer, x):
    """Print what an output costs: as einsums along opt_einsum's path, as our chain, as the dense layer."""
    kernel, output = tnc.to_einsum(layer), tnc.to_einsum(layer, x)
    lengths = x.shape[2:]
    print(f"opt_einsum: the kernel costs {count(kernel.macs)} MACs along {kernel.path}")
    for what, macs in (
        ("one einsum over patches", output.macs),
        ("the chain of convolutions", chain_macs(layer.geometry, layer.stages, lengths, len(x))),
        ("the dense convolution", dense_macs(layer.geometry, lengths, len(x))),
    ):
        print(f"  {what + ' ':.<30} {count(macs)} MACs")


@torch.no_grad()
def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--side", type=int, default=28, help="pixels of the image")
    parser.add_argument("--keep", type=int, default=24, help="what the first bond is cut down to")
    parser.add_argument("--draw", type=Path, help="where to draw the network: .png, .svg or .pdf")
    asked = parser.parse_args(arguments)
    torch.manual_seed(0)
    conv = nn.Conv2d(asked.channels, asked.channels, 3, padding=1)
    half = tuple(-(-rank // 2) for rank in tnc.MPS().max_ranks(tuple(conv.weight.shape)))
    layer = tnc.TNConv.from_dense(conv, tnc.MPS(), half)
    x = torch.randn(2, asked.channels, asked.side, asked.side)
    print(f"{layer.format}, ranks {layer.ranks}, off the dense layer by {off(layer(x), conv(x)):.3f}")
    smaller = truncate_bond(layer, asked.keep)
    print(f"  put back: ranks {smaller.ranks}, off the layer by {off(smaller(x), layer(x)):.3f}")
    turned = canonise(layer, asked.draw)
    print(f"  put back: ranks {turned.ranks}, off the layer by {off(turned(x), layer(x)):.1e}")
    costs(layer, x)


if __name__ == "__main__":
    main()
