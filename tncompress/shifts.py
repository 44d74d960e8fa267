"""Squares of patches that overlap: each product of two shifts of an image is taken once.

The patches of a convolution of stride 1 are shifts of one image, y_a[p] = x[p + a]. Their products
S[a, b] = sum over p of y_a[p] y_b[p]' depend on b - a alone, but for the borders: with e a step along an
axis, S[a + e, b + e] is S[a, b] without the first line of pixels and with one more behind the last. A window
of 3x3 needs 13 products then, and those of borders, in place of 45.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tncompress.geometry import ConvGeometry

GAIN = 0.7
"""At most this part of the multiplications of the plain product must be left for shifts to be taken."""


@dataclass(frozen=True)
class Shifts:
    """Patches that are shifts of images: of a ``window``, at a ``grid`` of images, lines and pixels."""

    window: tuple[int, int]
    dilation: tuple[int, int]
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, geometry: ConvGeometry, spatial: tuple[int, ...], count: int, numbers: int) -> Shifts | None:
        """Return the shifts that ``count`` patches of inputs of lengths ``spatial`` are; None if none pay.

        They are all lines of some images, or some lines of one. ``numbers`` is how many a product may hold.
        """
        if geometry.ndim != 2 or geometry.transposed or geometry.stride != (1, 1):
            return None
        lines, pixels = (geometry.output_length(length, axis) for axis, length in enumerate(spatial))
        images, rest = divmod(count, lines * pixels)
        grid = (1, count // pixels, pixels) if rest else (images, lines, pixels)
        (high, wide), (down, across) = geometry.kernel_size, geometry.dilation
        if down >= grid[1] or across >= pixels or numbers_held(geometry) > numbers:
            return None
        borders = 2 * (((high - 1) * wide) ** 2 * down / grid[1] + (high * (wide - 1)) ** 2 * across / pixels)
        needed = high * wide + (high - 1) * (wide - 1) + borders
        if needed > GAIN * (high * wide) ** 2 / 2:
            return None
        return cls((high, wide), (down, across), grid)

    def alike(self, points: Tensor) -> Tensor:
        """Return ``points`` ``(groups, d)``, each the mean over its window: patches about them are shifts."""
        split = points.unflatten(1, (-1, math.prod(self.window)))
        return split.mean(2, keepdim=True).expand_as(split).flatten(1)

    def squares(self, rows: Tensor) -> Tensor:
        """Return ``rows rows'`` ``(groups, d, d)`` for patches ``(groups, d, count)``, all shifted alike."""
        high, wide = self.window
        y = rows.unflatten(1, (-1, high, wide))  # groups, in, *window, count
        channels = y.shape[1]
        found = rows.new_empty(len(rows), channels, high, wide, channels, high, wide)
        found[:, :, 0, 0] = (y[:, :, 0, 0] @ rows.mT).unflatten(2, y.shape[1:4])
        found[:, :, 0, 1:, :, 0, 0] = found[:, :, 0, 0, :, 0, 1:].permute(0, 2, 3, 1)
        if high > 1 and wide > 1:
            found[:, :, 0, 1:, :, 1:, 0] = _products(y[:, :, 0, 1:], y[:, :, 1:, 0])
        pixels = y.unflatten(4, self.grid)
        down, across = self.dilation
        if wide > 1:
            step = _squares(pixels[:, :, :, 1:, ..., -across:]) - _squares(pixels[:, :, :, :-1, ..., :across])
            for column in range(1, wide):
                before = found[:, :, 0, column - 1, :, :, :-1]
                found[:, :, 0, column, :, :, 1:] = before + step[:, :, 0, column - 1]
        if high > 1:
            step = _squares(pixels[:, :, 1:, ..., -down:, :]) - _squares(pixels[:, :, :-1, ..., :down, :])
            for line in range(1, high):
                found[:, :, line, :, :, 0] = found[:, :, 0, :, :, line].permute(0, 3, 4, 1, 2)
                found[:, :, line, :, :, 1:] = found[:, :, line - 1, :, :, :-1] + step[:, :, line - 1]
        return found.flatten(4).flatten(1, 3)


def numbers_held(geometry: ConvGeometry) -> int:
    """Return how many numbers the squares of a layer's patches take by shifts, with what they are made of."""
    return 2 * geometry.groups * math.prod(geometry.kernel_shape[1:]) ** 2


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the products ``(groups, in, m, in, n)`` of two ``(groups, in, m, count)``, m and n."""
    return (a.flatten(1, 2) @ b.flatten(1, 2).mT).unflatten(2, b.shape[1:3]).unflatten(1, a.shape[1:3])


def _squares(some: Tensor) -> Tensor:
    """Return the products of each ``(in, *window)`` of ``(groups, in, *window, *grid)`` with each other."""
    flat = some.flatten(4).flatten(1, 3)
    return (flat @ flat.mT).unflatten(2, some.shape[1:4]).unflatten(1, some.shape[1:4])
