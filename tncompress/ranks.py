"""From a rank policy to the ranks of one layer, for any format alike.

Candidates lie on a path from the smallest ranks to the full ones. On it every bond discards about the same
weight: a bound on the discarded weight is lowered step by step, and each bond takes the smallest rank that
keeps it. Parameters grow along the path and the error falls, so a policy is met by bisection. The sum of
the tails bounds the squared error from above, the largest tail from below; between the two a few fits find
where a policy on the error is met. A format without spectra (CP, networks with loops) has its ranks
themselves as the path, and is fitted where the error must be known.

With a metric, spectra are those of the whitened kernel, fits are made in the metric, and the error is that of
the layer's output. The sum of the tails is then an estimate, and a policy on the error is met by fits.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor

from tncompress.cuts import Cut, effective_rank, legs_of, spectrum
from tncompress.formats import Fit, Format
from tncompress.linalg import tail_energies
from tncompress.metric import Metric
from tncompress.policies import (
    EVBMF,
    Energy,
    Entropy,
    FixedRank,
    ParamsRatio,
    RankFraction,
    RankPolicy,
    RelError,
)
from tncompress.spec import Settings
from tncompress.vbmf import evbmf_rank
from tncompress.weighted import WeightedKernels, fit_in_metric, whiten

Ranks = tuple[int, ...]

RIDGE = 1e-2
"""Part of the metric's mean diagonal that fits add to it, so that they also hold on other data."""

EXACT = 1e-12
"""A relative error that counts as none."""

WORTH = 0.05
"""The part of the parameters for which a policy on the error does not try once more."""

SHORT = 9
"""The largest full rank of a bond that counts as short: 3x3 kernels and their like."""


class NoRanks(Exception):  # noqa: N818 - a verdict on a layer, which the plan turns into a Skip
    """No ranks satisfy the policy within the size that is allowed; the message is the reason."""


def choose(
    kernels: Tensor, settings: Settings, *, limit: int | float, metric: Metric | None = None
) -> tuple[Ranks, Fit | None]:
    """Return the ranks that ``settings`` ask for on a stack of ``kernels``, and the fit there.

    ``kernels`` is ``(groups, out, in, *spatial)``; its groups get the same ranks. Factors with more
    parameters than ``limit`` are refused: :class:`NoRanks` says why. Ranks that the format cannot have are a
    ``ValueError``. Of kernels on the meta device there is no fit, nor a policy on the error: their ranks are
    those of kernels with flat spectra. With a ``metric`` the errors are those of the layer's output.
    """
    format, policy = settings.one_format, settings.rank
    groups, *shape = kernels.shape
    if isinstance(policy, FixedRank | RankFraction):
        ranks = _fixed(format, tuple(shape), policy)
        _check_size(format, tuple(shape), ranks, groups, limit)
        return ranks, fit_at(format, kernels, ranks, metric)
    if kernels.is_meta and not isinstance(policy, ParamsRatio):
        raise ValueError(f"{policy.tag} needs its weights: load them, or plan with params_ratio or fixed")
    if isinstance(policy, Entropy | EVBMF):
        seen = kernels if metric is None else whiten(format, kernels, metric)
        ranks = _spectral(seen, settings, policy)
        _check_size(format, tuple(shape), ranks, groups, limit)
        return ranks, fit_at(format, kernels, ranks, metric)
    paths = RankPath(kernels, settings, metric).with_variants()
    if isinstance(policy, ParamsRatio):
        within = min(limit, policy.ratio * kernels.numel())
        return _best(
            [partial(path.largest_within, within) for path in paths],
            lambda ranks, fit: fit.loss if fit is not None else 0,
        )
    error = _allowed_error(policy)
    return _best(
        [partial(path.smallest_reaching, error, limit) for path in paths],
        lambda ranks, fit: format.num_params(tuple(shape), ranks),
    )


def _check_size(
    format: Format, shape: tuple[int, ...], ranks: Ranks, groups: int, limit: int | float
) -> None:
    params = format.num_params(shape, ranks, groups)
    if params > limit:
        raise NoRanks(f"{format} at ranks {ranks} would hold {params:,} parameters, now {limit + 1:,}")


