"""What every way in and out shares: a layer's tensors with their legs, and a layer from such tensors.

Other libraries know no names of bonds that would outlive a truncation. So a network is recognised by what it
is: which kernel legs each tensor has, and which tensors each bond joins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, cast

import torch
from torch import Tensor, nn

from tncompress.cuts import legs_of
from tncompress.formats import Format
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv

Network = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Piece:
    """One tensor of a network: what it is called, the labels of its axes, its values."""

    name: str
    legs: tuple[str, ...]
    tensor: Any


def network_of(layer: Any) -> Network:
    """Return the legs of each factor of a compressed layer; any other layer is a ``TypeError``."""
    if not isinstance(layer, TNConv):
        raise TypeError(
            f"wanted a compressed layer (TNConv), got {type(layer).__name__}: compress the model first, or "
            "take TNConv.from_dense(layer, format, ranks)"
        )
    return layer.format.network(layer.geometry.kernel_shape)


def pieces_of(layer: Any, group: int | None) -> list[Piece]:
    """Return the factors of one group of a compressed layer; they share the layer's memory and gradients.

    A layer of several groups has as many networks: ``group`` says which is meant.
    """
    network = network_of(layer)
    tensors, groups = layer.tensors(), layer.geometry.groups
    if groups > 1:
        if group is None:
            raise ValueError(
                f"the layer has {groups} groups, a network each: pass group=0 to group={groups - 1}"
            )
        _check_group(group, groups)
        tensors = [tensor[group] for tensor in tensors]
    elif group is not None:
        _check_group(group, groups)
    names = names_of(network)
    return [Piece(*parts) for parts in zip(names, network, tensors, strict=True)]


def _check_group(group: int, groups: int) -> None:
    if not 0 <= group < groups:
        raise ValueError(f"wanted a group from 0 to {groups - 1}, got {group}")


def names_of(network: Network) -> list[str]:
    """Return a name for each factor: its kernel legs, or ``core`` where it has none.

    >>> names_of((("r0", "in"), ("r1", "r0", "kh", "kw"), ("out", "r1")))
    ['in', 'kh_kw', 'out']
    """
    names = list[str]()
    for legs in network:
        name = "_".join(leg for leg in legs if not is_bond(leg)) or "core"
        names.append(name if name not in names else f"{name}{len(names)}")
    return names


def is_bond(leg: str) -> bool:
    """Say whether a leg of a factor is a bond (``r0``, ``r1``, ...) and not a leg of the kernel."""
    return leg.startswith("r")


def layer_from(groups: Sequence[Sequence[Tensor]], like: nn.Module, format: Format) -> TNConv:
    """Return a layer that holds copies of the factors of each group, and is like ``like`` in all else.

    It has the geometry, bias, dtype and device of ``like``: other libraries work in float64 where torch has
    float32, and a network of two dtypes would not run.
    """
    stacked = list[Tensor]()
    for number, parts in enumerate(zip(*groups, strict=True)):
        if len({part.shape for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"all groups have the same ranks, but factor {number} comes as {shapes}: truncate them alike"
            )
        whole = parts[0].detach().clone() if len(parts) == 1 else torch.stack(parts).detach()
        stacked.append(whole.contiguous())
    kinds = {(factor.dtype, factor.device) for factor in stacked}
    if len(kinds) > 1 or not stacked[0].is_floating_point():
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        real = ": kernels are real, pass the real parts" if any(f.is_complex() for f in stacked) else ""
        raise ValueError(f"wanted floating-point tensors of one dtype on one device, got {found}{real}")
    geometry, old = geometry_of(like), cast(Any, like)
    held = list(like.factors) if isinstance(like, TNConv) else [old.weight]
    stacked = [factor.to(held[0]) for factor in stacked]
    bias = old.bias
    copied = bias.detach().clone() if bias is not None else None
    layer = TNConv(format, geometry, stacked, copied)
    format.check_ranks(geometry.kernel_shape, layer.ranks)
    layer.rel_error = _error(layer, like)
    layer.factors.requires_grad_(any(p.requires_grad for p in held))
    if layer.bias is not None and bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    return layer.train(like.training)


def geometry_of(like: Any) -> ConvGeometry:
    """Return the geometry of a dense or a compressed layer."""
    return like.geometry if isinstance(like, TNConv) else ConvGeometry.of(like)


def format_of(like: Any, format: Format | None) -> Format:
    """Return ``format``, or that of ``like`` if it is compressed."""
    if format is not None and not isinstance(format, Format):
        raise TypeError(f"wanted a format, such as MPS(), got {format!r}")
    if format is not None:
        return format
    if isinstance(like, TNConv):
        return like.format
    raise ValueError(
        f"a {type(like).__name__} does not say of which format the network is: pass format=, such as MPS()"
    )


def _error(layer: TNConv, like: Any) -> float | None:
    """Return the relative error against a dense ``like``; that of a compressed one if nothing changed."""
    if isinstance(like, TNConv):
        pairs = zip(layer.factors, like.factors, strict=False)
        same = layer.format == like.format and all(
            new.dtype == old.dtype and new.device == old.device and torch.equal(new, old)
            for new, old in pairs
        )
        return like.rel_error if same else None
    wanted = like.weight.detach().to(layer.factors[0].device).double()
    norm = float(wanted.norm())
    return float((wanted - layer.weight.detach().double()).norm()) / norm if norm > 0 else 0.0


def arrange(
    pieces: Sequence[Piece], network: Network, shape: Sequence[int], format: Format, what: str = "node"
) -> list[Tensor]:
    """Return the tensors of ``pieces`` in the order of ``network``, and their axes in that of its legs.

    Labels that are legs of a kernel of shape ``shape`` are these; all others are bonds, whose names are free.
    Raises ``ValueError`` if this is not the network.
    """
    legs = legs_of(len(shape))
    _check_legs(pieces, dict(zip(legs, shape, strict=True)), tuple(shape), what)
    for order in _orders(pieces, network, legs):
        renamed = _renaming([piece.legs for piece in order], network, legs)
        if renamed is not None:
            return [_permuted(piece, renamed, wanted) for piece, wanted in zip(order, network, strict=True)]
    raise ValueError(
        f"the {what}s do not form the network of {format} on a kernel {tuple(shape)}: wanted "
        f"{_written(network)}, got {_written([piece.legs for piece in pieces])}"
    )


def _check_legs(pieces: Sequence[Piece], sizes: dict[str, int], shape: tuple[int, ...], what: str) -> None:
    holders: dict[str, list[Piece]] = {}
    for piece in pieces:
        for leg, size in zip(piece.legs, piece.tensor.shape, strict=True):
            holders.setdefault(leg, []).append(piece)
            if sizes.setdefault(leg, size) != size:
                there = (
                    f"a kernel {shape}" if leg in legs_of(len(shape)) else f"{what} {holders[leg][0].name!r}"
                )
                raise ValueError(
                    f"{what} {piece.name!r} has dimension {size} on {leg!r}, {there} has {sizes[leg]}"
                )
    for leg in legs_of(len(shape)):
        count = len(holders.get(leg, []))
        if count != 1:
            raise ValueError(
                f"wanted one {what} with the kernel's leg {leg!r}, got {count}: {_shown(pieces)}"
            )
    for leg, held in holders.items():
        if leg not in legs_of(len(shape)) and len(held) == 1:
            raise ValueError(
                f"{leg!r} of {what} {held[0].name!r} leads nowhere, and is no leg of a kernel {shape}"
            )


def _orders(pieces: Sequence[Piece], network: Network, legs: Sequence[str]) -> Iterator[list[Piece]]:
    """Yield the pieces in orders in which they have the same kernel legs as the factors of ``network``."""
    own = [frozenset(piece.legs) & set(legs) for piece in pieces]
    wanted = [frozenset(factor) & set(legs) for factor in network]
    if sorted(map(sorted, own)) != sorted(map(sorted, wanted)):
        return
    place = {key: piece for key, piece in zip(own, pieces, strict=True) if key}
    without = [piece for key, piece in zip(own, pieces, strict=True) if not key]
    for chosen in permutations(without):
        rest = iter(chosen)
        yield [place[key] if key else next(rest) for key in wanted]


def _renaming(
    found: Sequence[tuple[str, ...]], network: Network, legs: Sequence[str]
) -> dict[str, str] | None:
    """Return which of our legs each label is, if the bonds join the same factors; like names if they can."""
    ours, theirs = _joined(network, legs), _joined(found, legs)
    renamed = {leg: leg for leg in legs}
    for bond, joins in ours.items():
        like = [label for label, other in theirs.items() if other == joins]
        if not like:
            return None
        label = bond if bond in like else like[0]
        renamed[label] = bond
        del theirs[label]
    return None if theirs else renamed


def _joined(network: Sequence[tuple[str, ...]], legs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    labels = dict.fromkeys(label for factor in network for label in factor if label not in legs)
    return {label: tuple(factor.count(label) for factor in network) for label in labels}


def _permuted(piece: Piece, renamed: dict[str, str], wanted: tuple[str, ...]) -> Tensor:
    axes = [renamed[label] for label in piece.legs]
    return torch.as_tensor(piece.tensor).permute([axes.index(leg) for leg in wanted])


def _written(network: Sequence[Sequence[str]]) -> str:
    return ", ".join(f"({' '.join(legs)})" for legs in network)


def _shown(pieces: Sequence[Piece]) -> str:
    return ", ".join(f"{piece.name!r} ({' '.join(piece.legs)})" for piece in pieces)
