"""Google's tensornetwork: a layer as nodes and edges, to be split, truncated or contracted, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tncompress.cuts import legs_of
from tncompress.formats import Format
from tncompress.interop.matching import (
    Network,
    Piece,
    arrange,
    format_of,
    geometry_of,
    is_bond,
    layer_from,
    pieces_of,
)
from tncompress.layers import TNConv


class KernelNodes(NamedTuple):
    """Connected nodes, and their dangling edges in the order of the kernel: out, in, kd, kh, kw."""

    nodes: list[Any]
    edges: list[Any]


def to_tensornetwork(layer: TNConv, group: int | None = None) -> KernelNodes:
    """Return the network of a layer as connected tensornetwork nodes on the PyTorch backend.

    Nodes are named after the kernel legs that they hold, axes and edges as in ``format.network``. Contracted
    with the edges as output, they give the kernel ``(out, in, *spatial)``. The tensors are the layer's own,
    gradients flow to it: copy the nodes before you change a tensor in place. A grouped layer has a network
    for each ``group``. A bond that more than two factors share (CP's) becomes a chain of bonds, along
    which the inner factors are diagonal.

    >>> import tensornetwork, tncompress as tnc
    >>> layer = TNConv.from_dense(nn.Conv2d(8, 16, 3), tnc.MPS(), ranks=(6, 12, 10))
    >>> nodes, edges = to_tensornetwork(layer)
    >>> [(node.name, node.axis_names) for node in nodes]
    [('in', ['r0', 'in']), ('kh', ['r1', 'r0', 'kh']), ('kw', ['r2', 'r1', 'kw']), ('out', ['out', 'r2'])]
    >>> kernel = tensornetwork.contractors.auto(nodes, output_edge_order=edges).tensor
    >>> torch.allclose(kernel, layer.weight, atol=1e-6)
    True

    Cut a bond down to 4, and put the layer back together:

    >>> nodes, edges = to_tensornetwork(layer)
    >>> first, second, *others = nodes
    >>> sides = [first["in"]], [second["kh"], second["r1"]]
    >>> left, right, _ = tensornetwork.split_node(first @ second, *sides, max_singular_values=4)
    >>> from_tensornetwork([left, right, *others], layer).ranks
    (4, 12, 10)
    """
    import tensornetwork

    pieces = pieces_of(layer, group)
    ndim = len(layer.geometry.kernel_shape)
    nodes, ends = [], dict[str, Any]()
    for piece, legs in zip(pieces, _unrolled(tuple(piece.legs for piece in pieces)), strict=True):
        tensor = _spread(piece.tensor, piece.legs, legs)
        node = tensornetwork.Node(tensor, name=piece.name, axis_names=list(legs), backend="pytorch")
        nodes.append(node)
        for leg in legs:
            edge = ends[leg] ^ node[leg] if leg in ends else node[leg]
            edge.set_name(leg)
            ends[leg] = edge
    return KernelNodes(nodes, [ends[leg] for leg in legs_of(ndim)])


def from_tensornetwork(nodes: Iterable[Any], like: nn.Module, *, format: Format | None = None) -> TNConv:
    """Return a fresh layer that holds the tensors of ``nodes``, and is like ``like`` in all else.

    Geometry, bias, dtype and device are those of ``like``: arrays in float64 come back in float32.
    ``like`` is the layer that the nodes came from, or a dense layer, whose ``format`` has then to be said.
    Of a layer with groups ``nodes`` are its networks in turn. Dangling edges are told by their own names or
    those of the axes (``out``, ``in``, ``kd``, ``kh``, ``kw``); bonds may have any names and dimensions. What
    :func:`to_tensornetwork` made comes back bit by bit. Raises ``ValueError`` if the nodes do not form the
    network of the format.
    """
    wanted, shape = format_of(like, format), geometry_of(like).kernel_shape
    network, groups = wanted.network(shape), geometry_of(like).groups
    networks: Sequence[Any] = [nodes] if groups == 1 else list(nodes)
    if len(networks) != groups:
        raise ValueError(f"the layer has {groups} groups: wanted a network for each, got {len(networks)}")
    found = [_group_from(each, network, shape, wanted) for each in networks]
    return layer_from(found, like, wanted)


def _group_from(nodes: Any, network: Network, shape: tuple[int, ...], format: Format) -> list[Tensor]:
    pieces = _pieces(nodes.nodes if isinstance(nodes, KernelNodes) else list(nodes), legs_of(len(shape)))
    unrolled = _unrolled(network)
    tensors = arrange(pieces, unrolled, shape, format)
    return [_gathered(*parts, format) for parts in zip(tensors, network, unrolled, strict=True)]


def _pieces(nodes: Sequence[Any], legs: Sequence[str]) -> list[Piece]:
    import tensornetwork

    if wrong := [node for node in nodes if not isinstance(node, tensornetwork.AbstractNode)]:
        raise TypeError(f"wanted nodes of tensornetwork, got a {type(wrong[0]).__name__}")
    inner = {id(edge): edge for node in nodes for edge in node.edges if not edge.is_dangling()}
    names = [edge.name for edge in inner.values()]
    labels = {
        key: edge.name if names.count(edge.name) == 1 and edge.name not in legs else f"bond {number}"
        for number, (key, edge) in enumerate(inner.items())
    }
    for edge in inner.values():
        for node, other in ((edge.node1, edge.node2), (edge.node2, edge.node1)):
            if not any(other is given for given in nodes):
                raise ValueError(
                    f"edge {labels[id(edge)]!r} of node {node.name!r} leads to node {other.name!r}, which is "
                    "not among the nodes given"
                )
    return [Piece(node.name, tuple(_labels(node, labels, legs)), node.tensor) for node in nodes]


def _labels(node: Any, labels: dict[int, str], legs: Sequence[str]) -> Iterable[str]:
    for axis, edge in enumerate(node.edges):
        named = edge.name in legs or not node.axis_names
        label = labels.get(id(edge), edge.name if named else node.axis_names[axis])
        if edge.is_dangling() and label not in legs:
            raise ValueError(
                f"edge {label!r} of node {node.name!r} is dangling, and no leg of the kernel "
                f"({', '.join(legs)})"
            )
        yield label


def _unrolled(network: Network) -> Network:
    """Return ``network`` with a chain of bonds in place of each bond that more than two factors share.

    >>> _unrolled((("r0", "in"), ("r0", "kh"), ("r0", "kw"), ("out", "r0")))
    (('r0_0', 'in'), ('r0_0', 'r0_1', 'kh'), ('r0_1', 'r0_2', 'kw'), ('out', 'r0_2'))
    """
    count = {leg: sum(leg in legs for legs in network) for legs in network for leg in legs}
    seen, unrolled = dict.fromkeys(count, 0), []
    for legs in network:
        new = list[str]()
        for leg in legs:
            if not is_bond(leg) or count[leg] <= 2:
                new.append(leg)
                continue
            place = seen[leg]
            seen[leg] += 1
            sides = [place - 1] * (place > 0) + [place] * (place < count[leg] - 1)
            new += [f"{leg}_{side}" for side in sides]
        unrolled.append(tuple(new))
    return tuple(unrolled)


def _doubled(legs: tuple[str, ...], unrolled: tuple[str, ...]) -> list[int]:
    """Return the axes of ``unrolled`` at which a leg begins that has become two."""
    starts, axis = [], 0
    for leg in legs:
        width = sum(new == leg or new.startswith(f"{leg}_") for new in unrolled)
        starts += [axis] if width == 2 else []
        axis += width
    return starts


def _spread(tensor: Tensor, legs: tuple[str, ...], unrolled: tuple[str, ...]) -> Tensor:
    for axis in _doubled(legs, unrolled):
        tensor = torch.diag_embed(tensor.movedim(axis, -1), dim1=axis, dim2=axis + 1)
    return tensor


def _gathered(tensor: Tensor, legs: tuple[str, ...], unrolled: tuple[str, ...], format: Format) -> Tensor:
    """Return the factor whose :func:`_spread` is ``tensor``, which has to be diagonal."""
    for axis in reversed(_doubled(legs, unrolled)):
        size = tensor.shape[axis : axis + 2]
        diagonal = tensor.diagonal(dim1=axis, dim2=axis + 1)
        if size[0] != size[1] or not torch.equal(
            torch.diag_embed(diagonal, dim1=axis, dim2=axis + 1), tensor
        ):
            raise ValueError(
                f"the node with legs ({' '.join(unrolled)}) is not diagonal along its bonds, as {format} "
                "needs: pass format=MPS(), which is what the nodes form now"
            )
        tensor = diagonal.movedim(-1, axis)
    return tensor