def _spectral(kernels: Tensor, settings: Settings, policy: Entropy | EVBMF) -> Ranks:
    """Return the ranks that each bond's own spectrum asks for, on the grid of ``settings``."""
    format, shape = settings.one_format, tuple(kernels.shape[1:])
    tops = format.max_ranks(shape)
    spectra = format.spectra_of_groups(kernels)
    if spectra is None and len(tops) > 1:
        raise ValueError(
            f"{policy.tag} goes by the spectrum of each bond, and those of {format} have none: take "
            "params_ratio, rel_error, energy, rank_fraction or fixed"
        )
    if spectra is None:  # one bond, which lies on every cut: the largest that a leg asks for
        cuts = [Cut((leg,), ("rest",)) for leg in legs_of(len(shape))]
        legs = [torch.stack([spectrum(kernel, cut) for kernel in kernels]) for cut in cuts]
        wanted = [max(_asked(policy, leg.square().sum(0).sqrt(), math.prod(shape)) for leg in legs)]
    else:
        wanted = [_asked(policy, s, math.prod(shape)) for s in spectra]
    ranks = []
    for top, rank in zip(tops, wanted, strict=True):
        grid = _grid(top, settings)
        ranks.append(grid[min(bisect_left(grid, rank), len(grid) - 1)])
    return format.feasible(shape, tuple(ranks))


