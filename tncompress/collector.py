"""Mean and covariance of a stream of patches, within a bounded working memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tncompress.discovery import Layer
from tncompress.geometry import ConvGeometry
from tncompress.moments import Moments, product
from tncompress.patches import patch_chunks
from tncompress.shifts import Shifts
from tncompress.squares import add_squares, mirror

NEVER = 2**62
"""The number of the first batch with NaN or infinity, while there was none."""


class Collector:
    """Mean and centred squares of a layer's patches, piece after piece (Chan, Golub & LeVeque 1979)."""

    def __init__(self, layer: Layer, numbers: int, *, separable: bool) -> None:
        self.name, self.patch = layer.name, layer.geometry.kernel_shape[1:]
        self.groups, self.numbers, self.separable = layer.geometry.groups, numbers, separable
        self.count, self.finite = 0, Finite()
        self.mean = torch.empty(0)
        self.squares: list[Tensor] = []

    def add(self, x: Tensor, geometry: ConvGeometry, number: int) -> None:
        """Take in the input of one call."""
        x = x.detach()
        spatial = tuple(x.shape[x.ndim - geometry.ndim :])
        for seen in patch_chunks(x, geometry, numbers=self.numbers):
            own = (
                seen.mT.is_contiguous()
                and seen.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            )
            rows = seen.float() if seen.dtype.itemsize < 4 else seen
            middle = rows.mean(1)
            self.finite.look(middle, number)
            shifts = None if self.separable else Shifts.of(geometry, spatial, rows.shape[1], self.numbers)
            if shifts is not None:
                middle = shifts.alike(middle)
            about = middle[:, None]
            centred = rows.sub_(about) if own or rows is not seen else rows - about
            self._pool(centred, middle.double(), shifts)

    def _pool(self, centred: Tensor, about: Tensor, shifts: Shifts | None) -> None:
        """Add patches ``about`` a point near their mean: their squares, and those of the means' distance."""
        if not self.squares:
            self._begin(about)
        count, off = centred.shape[1], centred.mean(1).double()
        mean = about + off
        total = self.count + count
        gap, weight = mean - self.mean, self.count * count / total
        if self.separable:
            split = centred.mT.reshape(self.groups, self.patch[0], -1, count)
            apart = gap.reshape(self.groups, self.patch[0], -1)
            channels, window = self.squares
            add_squares(channels, split.flatten(2).mT, apart, weight)
            window += (split.flatten(0, 1) @ split.flatten(0, 1).mT).unflatten(0, split.shape[:2]).sum(1)
            window += weight * (apart.mT @ apart)
        elif shifts is not None:
            self.squares[0] += shifts.squares(centred.mT)
            self.squares[0].baddbmm_(off[:, :, None], off[:, None], alpha=-count)
            self.squares[0].baddbmm_(gap[:, :, None], gap[:, None], alpha=weight)
        else:
            add_squares(self.squares[0], centred, gap[:, :, None], weight)
        self.mean += gap * (count / total)
        self.count = total

    def _begin(self, mean: Tensor) -> None:
        self.mean = torch.zeros_like(mean)
        d, inward = mean.shape[1], self.patch[0]
        sizes = (inward, d // inward) if self.separable else (d,)
        self.squares = [mean.new_zeros(self.groups, size, size) for size in sizes]

    def finish(self, gradient: Tensor | None) -> Moments:
        """Return the moments of all that was taken in, whose memory they take over."""
        for squares in self.squares:
            squares /= self.count
        mirror(self.squares[0])
        if not bool(torch.isfinite(self.squares[0].diagonal(dim1=1, dim2=2)).all()):
            raise ValueError(f"the input of layer {self.name!r} is too large: its squares overflow")
        mean = self.mean.reshape(self.groups, *self.patch)
        if self.separable:
            channels, window = product(*self.squares)
            return Moments(self.count, mean, None, channels, window, gradient)
        return Moments(self.count, mean, self.squares[0], gradient=gradient)


class Finite:
    """The number of the first batch with NaN or infinity, kept on the device until it is asked for."""

    def __init__(self) -> None:
        self.first: Tensor | None = None

    def look(self, values: Tensor, number: int) -> None:
        """Take note of ``number`` if any of ``values`` is not finite."""
        if values.is_floating_point() or values.is_complex():
            found = torch.where(torch.isfinite(values).all(), NEVER, number)
            self.first = found if self.first is None else torch.minimum(self.first, found)

    def first_bad(self) -> int | None:
        """Return the number noted, if any."""
        first = int(self.first) if self.first is not None else NEVER
        return first if first < NEVER else None
