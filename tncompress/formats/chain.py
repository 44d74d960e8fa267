"""Formats whose factors form a chain: each core holds some legs of the kernel and two bonds.

A single cut, Tucker-2 and an MPS are all chains; they differ in how legs are grouped into cores. Here is
what they share: the network, the convolutions that run it, and the sequentially truncated decomposition.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from tncompress.cuts import legs_of
from tncompress.formats.base import Fit, Format, Ranks, Shape, Stage
from tncompress.linalg import (
    SINGLE_FLOOR,
    bond_scale,
    leading,
    orthonormalised,
    projected,
    single_suffices,
    singular_values,
    squared_norm,
    svd,
    unfold,
    working_copy,
)
from tncompress.products import product

OUT, IN = 0, 1
SWEEPS, NEGLIGIBLE = 2, 1e-8
"""Sweeps over a truncated chain, and the squared error, relative, below which they are not worth it."""

Groups = tuple[tuple[int, ...], ...]


class ChainFormat(Format):
    """A chain of cores; core number k is stored as ``([out], [r_k], [in], [r_k-1], *spatial)``.

    With that order of modes a core *is* the weight of its convolution, so nothing is copied in a forward
    pass (except for cores beyond ``in`` or ``out``, see :meth:`stages`).
    """

    @abstractmethod
    def grouping(self, ndim: int) -> Groups:
        """Return the kernel's modes in each core, from one end of the chain to the other."""

    def groups(self, shape: Shape) -> Groups:
        """Return the modes in each core for a kernel of this shape, ``in`` no later than ``out``.

        A spatial mode of dimension 1 joins the core of ``in``: the input is then subsampled first.
        """
        thin = [mode for mode in range(2, len(shape)) if shape[mode] == 1]
        groups = []
        for group in self.grouping(len(shape)):
            kept = [mode for mode in group if mode not in thin]
            if IN in group:
                kept += thin
            if kept:
                groups.append(tuple(sorted(kept)))
        if len(groups) < 2:
            raise ValueError(f"{self} has nothing to cut in a kernel {tuple(shape)}: one side would be empty")
        if _position(groups, IN) > _position(groups, OUT):
            groups.reverse()
        return tuple(groups)

    def network(self, shape: Shape) -> tuple[tuple[str, ...], ...]:
        names, groups = legs_of(len(shape)), self.groups(shape)
        cores = []
        for k, group in enumerate(groups):
            legs = [names[OUT]] if OUT in group else []
            legs += [f"r{k}"] if k < len(groups) - 1 else []
            legs += [names[IN]] if IN in group else []
            legs += [f"r{k - 1}"] if k > 0 else []
            cores.append((*legs, *(names[mode] for mode in group if mode > IN)))
        return tuple(cores)

    def max_ranks(self, shape: Shape) -> Ranks:
        sizes = [math.prod(shape[mode] for mode in group) for group in self.groups(shape)]
        return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))

    def feasible(self, shape: Shape, ranks: Ranks) -> Ranks:
        sizes = [math.prod(shape[mode] for mode in group) for group in self.groups(shape)]
        clipped = [1, *ranks, 1]
        for k in range(1, len(clipped)):
            clipped[k] = min(clipped[k], clipped[k - 1] * sizes[k - 1])
        for k in range(len(clipped) - 2, 0, -1):
            clipped[k] = min(clipped[k], clipped[k + 1] * sizes[k])
        return tuple(clipped[1:-1])

    def stages(self, shape: Shape, ranks: Ranks) -> tuple[Stage, ...]:
        """Return one convolution for each core, from ``in`` to ``out``.

        A core beyond ``in`` acts on each input channel alike, one beyond ``out`` on each output channel:
        a grouped convolution whose weight is repeated for every group.
        """
        groups = self.groups(shape)
        first, last = _position(groups, IN), _position(groups, OUT)
        bonds, stages = (1, *ranks, 1), []
        for k, group in enumerate(groups):
            channels_out = bonds[k + 1] * (shape[OUT] if OUT in group else 1)
            channels_in = bonds[k] * (shape[IN] if IN in group else 1)
            copies = shape[IN] if k < first else shape[OUT] if k > last else 1
            axes = tuple(mode - 2 for mode in group if mode > IN)
            window = tuple(size if axis in axes else 1 for axis, size in enumerate(shape[2:]))
            stages.append(Stage(k, (copies * channels_out, channels_in, *window), axes, copies, copies))
        return tuple(stages)

    def spectra(self, kernel: Tensor) -> tuple[Tensor, ...]:
        groups, kernel = self.groups(kernel.shape), working_copy(kernel)
        cut_modes = [sum(groups[:k], ()) for k in range(1, len(groups))]
        return tuple(singular_values(unfold(kernel, modes)) for modes in cut_modes)

    def fit(self, kernel: Tensor, ranks: Ranks) -> Fit:
        """Return the sequentially truncated decomposition (TT-SVD, Oseledets 2011), improved by sweeps.

        It is optimal for one bond. For more, the truncation is within sqrt(number of bonds) of the best, and
        the sweeps, which solve for one core after another, never raise the error.
        """
        ranks = self.feasible(kernel.shape, self.check_ranks(kernel.shape, ranks))
        groups = self.groups(kernel.shape)
        single = single_suffices(kernel)
        tensor = self._tensor(kernel, groups, single=single)
        cores, centre, squared = truncate_chain(tensor, ranks, single=single)
        norm = squared_norm(tensor)
        if len(ranks) > 1 and squared > NEGLIGIBLE * norm:
            single = single and squared > SINGLE_FLOOR * norm
            cores, squared = improve_chain(tensor if single else tensor.double(), cores, single=single)
            centre = len(cores) - 1
        cores = balance_chain(cores, centre)
        rel_error = math.sqrt(max(squared, 0.0) / norm) if norm > 0 else 0.0
        shapes = self.factor_shapes(kernel.shape, ranks)
        stored = (_store(core, group, kernel.shape) for core, group in zip(cores, groups, strict=True))
        made = (core.reshape(size) for core, size in zip(stored, shapes, strict=True))
        return self.as_fit(made, kernel, rel_error)

    def estimate(self, kernels: Tensor, ranks: Ranks) -> float:
        """Return the relative error of the truncation, which sweeps then lower by little."""
        ranks = self.feasible(kernels.shape[1:], self.check_ranks(kernels.shape[1:], ranks))
        groups = self.groups(kernels.shape[1:])
        single = single_suffices(kernels)
        squared = sum(
            truncate_chain(self._tensor(kernel, groups, single=single), ranks, single=single)[2]
            for kernel in kernels
        )
        norm = squared_norm(kernels)
        return math.sqrt(max(squared, 0.0) / norm) if norm > 0 else 0.0

    def _tensor(self, kernel: Tensor, groups: Groups, *, single: bool) -> Tensor:
        """Return the kernel with one mode for each core, in the order of the chain."""
        sizes = [math.prod(kernel.shape[mode] for mode in group) for group in groups]
        return working_copy(kernel.permute(sum(groups, ())), single=single).reshape(sizes)


