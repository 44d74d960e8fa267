"""Least squares from one network's inputs onto another's outputs: closed forms against the slow answer."""

import pytest
import torch
from torch.testing import assert_close

from tncompress.least_squares import PairMoments, ridge_for, solve_towards


def pairs(count=50, d=6, out=4, groups=2):
    x = (
        torch.randn(groups, count, d, dtype=torch.float64) @ torch.randn(groups, d, d, dtype=torch.float64)
        + 2
    )
    y = x[..., :out].square() + torch.randn(groups, count, out, dtype=torch.float64) - 5
    return x, y


def summed(x, y, *sizes):
    moments = PairMoments()
    for a, b in zip(x.split(sizes or x.shape[1], 1), y.split(sizes or y.shape[1], 1), strict=True):
        moments.add(a, b)
    return moments


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (20, 0, 30), (10,) * 5])
def test_moments_do_not_depend_on_how_the_pairs_come(sizes):
    x, y = pairs()
    moments = summed(x, y, *sizes)
    assert moments.count == 50
    assert_close(moments.mean_x, x.mean(1))
    xx, yx = moments.moments()
    centred, wanted = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    assert_close(xx, centred.mT @ centred / 50)
    assert_close(yx, wanted.mT @ centred / 50)
    fixed = torch.randn(2, 4, dtype=torch.float64)
    xx, yx = moments.moments(fixed)
    assert_close(xx, x.mT @ x / 50)
    assert_close(yx, (y - fixed[:, None]).mT @ x / 50)


def test_moments_of_parts_pool_and_leave_the_parts_alone():
    x, y = pairs()
    first, second = summed(x[:, :13], y[:, :13]), summed(x[:, 13:], y[:, 13:])
    whole, before = PairMoments(), first.xx.clone()
    whole.pool(first)
    whole.pool(second)
    whole.pool(PairMoments())
    assert torch.equal(first.xx, before)
    assert_close(whole.moments()[0], summed(x, y).moments()[0])
    assert_close(whole.yy, summed(x, y).yy)


def test_float32_pairs_far_from_zero_lose_nothing():
    x, y = pairs()
    near, far = summed(x.float(), y.float()), summed(x.float() + 1000, y.float() - 3000)
    assert_close(far.moments()[0], near.moments()[0], rtol=1e-3, atol=1e-3)


def test_the_error_is_that_of_the_outputs():
    x, y = pairs()
    kernels, bias = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    missing = y - x @ kernels.mT - bias[:, None]
    moments = summed(x, y)
    assert moments.squared_error(kernels, bias) == pytest.approx(float(missing.square().sum() / 50))
    root = torch.randn(2, 4, 4, dtype=torch.float64)
    weighed = moments.squared_error(kernels, bias, root.mT @ root)
    assert weighed == pytest.approx(float((missing @ root.mT).square().sum() / 50))
    free = moments.bias(kernels)
    assert_close(free, (y - x @ kernels.mT).mean(1))
    assert moments.squared_error(kernels, free) < moments.squared_error(kernels, bias)
    spread = float((y - y.mean(1, keepdim=True)).square().sum() / 50)
    wanted = (moments.squared_error(kernels, bias) / spread) ** 0.5
    assert moments.relative_error(kernels, bias) == pytest.approx(wanted)


@pytest.mark.parametrize("ridge", [1e-4, 1e-1, 3.0])
@pytest.mark.parametrize("count", [50, 3])
def test_the_solution_is_that_of_least_squares_with_ridge_rows(ridge, count):
    """Rows sqrt(lambda n) I beneath the data pull towards the kernel that they carry."""
    x, y = pairs(count)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    start = torch.randn(2, 4, 6, dtype=torch.float64)
    solved, metric = solve_towards(start, *summed(x, y).moments(), ridge)
    for group in range(2):
        weight = ridge * x[group].square().sum(0).mean() / count
        rows = (weight * count).sqrt() * torch.eye(6, dtype=torch.float64)
        wanted = torch.linalg.lstsq(torch.cat([x[group], rows]), torch.cat([y[group], rows @ start[group].T]))
        assert_close(solved[group], wanted.solution.T)
        assert_close(
            metric[group], x[group].T @ x[group] / count + weight * torch.eye(6, dtype=torch.float64)
        )


def test_loss_is_the_distance_to_the_solution_in_the_metric():
    """E|y - W x|^2 + lambda |W - W0|^2 = tr((W - W*) (A + lambda I) (W - W*)') + a constant."""
    x, y = pairs()
    start = torch.randn(2, 4, 6, dtype=torch.float64)
    moments = summed(x, y)
    fixed = torch.zeros(2, 4, dtype=torch.float64)
    xx, yx = moments.moments(fixed)
    solved, metric = solve_towards(start, xx, yx, 0.3)
    weight = 0.3 * xx.diagonal(dim1=1, dim2=2).mean(1)

    def loss(kernels):
        pull = float((weight * (kernels - start).square().sum((1, 2))).sum())
        return moments.squared_error(kernels, fixed) + pull

    for _ in range(3):
        kernels = torch.randn(2, 4, 6, dtype=torch.float64)
        off = kernels - solved
        assert float(((off @ metric) * off).sum()) == pytest.approx(loss(kernels) - loss(solved))


def test_directions_that_no_patch_has_stay_as_they_were():
    x, y = pairs()
    x[..., 4:] = 0
    start = torch.randn(2, 4, 6, dtype=torch.float64)
    solved, _ = solve_towards(start, *summed(x, y).moments(), 1e-2)
    assert_close(solved[..., 4:], start[..., 4:])
    assert not torch.allclose(solved[..., :4], start[..., :4])


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_without_any_data_the_kernel_stays(ridge):
    start = torch.randn(2, 4, 6, dtype=torch.float64)
    nothing = torch.zeros(2, 6, 6, dtype=torch.float64), torch.zeros(2, 4, 6, dtype=torch.float64)
    assert_close(solve_towards(start, *nothing, ridge)[0], start)


def test_no_ridge_at_all_is_solved_by_the_pseudo_inverse():
    x, y = pairs(3)
    solved, _ = solve_towards(torch.zeros(2, 4, 6, dtype=torch.float64), *summed(x, y).moments(), 0.0)
    moments = summed(x, y)
    assert moments.squared_error(solved, moments.bias(solved)) == pytest.approx(0, abs=1e-10)


def test_the_ridge_falls_with_patches_within_its_bounds():
    assert ridge_for(100, 100) == 1e-2
    found = [ridge_for(count, 100) for count in (0, 1, 20, 100, 500, 10_000, 10**9)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (1e-1, 1e-4)
