"""The multiple-choice knapsack: one candidate for each layer, the least summed loss, limits on the costs.

The relaxation, in which a layer may be a mixture of candidates, gives multipliers (prices) and a lower bound.
With one resource it is solved on the lower convex hulls of the layers' candidates: their edges, steepest
first, are taken as far as the limit goes (Sinha and Zoltners 1979), which is the bisection of the Lagrange
multiplier carried out on a sorted list. With several it is a linear program. A feasible choice is
then made by hand and filled up. At most the gap between its loss and the bound can be won, so any candidate
that its layer pays more for than the gap, at the prices of the relaxation, is out; a branch and bound
over the rest finishes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

NEGLIGIBLE = 1e-9
"""A gap, over the loss, that is not worth closing."""

ABSENT = 1e30
"""The cost, over the limit, of a candidate that is none; finite, so that times zero it is zero."""

NODES = 200_000
"""How many nodes times variables the branch and bound may open: the same answer on every machine."""


@dataclass(frozen=True)
class Solution:
    """The candidate chosen for each layer, what they lose and cost together, and how good that is.

    ``bound`` is that of the relaxation: no choice within the limits loses less. ``multipliers`` say how much
    less the relaxation would lose for each further unit of a resource.
    """

    choice: tuple[int, ...]
    loss: float
    costs: tuple[float, ...]
    bound: float
    multipliers: tuple[float, ...]

    @property
    def gap(self) -> float:
        """How much more than the bound the choice loses."""
        return self.loss - self.bound


@dataclass(frozen=True)
class Infeasible:
    """No choice is within the limits.

    ``smallest`` holds the least that each resource can come to by itself, ``closest`` the costs of the choice
    that oversteps the limits by the smallest factor.
    """

    smallest: tuple[float, ...]
    closest: tuple[float, ...]


def solve(
    losses: Sequence[Float[ndarray, " _"]],
    costs: Sequence[Float[ndarray, "_ k"]],
    limits: Float[ndarray, " k"],
) -> Solution | Infeasible:
    """Return one candidate for each layer: the least summed loss with summed costs within ``limits``.

    Layer number l has candidates with ``losses[l]`` and, in each of the k resources, ``costs[l]``.

    >>> made = solve([np.array([0.0, 1.0, 4.0])] * 2, [np.array([[9.0], [4.0], [1.0]])] * 2, np.array([8.0]))
    >>> made.choice, made.loss
    ((1, 1), 2.0)
    """
    table = _Table.of(losses, costs, limits)
    if not table.fits(table.costs.min(1).sum(0)):
        return table.infeasible()
    multipliers, picks = table.relaxed()
    priced = table.losses + table.costs @ multipliers
    bound = float(priced.min(1).sum() - multipliers.sum())
    found = table.repaired(picks)
    if found is None:
        found = table.closest()
        if not table.fits(table.total(found)):
            return table.infeasible()
    best = table.finished(table.filled(found), priced - priced.min(1, keepdims=True), bound)
    loss = table.loss(best)
    return Solution(
        choice=tuple(int(table.numbers[layer, pick]) for layer, pick in enumerate(best)),
        loss=loss,
        costs=tuple((table.total(best) * table.limits).tolist()),
        bound=min(bound, loss),
        multipliers=tuple((multipliers / table.limits).tolist()),
    )


@dataclass(frozen=True)
class _Table:
    """The candidates that no other one of their layer dominates, in arrays, and the limits.

    Costs are fractions of the limits. Rows are filled up with candidates of infinite loss and the cost
    ``ABSENT``; ``numbers`` says which candidate each was.
    """

    losses: Float[ndarray, "n c"]
    costs: Float[ndarray, "n c k"]
    limits: Float[ndarray, " k"]
    numbers: Int[ndarray, "n c"]

    @classmethod
    def of(cls, losses: Sequence[ndarray], costs: Sequence[ndarray], limits: Float[ndarray, " k"]) -> _Table:
        """Check the arguments of :func:`solve`, and put them into arrays."""
        if len(losses) != len(costs) or not len(losses):
            raise ValueError(
                f"wanted losses and costs of one or more layers, got {len(losses)}, {len(costs)}"
            )
        if not (limits > 0).all() or not np.isfinite(limits).all():
            raise ValueError(f"limits are above 0 and finite, got {limits.tolist()}")
        for layer, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
            if not len(loss) or cost.shape != (len(loss), len(limits)):
                raise ValueError(f"layer {layer} has losses {loss.shape} and costs {cost.shape}")
            if not (np.isfinite(loss).all() and np.isfinite(cost).all() and (cost >= 0).all()):
                raise ValueError(f"layer {layer} has a loss or cost that is infinite, NaN or a negative cost")
        kept = [_undominated(np.column_stack([a, c])) for a, c in zip(losses, costs, strict=True)]
        shape = len(kept), max(map(len, kept))
        table = cls(
            np.full(shape, np.inf), np.full((*shape, len(limits)), ABSENT), limits, np.zeros(shape, int)
        )
        for layer, which in enumerate(kept):
            table.losses[layer, : len(which)] = losses[layer][which]
            table.costs[layer, : len(which)] = costs[layer][which] / limits
            table.numbers[layer, : len(which)] = which
        return table

    def total(self, picks: Int[ndarray, " n"]) -> Float[ndarray, " k"]:
        """Return the summed costs of a choice."""
        return self.costs[np.arange(len(picks)), picks].sum(0)

    def loss(self, picks: Int[ndarray, " n"]) -> float:
        """Return the summed loss of a choice."""
        return float(self.losses[np.arange(len(picks)), picks].sum())

    def fits(self, total: Float[ndarray, "*any k"]) -> ndarray:
        """Say whether summed costs are within the limits, but for rounding."""
        return np.asarray((total <= 1 + 1e-14 * len(self.losses)).all(-1))

    def relaxed(self) -> tuple[Float[ndarray, " k"], Int[ndarray, " n"]]:
        """Return the multipliers of the relaxation, and a choice near its solution."""
        return self._along_hulls() if self.costs.shape[2] == 1 else self._by_linear_program()

    def _along_hulls(self) -> tuple[Float[ndarray, " 1"], Int[ndarray, " n"]]:
        """Return the multiplier of the one resource, and the last choice on the hulls that fits."""
        hulls = [_lower_hull(c[:, 0], a) for c, a in zip(self.costs, self.losses, strict=True)]
        edges = []
        for layer, hull in enumerate(hulls):
            gains = -np.diff(self.losses[layer, hull])
            steps = np.diff(self.costs[layer, hull, 0])
            edges += [(gain / step, step, layer) for gain, step in zip(gains, steps, strict=True)]
        edges.sort(key=lambda edge: -edge[0])  # stable: a layer's edges stay in their order
        start = sum(self.costs[layer, hull[0], 0] for layer, hull in enumerate(hulls))
        spent = start + np.cumsum([step for _, step, _ in edges])
        affordable = int(np.searchsorted(spent, 1.0, side="right")) if edges else 0
        taken = np.bincount([layer for *_, layer in edges[:affordable]], minlength=len(hulls))
        slope = edges[affordable][0] if affordable < len(edges) else 0.0
        picks = np.array([hull[k] for hull, k in zip(hulls, taken, strict=True)])
        return np.array([slope]), picks

    def _by_linear_program(self) -> tuple[Float[ndarray, " k"], Int[ndarray, " n"]]:
        """Return the multipliers, and what the relaxation's solution has most of in each layer.

        The program is solved twice, the second time with losses in units of what is lost, so that the
        solver's absolute tolerances do no harm.
        """
        from scipy.optimize import linprog

        layers, numbers = np.nonzero(np.isfinite(self.losses))
        losses, costs = self.losses[layers, numbers], self.costs[layers, numbers]
        one_each, ones = _one_each(layers, len(self.losses)), np.ones(len(self.losses))
        unit = max(losses.max(), np.finfo(float).tiny)
        for _ in range(2):
            found = linprog(
                losses / unit, A_ub=costs.T, b_ub=np.ones(costs.shape[1]), A_eq=one_each, b_eq=ones
            )
            if found.x is None:  # no mixture is within the limits
                break
            multipliers, shares = np.maximum(-found.ineqlin.marginals, 0) * unit, found.x
            unit = max(found.fun * unit, 1e-12 * unit)
        else:
            mixed = np.zeros_like(self.losses)
            mixed[layers, numbers] = shares
            return multipliers, mixed.argmax(1)
        return np.zeros(costs.shape[1]), self.losses.argmin(1)

    def repaired(self, picks: Int[ndarray, " n"]) -> Int[ndarray, " n"] | None:
        """Return a choice within the limits, by the changes that lose least for what they save, or None."""
        picks = picks.copy()
        while not self.fits(total := self.total(picks)):
            after = total + self._changes(self.costs, picks)
            saved = np.maximum(total - 1, 0).sum() - np.maximum(after - 1, 0).sum(-1)
            lost = np.maximum(self._changes(self.losses, picks), 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                price = np.where(saved > 1e-12, lost / saved, np.inf)
            if not np.isfinite(price.min()):
                return None
            layer, number = np.unravel_index(price.argmin(), price.shape)
            picks[layer] = number
        return picks

    def filled(self, picks: Int[ndarray, " n"]) -> Int[ndarray, " n"]:
        """Return the choice after single changes that lose less and still fit, the largest gain first."""
        picks = picks.copy()
        while True:
            change = self._changes(self.losses, picks)
            fits = self.fits(self.total(picks) + self._changes(self.costs, picks))
            change = np.where(fits, change, 0.0)
            layer, number = np.unravel_index(change.argmin(), change.shape)
            if change[layer, number] >= 0:
                return picks
            picks[layer] = number

    def _changes(self, values: ndarray, picks: Int[ndarray, " n"]) -> ndarray:
        """Return by how much the sum of ``values`` changes if one layer takes another candidate."""
        return values - values[np.arange(len(picks)), picks][:, None]

    def finished(
        self, picks: Int[ndarray, " n"], reduced: Float[ndarray, "n c"], bound: float
    ) -> Int[ndarray, " n"]:
        """Return the best choice there is (as far as :data:`NODES` go), given one and a bound.

        ``reduced`` holds what a candidate is worse than the best one of its layer, at the relaxation's
        prices; a choice that loses less than ``picks`` has none that is worse by more than the gap.
        """
        loss = self.loss(picks)
        gap = loss - bound
        if gap <= NEGLIGIBLE * abs(loss):
            return picks
        layers, numbers = np.nonzero(reduced <= gap * (1 + 1e-6))
        values = (self.losses[layers, numbers] - self.losses[layers, picks[layers]]) / gap
        found = self._branch_and_bound(values, layers, numbers)
        better = found is not None and self.fits(self.total(found)) and self.loss(found) < loss
        return found if found is not None and better else picks

    def _branch_and_bound(
        self, values: ndarray, layers: ndarray, numbers: ndarray
    ) -> Int[ndarray, " n"] | None:
        """Return the choice among these candidates within the limits with the least summed value."""
        from scipy.optimize import Bounds, LinearConstraint

        costs = self.costs[layers, numbers]
        one_each = LinearConstraint(_one_each(layers, len(self.losses)), 1, 1)
        found = _branch_and_bound(
            values,
            integrality=np.ones(len(values)),
            bounds=Bounds(0, 1),
            constraints=[one_each, LinearConstraint(costs.T, -np.inf, 1)],
            options={"node_limit": 1 + NODES // len(values), "mip_rel_gap": 0},
        )
        return None if found.x is None else _picks(found.x, layers, numbers, len(self.losses))

    def closest(self) -> Int[ndarray, " n"]:
        """Return the choice whose largest cost, over its limit, is smallest."""
        from scipy.optimize import Bounds, LinearConstraint
        from scipy.sparse import hstack

        if self.costs.shape[2] == 1:
            return self.costs[..., 0].argmin(1)
        layers, numbers = np.nonzero(np.isfinite(self.losses))
        costs, n = self.costs[layers, numbers], len(self.losses)
        one_each = hstack([_one_each(layers, n), np.zeros((n, 1))])  # the last variable is the factor
        within = np.column_stack([costs.T, -np.ones(costs.shape[1])])
        upper = np.append(np.ones(len(layers)), np.inf)
        found = _branch_and_bound(
            np.append(np.zeros(len(layers)), 1.0),
            integrality=np.append(np.ones(len(layers)), 0),
            bounds=Bounds(0, upper),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(within, -np.inf, 0)],
            options={"node_limit": 1 + NODES // len(layers), "mip_rel_gap": 0},
        )
        if found.x is None:  # not even a first one within the nodes
            return self.costs.max(2).argmin(1)
        return _picks(found.x[:-1], layers, numbers, n)

    def infeasible(self) -> Infeasible:
        """Return how close the limits can be come to."""
        smallest = self.costs.min(1).sum(0) * self.limits
        return Infeasible(
            tuple(smallest.tolist()), tuple((self.total(self.closest()) * self.limits).tolist())
        )


def _branch_and_bound(*args: Any, **options: Any) -> Any:
    """Return what ``scipy.optimize.milp`` does, without the lines that HiGHS prints behind Python's back.

    They go to the process's standard output, where a program that reads JSON would find them.
    """
    from scipy.optimize import milp

    with _PRINTING:
        sys.stdout.flush()
        kept = os.dup(1)
        try:
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                return milp(*args, **options)
        finally:
            os.dup2(kept, 1)
            os.close(kept)


_PRINTING = threading.Lock()


def _undominated(values: Float[ndarray, "c m"]) -> Int[ndarray, " kept"]:
    """Return which rows no other row is at most as large as everywhere; of equal rows, the first."""
    below = (values[:, None] <= values[None]).all(-1)  # [i, j]: i is at most as large as j
    equal = below & below.T
    first = np.tril(np.ones_like(below), -1).T.astype(bool)  # [i, j]: i comes before j
    dominated = (below & (~equal | first)).any(0)
    return np.flatnonzero(~dominated)


def _lower_hull(costs: Float[ndarray, " c"], losses: Float[ndarray, " c"]) -> list[int]:
    """Return the candidates on the lower convex hull of loss over cost, the cheapest first."""
    hull: list[int] = []
    for new in sorted(np.flatnonzero(np.isfinite(losses)).tolist(), key=lambda i: costs[i]):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            slope_on = (losses[new] - losses[b]) * (costs[b] - costs[a])
            if slope_on > (losses[b] - losses[a]) * (costs[new] - costs[b]):
                break
            hull.pop()
        hull.append(new)
    return hull


def _one_each(layers: Int[ndarray, " v"], n: int) -> object:
    """Return the sparse matrix that sums the variables of each layer."""
    from scipy.sparse import csr_matrix

    return csr_matrix((np.ones(len(layers)), (layers, np.arange(len(layers)))), shape=(n, len(layers)))


def _picks(x: Float[ndarray, " v"], layers: ndarray, numbers: ndarray, n: int) -> Int[ndarray, " n"]:
    """Return the candidate of each layer whose variable is largest."""
    picks, best = np.zeros(n, int), np.full(n, -1.0)
    for value, layer, number in zip(x, layers, numbers, strict=True):
        if value > best[layer]:
            picks[layer], best[layer] = number, value
    return picks
