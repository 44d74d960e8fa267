"""Alternating least squares for CP, on a stack of tensors at once.

A stack is ``(groups, *sizes)`` with its modes ordered by size, largest first. The vectors of a mode are one
matrix ``(groups, starts, rank, size)``: several starts of the same tensor share its passes. What is said of
one item, a pair of group and start, is a tensor ``(groups, starts)``; items never mix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tncompress.products import product

Matrices = list[Tensor]
PerItem = Float[Tensor, "groups starts"]

TOLERANCE, GOOD_ENOUGH = 1e-5, 1e-7
RIDGE_DECAY, RIDGE_FLOOR = 0.8, 1e-9
STIFF, LOOSE = (1e-2, 1e-2), (1e-8, 1e-4)
"""The two penalties of :func:`sweep` in a first and a second descent, the latter over the error."""
CORRECTIONS, LAST_SWEEPS, LOOSER, LARGEST_TERM = 60, 5, 1.01, 9.0
"""How :func:`tame` corrects large terms; rounding to half precision may add a little to the largest."""
JITTER = 1e-14
"""Added to a Gram matrix, over its mean diagonal: keeps terms that have died from making it singular."""
STEADY_ENOUGH = 1e-3
"""From this pull towards the previous matrix on, systems of float32 matrices are solved in float32."""


def descend(
    work: Tensor, start: Matrices, limit: int, penalties: tuple[float, float]
) -> tuple[Matrices, PerItem]:
    """Return the matrices after alternating least squares from ``start``, and their relative errors.

    Each sweep starts beyond the last one, on the line from the one before (Nesterov acceleration with
    restarts, Mitchell, Ye and De Sterck 2020); where the error would rise, the step is taken back.
    """
    best = ahead = start
    ridge, shrink = penalties
    error = start[0].new_full(start[0].shape[:2], math.inf, dtype=torch.float64)
    steady, streak = torch.full_like(error, ridge), torch.zeros_like(error)
    done = torch.zeros_like(error, dtype=torch.bool)
    for _ in range(limit):
        found, reached = sweep(work, ahead, steady, shrink * error.clamp_max(1.0))
        taken = ~done & reached.isfinite() & ((reached <= error) | (streak == 0))
        gain = error - reached
        error = torch.where(taken, reached, error)
        converged = (steady <= RIDGE_FLOOR) & (gain.abs() <= TOLERANCE * error)
        done = done | (taken & converged) | ~(taken | (streak > 0))
        done = done | (error < GOOD_ENOUGH).any(1, keepdim=True)
        if bool(done.all()):
            return choose(taken, found, best), error
        streak = torch.where(taken, streak + 1, 0.0)
        momentum = ((streak - 1) / (streak + 2)).clamp_min(0.0)[..., None, None].to(work.dtype)
        kept = choose(taken, found, best)
        ahead = [new + momentum * (new - old) for new, old in zip(kept, best, strict=True)]
        best = kept
        steady = torch.where(taken, (steady * RIDGE_DECAY).clamp_min(RIDGE_FLOOR), steady)
    return best, error


def sweep(work: Tensor, matrices: Matrices, steady: PerItem, shrink: PerItem) -> tuple[Matrices, PerItem]:
    """Return every matrix solved for in turn, and the relative errors reached.

    ``steady`` pulls towards the previous matrix and steadies the first sweeps. ``shrink`` is the weight mu of
    the penalty ``mu * sum ||term||^2``, which keeps terms from growing against each other. It is best given
    in proportion to the error, so that an exact fit is not biased. The two largest modes and the product of
    the others are three blocks: a sweep costs two passes over the tensor.
    """
    a, b, *small = matrices
    starts, rank, flat = a.shape[1], a.shape[2], work.flatten(2)
    weights = (steady, shrink)
    projected = product(a.flatten(1, 2), flat).reshape(*b.shape, -1)
    spread = khatri_rao(small)
    b = solve(_gram(a) * _gram(spread), (projected @ spread[..., None])[..., 0], b, *weights)
    profile = (b[..., None, :] @ projected).reshape(*b.shape[:3], *work.shape[3:])
    small = _solve_small(profile, _gram(a) * _gram(b), small, weights)
    spread = khatri_rao(small)
    outer = (b[..., None] * spread[..., None, :]).reshape(len(work), starts * rank, -1)
    target = product(outer, flat.mT).reshape(a.shape)
    gram = _gram(b) * _gram(spread)
    a = solve(gram, target, a, *weights)
    return balance([a, b, *small]), _relative_error(work, a, target, gram)


def _solve_small(
    profile: Tensor, gram: Tensor, small: Matrices, weights: tuple[PerItem, PerItem]
) -> Matrices:
    small = list(small)
    for m in range(len(small)):
        target, others = profile, gram
        for other in reversed(range(len(small))):
            if other != m:
                axes = [-1 if axis == other else 1 for axis in range(len(small))]
                vectors = small[other].reshape(*small[other].shape[:3], *axes)
                target = (target * vectors).sum(3 + other, keepdim=True)
                others = others * _gram(small[other])
        small[m] = solve(others, target.flatten(3), small[m], *weights)
    return small


def solve(gram: Tensor, target: Tensor, previous: Tensor, steady: PerItem, shrink: PerItem) -> Tensor:
    """Return the solutions of ``gram @ x = target`` under the two penalties of :func:`sweep`.

    They are found in float64, or in the precision of ``previous`` under a strong pull towards it, which
    bounds the condition of the systems. The squared norm of a term is its squared vector times the diagonal
    entry of ``gram``: penalising it by mu multiplies the diagonal by 1 + mu. Where a system cannot be
    solved, the previous matrix stays.
    """
    coarse = gram.dtype == torch.float32 and bool((steady >= STEADY_ENOUGH).all())
    damped = gram.to(torch.float32 if coarse else torch.float64, copy=True)
    steady, shrink = steady.to(damped.dtype), shrink.to(damped.dtype)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(damped.dtype).tiny)
    pull = steady[..., None] * scale
    diagonal += shrink[..., None] * diagonal + pull + JITTER * scale
    lower, failed = torch.linalg.cholesky_ex(damped)
    right = target.to(damped.dtype) + pull[..., None] * previous
    solved = torch.cholesky_solve(right, lower).to(previous.dtype)
    sound = (failed == 0) & solved.sum((-2, -1)).isfinite()
    return torch.where(sound[..., None, None], solved, previous)


def tame(work: Tensor, matrices: Matrices, error: PerItem, limit: int) -> tuple[Matrices, PerItem]:
    """Return matrices with no term above ``LARGEST_TERM`` in norm, and their errors.

    Where a term is larger than its tensor, ``sum ||term||^2`` is minimised while the error stays within
    ``LOOSER`` times what it was (error-preserving correction, Phan, Tichavsky and Cichocki 2018): by sweeps
    under the penalty ``mu * sum ||term||^2``, whose mu grows while the error allows it and shrinks where it
    does not. Where a term is above ``LARGEST_TERM``, mu grows whatever the error. A matrix solved for is no
    worse than zeros, so ``||rest||^2 + mu * sum ||term||^2 <= 1`` after any sweep: at ``LARGEST_TERM^-2`` mu
    is large enough for every tensor.
    """
    pick = (term_norms(matrices).amax((1, 2)) > 1).nonzero()[:, 0]
    if len(pick) == 0:
        return matrices, error
    part, current = work[pick], [matrix[pick] for matrix in matrices]
    best = _Candidate.of(current, error[pick])
    allowed, top = (LOOSER * best.error).clamp_min(GOOD_ENOUGH), LARGEST_TERM**-2
    mu = ((LOOSER**2 - 1) * allowed.square() / best.energy).clamp(1e-12, top)
    steady = torch.full_like(mu, RIDGE_FLOOR)
    sweeps = max(2 * LAST_SWEEPS, min(CORRECTIONS, limit))
    for left in reversed(range(sweeps)):
        current, reached = sweep(part, current, steady, mu)
        found = _Candidate.of(current, reached)
        best = best.or_better(found, allowed)
        step = 1 + 3 * (left / sweeps) ** 2
        mu = torch.where((found.largest > LARGEST_TERM) | (reached <= allowed), mu * step, mu / step)
        if left <= LAST_SWEEPS:
            mu = torch.where(best.largest > LARGEST_TERM, top, mu)
        mu = mu.clamp_max(top)
    tamed = [matrix.index_copy(0, pick, new) for matrix, new in zip(matrices, best.matrices, strict=True)]
    return tamed, error.index_copy(0, pick, best.error)


class _Candidate(NamedTuple):
    """Matrices with what they are judged by: error, sum of squared norms of terms, and largest norm."""

    matrices: Matrices
    error: PerItem
    energy: PerItem
    largest: PerItem

    @classmethod
    def of(cls, matrices: Matrices, error: PerItem) -> _Candidate:
        norms = term_norms(matrices)
        return cls(matrices, error, norms.square().sum(-1), norms.amax(-1))

    def or_better(self, other: _Candidate, allowed: PerItem) -> _Candidate:
        """Return, item by item, the one whose terms are not too large, then of lower error, then energy."""
        mine, theirs = self.largest > LARGEST_TERM, other.largest > LARGEST_TERM
        excess, found = self.error.maximum(allowed), other.error.maximum(allowed)
        closer = (found < excess) | ((found == excess) & (other.energy < self.energy))
        better = (mine & ~theirs) | ((mine == theirs) & closer)
        return _Candidate(
            choose(better, other.matrices, self.matrices),
            *(torch.where(better, new, old) for new, old in zip(other[1:], self[1:], strict=True)),
        )


def khatri_rao(matrices: Matrices) -> Tensor:
    """Return the row-wise Kronecker product ``(groups, starts, rank, product of sizes)``."""
    result = matrices[0]
    for matrix in matrices[1:]:
        result = (result[..., None] * matrix[..., None, :]).flatten(-2)
    return result


def balance(matrices: Matrices) -> Matrices:
    """Return the same terms with the norm of each shared evenly by its vectors."""
    norms = [matrix.norm(dim=-1).clamp_min(torch.finfo(matrix.dtype).tiny) for matrix in matrices]
    even = torch.stack(norms).log().mean(0).exp()
    return [matrix * (even / norm)[..., None] for matrix, norm in zip(matrices, norms, strict=True)]


def term_norms(matrices: Matrices) -> Float[Tensor, "groups starts rank"]:
    """Return the Frobenius norm of every rank-one term."""
    return torch.stack([matrix.double().norm(dim=-1) for matrix in matrices]).prod(0)


def choose(mask: Tensor, new: Matrices, old: Matrices) -> Matrices:
    """Return the new matrices of those items where ``mask`` holds, and the old ones of the others."""
    return [torch.where(mask[..., None, None], x, y) for x, y in zip(new, old, strict=True)]


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT


def _relative_error(work: Tensor, a: Tensor, target: Tensor, gram: Tensor) -> PerItem:
    """Return the relative error of fits to tensors of norm 1, from their normal equations."""
    a, target, gram = a.double(), target.double(), gram.double()
    explained = 2 * (a * target).sum((-2, -1)) - ((gram @ a) * a).sum((-2, -1))
    return (1 - explained).clamp_min(0.0).sqrt()


def slice_start(work: Tensor, rank: int) -> tuple[Matrices, PerItem]:
    """Return the strongest ``rank`` of the terms of :class:`Slices`, and the relative errors they leave."""
    return Slices.of(work).strongest(rank)


class Slices(NamedTuple):
    """All product terms found by an SVD of every slice of a stack of tensors, in no order.

    Slices are taken along the principal directions of the small modes. All their terms together are the
    tensor itself, which is why the largest rank is exact. They are orthogonal, so that no term is larger
    than the tensor, and the squared error of some of them is the energy of the others.
    """

    left: Tensor
    right: Tensor
    directions: Matrices

    @classmethod
    def of(cls, work: Tensor) -> Slices:
        """Return the terms of tensors ``(groups, *sizes)`` whose modes are ordered by size."""
        directions, rotated = [], work
        for mode in range(3, work.ndim):
            basis = _principal(work.movedim(mode, 1).flatten(2))
            moved = rotated.movedim(mode, -1)
            rotated = (moved.flatten(1, -2) @ basis).reshape(moved.shape).movedim(-1, mode)
            directions.append(basis.mT)
        slices = rotated.flatten(3).permute(0, 3, 2, 1)
        left = _principal(slices).mT
        return cls(left, left @ slices, directions)

    def strongest(self, rank: int) -> tuple[Matrices, PerItem]:
        """Return the ``rank`` strongest terms of each tensor, and the norms of what the others are."""
        strengths = self.right.norm(dim=-1).flatten(1)
        order = strengths.argsort(dim=1, descending=True, stable=True)
        dropped = strengths.gather(1, order[:, rank:]).double().norm(dim=1)
        chosen = order[:, :rank]
        a, b = (_rows(side.flatten(1, 2), chosen) for side in (self.right, self.left))
        place, small = chosen // self.left.shape[2], []
        for basis in reversed(self.directions):
            size = basis.shape[1]
            small.append(_rows(basis, place % size))
            place = place // size
        return balance([matrix[:, None] for matrix in (a, b, *reversed(small))]), dropped[:, None]


def _principal(matrix: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m m"]:
    """Return the left singular vectors of every wide matrix, strongest first: an orthogonal matrix."""
    return torch.linalg.eigh(matrix @ matrix.mT)[1].flip(-1)


def _rows(matrix: Float[Tensor, "groups m n"], index: Tensor) -> Float[Tensor, "groups rank n"]:
    return matrix.gather(1, index[..., None].expand(-1, -1, matrix.shape[2]))


def with_random(work: Tensor, start: Matrices, count: int) -> Matrices:
    """Return ``start`` and, beside it, ``count`` random starts: the same for every tensor."""
    groups, _, rank, _ = start[0].shape
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = [
        [torch.randn(rank, n, generator=generator, dtype=torch.float64, device="cpu") for n in work.shape[1:]]
        for _ in range(count)
    ]
    others = (torch.stack(matrices).to(work) for matrices in zip(*drawn, strict=True))
    return [torch.cat([a, b.expand(groups, *b.shape)], 1) for a, b in zip(start, others, strict=True)]


def lowest(matrices: Matrices, error: PerItem) -> Matrices:
    """Return the matrices of that start of each tensor which has the lowest error."""
    winner = error.argmin(1)[:, None, None, None]
    return [matrix.take_along_dim(winner, 1) for matrix in matrices]
