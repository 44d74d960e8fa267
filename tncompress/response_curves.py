"""Curves that predict the change of a network's output from the loss of one layer, format by format.

Near zero the squared change is in proportion to the squared loss, since networks are smooth there; the factor
is the layer's own, and the format's: errors of the same size that lie elsewhere in the kernel are not
forgiven alike. A format that was measured at few losses only has the curve of those that were measured at
more, times a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tncompress.formats import Format

Point = tuple[float, float]
"""The loss of a layer, and the squared change of the network's output there."""


@dataclass(frozen=True)
class Curve:
    """The change of the network's output as a growing function of a layer's loss, 0 at 0.

    ``points`` are the logarithms of squared losses and of changes, both strictly increasing. Without points
    the change is ``constant`` times the squared loss.
    """

    points: tuple[tuple[float, float], ...]
    constant: float = 0.0

    def __call__(self, loss: float) -> float:
        """Return the squared relative change of the output at this loss."""
        if loss == 0 or not self.points:
            return self.constant * loss**2
        x = 2 * math.log(loss)
        (first, low), (last, high) = self.points[0], self.points[-1]
        if x <= first:
            return math.exp(low + x - first)
        if x >= last:
            return math.exp(min(high + x - last, 700.0))
        after = next(i for i, (at, _) in enumerate(self.points) if at >= x)
        (x0, y0), (x1, y1) = self.points[after - 1], self.points[after]
        return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))

    def times(self, factor: float) -> Curve:
        """Return the curve of ``factor`` times the change; the factor is above zero."""
        up = math.log(factor)
        return Curve(tuple((x, y + up) for x, y in self.points), self.constant * factor)


def fit_curve(losses: Sequence[float], errors: Sequence[float]) -> Curve:
    """Return the curve through measured points, those that contradict its growth pooled at their mean.

    The pooling is that of isotonic regression (Ayer et al. 1955), with the mean of a pool standing where the
    mean of its losses is. Rows without a loss of their own say nothing; where no other is there, the change
    is taken to be the squared loss itself.

    >>> curve = fit_curve([0.1, 0.2], [0.001, 0.016])
    >>> [round(curve(loss), 6) for loss in (0.0, 0.05, 0.1, 0.2, 0.4)]
    [0.0, 0.00025, 0.001, 0.016, 0.064]
    """
    seen = sorted((loss, error) for loss, error in zip(losses, errors, strict=True) if loss > 0)
    if not seen:
        return Curve((), 1.0)
    if not any(error > 0 for _, error in seen):
        return Curve(())
    pools: list[tuple[int, float, float]] = []  # how many points, their mean
    for loss, error in seen:
        x = 2 * math.log(loss)
        pool = (1, x, math.log(max(error, 1e-12 * loss**2, 1e-300)))
        while pools and (pools[-1][2] >= pool[2] or pools[-1][1] >= pool[1]):
            (n, a, b), (m, c, d) = pools.pop(), pool
            pool = (n + m, (n * a + m * c) / (n + m), (n * b + m * d) / (n + m))
        pools.append(pool)
    return Curve(tuple((x, y) for _, x, y in pools))


class LayerCurves:
    """The curves of one layer: one for each format that was measured, and one for all others."""

    def __init__(self, points: Mapping[Format, Sequence[Point]]) -> None:
        most = max(map(len, points.values()), default=0)
        base = _through([point for own in points.values() if len(own) == most for point in own])
        self.any = _through([point for own in points.values() for point in own])
        self.own = {
            format: _through(own) if len(own) == most else base.times(_factor(base, own))
            for format, own in points.items()
        }

    def of(self, format: Format | None) -> Curve:
        """Return the curve of ``format``, or that through all points where it was not measured."""
        return self.any if format is None else self.own.get(format, self.any)


def _through(points: Sequence[Point]) -> Curve:
    return fit_curve([loss for loss, _ in points], [error for _, error in points])


def _factor(base: Curve, points: Iterable[Point]) -> float:
    """Return by how much the changes of ``points`` lie above ``base``, as a geometric mean."""
    pairs = [(error, base(loss)) for loss, error in points]
    logs = [math.log(error / guess) for error, guess in pairs if error > 0 and guess > 0]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0
