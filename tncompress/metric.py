"""The norm in which a kernel is truncated where data are at hand: the error of the layer's output.

With C the second moment of the input patches, the mean squared output error of a kernel that is off by D is
tr(D C D'). A :class:`Metric` is such a C for each group of a layer, whole, or as a product of one matrix for
the input channels and one for the window where the whole would be too large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-10
"""Directions below this part of the largest eigenvalue are not in the data: roots leave them out."""


@dataclass(frozen=True)
class Metric:
    """Second moments of patches ``(in, *window)`` for each group of a layer, positive semi-definite.

    ``whole`` is ``(groups, d, d)`` with d = in * prod(window), in the order of the kernel's entries. Without
    it, ``channels`` ``(groups, in, in)`` and ``window`` ``(groups, k, k)`` stand for their Kronecker product.
    """

    patch: tuple[int, ...]
    whole: Tensor | None = None
    channels: Tensor | None = None
    window: Tensor | None = None

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
            return (kernels.flatten(2) @ self.whole).reshape(kernels.shape)
        assert self.channels is not None and self.window is not None
        halfway = torch.einsum("gmik,gij->gmjk", kernels.flatten(3), self.channels)
        return (halfway @ self.window[:, None]).reshape(kernels.shape)

    def squared_norm(self, kernels: Tensor) -> Tensor:
        """Return ``tr(K C K')`` of each group: the mean squared output for patches with these moments."""
        return (self.times(kernels) * kernels).flatten(1).sum(1).clamp_min(0.0)

    def marginal(self, modes: tuple[int, ...]) -> Tensor:
        """Return ``(groups, n, n)``: the moments of the patch's ``modes`` (0 is ``in``), summed over the others."""
        sizes = [self.patch[mode] for mode in modes]
        if self.whole is None:
            return self._marginal_of_product(modes).reshape(self.groups, math.prod(sizes), -1)
        rest = [mode for mode in range(len(self.patch)) if mode not in modes]
        n = len(self.patch)
        order = [1 + mode for mode in (*modes, *rest)]
        split = self.whole.reshape(-1, *self.patch, *self.patch).permute(
            0, *order, *(n + axis for axis in order)
        )
        joint = split.reshape(
            self.groups, math.prod(sizes), -1, math.prod(sizes), math.prod(self.patch) // math.prod(sizes)
        )
        return torch.einsum("gaxbx->gab", joint)

    def _marginal_of_product(self, modes: tuple[int, ...]) -> Tensor:
        assert self.channels is not None and self.window is not None
        spatial = tuple(mode for mode in modes if mode > 0)
        rest = [mode for mode in range(1, len(self.patch)) if mode not in spatial]
        n, sizes = len(self.patch) - 1, self.patch[1:]
        order = [*spatial, *rest]
        split = self.window.reshape(-1, *sizes, *sizes).permute(0, *order, *(n + axis for axis in order))
        kept = math.prod(self.patch[mode] for mode in spatial)
        left = math.prod(sizes) // kept
        window = torch.einsum("gaxbx->gab", split.reshape(self.groups, kept, left, kept, left))
        if 0 not in modes:
            return window * self.channels.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        if not spatial:
            return self.channels * window
        product = torch.einsum("gij,gab->giajb", self.channels, window)
        first = modes.index(0)
        before = math.prod(self.patch[mode] for mode in modes[:first])
        product = product.reshape(
            self.groups, self.patch[0], before, -1, self.patch[0], before, kept // before
        )
        return product.permute(0, 2, 1, 3, 5, 4, 6)

    def to(self, *args: object, **kwargs: object) -> Metric:
        """Return the same metric in another dtype or on another device."""
        moved = {
            name: matrix.to(*args, **kwargs) if matrix is not None else None  # type: ignore[call-overload]
            for name, matrix in (("whole", self.whole), ("channels", self.channels), ("window", self.window))
        }
        return Metric(self.patch, **moved)


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square roots of ``(groups, n, n)`` moments, and their pseudo-inverses.

    Directions below ``FLOOR`` of the largest eigenvalue are left out of both.
    """
    values, vectors = torch.linalg.eigh(moments)
    kept = values > FLOOR * values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny)
    root = torch.where(kept, values.clamp_min(0.0), 0.0).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, root, 1.0), 0.0)
    return (vectors * root[:, None]) @ vectors.mT, (vectors * inverse[:, None]) @ vectors.mT