def truncate_chain(tensor: Tensor, ranks: Ranks, *, single: bool = False) -> tuple[list[Tensor], int, float]:
    """Return cores ``(r_left, size, r_right)`` of a chain, the number of the centre, and the squared error.

    Bonds are cut from both ends towards the middle, the cheaper end first, with isometries: the centre, which
    remains, carries the whole norm, so that the discarded weights add. ``single``: see
    :func:`tncompress.linalg.leading`.
    """
    sizes, last = tensor.shape, tensor.ndim - 1
    cores: list[Tensor] = [tensor] * tensor.ndim
    low, high, r_low, r_high, discarded = 0, last, 1, 1, 0.0
    rest = tensor
    while low < high:
        from_left = r_low * sizes[low] <= sizes[high] * r_high
        rank = ranks[low] if from_left else ranks[high - 1]
        rows = (
            rest.reshape(r_low * sizes[low], -1) if from_left else rest.reshape(-1, sizes[high] * r_high).mT
        )
        u, rest, lost = leading(rows, rank, single=single)
        discarded += lost
        if from_left:
            cores[low] = u.reshape(r_low, sizes[low], rank)
            low, r_low = low + 1, rank
        else:
            cores[high], rest = u.mT.reshape(rank, sizes[high], r_high), rest.mT
            high, r_high = high - 1, rank
    cores[low] = rest.reshape(r_low, sizes[low], r_high)
    return cores, low, discarded


