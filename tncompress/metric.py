"""The norm in which a kernel is truncated where data are at hand: the error of the layer's output.

With C the second moment of the input patches, the mean squared output error of a kernel that is off by D is
tr(D C D'). A :class:`Metric` is such a C for each group of a layer, whole, or as a product of one matrix for
the input channels and one for the window where the whole would be too large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tncompress.products import product

FLOOR = 1e-10
"""Directions below this part of the largest eigenvalue are not in the data: roots leave them out."""
LEVELS = 1e-9, 1e9
"""Mean squares of inputs between which nothing leaves the range of floats on the way to a fit."""


@dataclass(frozen=True)
class Metric:
    """Second moments of patches ``(in, *window)`` for each group of a layer, positive semi-definite.

    ``whole`` is ``(groups, d, d)`` with d = in * prod(window), in the order of the kernel's entries. Without
    it, ``channels`` ``(groups, in, in)`` and ``window`` ``(groups, k, k)`` stand for their Kronecker product.
    ``gradient`` ``(groups, out, out)``, the second moments of the loss's gradients at the output, lets fits
    weigh the outputs, too (the two factors of K-FAC, Martens and Grosse 2015).
    """

    patch: tuple[int, ...]
    whole: Tensor | None = None
    channels: Tensor | None = None
    window: Tensor | None = None
    gradient: Tensor | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        d, k = math.prod(self.patch), math.prod(self.patch[1:])
        given = {
            "whole": (self.whole, d),
            "channels": (self.channels, self.patch[0]),
            "window": (self.window, k),
        }
        for name, (matrix, size) in given.items():
            if matrix is not None and (matrix.ndim != 3 or matrix.shape[1:] != (size, size)):
                shape = tuple(matrix.shape)
                raise ValueError(
                    f"{name} moments of patches {self.patch} are (groups, {size}, {size}), got {shape}"
                )
        if self.whole is None and (self.channels is None or self.window is None):
            raise ValueError("a metric is given whole, or as channels and window")

    @property
    def groups(self) -> int:
        """The number of groups, each with moments of its own."""
        matrix = self.whole if self.whole is not None else self.channels
        assert matrix is not None
        return len(matrix)

    def times(self, kernels: Tensor) -> Tensor:
        """Return ``kernels @ C`` for kernels ``(groups, rows, *patch)``, in the same shape."""
        if self.whole is not None:
            return product(kernels.flatten(2), self.whole).reshape(kernels.shape)
        assert self.channels is not None
        assert self.window is not None
        halfway = torch.einsum("gmik,gij->gmjk", kernels.flatten(3), self.channels)
        return (halfway @ self.window[:, None]).reshape(kernels.shape)

    def gram(self, kernels: Tensor) -> Tensor:
        """Return W C W' ``(groups, rows, rows)``: the second moments of what the kernels put out."""
        return self.times(kernels).flatten(2) @ kernels.flatten(2).mT

    def squared_norm(self, kernels: Tensor) -> Tensor:
        """Return ``tr(K C K')`` of each group: the mean squared output for patches with these moments."""
        return (self.times(kernels) * kernels).flatten(1).sum(1).clamp_min(0.0)

    def marginal(self, modes: tuple[int, ...]) -> Tensor:
        """Return ``(groups, n, n)``: the moments of the patch's ``modes``, ascending, summed over the others.

        Mode 0 is ``in``, the others are those of the window.
        """
        if self.whole is not None:
            return _marginal(self.whole, self.patch, modes)
        assert self.channels is not None
        assert self.window is not None
        spatial = tuple(mode - 1 for mode in modes if mode > 0)
        window = _marginal(self.window, self.patch[1:], spatial)
        if 0 not in modes:
            return window * self.channels.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        both = torch.einsum("gij,gab->giajb", self.channels, window)
        return both.flatten(3, 4).flatten(1, 2)

    def roots(self, modes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the :func:`roots` of the :meth:`marginal` of ``modes``, which are taken once."""
        if modes not in self._kept:
            self._kept[modes] = roots(self.marginal(modes))
        found: tuple[Tensor, Tensor] = self._kept[modes]
        return found

    def ridged(self, ridge: float) -> Metric:
        """Return the metric with ``ridge`` times the mean of its diagonal added to it, made once."""
        if not ridge:
            return self
        if ridge not in self._kept:
            whole, channels, window = (
                add_ridge(m, ridge) if m is not None else None
                for m in (self.whole, self.channels, self.window)
            )
            self._kept[ridge] = Metric(self.patch, whole, channels, window, self.gradient)
        made: Metric = self._kept[ridge]
        return made

    def levelled(self) -> Metric:
        """Return a multiple of the metric whose squares and products stay within the range of floats."""
        parts = (self.whole, self.channels, self.window)
        means = [float(m.diagonal(dim1=1, dim2=2).mean()) if m is not None else 1.0 for m in parts]
        if all(LEVELS[0] < mean < LEVELS[1] for mean in means):
            return self
        if "levelled" not in self._kept:
            whole, channels, window = (
                m / (mean or 1.0) if m is not None else None for m, mean in zip(parts, means, strict=True)
            )
            self._kept["levelled"] = Metric(self.patch, whole, channels, window, self.gradient)
        made: Metric = self._kept["levelled"]
        return made

    def to(self, *args: object, **kwargs: object) -> Metric:
        """Return the same metric in another dtype or on another device."""
        parts = (self.whole, self.channels, self.window, self.gradient)
        moved = [m.to(*args, **kwargs) if m is not None else None for m in parts]  # type: ignore[call-overload]
        same = all(m is n for m, n in zip(moved, parts, strict=True))
        return self if same else Metric(self.patch, *moved)


def _marginal(moments: Tensor, sizes: tuple[int, ...], modes: tuple[int, ...]) -> Tensor:
    """Return moments ``(groups, n, n)`` over the product of ``sizes``, traced over all but ``modes``."""
    rest = [mode for mode in range(len(sizes)) if mode not in modes]
    order = [1 + mode for mode in (*modes, *rest)]
    split = moments.reshape(-1, *sizes, *sizes).permute(0, *order, *(len(sizes) + axis for axis in order))
    kept = math.prod(sizes[mode] for mode in modes)
    left = math.prod(sizes) // kept
    return torch.einsum("gaxbx->gab", split.reshape(len(moments), kept, left, kept, left))


def add_ridge(moments: Tensor, ridge: float) -> Tensor:
    """Return ``(groups, n, n)`` moments with ``ridge`` times the mean of each diagonal added to it."""
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return moments + ridge * mean[:, None, None] * identity


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square roots of ``(groups, n, n)`` moments, and their pseudo-inverses.

    Directions below ``FLOOR`` of the largest eigenvalue are left out of both.
    """
    values, vectors = torch.linalg.eigh(moments)
    kept = values > FLOOR * values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny)
    root = torch.where(kept, values.clamp_min(0.0), 0.0).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, root, 1.0), 0.0)
    return (vectors * root[:, None]) @ vectors.mT, (vectors * inverse[:, None]) @ vectors.mT
