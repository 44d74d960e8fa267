"""The Tucker decomposition: a small core and one matrix for each compressed leg."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tncompress.cuts import legs_of
from tncompress.formats.base import Fit, Format, Ranks, Shape, Stage, register_format
from tncompress.formats.chain import IN, OUT
from tncompress.linalg import (
    bond_scale,
    followed_vectors,
    leading,
    leading_vectors,
    orthonormalised,
    projected,
    single_suffices,
    singular_values,
    squared_norm,
    svd,
    unfold,
    working_copy,
)
from tncompress.products import product

SWEEPS, TOLERANCE = 10, 1e-4
"""Sweeps at most, and the part of the squared error that one has to take off for another to follow."""

SINGLE_FLOOR = 1e-2
"""The least squared error, relative, at which sweeps run in float32."""


@register_format("tucker")
@dataclass(frozen=True)
class Tucker(Format):
    """A core with a factor matrix on its channel legs (``legs="channels"``) or on every leg (``"all"``).

    Ranks are those of ``in``, of the spatial legs (with ``"all"``), and of ``out``, in this order. With
    ``"channels"`` it runs as 1x1, kh x kw, 1x1 (Kim et al. 2016). A kernel without spatial extent is a
    matrix: it has one bond and no core.

    >>> Tucker().factor_shapes((64, 32, 3, 3), ranks=(8, 16))
    ((8, 32), (16, 8, 3, 3), (64, 16))
    """

    legs: str = "channels"

    def __post_init__(self) -> None:
        if self.legs not in ("channels", "all"):
            raise ValueError(f"tucker's legs are 'channels' or 'all', got {self.legs!r}")

    def modes(self, shape: Shape) -> tuple[int, ...]:
        """Return the kernel modes that have a bond, in the order of the ranks."""
        wide = _wide(shape)
        if not wide:
            return (IN,)
        return (IN, *(wide if self.legs == "all" else ()), OUT)

    def network(self, shape: Shape) -> tuple[tuple[str, ...], ...]:
        names, modes, wide = legs_of(len(shape)), self.modes(shape), _wide(shape)
        thin = tuple(names[mode] for mode in range(2, len(shape)) if mode not in wide)
        first = ("r0", "in", *thin)
        if not wide:
            return first, ("out", "r0")
        bonds = {mode: f"r{i}" for i, mode in enumerate(modes)}
        spatial = tuple((bonds[mode], names[mode]) for mode in wide if mode in bonds)
        core = (bonds[OUT], "r0", *(bonds.get(mode, names[mode]) for mode in wide))
        return first, *spatial, core, ("out", bonds[OUT])

    def max_ranks(self, shape: Shape) -> Ranks:
        total = math.prod(shape)
        return tuple(min(shape[mode], total // shape[mode]) for mode in self.modes(shape))

    def feasible(self, shape: Shape, ranks: Ranks) -> Ranks:
        modes, clipped = self.modes(shape), list(ranks)
        if len(modes) == 1:
            return ranks
        fixed = math.prod(shape[mode] for mode in _wide(shape) if mode not in modes)
        while True:
            before = list(clipped)
            for i, rank in enumerate(clipped):
                clipped[i] = min(rank, fixed * math.prod(clipped) // rank)
            if clipped == before:
                return tuple(clipped)

    def stages(self, shape: Shape, ranks: Ranks) -> tuple[Stage, ...]:
        """Return 1x1, the core, 1x1; spatial factors of ``legs="all"`` act on each bond channel before it."""
        modes, wide = self.modes(shape), _wide(shape)
        ones = (1,) * (len(shape) - 2)
        thin = tuple(mode - 2 for mode in range(2, len(shape)) if mode not in wide)
        stages = [Stage(0, (ranks[0], shape[IN], *ones), thin)]
        if not wide:
            return stages[0], Stage(1, (shape[OUT], ranks[0], *ones))
        channels, spatial = ranks[0], modes[1:-1]
        for i, mode in enumerate(spatial, start=1):
            window = tuple(shape[mode] if axis == mode - 2 else 1 for axis in range(len(ones)))
            stages.append(Stage(i, (channels * ranks[i], 1, *window), (mode - 2,), channels, channels))
            channels *= ranks[i]
        core = 1 + len(spatial)
        if spatial:
            stages.append(Stage(core, (ranks[-1], channels, *ones)))
        else:
            stages.append(Stage(core, (ranks[-1], channels, *shape[2:]), tuple(mode - 2 for mode in wide)))
        return *stages, Stage(core + 1, (shape[OUT], ranks[-1], *ones))

    def spectra(self, kernel: Tensor) -> tuple[Tensor, ...]:
        kernel = working_copy(kernel)
        return tuple(singular_values(unfold(kernel, [mode])) for mode in self.modes(kernel.shape))

    def fit(self, kernel: Tensor, ranks: Ranks) -> Fit:
        """Return the HOOI fit (De Lathauwer et al. 2000), started from a sequentially truncated HOSVD.

        Sweeps never raise the error, which is at most that of the HOSVD: the sum of the squared tails.
        """
        shape = tuple(kernel.shape)
        ranks = self.feasible(shape, self.check_ranks(shape, ranks))
        single = single_suffices(kernel)
        work = working_copy(kernel, single=single)
        total = squared_norm(work)
        found = self._found_in_single(work, ranks, total) if single else None
        core, bases = found or _swept(work.double(), *self._truncated(work, ranks, single=single), total)
        error = math.sqrt(_squared_distance(work, core, bases) / total) if total > 0 else 0.0
        factors = self._factors(core, bases, shape)
        shapes = self.factor_shapes(shape, ranks)
        made = (factor.reshape(size) for factor, size in zip(factors, shapes, strict=True))
        return self.as_fit(made, kernel, error)

    def estimate(self, kernels: Tensor, ranks: Ranks) -> float:
        """Return the relative error of the truncated HOSVD, which sweeps then lower by little."""
        shape = tuple(kernels.shape[1:])
        ranks = self.feasible(shape, self.check_ranks(shape, ranks))
        single = single_suffices(kernels)
        works = [working_copy(kernel, single=single) for kernel in kernels]
        squared = sum(_squared_distance(work, *self._truncated(work, ranks, single=single)) for work in works)
        total = sum(squared_norm(work) for work in works)
        return math.sqrt(max(squared, 0.0) / total) if total > 0 else 0.0

    def _truncated(
        self, work: Tensor, ranks: Ranks, *, single: bool = False
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return core and bases of the sequentially truncated HOSVD, the bond that loses most first."""
        core, bases = work, dict[int, Tensor]()
        for mode, rank in self._most_cut_first(work, ranks):
            bases[mode], rest, _ = leading(unfold(core, [mode]), rank, single=single)
            others = [size for other, size in enumerate(core.shape) if other != mode]
            core = rest.reshape(rank, *others).movedim(0, mode)
        return core, bases

    def _most_cut_first(self, work: Tensor, ranks: Ranks) -> list[tuple[int, int]]:
        pairs = zip(self.modes(tuple(work.shape)), ranks, strict=True)
        return sorted(pairs, key=lambda pair: pair[1] / work.shape[pair[0]])

    def _found_in_single(
        self, work: Tensor, ranks: Ranks, total: float
    ) -> tuple[Tensor, dict[int, Tensor]] | None:
        """Return core and bases, start and sweeps in float32, or None where that is not for float32.

        What is found is made orthonormal in float64, where the kernel is projected on it. Where less than
        ``SINGLE_FLOOR`` of the squared norm is discarded, float32 can't tell one sweep from the next.
        """
        modes = self._most_cut_first(work, ranks)
        if len(modes) == 1 or all(rank == work.shape[mode] for mode, rank in modes):
            return None
        last = work.ndim - 1  # ``in`` goes there: the largest products then need no copies
        place = {mode: last if mode == IN else mode - (mode > IN) for mode, _ in modes}
        moved = work.movedim(IN, last).contiguous()
        core, bases = moved, dict[int, Tensor]()
        for mode, rank in modes:
            bases[place[mode]] = leading_vectors(_rows(core, place[mode]), rank)
            core = _project(core, place[mode], bases[place[mode]])
        if total - squared_norm(core) <= SINGLE_FLOOR * total:
            return None
        bases = _swept(moved, core, bases, total)[1]
        del moved
        found = {mode: orthonormalised(bases[place[mode]].double()) for mode, _ in modes}
        core = work
        for mode in sorted(found):  # ``out`` first, for which nothing is copied
            core = _project(core, mode, found[mode])
        return core, found

    def _factors(self, core: Tensor, bases: dict[int, Tensor], shape: Shape) -> list[Tensor]:
        """Return the factors in storage order, each bond's singular values split over its two sides.

        The core is first turned to its own principal directions, in which it is all-orthogonal.
        """
        turns = {mode: svd(unfold(core, [mode]))[:2] for mode in bases}
        matrices = {}
        for mode, (u, s) in turns.items():
            scale = bond_scale(s)
            core = _project(core, mode, u / scale)
            matrices[mode] = bases[mode] @ u * scale
        if len(matrices) == 1:
            return [matrices[IN].mT, core.flatten(1)]
        spatial = [matrices[mode].mT for mode in sorted(matrices) if mode > IN]
        return [matrices[IN].mT, *spatial, core, matrices[OUT]]


