"""A format of one's own: the tensor ring, a chain of cores whose ends are joined (Zhao et al. 2016).

A conv2d kernel becomes four cores around a loop, ``in -r0- kh -r1- kw -r2- out -r3- in``. The bond that
closes the loop is carried past the cores in between as a number of groups that all apply the same weight,
so that the ring runs as a chain of ordinary convolutions: 1x1, kh x 1, 1 x kw, 1x1.

    pip install examples/own_format

From then on ``format: ring`` works in every spec, plan, saved model and command.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tncompress.cuts import legs_of
from tncompress.formats import Fit, Format, Stage, register_format
from tncompress.linalg import bond_scale, singular_values, svd, working_copy

Shape = Ranks = tuple[int, ...]
OUT, IN = 0, 1
NEGLIGIBLE, PULL = 1e-24, 1e-6
"""The squared error, relative, that no sweep could lower, and how strongly a sweep holds on to a core."""


@register_format("ring")
@dataclass(frozen=True)
class TensorRing(Format):
    """A core for each leg, joined to a ring; ``sweeps`` of least squares improve the truncated start.

    Ranks are those of the chain from ``in`` to ``out``, and last that of the bond which closes the loop. A
    kernel without spatial extent is a matrix, and has one bond. Spatial legs of dimension 1 go with ``in``.
    """

    sweeps: int = 12

    def __post_init__(self) -> None:
        if self.sweeps < 0:
            raise ValueError(f"a ring's sweeps are 0 or more, got {self.sweeps}")

    def network(self, shape: Shape) -> tuple[tuple[str, ...], ...]:
        """Name the legs of every factor: all else (shapes, sizes, the einsum, the kernel) follows."""
        names, wide = legs_of(len(shape)), _wide(shape)
        thin = tuple(names[mode] for mode in range(2, len(shape)) if mode not in wide)
        if not wide:
            return ("r0", "in", *thin), ("out", "r0")
        loop = f"r{len(wide) + 1}"
        inner = ((f"r{k}", f"r{k - 1}", names[mode]) for k, mode in enumerate(wide, start=1))
        return (loop, "r0", "in", *thin), *inner, ("out", loop, f"r{len(wide)}")

    def max_ranks(self, shape: Shape) -> Ranks:
        """The cut around ``in`` crosses two bonds, which share its rank; the others follow from them."""
        wide, whole = _wide(shape), math.prod(shape)
        most = min(shape[IN], whole // shape[IN])
        if not wide:
            return (most,)
        loop = math.isqrt(most)
        chain = [-(-most // loop)]
        for k, mode in enumerate(wide):
            rest = math.prod(shape[other] for other in wide[k + 1 :]) * shape[OUT] * loop
            chain.append(min(math.prod(shape[other] for other in wide[: k + 1]) * chain[0], rest))
            assert chain[-1] <= chain[-2] * shape[mode]
        return (*chain, loop)

    def feasible(self, shape: Shape, ranks: Ranks) -> Ranks:
        """No bond is larger than all other legs of the core at either of its ends together."""
        network, clipped = self.network(shape), list(ranks)
        names = legs_of(len(shape))
        while True:
            size = dict(zip(names, shape, strict=True)) | {f"r{i}": rank for i, rank in enumerate(clipped)}
            before = list(clipped)
            for i in range(len(clipped)):
                ends = (legs for legs in network if f"r{i}" in legs)
                rooms = [math.prod(size[leg] for leg in legs if leg != f"r{i}") for legs in ends]
                clipped[i] = size[f"r{i}"] = min(clipped[i], *rooms)
            if clipped == before:
                return tuple(clipped)

    def stages(self, shape: Shape, ranks: Ranks) -> tuple[Stage, ...]:
        """Channels on the way are (loop, chain): every core in between is copied along the loop."""
        wide, ones = _wide(shape), (1,) * (len(shape) - 2)
        thin = tuple(mode - 2 for mode in range(2, len(shape)) if mode not in wide)
        *chain, loop = ranks if wide else (*ranks, 1)
        stages = [Stage(0, (loop * chain[0], shape[IN], *ones), thin)]
        for k, mode in enumerate(wide, start=1):
            window = tuple(shape[mode] if axis == mode - 2 else 1 for axis in range(len(ones)))
            stages.append(Stage(k, (loop * chain[k], chain[k - 1], *window), (mode - 2,), loop, loop))
        return *stages, Stage(len(wide) + 1, (shape[OUT], loop * chain[-1], *ones))

    def spectra(self, kernel: Tensor) -> tuple[Tensor, ...] | None:
        """A bond of a loop is no cut of the kernel, and has no singular values; that of a matrix has."""
        if _wide(tuple(kernel.shape)):
            return None
        return (singular_values(working_copy(kernel).flatten(1)),)

    def fit(self, kernel: Tensor, ranks: Ranks) -> Fit:
        """Return the ring by truncations one after another (TR-SVD), then least squares core by core.

        Each core is held on to a little, so that the error never rises and no core grows without bounds.
        """
        shape = tuple(kernel.shape)
        ranks = self.feasible(shape, self.check_ranks(shape, ranks))
        modes = (IN, *_wide(shape), OUT)
        thin = tuple(mode for mode in range(2, len(shape)) if mode not in modes)
        work = working_copy(kernel).permute(IN, *thin, *modes[1:])
        work = work.reshape(shape[IN], *(shape[mode] for mode in modes[1:]))
        norm = float(work.norm())
        if norm > 0:
            work = work / norm
        cores = _truncated(work, ranks)
        error = _distance(work, cores)
        for _ in range(self.sweeps if len(ranks) > 1 else 0):
            if error**2 <= NEGLIGIBLE:
                break
            improved = _swept(work, cores)
            reached = _distance(work, improved)
            if not reached < error:
                break
            cores, error, gain = improved, reached, error - reached
            if gain < 1e-4 * error:
                break
        stored = zip(_stored(_evened(cores, norm)), self.factor_shapes(shape, ranks), strict=True)
        return self.as_fit((core.reshape(size) for core, size in stored), kernel, error)

    def draft(self, kernels: Tensor, ranks: Ranks) -> Fit:
        """Return the fit after one sweep, for a layer whose factors are solved for afterwards anyhow."""
        return TensorRing(min(1, self.sweeps)).fit_groups(kernels, ranks)

    def estimate(self, kernels: Tensor, ranks: Ranks) -> float:
        """Return the error after one sweep, which the others lower by little."""
        return self.draft(kernels, ranks).rel_error


def _wide(shape: Shape) -> tuple[int, ...]:
    return tuple(mode for mode in range(2, len(shape)) if shape[mode] > 1)


def _truncated(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Return cores ``(left bond, leg, right bond)`` around the ring: the first bond is also the last."""
    if tensor.ndim == 2:
        u, s, svh = svd(tensor)
        (rank,) = ranks
        scale = bond_scale(s[:rank])
        return [(u[:, :rank] * scale)[None], (svh[:rank] / scale[:, None])[..., None]]
    *chain, loop = ranks
    first, *others, last = tensor.shape
    u, s, svh = svd(tensor.flatten(1))
    most, kept = loop * chain[0], min(loop * chain[0], len(s))
    basis, rest = tensor.new_zeros(first, most), tensor.new_zeros(most, svh.shape[1])
    basis[:, :kept], rest[:kept] = u[:, :kept], svh[:kept]
    cores = [basis.reshape(first, loop, chain[0]).movedim(1, 0)]
    rest = rest.reshape(loop, chain[0], *others, last).movedim(0, -1)  # a chain from here on
    for size, rank in zip(others, chain[1:], strict=True):
        u, _, svh = svd(rest.reshape(cores[-1].shape[2] * size, -1))
        cores.append(u[:, :rank].reshape(-1, size, rank))
        rest = svh[:rank]
    return [*cores, rest.reshape(chain[-1], last, loop)]


