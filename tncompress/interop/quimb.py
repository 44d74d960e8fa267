"""quimb: a layer as a ``TensorNetwork``, to be canonised, compressed or drawn, and back (an extra)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from tncompress.formats import Format
from tncompress.interop.matching import Piece, arrange, format_of, geometry_of, layer_from, pieces_of
from tncompress.layers import TNConv


def to_quimb(layer: TNConv, group: int | None = None) -> Any:
    """Return the network of a layer as a ``quimb.tensor.TensorNetwork`` of torch tensors.

    Indices are named as in ``format.network``: ``out``, ``in``, ``kd``, ``kh``, ``kw`` and the bonds ``r0``,
    ``r1``, ... Each tensor is tagged with the kernel legs that it holds and with the format's name. The
    tensors are the layer's own, and gradients flow to it. A grouped layer has a network for each
    ``group``. CP's bond is one index of all factors: name the ``output_inds`` when contracting it.

    >>> import tncompress as tnc
    >>> layer = TNConv.from_dense(nn.Conv2d(8, 16, 3), tnc.MPS(), ranks=(6, 12, 10))
    >>> network = to_quimb(layer)                                          # doctest: +SKIP
    >>> kernel = network.contract(output_inds=("out", "in", "kh", "kw")).data    # doctest: +SKIP
    """
    quimb = _quimb()
    pieces = pieces_of(layer, group)
    return quimb.TensorNetwork(
        [quimb.Tensor(p.tensor, inds=p.legs, tags=[p.name, layer.format.name]) for p in pieces]
    )


def from_quimb(network: Any, like: nn.Module, *, format: Format | None = None) -> TNConv:
    """Return a fresh layer that holds the tensors of ``network``, and is like ``like`` in all else.

    Geometry, bias, dtype and device are those of ``like``: arrays in float64 come back in float32.
    ``like`` is the layer that the network came from, or a dense layer, whose ``format`` has then to be said.
    Of a layer with groups ``network`` is a sequence of one for each. The kernel's indices have their
    names, bonds may have any names and dimensions. What :func:`to_quimb` made comes back bit by bit. Raises
    ``ValueError`` if the tensors do not form the network of the format.
    """
    quimb = _quimb()
    wanted, geometry = format_of(like, format), geometry_of(like)
    shape, found = geometry.kernel_shape, []
    networks: Sequence[Any] = [network] if geometry.groups == 1 else list(network)
    if len(networks) != geometry.groups:
        raise ValueError(
            f"the layer has {geometry.groups} groups: wanted a network for each, got {len(networks)}"
        )
    for each in networks:
        if not isinstance(each, quimb.TensorNetwork):
            raise TypeError(f"wanted a TensorNetwork of quimb, got a {type(each).__name__}")
        pieces = [Piece(" ".join(t.tags), tuple(t.inds), t.data) for t in each.tensors]
        found.append(arrange(pieces, wanted.network(shape), shape, wanted, "tensor"))
    return layer_from(found, like, wanted)


def _quimb() -> ModuleType:
    try:
        with warnings.catch_warnings():  # to whose filters quimb's import adds one
            import quimb.tensor
    except ImportError as error:
        raise ImportError("quimb is not installed: pip install 'tncompress[quimb]'") from error
    return quimb.tensor
