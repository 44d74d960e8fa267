"""The CP decomposition: a sum of rank-one terms, one vector per leg."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from tncompress.cuts import legs_of
from tncompress.formats.base import Fit, Format, Ranks, Shape, Stage, register_format
from tncompress.linalg import bond_scale, svd, unfold, working_copy

SWEEPS, TOLERANCE, GOOD_ENOUGH = 120, 1e-5, 1e-7
FEWEST_SWEEPS, BUDGET = 30, 2**33
"""A large kernel gets as many sweeps as fit into ``BUDGET`` products of its entries with the rank."""
RIDGE_START, RIDGE_DECAY, RIDGE_FLOOR, SHRINK = 1e-2, 0.8, 1e-9, 1e-3
RESTARTS, TRIAL, CHEAP = 4, 60, 2**22


@register_format("cp")
@dataclass(frozen=True)
class CP(Format):
    """A sum of ``rank`` product terms over out, in and each spatial leg (Lebedev et al. 2015).

    It runs as 1x1, depthwise kh x 1, depthwise 1 x kw, 1x1; with ``merged`` the spatial legs are one and
    the two depthwise stages are one kh x kw stage. A kernel without spatial extent is a matrix: its best
    CP is its truncated SVD. At the maximal rank the fit is exact.
    """

    merged: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.merged, bool):
            raise ValueError(f"cp's option merged is true or false, got {self.merged!r}")

    def modes(self, shape: Shape) -> tuple[tuple[int, ...], ...]:
        """Return the kernel modes of each factor: in, spatial, out; thin spatial legs go with ``in``."""
        thin = tuple(mode for mode in range(2, len(shape)) if shape[mode] == 1)
        wide = tuple(mode for mode in range(2, len(shape)) if shape[mode] > 1)
        spatial = ((wide,) if self.merged else tuple((mode,) for mode in wide)) if wide else ()
        return ((1, *thin), *spatial, (0,))

    def network(self, shape: Shape) -> tuple[tuple[str, ...], ...]:
        names = legs_of(len(shape))
        *others, _ = self.modes(shape)
        return *(("r0", *(names[mode] for mode in group)) for group in others), ("out", "r0")

    def max_ranks(self, shape: Shape) -> Ranks:
        sizes = self._sizes(shape)
        return (math.prod(sizes) // max(sizes),)

    def stages(self, shape: Shape, ranks: Ranks) -> tuple[Stage, ...]:
        """Return 1x1 to the terms, one depthwise convolution for each spatial factor, 1x1 from the terms."""
        (rank,) = ranks
        inward, *spatial, _ = self.modes(shape)
        ones = (1,) * (len(shape) - 2)
        stages = [Stage(0, (rank, shape[1], *ones), tuple(mode - 2 for mode in inward[1:]))]
        for i, group in enumerate(spatial, start=1):
            window = tuple(shape[axis + 2] if axis + 2 in group else 1 for axis in range(len(ones)))
            stages.append(Stage(i, (rank, 1, *window), tuple(mode - 2 for mode in group), groups=rank))
        return *stages, Stage(1 + len(spatial), (shape[0], rank, *ones))

    def fit(self, kernel: Tensor, ranks: Ranks) -> Fit:
        """Return the fit by regularised alternating least squares, the same for the same kernel."""
        shape = tuple(kernel.shape)
        (rank,) = self.check_ranks(shape, ranks)
        groups, sizes = self.modes(shape), self._sizes(shape)
        work = working_copy(kernel)
        tensor = work.permute(sum(groups, ())).reshape(sizes)
        norm = float(tensor.norm())
        if kernel.dtype != torch.float64:
            tensor = tensor.float()
        matrices = cp_als(tensor / (norm or 1.0), rank)
        share = norm ** (1 / len(matrices))
        shapes = self.factor_shapes(shape, ranks)
        stored = [*matrices[:-1], matrices[-1].mT]
        made = ((share * f).reshape(size).to(kernel.dtype) for f, size in zip(stored, shapes, strict=True))
        factors = tuple(factor.contiguous() for factor in made)
        rebuilt = self.to_dense([factor.double() for factor in factors], shape)
        return Fit(factors, float((work - rebuilt).norm()) / norm if norm > 0 else 0.0)

    def _sizes(self, shape: Shape) -> tuple[int, ...]:
        return tuple(math.prod(shape[mode] for mode in group) for group in self.modes(shape))


def cp_als(tensor: Tensor, rank: int) -> list[Float[Tensor, "rank _"]]:
    """Return one matrix ``(rank, size)`` for each mode of ``tensor``, fitted by least squares in turns.

    The first start is made of slices (:func:`_slice_start`), and is exact at the largest rank. Where a start
    is cheap, random ones follow and the best fit is kept: least squares in turns can end in a local minimum.
    """
    if tensor.ndim == 2:
        return _from_svd(tensor, rank)
    order = sorted(range(tensor.ndim), key=lambda mode: -tensor.shape[mode])
    work = tensor.permute(order).contiguous()
    start = _slice_start(work, rank)
    best, error = (start, 0.0) if rank == work[0].numel() else _sweeps(work, start)
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(RESTARTS if tensor.numel() * rank <= CHEAP else 0):
        if error < GOOD_ENOUGH:
            break
        shapes = [(rank, size) for size in work.shape]
        random = [torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in shapes]
        fitted, reached = _sweeps(work, [matrix.to(work) for matrix in random], TRIAL)
        if reached < error:
            best, error = _sweeps(work, fitted)
    return [best[order.index(mode)] for mode in range(tensor.ndim)]


def _sweeps(work: Tensor, start: list[Tensor], limit: int | None = None) -> tuple[list[Tensor], float]:
    """Return the matrices after alternating least squares from ``start``, and their relative error.

    Each sweep starts beyond the last one, on the line from the one before (Nesterov acceleration with
    restarts, Mitchell, Ye and De Sterck 2020); where the error would rise, the step is taken back.
    """
    flat = work.flatten(1)
    total = float(flat.double().square().sum())
    affordable = max(FEWEST_SWEEPS, BUDGET // (work.numel() * len(start[0])))
    limit = limit or min(SWEEPS, affordable)
    best, error, ridge, streak = start, math.inf, RIDGE_START, 0
    ahead = start
    for _ in range(limit):
        shrink = SHRINK * min(error, 1.0)
        found, reached = _sweep(flat, work.shape, ahead, (ridge, shrink), total)
        if reached > error and streak:
            ahead, streak = best, 0
            continue
        streak += 1
        momentum = (streak - 1) / (streak + 2)
        ahead = [new + momentum * (new - old) for new, old in zip(found, best, strict=True)]
        gain, best, error = error - reached, found, reached
        if error < GOOD_ENOUGH or (ridge <= RIDGE_FLOOR and abs(gain) <= TOLERANCE * error):
            break
        ridge = max(ridge * RIDGE_DECAY, RIDGE_FLOOR)
    return best, error


def _sweep(
    flat: Tensor, shape: Sequence[int], matrices: list[Tensor], ridge: tuple[float, float], total: float
) -> tuple[list[Tensor], float]:
    """Return every matrix solved for in turn, and the relative error reached.

    The first number of ``ridge`` pulls towards the previous matrix and steadies the first sweeps; the second
    pulls towards zero, and keeps terms from growing against each other. It is given in proportion to the
    error, so that an exact fit is not biased. The two largest modes and the product of the others are three
    blocks: a sweep costs two passes over the tensor.
    """
    a, b, *small = matrices
    projected = (a @ flat).reshape(len(a), shape[1], -1)
    spread = _khatri_rao(small)
    b = _solve(_gram(a) * _gram(spread), (projected * spread[:, None]).sum(2), ridge, b)
    weights = (b[:, None] @ projected).reshape(len(a), *shape[2:])
    small = _solve_small(weights, _gram(a) * _gram(b), small, ridge)
    spread = _khatri_rao(small)
    target = (b[:, :, None] * spread[:, None]).flatten(1) @ flat.mT
    gram = _gram(b) * _gram(spread)
    a = _solve(gram, target, ridge, a)
    return _balance([a, b, *small]), _relative_error(total, a, target, gram)


def _from_svd(matrix: Tensor, rank: int) -> list[Tensor]:
    u, s, svh = svd(matrix)
    scale = bond_scale(s[:rank])
    return [(u[:, :rank] * scale).mT, svh[:rank] / scale[:, None]]


def _slice_start(work: Tensor, rank: int) -> list[Tensor]:
    """Return the strongest ``rank`` of the product terms found by an SVD of every slice of ``work``.

    Slices are taken along the principal directions of the small modes. All their terms together are the
    tensor itself, which is why the largest rank is exact.
    """
    small_modes = range(2, work.ndim)
    directions = {mode: svd(unfold(work, [mode]))[0] for mode in small_modes}
    rotated = work
    for mode, basis in directions.items():
        rotated = torch.tensordot(rotated, basis, dims=([mode], [0])).movedim(-1, mode)
    terms = []
    rotated = rotated.movedim((0, 1), (-2, -1))
    for place in product(*(range(size) for size in work.shape[2:])):
        u, s, svh = svd(rotated[tuple(place)])
        terms.append((s, u.mT, svh, place))
    strengths = torch.cat([s for s, *_ in terms])
    owner = [(i, k) for i, (s, *_) in enumerate(terms) for k in range(len(s))]
    chosen = [owner[j] for j in strengths.argsort(descending=True, stable=True)[:rank].tolist()]
    a = torch.stack([terms[i][1][k] for i, k in chosen])
    b = torch.stack([terms[i][2][k] for i, k in chosen])
    small = [
        torch.stack([directions[mode][:, terms[i][3][mode - 2]] for i, _ in chosen]) for mode in small_modes
    ]
    return _balance([a, b, *small])


def _solve_small(
    weights: Tensor, gram: Tensor, small: list[Tensor], ridge: tuple[float, float]
) -> list[Tensor]:
    small = list(small)
    for m in range(len(small)):
        target, others = weights, gram
        for other in reversed(range(len(small))):
            if other != m:
                shape = [len(target), *[-1 if axis == other else 1 for axis in range(target.ndim - 1)]]
                target = (target * small[other].reshape(shape)).sum(1 + other, keepdim=True)
                others = others * _gram(small[other])
        small[m] = _solve(others, target.flatten(1), ridge, small[m])
    return small


def _solve(gram: Tensor, target: Tensor, ridge: tuple[float, float], previous: Tensor) -> Tensor:
    """Return the solution of ``gram @ x = target`` with ridges towards ``previous`` and zero, in float64."""
    gram, target = gram.double(), target.double()
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    steady, shrink = ridge
    weight = steady * scale
    damped = gram + (weight + shrink * scale) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    right = target + weight * previous
    solved = (
        torch.linalg.lstsq(damped, right).solution if bool(failed) else torch.cholesky_solve(right, lower)
    )
    return solved.to(previous.dtype)


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT


def _khatri_rao(matrices: list[Tensor]) -> Tensor:
    """Return the row-wise Kronecker product ``(rank, product of sizes)``."""
    result = matrices[0]
    for matrix in matrices[1:]:
        result = (result[:, :, None] * matrix[:, None]).flatten(1)
    return result


def _balance(matrices: list[Tensor]) -> list[Tensor]:
    """Return the same terms with the norm of each shared evenly by its vectors."""
    norms = [matrix.norm(dim=1).clamp_min(torch.finfo(matrix.dtype).tiny) for matrix in matrices]
    even = torch.stack(norms).log().mean(0).exp()
    return [matrix * (even / norm)[:, None] for matrix, norm in zip(matrices, norms, strict=True)]


def _relative_error(total: float, a: Tensor, target: Tensor, gram: Tensor) -> float:
    """Return the relative error of a fit from its normal equations, ``total`` being the squared norm."""
    a, target, gram = a.double(), target.double(), gram.double()
    squared = total - float(2 * (a * target).sum() - ((gram @ a) * a).sum())
    return math.sqrt(max(squared, 0.0) / total) if total > 0 else 0.0