def _wide(shape: Shape) -> tuple[int, ...]:
    return tuple(mode for mode in range(2, len(shape)) if shape[mode] > 1)


def _project(tensor: Tensor, mode: int, basis: Tensor) -> Tensor:
    if mode == 0:  # no other order of the modes has to be made
        return projected(basis, tensor.flatten(1)).reshape(-1, *tensor.shape[1:])
    if mode == tensor.ndim - 1:
        return product(tensor.flatten(0, -2), basis).unflatten(0, tensor.shape[:-1])
    return torch.tensordot(tensor, basis, dims=([mode], [0])).movedim(-1, mode)


def _rows(tensor: Tensor, mode: int) -> Tensor:
    """Return the unfolding with ``mode`` as rows; the last mode's is a view, its columns in another order."""
    return tensor.flatten(0, -2).mT if mode == tensor.ndim - 1 else unfold(tensor, [mode])


def _swept(
    work: Tensor, core: Tensor, bases: dict[int, Tensor], total: float
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return core and bases after sweeps as long as they pay; none of them lowers the core's norm.

    As sweeps creep along one direction, each begins as far again beyond what the last one found. Where that
    leads nowhere the next begins at the best that there is.
    """
    if len(bases) == 1 or all(basis.shape[0] == basis.shape[1] for basis in bases.values()):
        return core, bases
    kept, ahead = squared_norm(core), bases
    for _ in range(SWEEPS):
        trial, found = core, dict(ahead)
        for mode in found:
            trial = work
            for other in found:
                if other != mode:
                    trial = _project(trial, other, found[other])
            found[mode] = followed_vectors(_rows(trial, mode), found[mode])
        trial = _project(trial, mode, found[mode])
        gain = squared_norm(trial) - kept
        if gain <= 0:
            if ahead is bases:
                break
            ahead = bases
            continue
        before, bases, core, kept = bases, found, trial, kept + gain
        if gain <= TOLERANCE * (total - kept):
            break
        ahead = {mode: _beyond(before[mode], basis) for mode, basis in bases.items()}
    return core, bases


def _beyond(before: Tensor, basis: Tensor) -> Tensor:
    """Return an orthonormal basis of the space that lies as far beyond ``basis`` as ``before`` behind it."""
    return torch.linalg.qr(2 * basis - before @ (before.mT @ basis)).Q


def _squared_distance(work: Tensor, core: Tensor, bases: dict[int, Tensor]) -> float:
    """Return the squared error, from the norms where they differ enough and by subtraction where not."""
    total, kept = squared_norm(work), squared_norm(core)
    if total - kept > 1e-8 * total:
        return total - kept
    rebuilt = core
    for mode, basis in bases.items():
        rebuilt = _project(rebuilt, mode, basis.mT)
    return squared_norm(work - rebuilt)
