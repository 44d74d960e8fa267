"""The kernels of a layer across one cut, and alternating projections where cuts cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tncompress.cuts import Cut
from tncompress.linalg import svd, tail_energies, unfold

ROUNDS = 100
"""The most rounds of :func:`alternating` projections."""

SETTLED = 1e-4
"""Norm above the ranks that were asked for, over the kernels' norm, at which these rounds end."""

MEMORY = 8
"""How many rounds the extrapolation looks back."""

NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest do not count as rank."""


@dataclass(frozen=True)
class Unfolded:
    """A stack of kernels ``(groups, out, in, *spatial)`` across one cut; all get the same rank.

    Value number k of ``s`` is the root of the sum of squares of the kernels' own, so that its tails are what
    a truncation of all of them discards.
    """

    kernels: Tensor
    order: tuple[int, ...]
    parts: tuple[tuple[Tensor, Tensor, Tensor], ...]
    s: Tensor

    @classmethod
    def of(cls, kernels: Tensor, cut: Cut) -> Unfolded:
        """Return the decompositions of ``kernels`` across ``cut``."""
        left, right = cut.modes(kernels.ndim - 1)
        parts = tuple(svd(unfold(kernel, left)) for kernel in kernels)
        s = torch.stack([own for _, own, _ in parts]).square().sum(0).sqrt()
        return cls(kernels, left + right, parts, s)

    @property
    def sides(self) -> tuple[int, int]:
        """The sizes of the two sides of the cut."""
        u, _, svh = self.parts[0]
        return u.shape[0], svh.shape[1]

    @property
    def full(self) -> int:
        """The full rank."""
        return min(self.sides)

    @cached_property
    def tails(self) -> Tensor:
        """The squared norm that a truncation to each rank discards, of all kernels together."""
        return tail_energies(self.s)

    def truncated(self, rank: int) -> Tensor:
        """Return the kernels at ``rank``; at the full rank they are as they were."""
        if rank >= self.full:
            return self.kernels
        shape = [self.kernels.shape[1 + mode] for mode in self.order]
        inverse = [self.order.index(mode) for mode in range(len(self.order))]
        folded = [(u[:, :rank] @ svh[:rank]).reshape(shape).permute(inverse) for u, _, svh in self.parts]
        return torch.stack(folded)

    def measured_rank(self, dtype: torch.dtype) -> int:
        """Return how many singular values, of the kernel with most, are no mere rounding of ``dtype``.

        Rounding leaves a matrix of independent entries of about eps times the typical entry, whose norm is
        that times sqrt(m) + sqrt(n).
        """
        m, n = self.sides
        eps = torch.finfo(dtype).eps
        most = 0
        for _, s, _ in self.parts:
            rounding = eps * float(s.norm()) / math.sqrt(m * n) * (math.sqrt(m) + math.sqrt(n))
            most = max(most, int((s > max(NEGLIGIBLE * float(s[0]), rounding)).sum()))
        return most


def alternating(kernels: Tensor, cuts: Sequence[Cut], ranks: Sequence[int], norm: float) -> Tensor:
    """Return kernels truncated along one cut after another, round by round, until all ranks nearly hold.

    By themselves the rounds converge like 1/k, since the sets meet at a small angle: the step is therefore
    extrapolated from the last rounds (Anderson 1965), which needs a tenth of them. Where no cuts cross the
    ranks hold already, and ``kernels`` are returned.
    """
    ndim = kernels.ndim - 1
    if not any(one.crosses(other, ndim) for one in cuts for other in cuts if one != other):
        return kernels
    points: list[Tensor] = []
    steps: list[Tensor] = []
    start = kernels
    for _ in range(ROUNDS):
        kernels, worst = start, 0.0
        for cut, rank in zip(cuts, ranks, strict=True):
            unfolded = Unfolded.of(kernels, cut)
            kernels = unfolded.truncated(rank)
        for cut, rank in zip(cuts[:-1], ranks[:-1], strict=True):
            worst = max(worst, float(Unfolded.of(kernels, cut).tails[rank]))
        if math.sqrt(worst) <= SETTLED * norm:
            break
        points, steps = [*points, start.flatten()][-MEMORY:], [*steps, (kernels - start).flatten()][-MEMORY:]
        start = _extrapolated(points, steps).reshape(kernels.shape)
    return kernels


def _extrapolated(points: list[Tensor], steps: list[Tensor]) -> Tensor:
    """Return the next point: that at which a linear model of the last steps vanishes, one step further."""
    here = points[-1] + steps[-1]
    if len(points) < 2:
        return here
    moved, changed = torch.stack(points, 1).diff(dim=1), torch.stack(steps, 1).diff(dim=1)
    weights = torch.linalg.lstsq(changed, steps[-1][:, None]).solution
    return here - ((moved + changed) @ weights)[:, 0]