def _join(first: Tensor, second: Tensor) -> Tensor:
    """Return two neighbours as one: (left bond, legs of both as one, right bond)."""
    return torch.tensordot(first, second, dims=1).flatten(1, 2)


def _gram(part: Tensor) -> Tensor:
    """Return ``(left, right, left', right')``: a part of the ring on a copy of itself, over all its legs."""
    left, _, right = part.shape
    rows = part.movedim(1, 2).flatten(0, 1)
    return (rows @ rows.mT).reshape(left, right, left, right)


def _swept(tensor: Tensor, cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the cores after each was solved for in turn, with a pull towards what it was.

    What lies before a core and behind it enters by its Gram matrices: nothing as large as both is made.
    """
    cores, last = list(cores), len(cores) - 1
    behind = [cores[last]]
    for core in reversed(cores[1:last]):
        behind.insert(0, _join(core, behind[0]))
    before = None
    for number, core in enumerate(cores):
        left, size, right = core.shape
        after = behind[number] if number < last else None
        if before is None:
            assert after is not None
            gram = _gram(after).permute(1, 0, 3, 2)  # loop, chain
            aim = torch.einsum("ab,rbl->alr", tensor.reshape(size, -1), after)
        elif after is None:
            gram = _gram(before).permute(1, 0, 3, 2)
            aim = torch.einsum("lai,as->sil", before, tensor.reshape(-1, size))
        else:
            gram = torch.einsum("limj,rlsm->irjs", _gram(before), _gram(after))
            middle = tensor.reshape(before.shape[1], size, after.shape[1])
            aim = torch.einsum("lai,asb,rbl->sir", before, middle, after)
        gram = gram.reshape(left * right, -1)
        pull = PULL * float(gram.diagonal().mean()) + torch.finfo(gram.dtype).tiny
        gram = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        held = core.movedim(1, 0).flatten(1)
        solved = torch.linalg.solve(gram, (aim.flatten(1) + pull * held).mT).mT
        cores[number] = solved.reshape(size, left, right).movedim(0, 1)
        before = cores[number] if before is None else _join(before, cores[number])
    return cores


def _distance(tensor: Tensor, cores: Sequence[Tensor]) -> float:
    """Return the norm of what the ring leaves out of a tensor."""
    before = cores[0]
    for core in cores[1:-1]:
        before = _join(before, core)
    rebuilt = torch.einsum("lai,ibl->ab", before, cores[-1])
    return float((tensor.reshape(rebuilt.shape) - rebuilt).norm())


def _evened(cores: Sequence[Tensor], norm: float) -> list[Tensor]:
    """Return the cores of the kernel itself, all of one norm."""
    sizes = [float(core.norm()) for core in cores]
    if norm == 0 or min(sizes) == 0:
        return [torch.zeros_like(core) for core in cores]
    share = (norm * math.prod(sizes)) ** (1 / len(cores))
    return [core * (share / size) for core, size in zip(cores, sizes, strict=True)]


def _stored(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the cores with their modes in the order of the network."""
    if len(cores) == 2:
        return [cores[0][0].mT, cores[1][..., 0].mT]
    first, *inner, last = cores
    return [first.permute(0, 2, 1), *(core.permute(2, 0, 1) for core in inner), last.permute(1, 2, 0)]
