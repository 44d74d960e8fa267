"""Least squares from inputs of one network onto outputs of another, in closed form.

A layer whose inputs have changed is asked for the outputs that it had before: W minimises
E|y - b - W x|^2 over inputs x of the compressed network and outputs y of the dense one, with a ridge
towards the dense kernel. All that is needed are the moments of (x, y), which are summed over batches here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tncompress.squares import add_squares, mirror

RIDGES = (1e-4, 1e-2, 1e-1)
"""The least ridge, the one where there are as many patches as numbers in one, and the largest."""


class PairMoments:
    """Sums over pairs of patch and output ``(groups, count, d)``, ``(groups, count, out)``, in float64.

    Products are taken in float32 (float64 for float64 inputs), about the mean of what is added at a time,
    and pooled with what was added before (Chan et al. 1979): moments don't depend on how the pairs come.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_x = self.mean_y = self.yx = torch.zeros(())
        self._xx = self._yy = torch.zeros(())
        self._mirrored = True

    def add(self, x: Float[Tensor, "g n d"], y: Float[Tensor, "g n out"]) -> None:
        """Take in pairs, as many for each group."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, y, count = x.to(dtype), y.to(dtype), x.shape[1]
        if count == 0:
            return
        mean_x, mean_y = x.mean(1, dtype=torch.float64), y.mean(1, dtype=torch.float64)
        x, y = x - mean_x[:, None].to(dtype), y - mean_y[:, None].to(dtype)
        if not self.count:
            self._begin(mean_x, mean_y)
        weight, gap_x, gap_y = self._pool_means(count, mean_x, mean_y)
        add_squares(self._xx, x, gap_x, weight)
        add_squares(self._yy, y, gap_y, weight)
        self.yx += y.mT @ x
        self.yx.baddbmm_(gap_y, gap_x.mT, alpha=weight)
        self._mirrored = False

    def pool(self, other: PairMoments) -> None:
        """Take in all that ``other`` has."""
        if not other.count:
            return
        if not self.count:
            self._begin(other.mean_x, other.mean_y)
        weight, gap_x, gap_y = self._pool_means(other.count, other.mean_x, other.mean_y)
        self.xx.add_(other.xx).baddbmm_(gap_x, gap_x.mT, alpha=weight)
        self.yy.add_(other.yy).baddbmm_(gap_y, gap_y.mT, alpha=weight)
        self.yx.add_(other.yx).baddbmm_(gap_y, gap_x.mT, alpha=weight)

    def _begin(self, mean_x: Tensor, mean_y: Tensor) -> None:
        (groups, d), out = mean_x.shape, mean_y.shape[1]
        self.mean_x, self.mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        self._xx, self._yy = mean_x.new_zeros(groups, d, d), mean_y.new_zeros(groups, out, out)
        self.yx = mean_y.new_zeros(groups, out, d)

    def _pool_means(self, count: int, mean_x: Tensor, mean_y: Tensor) -> tuple[float, Tensor, Tensor]:
        """Take in ``count`` pairs with these means; return how their distance from the old weighs, and it."""
        total = self.count + count
        gap_x, gap_y = mean_x - self.mean_x, mean_y - self.mean_y
        weight = self.count * count / total
        self.mean_x = self.mean_x + gap_x * (count / total)
        self.mean_y = self.mean_y + gap_y * (count / total)
        self.count = total
        return weight, gap_x[:, :, None], gap_y[:, :, None]

    @property
    def xx(self) -> Float[Tensor, "g d d"]:
        """The centred squares of x, summed up."""
        self._mirror()
        return self._xx

    @property
    def yy(self) -> Float[Tensor, "g out out"]:
        """The centred squares of y, summed up."""
        self._mirror()
        return self._yy

    def _mirror(self) -> None:
        if not self._mirrored:
            mirror(self._xx)
            mirror(self._yy)
            self._mirrored = True

    @property
    def finite(self) -> bool:
        """Whether no NaN and no infinity was among what was added."""
        squares = (part.diagonal(dim1=1, dim2=2) for part in (self._xx, self._yy) if self.count)
        return all(bool(part.isfinite().all()) for part in squares)  # they bound all products

    @property
    def _trace(self) -> Tensor:
        return self._yy.diagonal(dim1=1, dim2=2).sum()

    def moments(
        self, fixed: Float[Tensor, "g out"] | None = None
    ) -> tuple[Float[Tensor, "g d d"], Float[Tensor, "g out d"]]:
        """Return E[x x'] and E[y x'], about the means; or of x and y - ``fixed``, if that is given."""
        xx, yx = self.xx / self.count, self.yx / self.count
        if fixed is not None:
            xx = xx + self.mean_x[:, :, None] * self.mean_x[:, None]
            yx = yx + (self.mean_y - fixed)[:, :, None] * self.mean_x[:, None]
        return xx, yx

    def bias(self, kernels: Float[Tensor, "g out d"]) -> Float[Tensor, "g out"]:
        """Return the bias with which ``kernels`` give the mean output: E[y] - W E[x]."""
        return self.mean_y - (kernels @ self.mean_x[..., None])[..., 0]

    def squared_error(
        self,
        kernels: Float[Tensor, "g out d"],
        bias: Float[Tensor, "g out"],
        weight: Float[Tensor, "g out out"] | None = None,
    ) -> float:
        """Return E[e' G e] for e = y - b - W x, summed over the groups; G is ``weight``, 1 by default."""
        gap = (self.bias(kernels) - bias)[..., None]
        weighed, gap_weighed = (kernels, gap) if weight is None else (weight @ kernels, weight @ gap)
        spread = self._trace if weight is None else (weight * self.yy).sum()
        cross, own = (weighed * self.yx).sum(), ((kernels @ self.xx) * weighed).sum()
        return max(0.0, float(spread - 2 * cross + own) / self.count) + float((gap * gap_weighed).sum())

    def relative_error(self, kernels: Float[Tensor, "g out d"], bias: Float[Tensor, "g out"]) -> float:
        """Return the root of :meth:`squared_error` over that of the spread of y about its mean."""
        spread = float(self._trace) / self.count
        return (self.squared_error(kernels, bias) / spread) ** 0.5 if spread > 0 else 0.0


def ridge_for(count: int, d: int) -> float:
    """Return the ridge, over the mean diagonal of E[x x'], for ``count`` patches of ``d`` numbers.

    The noise in a least-squares solution falls with the number of patches for each number in one, and so
    does the ridge that balances it: 1e-2 where there are as many patches as numbers, from 1e-4 to 1e-1.

    >>> ridge_for(1000, 1000), ridge_for(10_000, 1000), ridge_for(50, 1000)
    (0.01, 0.001, 0.1)
    """
    least, even, most = RIDGES
    return min(most, max(least, even * d / max(count, 1)))


def solve_towards(
    kernels: Float[Tensor, "g out d"],
    xx: Float[Tensor, "g d d"],
    yx: Float[Tensor, "g out d"],
    ridge: float,
) -> tuple[Float[Tensor, "g out d"], Float[Tensor, "g d d"]]:
    """Return W* = W0 + (E[y x'] - W0 A)(A + lambda I)^-1 and A + lambda I; W0 are ``kernels``, A is ``xx``.

    ``lambda`` is ``ridge`` times the mean diagonal of A. For any W, E|y - W x|^2 + lambda |W - W0|^2
    is tr((W - W*)(A + lambda I)(W - W*)') and a constant: what is left is to fit W* in that metric.
    """
    work, d = kernels.double(), xx.shape[-1]
    mean = xx.diagonal(dim1=1, dim2=2).mean(1)
    pull = ridge * torch.where(mean > 0, mean, 1.0)
    metric = xx + pull[:, None, None] * torch.eye(d, dtype=xx.dtype, device=xx.device)
    missing = yx - work @ xx
    lower, failed = torch.linalg.cholesky_ex(metric)
    if bool(failed.any()):  # a ridge of zero, or one below the rounding of A
        return work + missing @ torch.linalg.pinv(metric, hermitian=True), metric
    return work + torch.cholesky_solve(missing.mT, lower).mT, metric
