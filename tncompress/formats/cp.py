"""The CP decomposition: a sum of rank-one terms, one vector per leg."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tncompress.cuts import legs_of
from tncompress.formats import als
from tncompress.formats.base import Fit, Format, Ranks, Shape, Stage, register_format
from tncompress.linalg import bond_scale, singular_values, svd, unfold, working_copy

SWEEPS, RESTARTS = 120, 4
FEWEST_SWEEPS, BUDGET = 30, 2**33
"""A large kernel gets as many sweeps as fit into ``BUDGET`` products of its entries with the rank."""
TRIAL, CHEAP = 60, 2**22
"""After ``TRIAL`` sweeps, or half of all, the best start goes on alone. Kernels with at most ``CHEAP`` such
products have random ones beside the first."""
DRAFT = 24
"""Sweeps of a draft."""
FEW, DOUBLINGS = 4, 4
"""Sweeps of the two halves of an estimate, and how many doublings of their number it is carried on for."""
CHUNK = 2**20
"""Kernels are fitted together as long as they keep no more than ``CHUNK`` numbers in work."""


@register_format("cp")
@dataclass(frozen=True)
class CP(Format):
    """A sum of ``rank`` product terms over out, in and each spatial leg (Lebedev et al. 2015).

    It runs as 1x1, depthwise kh x 1, depthwise 1 x kw, 1x1; with ``merged`` the spatial legs are one and
    the two depthwise stages are one kh x kw stage. A kernel without spatial extent is a matrix: its best
    CP is its truncated SVD. At the maximal rank the fit is exact.

    >>> CP().factor_shapes((64, 32, 3, 3), ranks=(40,))
    ((40, 32), (40, 3), (40, 3), (64, 40))
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
        """Return the fit by regularised alternating least squares, the same for the same kernel.

        No term is larger than ten times the kernel, and no fit is worse than zero factors; large terms are
        corrected after Phan, Tichavsky and Cichocki (2018).
        """
        fit = self._fit_stack(kernel[None], ranks)
        return Fit(tuple(factor[0] for factor in fit.factors), fit.rel_error)

    def fit_groups(self, kernels: Tensor, ranks: Ranks) -> Fit:
        """Return what :meth:`fit` gives for each kernel, all of them fitted at once."""
        return self.fit(kernels[0], ranks) if len(kernels) == 1 else self._fit_stack(kernels, ranks)

    def spectra(self, kernel: Tensor) -> tuple[Tensor, ...] | None:
        """Return the singular values of a kernel that is a matrix; the bond of any other has none."""
        modes = self.modes(tuple(kernel.shape))
        return (singular_values(unfold(working_copy(kernel), modes[-1])),) if len(modes) == 2 else None

    def draft(self, kernels: Tensor, ranks: Ranks) -> Fit:
        """Return the fits after a few sweeps from the first start."""
        fit = self._fit_stack(kernels, ranks, draft=True)
        return fit if len(kernels) > 1 else Fit(tuple(factor[0] for factor in fit.factors), fit.rel_error)

    def estimate(self, kernels: Tensor, ranks: Ranks) -> float:
        """Return the error after a few sweeps, carried on to more of them.

        Each doubling of their number lowers the logarithm of the error about as much as the one before.
        """
        return self.estimates(kernels, [ranks])[0]

    def estimates(self, kernels: Tensor, several: Sequence[Ranks]) -> list[float]:
        shape = tuple(kernels.shape[1:])
        checked = [self.check_ranks(shape, ranks)[0] for ranks in several]
        if len(self.modes(shape)) == 2:
            return [self.fit_groups(kernels, ranks).rel_error for ranks in several]
        parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in checked]
        for part in kernels.split(_chunk(shape, max(checked, default=1), 1)):
            work, peaks, norms = self._normalised(part)
            order = sorted(range(1, work.ndim), key=lambda mode: -work.shape[mode])
            work = work.permute(0, *order).contiguous().float()
            slices = als.Slices.of(work)
            for rank, own in zip(checked, parts, strict=True):
                start, left_out = slices.strongest(rank)
                fewer, before = als.descend(work, start, FEW, als.STIFF)
                _, after = als.descend(work, fewer, FEW, als.STIFF)
                further = after * (after / before.clamp_min(als.GOOD_ENOUGH)).clamp_max(1.0) ** DOUBLINGS
                own.append((torch.minimum(further, left_out)[:, 0], norms[:, 0], peaks[:, 0]))
        return [_joint_error(*(torch.cat(values) for values in zip(*own, strict=True))) for own in parts]

    def _fit_stack(self, kernels: Tensor, ranks: Ranks, *, draft: bool = False) -> Fit:
        shape = tuple(kernels.shape[1:])
        (rank,) = self.check_ranks(shape, ranks)
        starts = 1 + RESTARTS * (math.prod(shape) * rank <= CHEAP)
        chunks = kernels.split(_chunk(shape, rank, starts))
        fits = [self._fit_chunk(part, rank, draft=draft) for part in chunks]
        factors = tuple(torch.cat(parts) for parts in zip(*(parts for parts, *_ in fits), strict=True))
        errors, norms, peaks = (torch.cat(parts) for parts in zip(*(rest for _, *rest in fits), strict=True))
        return Fit(factors, _joint_error(errors, norms, peaks))

    def _fit_chunk(
        self, kernels: Tensor, rank: int, *, draft: bool
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        """Return stacked factors, relative errors, and norms over the largest entries, which come last."""
        shape = tuple(kernels.shape[1:])
        sizes = self._sizes(shape)
        work, peaks, norms = self._normalised(kernels)
        exact = kernels.dtype == torch.float64 or math.prod(sizes) * rank <= CHEAP
        matrices = cp_als(work if exact else work.float(), rank, draft=draft)
        share = ((peaks ** (1 / len(sizes))) * norms ** (1 / len(sizes)))[..., None]
        stored = [(share * matrix).to(kernels.dtype) for matrix in matrices]
        rounded = [matrix.double() / torch.where(share > 0, share, 1.0) for matrix in stored]
        rebuilt = rounded[0].mT @ als.khatri_rao(rounded[1:])
        errors = (rebuilt.reshape(work.shape) - work).flatten(1).norm(dim=1)
        stored[-1] = stored[-1].mT
        made = zip(stored, self.factor_shapes(shape, (rank,)), strict=True)
        factors = tuple(factor.reshape(len(kernels), *size).contiguous() for factor, size in made)
        return factors, errors, norms[:, 0], (peaks * (norms > 0))[:, 0]

    def _normalised(self, kernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return kernels of norm 1, one mode for each factor, their largest entries, and norms over these.

        The way by the largest entry keeps squares from over- and underflowing.
        """
        shape = tuple(kernels.shape[1:])
        order = [mode + 1 for group in self.modes(shape) for mode in group]
        work = working_copy(kernels).permute(0, *order).reshape(len(kernels), -1)
        peaks = work.abs().amax(1, keepdim=True)
        peaks = torch.where(peaks > 0, peaks, 1.0)
        work = work / peaks
        norms = work.norm(dim=1, keepdim=True)
        return work.div_(norms.clamp_min(1.0)).unflatten(1, self._sizes(shape)), peaks, norms

    def _sizes(self, shape: Shape) -> tuple[int, ...]:
        return tuple(math.prod(shape[mode] for mode in group) for group in self.modes(shape))


def _chunk(shape: Shape, rank: int, starts: int) -> int:
    """Return how many kernels of this shape are fitted together."""
    numel = math.prod(shape)
    return max(1, CHUNK // (numel + 3 * starts * rank * numel // max(shape)))


def _joint_error(errors: Tensor, norms: Tensor, peaks: Tensor) -> float:
    """Return the relative error of all kernels, given those of each and their norms over ``peaks``."""
    weights = norms * (peaks / peaks.max().clamp_min(torch.finfo(peaks.dtype).smallest_normal))
    total = float(weights.norm())
    return float((weights * errors).norm()) / total if total > 0 else 0.0


def cp_als(
    tensors: Float[Tensor, "groups ..."], rank: int, *, draft: bool = False
) -> list[Float[Tensor, "groups rank _"]]:
    """Return one matrix for each mode of a stack of tensors of norm 1, fitted by least squares in turns.

    The first start is made of slices (:func:`tncompress.formats.als.slice_start`), and is exact at the
    largest rank. Where a start is cheap, random ones are tried beside it and the best goes on: least squares
    in turns can end in a local minimum. A ``draft`` ends after a few sweeps.
    """
    if tensors.ndim == 3:
        return [torch.stack(parts) for parts in zip(*(_from_svd(t, rank) for t in tensors), strict=True)]
    order = sorted(range(tensors.ndim - 1), key=lambda mode: -tensors.shape[mode + 1])
    work = tensors.permute(0, *(mode + 1 for mode in order)).contiguous()
    start, left_out = als.slice_start(work, rank)
    best, products = start, work[0].numel() * rank
    if draft:
        best = als.descend(work, start, DRAFT, als.STIFF)[0]
    elif rank < work[0, 0].numel():
        affordable = min(SWEEPS, max(FEWEST_SWEEPS, BUDGET // products))
        trial = min(TRIAL, affordable // 2)
        rest = affordable - trial
        if RESTARTS and products <= CHEAP:
            best, rest = als.with_random(work, best, RESTARTS), SWEEPS
        best = als.lowest(*als.descend(work, best, trial, als.STIFF))
        best, error = als.tame(work, *als.descend(work, best, rest, als.LOOSE), affordable)
        best = als.choose((error <= left_out) & (left_out > als.GOOD_ENOUGH), best, start)
    return [best[order.index(mode)][:, 0] for mode in range(len(order))]


def _from_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, svh = svd(matrix)
    scale = bond_scale(s[:rank])
    return (u[:, :rank] * scale).mT, svh[:rank] / scale[:, None]