def improve_chain(tensor: Tensor, cores: list[Tensor], *, single: bool = False) -> tuple[list[Tensor], float]:
    """Return the chain after sweeps that solve for its cores in turn, and its squared error.

    With all other cores isometries, the best core is the tensor projected on them (one-site DMRG). The last
    core is the centre of the result. With ``single`` the isometries are found in float32; they are made
    exact before the tensor is projected on them for the last time.
    """
    if single:
        found, _ = improve_chain(tensor.float(), [core.float() for core in cores])
        return _centred(tensor, found)
    total = squared_norm(tensor)
    for _ in range(SWEEPS):
        cores = _orthogonal_from_right(cores)
        rests = [tensor.unsqueeze(-1)]  # number k: the tensor with the last k cores contracted to it
        for core in reversed(cores[1:]):
            rests.append(_contracted(rests[-1], core))
        left = tensor.new_ones(1, 1)
        for k, core in enumerate(cores):
            solved = product(left.mT, rests.pop().reshape(len(left), -1))
            if k < len(cores) - 1:
                solved = torch.linalg.qr(solved.reshape(-1, core.shape[2])).Q
                left = product(left, solved.reshape(len(core), -1)).reshape(-1, core.shape[2])
            cores[k] = solved.reshape(core.shape)
    return cores, total - squared_norm(cores[-1])


def _centred(tensor: Tensor, cores: list[Tensor]) -> tuple[list[Tensor], float]:
    """Return the chain whose cores but the last are isometries near ``cores``, and its squared error."""
    rest, made = tensor.reshape(1, -1), list[Tensor]()
    for core in cores[:-1]:
        basis = orthonormalised(core.double().flatten(0, 1))
        rest = projected(basis, rest.reshape(len(basis), -1))
        made.append(basis.reshape(core.shape))
    made.append(rest.reshape(cores[-1].shape))
    return made, squared_norm(tensor) - squared_norm(rest)


def _contracted(tensor: Tensor, core: Tensor) -> Tensor:
    """Return a tensor whose last two modes are contracted with a core's last two."""
    return product(tensor.flatten(-2).flatten(0, -2), core.flatten(1).mT).unflatten(0, tensor.shape[:-2])


def _orthogonal_from_right(cores: list[Tensor]) -> list[Tensor]:
    """Return the same chain with all cores but the first isometries, seen from the left."""
    cores = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        q, r = torch.linalg.qr(cores[k].flatten(1).mT)
        cores[k] = q.mT.reshape(-1, *cores[k].shape[1:])
        cores[k - 1] = torch.tensordot(cores[k - 1], r.mT, dims=1)
    return cores


def balance_chain(cores: list[Tensor], centre: int) -> list[Tensor]:
    """Return the same chain in another gauge: sqrt of each bond's singular values on both its sides.

    ``cores`` are isometries around the one numbered ``centre``, which carries the norm. Gradient flow keeps
    an unbalanced bond unbalanced, so fine-tuning should start from an even split.
    """
    turned = [core.permute(2, 1, 0) for core in reversed(cores[: centre + 1])]
    to_left, left = _balance_outwards(turned)
    to_right, right = _balance_outwards(cores[centre:])
    middle = torch.einsum("ax,xny,yb->anb", to_left.mT, cores[centre], to_right)
    return [*(core.permute(2, 1, 0) for core in reversed(left)), middle, *right]


def _balance_outwards(cores: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return what the last leg of the first core is multiplied with, and the balanced others.

    The norm is carried outwards: across each bond the singular values are those of the core that carries it.
    """
    carrier, balanced = cores[0], list[Tensor]()
    change = torch.eye(carrier.shape[2], dtype=carrier.dtype, device=carrier.device)
    for number, core in enumerate(cores[1:]):
        u, s, _ = svd(carrier.flatten(0, 1).mT)
        scale = bond_scale(s)
        if number == 0:
            change = u / scale
        else:
            balanced[-1] = balanced[-1] @ (u / scale)
        core = torch.tensordot(u.mT, core, dims=1)
        carrier = s[:, None, None] * core
        balanced.append(scale[:, None, None] * core)
    return change, balanced


def _store(core: Tensor, group: tuple[int, ...], shape: Shape) -> Tensor:
    """Return ``core`` (r_left, group's modes as one, r_right) with its modes in the order of storage."""
    r_left, _, r_right = core.shape
    split = core.reshape(r_left, *(shape[mode] for mode in group), r_right)
    place = {mode: 1 + i for i, mode in enumerate(group)}
    order = [place.get(OUT), split.ndim - 1, place.get(IN), 0, *(place[mode] for mode in group if mode > IN)]
    return split.permute([i for i in order if i is not None])


def _position(groups: list[tuple[int, ...]] | Groups, mode: int) -> int:
    return next(k for k, group in enumerate(groups) if mode in group)
