"""The patches of an input that the kernel of a layer meets: what the layer does, as one matrix product."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tncompress.geometry import ConvGeometry

CHUNK = 2**25
"""How many numbers a matrix of patches holds at most, where they are made piece by piece."""


def patches(x: Tensor, geometry: ConvGeometry) -> Float[Tensor, "groups count d"]:
    """Return what each output pixel sees of ``x``, one patch a row, with d = in / groups * prod(kernel).

    Rows are in the order of the output's pixels (image after image), columns in that of the kernel's
    entries: ``patches(x, geometry) @ geometry.kernels(weight).flatten(2).mT`` is the output before its bias.
    ``x`` is batched or not, as the layer takes it. Patches of a 1x1 convolution or a linear layer are
    a view of ``x`` where its memory allows.

    >>> import torch
    >>> layer = torch.nn.Conv2d(3, 5, 2, stride=2, bias=False)
    >>> x, geometry = torch.randn(4, 3, 6, 6), ConvGeometry.of(layer)
    >>> seen = patches(x, geometry)
    >>> seen.shape                                            # 12 numbers at each of 4 * 3 * 3 pixels
    torch.Size([1, 36, 12])
    >>> out = seen @ geometry.kernels(layer.weight).flatten(2).mT
    >>> torch.allclose(out[0].T, layer(x).transpose(0, 1).flatten(1), atol=1e-6)
    True
    """
    return _as_matrix(_windows(x, geometry), geometry)


def patch_chunks(
    x: Tensor, geometry: ConvGeometry, *, numbers: int = CHUNK
) -> Iterator[Float[Tensor, "groups count d"]]:
    """Yield :func:`patches` in pieces of at most ``numbers`` entries: some images, or lines of one image.

    A piece is a single line of pixels where even that is more.
    """
    ndim = geometry.ndim
    if ndim == 0:
        for part in x.reshape(-1, x.shape[-1]).split(max(1, numbers // x.shape[-1])):
            yield patches(part, geometry)
        return
    images = x if x.ndim == ndim + 2 else x[None]
    lengths = [geometry.output_length(length, axis) for axis, length in enumerate(images.shape[2:])]
    each = geometry.in_channels * math.prod(geometry.kernel_size) * math.prod(lengths)
    if each == 0 or not len(images):
        return
    if each <= numbers:
        for part in images.split(numbers // each):
            yield patches(part, geometry)
        return
    lines = max(1, numbers * lengths[0] // each)
    for image in images.split(1):
        for part in _windows(image, geometry).split(lines, 3 + ndim):
            yield _as_matrix(part, geometry)


def _as_matrix(view: Tensor, geometry: ConvGeometry) -> Tensor:
    d = math.prod(view.shape[1 : 2 + geometry.ndim])
    return view.reshape(geometry.groups, d, -1).mT


def _windows(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the view ``(groups, in, *window, images, *output)`` of ``x``, padded or stuffed with zeros."""
    ndim = geometry.ndim
    ranks = (ndim + 1, ndim + 2) if ndim else range(1, x.ndim + 1)
    if x.ndim not in ranks or x.shape[x.ndim - 1 - ndim] != geometry.in_channels:
        raise ValueError(f"a layer with {geometry.in_channels} input channels got a {tuple(x.shape)} input")
    if ndim == 0:
        return x.reshape(-1, geometry.in_channels).T[None]
    x = x if x.ndim == ndim + 2 else x[None]
    x = _stuffed(x, geometry) if geometry.transposed else _padded(x, geometry)
    for axis, (size, dilation) in enumerate(zip(geometry.kernel_size, geometry.dilation, strict=True)):
        step = 1 if geometry.transposed else geometry.stride[axis]
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    if geometry.transposed and max(geometry.kernel_size) > 1:
        x = x.flip([-1 - axis for axis in range(ndim)])
    x = x.unflatten(1, (geometry.groups, -1))  # images, groups, in, *output, *window
    output, window = range(3, 3 + ndim), range(3 + ndim, 3 + 2 * ndim)
    return x.permute(1, 2, *window, 0, *output)


def _padded(x: Tensor, geometry: ConvGeometry) -> Tensor:
    pad = sum(reversed(geometry.padding), ())
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, pad, mode=mode) if any(pad) else x


def _stuffed(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the input of the ordinary convolution of stride 1 that the transposed one is, window flipped."""
    lengths = [(length - 1) * s + 1 for length, s in zip(x.shape[2:], geometry.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *lengths)
    places: tuple[Any, ...] = (..., *(slice(None, None, s) for s in geometry.stride))
    stuffed[places] = x
    pairs = []
    for axis in range(geometry.ndim):
        reach = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)
        before, after = geometry.padding[axis]
        pairs.append((reach - before, reach - after + geometry.output_padding[axis]))
    return F.pad(stuffed, sum(reversed(pairs), ()))
