"""The knapsack against exhaustive search: as good, feasible where there is a way, and bounded from below."""

import itertools
import time

import numpy as np
import pytest

from tncompress.knapsack import Infeasible, Solution, solve


def drawn(rng, layers, candidates, resources, tight):
    """Losses that fall with the costs, noisily, and limits between the least and the most to be spent."""
    costs = [
        np.rint(rng.uniform(1, 1000, (candidates, 1)) * rng.uniform(0.6, 1.4, (candidates, resources)))
        for _ in range(layers)
    ]
    losses = [
        rng.uniform(0.1, 1)
        * np.exp(-cost.mean(1) / rng.uniform(100, 500))
        * rng.uniform(0.7, 1.3, candidates)
        for cost in costs
    ]
    least, most = sum(cost.min(0) for cost in costs), sum(cost.max(0) for cost in costs)
    return losses, costs, np.maximum(least + tight * (most - least), 1.0)


def best_of_all(losses, costs, limits):
    """The least loss of any choice within the limits, by trying them all; infinity if there is none."""
    best = np.inf
    for choice in itertools.product(*(range(len(loss)) for loss in losses)):
        if (sum(cost[pick] for cost, pick in zip(costs, choice, strict=True)) <= limits).all():
            best = min(best, sum(loss[pick] for loss, pick in zip(losses, choice, strict=True)))
    return best


@pytest.mark.parametrize("resources", [1, 2, 3])
def test_it_is_as_good_as_exhaustive_search(resources):
    rng = np.random.default_rng(resources)
    feasible = 0
    for _ in range(80):
        layers, candidates = rng.integers(1, 6), rng.integers(1, 6)
        tight = rng.uniform(-0.02, 0.7, resources)
        losses, costs, limits = drawn(rng, layers, candidates, resources, tight)
        best, made = best_of_all(losses, costs, limits), solve(losses, costs, limits)
        if np.isinf(best):
            assert isinstance(made, Infeasible)
            continue
        feasible += 1
        assert isinstance(made, Solution)
        assert made.loss == pytest.approx(best, rel=1e-6)
        assert made.bound <= best * (1 + 1e-12)
        assert made.gap == pytest.approx(made.loss - made.bound)
        picked = [cost[pick] for cost, pick in zip(costs, made.choice, strict=True)]
        assert made.loss == pytest.approx(
            sum(loss[pick] for loss, pick in zip(losses, made.choice, strict=True))
        )
        assert made.costs == pytest.approx(sum(picked).tolist())
        assert (sum(picked) <= limits).all()
    assert feasible > 40


@pytest.mark.parametrize("resources", [1, 2])
def test_a_larger_budget_never_loses_more(resources):
    rng = np.random.default_rng(0)
    losses, costs, _ = drawn(rng, 8, 12, resources, np.ones(resources))
    least, most = sum(cost.min(0) for cost in costs), sum(cost.max(0) for cost in costs)
    found = [solve(losses, costs, least + share * (most - least)) for share in np.linspace(0.02, 1, 25)]
    assert all(isinstance(made, Solution) for made in found)
    for values in ([made.loss for made in found], [made.bound for made in found]):
        assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(values))
    assert found[-1].gap == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("resources", [1, 2])
def test_the_multipliers_are_what_more_of_a_resource_is_worth(resources):
    losses, costs, limits = drawn(np.random.default_rng(3), 30, 40, resources, np.full(resources, 0.3))
    before = solve(losses, costs, limits)
    for resource in range(resources):
        more = limits.copy()
        more[resource] += 0.5
        gained = before.bound - solve(losses, costs, more).bound
        assert gained == pytest.approx(0.5 * before.multipliers[resource], rel=0.05, abs=1e-9)


def test_dominated_candidates_change_nothing():
    rng = np.random.default_rng(1)
    losses, costs, limits = drawn(rng, 5, 6, 2, np.full(2, 0.4))
    made = solve(losses, costs, limits)
    worse = [np.concatenate([loss, loss + 1e-3]) for loss in losses]
    dearer = [np.concatenate([cost, cost + 1]) for cost in costs]
    again = solve(worse, dearer, limits)
    assert (again.choice, again.loss, again.bound) == (made.choice, made.loss, made.bound)
    twice = solve([np.tile(loss, 2) for loss in losses], [np.tile(cost, (2, 1)) for cost in costs], limits)
    assert twice.choice == made.choice


def test_losses_of_any_scale_are_told_apart():
    rng = np.random.default_rng(2)
    losses, costs, limits = drawn(rng, 6, 6, 2, np.full(2, 0.4))
    made = solve(losses, costs, limits)
    for scale in (1e-9, 1e9):
        scaled = solve([scale * loss for loss in losses], costs, limits)
        assert scaled.choice == made.choice
        assert scaled.bound == pytest.approx(scale * made.bound, rel=1e-6)


def test_what_cannot_be_met_says_how_close_one_can_come():
    losses = [np.array([0.0, 1.0]), np.array([0.0, 2.0])]
    costs = [np.array([[4.0, 1.0], [1.0, 4.0]])] * 2
    alone = solve(losses, costs, np.array([1.0, 100.0]))
    assert alone == Infeasible(smallest=(2.0, 2.0), closest=(2.0, 8.0))
    together = solve(losses, costs, np.array([4.0, 4.0]))  # each can be 2, both at once are 5
    assert together == Infeasible(smallest=(2.0, 2.0), closest=(5.0, 5.0))
    assert isinstance(solve(losses, costs, np.array([5.0, 5.0])), Solution)


def test_what_is_no_knapsack_is_refused():
    loss, cost = [np.zeros(2)], [np.ones((2, 1))]
    with pytest.raises(ValueError, match="limits are above 0"):
        solve(loss, cost, np.zeros(1))
    with pytest.raises(ValueError, match="one or more layers, got 0, 0"):
        solve([], [], np.ones(1))
    with pytest.raises(ValueError, match=r"layer 0 has losses \(2,\) and costs \(3, 1\)"):
        solve(loss, [np.ones((3, 1))], np.ones(1))
    with pytest.raises(ValueError, match="layer 0 has a loss or cost that is infinite"):
        solve([np.array([0.0, np.nan])], cost, np.ones(1))


def test_a_hundred_layers_take_no_time():
    losses, costs, limits = drawn(np.random.default_rng(4), 100, 60, 1, np.full(1, 0.3))
    started = time.process_time()
    made = solve(losses, costs, limits)
    assert time.process_time() - started < 1
    assert made.gap < 1e-3 * made.loss
