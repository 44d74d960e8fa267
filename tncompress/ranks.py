"""From a rank policy to the ranks of one layer, for any format alike.

A format with spectra is grown bond by bond from its smallest ranks: the next step is the one that adds the
most to the logarithm of the kept weight per parameter added. (Weights kept across several cuts multiply,
roughly; adding the discarded ones up instead would starve one bond to fill another.) The sum of the tails
bounds the squared error, so a policy on the error is kept for certain. A format without spectra (CP) is
fitted at several ranks instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from tncompress.formats import Fit, Format
from tncompress.linalg import tail_energies
from tncompress.spec import Energy, FixedRank, ParamsRatio, RankPolicy, RelError, Settings

Ranks = tuple[int, ...]


class NoRanks(Exception):  # noqa: N818 - a verdict on a layer, which the plan turns into a Skip
    """No ranks satisfy the policy within the size that is allowed; the message is the reason."""


@dataclass(frozen=True)
class Step:
    """Ranks on the way from the smallest to the largest, with a bound on their squared relative error."""

    ranks: Ranks
    params: int
    bound: float


def choose(kernel: Tensor, settings: Settings, *, allow_larger: bool = False) -> tuple[Ranks, Fit]:
    """Return the ranks that ``settings`` ask for on ``kernel``, and the fit there.

    Unless ``allow_larger``, factors with as many parameters as the kernel are refused: :class:`NoRanks`
    says why. Ranks that the format cannot have are a ``ValueError``.
    """
    format, policy = settings.format, settings.rank
    limit = math.inf if allow_larger else kernel.numel() - 1
    if isinstance(policy, FixedRank):
        ranks = _fixed(format, kernel, policy)
    elif isinstance(policy, ParamsRatio):
        ranks = _largest_within(format, kernel, settings, min(limit, policy.ratio * kernel.numel()))
    else:
        return _smallest_reaching(format, kernel, settings, limit, _allowed_error(policy))
    params = format.num_params(tuple(kernel.shape), ranks)
    if params > limit:
        raise NoRanks(f"{format} at ranks {ranks} would hold {params:,} parameters, dense {kernel.numel():,}")
    return ranks, format.fit(kernel, ranks)


def _allowed_error(policy: RankPolicy) -> float:
    if isinstance(policy, RelError):
        return policy.error
    if isinstance(policy, Energy):
        return math.sqrt(1 - policy.kept)
    raise TypeError(f"unknown rank policy {policy!r}")


def _fixed(format: Format, kernel: Tensor, policy: FixedRank) -> Ranks:
    shape = tuple(kernel.shape)
    bonds = len(format.max_ranks(shape))
    asked = policy.ranks if isinstance(policy.ranks, tuple) else (policy.ranks,) * bonds
    return format.feasible(shape, format.check_ranks(shape, asked))


def _largest_within(format: Format, kernel: Tensor, settings: Settings, limit: float) -> Ranks:
    """Return the ranks at the end of the path that stays within ``limit`` parameters."""
    last = None
    for last in rank_path(format, kernel, settings, limit):
        pass
    if last is None:
        least = _grids(format, tuple(kernel.shape), settings)
        ranks = tuple(grid[0] for grid in least)
        need = format.num_params(tuple(kernel.shape), ranks)
        raise NoRanks(f"the smallest ranks {ranks} of {format} hold {need:,} parameters, allowed {int(limit):,}")
    return last.ranks


def _smallest_reaching(
    format: Format, kernel: Tensor, settings: Settings, limit: float, error: float
) -> tuple[Ranks, Fit]:
    """Return the fewest parameters on the path whose relative error is at most ``error``."""
    path = list(rank_path(format, kernel, settings, limit, until=error**2))
    if path and path[-1].bound <= error**2:
        return path[-1].ranks, format.fit(kernel, path[-1].ranks)
    fits: dict[Ranks, Fit] = {}

    def reaches(step: Step) -> bool:
        fits[step.ranks] = format.fit(kernel, step.ranks)
        return fits[step.ranks].rel_error <= error

    found = _first(path, reaches) if path else None
    if found is None:
        raise NoRanks(f"{format} needs as many parameters as the dense kernel for an error of {error:.3g}")
    return found.ranks, fits[found.ranks]


def _first(path: list[Step], good: Callable[[Step], bool]) -> Step | None:
    """Return the first good step of ``path`` by bisection, good steps coming last."""
    if not good(path[-1]):
        return None
    low, high = 0, len(path) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(path[middle]) else (middle + 1, high)
    return path[high]


def rank_path(
    format: Format, kernel: Tensor, settings: Settings, limit: float, until: float = 0.0
) -> Iterator[Step]:
    """Yield steps of growing ranks, from the smallest, within ``limit`` parameters.

    The path ends where nothing fits any more, or where the bound on the squared error reaches ``until``.
    Formats without spectra have an infinite bound until they are full.
    """
    shape = tuple(kernel.shape)
    grids, params_of = _grids(format, shape, settings), _params_function(format, shape)
    spectra = format.spectra(kernel)
    tails = [tail_energies(s).tolist() for s in spectra] if spectra else None
    total = tails[0][0] or 1.0 if tails else 1.0
    log_kept = [[math.log(max(1 - t / total, 1e-30)) for t in tail] for tail in tails] if tails else None
    places = [0] * len(grids)
    ranks = tuple(grid[0] for grid in grids)
    params = params_of(ranks)

    def bound(ranks: Ranks) -> float:
        if tails is None:
            return math.inf
        return sum(tail[rank] for tail, rank in zip(tails, ranks, strict=True)) / total

    while params <= limit:
        step = Step(ranks, params, bound(ranks))
        yield step
        if step.bound <= until:
            return
        moves = []
        for i, grid in enumerate(grids):
            if places[i] + 1 < len(grid):
                grown = (*ranks[:i], grid[places[i] + 1], *ranks[i + 1 :])
                cost = params_of(grown)
                gain = log_kept[i][grown[i]] - log_kept[i][ranks[i]] if log_kept else 1.0
                moves.append((gain / max(cost - params, 1), -i, grown, cost))
        moves.sort(reverse=True)
        for _, i, grown, cost in moves:
            if cost <= limit and format.feasible(shape, grown) == grown:
                places[-i] += 1
                ranks, params = grown, cost
                break
        else:
            return


def _grids(format: Format, shape: tuple[int, ...], settings: Settings) -> list[list[int]]:
    """Return the ranks that each bond may take: multiples of ``round_to`` from ``min_rank`` on, and full."""
    grids = []
    for top in format.max_ranks(shape):
        first = -(-settings.min_rank // settings.round_to) * settings.round_to
        grids.append([*range(first, top, settings.round_to), top])
    return grids


def _params_function(format: Format, shape: tuple[int, ...]) -> Callable[[Ranks], int]:
    """Return a quick ``ranks -> number of parameters``: a sum over factors of products of their bonds."""
    bonds = len(format.max_ranks(shape))
    sizes = format.factor_shapes(shape, (1,) * bonds)
    terms = [
        (math.prod(size), [i for i in range(bonds) if f"r{i}" in legs])
        for size, legs in zip(sizes, format.network(shape), strict=True)
    ]
    return lambda ranks: sum(constant * math.prod(ranks[i] for i in which) for constant, which in terms)