def _asked(policy: Entropy | EVBMF, s: Tensor, numel: int) -> int:
    if isinstance(policy, Entropy):
        return math.ceil(policy.factor * effective_rank(s))
    found = evbmf_rank(s, numel // len(s))
    return math.ceil(policy.share * found + (1 - policy.share) * len(s))


def fit_at(format: Format, kernels: Tensor, ranks: Ranks, metric: Metric | None) -> Fit | None:
    """Return the fit with which a layer is compressed; None for kernels without weights."""
    if kernels.is_meta:
        return None
    if metric is None:
        return format.fit_groups(kernels, ranks)
    return fit_in_metric(format, kernels, ranks, metric, ridge=RIDGE)


def _best(
    attempts: Sequence[Callable[[], tuple[Ranks, Fit | None]]], cost: Callable[[Ranks, Fit | None], float]
) -> tuple[Ranks, Fit | None]:
    """Return the cheapest result of the attempts that have one; raise the first verdict if none has."""
    found, verdicts = [], []
    for attempt in attempts:
        try:
            found.append(attempt())
        except NoRanks as verdict:
            verdicts.append(verdict)
    if not found:
        raise verdicts[0]
    return min(found, key=lambda result: cost(*result))


def _allowed_error(policy: RankPolicy) -> float:
    if isinstance(policy, RelError):
        return policy.error
    if isinstance(policy, Energy):
        return math.sqrt(1 - policy.kept)
    raise TypeError(f"unknown rank policy {policy!r}")


def _fixed(format: Format, shape: tuple[int, ...], policy: FixedRank | RankFraction) -> Ranks:
    if isinstance(policy, RankFraction):
        asked = tuple(policy.of(top) for top in format.max_ranks(shape))
    elif isinstance(policy.ranks, int):
        asked = tuple(min(policy.ranks, top) for top in format.max_ranks(shape))
    else:
        asked = tuple(policy.ranks)
    return format.feasible(shape, format.check_ranks(shape, asked))


class RankPath:
    """The candidate ranks for a stack of kernels, numbered from the smallest to the full ones."""

    def __init__(self, kernels: Tensor, settings: Settings, metric: Metric | None = None) -> None:
        self.kernels, self.format, self.shape = kernels, settings.one_format, tuple(kernels.shape[1:])
        self.metric = metric
        self._weighted = WeightedKernels(kernels, metric, ridge=RIDGE) if metric is not None else None
        self.params = _params_function(self.format, self.shape, len(kernels))
        self.grids = [_grid(top, settings) for top in self.format.max_ranks(self.shape)]
        seen = kernels if metric is None else whiten(self.format, kernels, metric)
        spectra = self.format.spectra_of_groups(seen)
        self.tails = [tail_energies(s).tolist() for s in spectra] if spectra is not None else None
        if self.tails is None:
            self.levels: list[float] = [*range(max(len(grid) for grid in self.grids))]
        else:
            discarded = {t[rank] for t, grid in zip(self.tails, self.grids, strict=True) for rank in grid}
            self.levels = sorted(discarded, reverse=True)

    def with_variants(self) -> list[RankPath]:
        """Return this path, and one that leaves short bonds full where some bonds are short and others not.

        A step on a short bond (those of spatial legs) is coarse: whether it pays is not seen from the tails.
        """
        short = [grid[-1] <= SHORT for grid in self.grids]
        if self.tails is None or all(short) or not any(short):
            return [self]
        other = copy.copy(self)
        other.grids = [grid[-1:] if s else grid for grid, s in zip(self.grids, short, strict=True)]
        return [self, other]

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: int) -> Ranks:
        level = self.levels[index]
        if self.tails is None:  # nothing tells the bonds apart: all grow together
            part = index % len(self) / max(1, len(self) - 1)
            grown = tuple(grid[round(part * (len(grid) - 1))] for grid in self.grids)
            return self.format.feasible(self.shape, grown)
        ranks = []
        for grid, tail in zip(self.grids, self.tails, strict=True):
            place = bisect_left(grid, -level, key=partial(_falling, tail))
            ranks.append(grid[min(place, len(grid) - 1)])
        return self.format.feasible(self.shape, tuple(ranks))

    def largest_within(self, limit: int | float) -> tuple[Ranks, Fit | None]:
        """Return the last ranks with at most ``limit`` parameters, bonds raised to fill it, and the fit."""
        ranks = self.ranks_within(limit)
        return ranks, self.fit(ranks)

    def ranks_within(self, limit: int | float) -> Ranks:
        """Return the ranks of :meth:`largest_within` without fitting them."""
        index = bisect_right(range(len(self)), limit, key=lambda i: self.params(self[i])) - 1
        if index < 0:
            least = self[0]
            raise NoRanks(
                f"the smallest ranks {least} of {self.format} hold {self.params(least):,} parameters, "
                f"allowed {int(limit):,}"
            )
        return self._filled(self[index], limit)

    def fit(self, ranks: Ranks) -> Fit | None:
        """Return the fit at ``ranks``, in the metric if there is one; None for kernels without weights."""
        if self._weighted is None:
            return fit_at(self.format, self.kernels, ranks, None)
        return self._weighted.fit(self.format, ranks)

    def estimates(self, several: Sequence[Ranks]) -> list[float]:
        """Return about the errors that :meth:`fit` reaches at ``several`` ranks, in less time."""
        if self.metric is None:
            return self.format.estimates(self.kernels, several)
        return [self.draft(ranks).loss for ranks in several]

    def draft(self, ranks: Ranks) -> Fit:
        """Return a fit at ``ranks`` that :meth:`fit` would better, in less time."""
        if self._weighted is None:
            return self.format.draft(self.kernels, ranks)
        return self._weighted.fit(self.format, ranks, draft=True)

    @property
    def tails_are_errors(self) -> bool:
        """Whether the tail of the spectrum is the squared error: of one cut, whitened as a whole."""
        if self.tails is None or len(self.tails) > 1 or (self.metric and self.metric.gradient is not None):
            return False
        patch = set(legs_of(len(self.shape))) - {"out"}
        return self.metric is None or any(patch <= set(legs) for legs in self.format.network(self.shape))

    def smallest_reaching(self, error: float, limit: int | float) -> tuple[Ranks, Fit]:
        """Return the first ranks whose relative error is at most ``error``, with the fit there."""
        affordable = range(bisect_right(range(len(self)), limit, key=lambda i: self.params(self[i])))
        by_fits = self.tails is None or self.metric is not None
        search = self._first_fitting if by_fits else self._first_bounded
        found = search(affordable, error)
        if found is None:
            too_small = len(affordable) == len(self)
            needs = "larger ranks than allowed" if too_small else "no fewer parameters than now"
            needed = f"{self.format} needs {needs} for a relative error of {error:.3g}"
            raise NoRanks(needed + (f" in {self.kernels.dtype}" if self.kernels.dtype.itemsize < 4 else ""))
        return found

    def _first_fitting(self, indices: range, error: float) -> tuple[Ranks, Fit] | None:
        fit = cache(lambda index: cast(Fit, self.fit(self[index])))
        index = bisect_left(indices, True, key=lambda i: fit(i).loss <= max(error, EXACT))
        return (self[index], fit(index)) if index < len(indices) else None

    def _first_bounded(self, indices: range, error: float) -> tuple[Ranks, Fit] | None:
        """Return the first ranks whose fits keep to ``error``, but for :data:`WORTH` of their parameters.

        Fits reach about the same share of the bound all along a path, so that few of them find the place.
        """
        low, high, share, found = 0, len(indices), 1.0, None
        while low < high:
            index = bisect_left(
                indices, True, low, high, key=lambda i: share * self.bound(self[i]) <= error**2
            )
            index = min(index, high - 1)
            if self.least(self[index]) > (1 + 1e-6) * error**2 + EXACT**2:
                low = index + 1
                continue
            fit = self.format.fit_groups(self.kernels, self[index])
            if fit.rel_error**2 - error**2 <= 1e-9 * error**2 + EXACT**2:
                found, worth = (self[index], fit), (1 - WORTH) * self.params(self[index])
                high = bisect_right(indices, worth, low, index, key=lambda i: self.params(self[i]))
            else:
                low = index + 1
            bound = self.bound(self[index])
            share = min(1.0, fit.rel_error**2 / bound) if bound > 0 else 1.0
        return found

    def bound(self, ranks: Ranks) -> float:
        """Return the sum of the discarded weights, relative: it bounds the squared error."""
        assert self.tails is not None
        total = self.tails[0][0] or 1.0
        return sum(tail[rank] for tail, rank in zip(self.tails, ranks, strict=True)) / total

    def least(self, ranks: Ranks) -> float:
        """Return the largest of the discarded weights, relative: no fit has a smaller squared error."""
        assert self.tails is not None
        total = self.tails[0][0] or 1.0
        return max(tail[rank] for tail, rank in zip(self.tails, ranks, strict=True)) / total

    def _filled(self, ranks: Ranks, limit: int | float) -> Ranks:
        """Return ``ranks`` with single bonds raised, the most weight per parameter first, while it fits."""
        while self.tails is not None:
            moves = []
            for i, (grid, tail) in enumerate(zip(self.grids, self.tails, strict=True)):
                place = bisect_right(grid, ranks[i])
                if place < len(grid):
                    raised = (*ranks[:i], grid[place], *ranks[i + 1 :])
                    cost = self.params(raised)
                    if cost <= limit and self.format.feasible(self.shape, raised) == raised:
                        gain = tail[ranks[i]] - tail[raised[i]]
                        moves.append((gain / (cost - self.params(ranks)), raised))
            if not moves:
                break
            ranks = max(moves)[1]
        return ranks


def _falling(tail: Sequence[float], rank: int) -> float:
    """Return what rises with the rank: the weight that it leaves out, negated."""
    return -tail[rank]


def _grid(top: int, settings: Settings) -> list[int]:
    """Return the ranks of a bond: multiples of ``round_to`` within the bounds, and the full one."""
    first = -(-settings.min_rank // settings.round_to) * settings.round_to
    last = min(top, settings.max_rank or top)
    grid = list(range(first, last + 1, settings.round_to))
    return grid if grid and (grid[-1] == last or last < top) else [*grid, last]


def _params_function(format: Format, shape: tuple[int, ...], groups: int) -> Callable[[Ranks], int]:
    """Return a quick ``ranks -> number of parameters``: a sum over factors of products of their bonds."""
    bonds = len(format.max_ranks(shape))
    sizes = format.factor_shapes(shape, (1,) * bonds)
    terms = [
        (math.prod(size), [i for i in range(bonds) if f"r{i}" in legs])
        for size, legs in zip(sizes, format.network(shape), strict=True)
    ]
    return lambda ranks: groups * sum(c * math.prod(ranks[i] for i in which) for c, which in terms)
