"""Factors in canonical form: the spectra of their bonds, and bonds cut to smaller ranks, without the kernel.

Where all factors but one are isometries towards that one, a bond beside it is cut by a truncated SVD of that
factor alone: its singular values are those of the kernel across the bond, and the discarded ones are the
error. The norm is then carried on to the next bond. Projections across two bonds act on sides that do not
overlap, and commute, so that the discarded weights add exactly (Vidal 2003; Oseledets 2011).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tncompress.gauge import Network, Tree, balanced_factors, tree_of
from tncompress.linalg import svd, tail_energies, working_copy


def bond_values(network: Network, tensors: Sequence[Tensor], groups: int = 1) -> dict[str, Tensor] | None:
    """Return the singular values of the kernel across each bond of a tree, largest first, in float64.

    Of several groups, stacked, value number k is the root of the sum of squares of their own. None where
    the factors are no tree (CP), whose bond has no singular values.
    """
    if (neighbours := tree_of(network)) is None:
        return None
    found = []
    for part in _groups(tensors, groups):
        tree = Tree(network, part, neighbours)
        tree.balanced()
        found.append(tree.values)
    return {bond: torch.stack([own[bond] for own in found]).square().sum(0).sqrt() for bond in found[0]}


def cut_bonds(
    network: Network, tensors: Sequence[Tensor], ranks: Mapping[str, int], groups: int = 1
) -> tuple[list[Tensor], float] | None:
    """Return factors with each bond cut to its rank, balanced, in float64, and the relative error.

    Bonds that ``ranks`` does not name, or that are no larger, keep their size. None where the factors are no
    tree.
    """
    if (neighbours := tree_of(network)) is None:
        return None
    made, lost, total = [], 0.0, 0.0
    for part in _groups(tensors, groups):
        tree = _Cutting(network, part, neighbours)
        tree.gather(0, None)
        total += float(tree.work[0].square().sum())
        lost += tree.cut(0, None, ranks)
        balanced = balanced_factors(network, tree.work)
        assert balanced is not None
        made.append(balanced)
    factors = made[0] if groups == 1 else [torch.stack(own) for own in zip(*made, strict=True)]
    return factors, math.sqrt(lost / total) if total > 0 else 0.0


def _groups(tensors: Sequence[Tensor], groups: int) -> list[list[Tensor]]:
    work = [working_copy(tensor) for tensor in tensors]
    return [[tensor[g] for tensor in work] for g in range(groups)] if groups > 1 else [work]


class _Cutting(Tree):
    """A tree whose bonds are cut one after another, each while a factor beside it has the whole norm."""

    def cut(self, k: int, parent: int | None, ranks: Mapping[str, int]) -> float:
        """Cut the bonds behind factor ``k``, which has the whole norm and keeps it; return what is lost."""
        lost = 0.0
        for bond, child in self.neighbours[k]:
            if child == parent:
                continue
            lost += self._cut_one(k, bond, child, ranks.get(bond))
            lost += self.cut(child, k, ranks)
            self.push(child, bond, k)
        return lost

    def _cut_one(self, k: int, bond: str, child: int, rank: int | None) -> float:
        """Cut ``bond`` and hand the norm on to ``child``; return the discarded weight."""
        axis = self.network[k].index(bond)
        rows = self.work[k].movedim(axis, -1)
        if rank is None or rank >= rows.shape[-1]:
            self.push(k, bond, child)
            return 0.0
        u, s, svh = svd(rows.flatten(0, -2))
        u, kept = u[:, :rank], svh[:rank]
        if len(kept) < rank:  # more than there are rows: the rest is zero
            missing = rank - len(kept)
            u, kept = nn.functional.pad(u, (0, missing)), nn.functional.pad(kept, (0, 0, 0, missing))
        self.work[k] = u.reshape(*rows.shape[:-1], rank).movedim(-1, axis)
        self.work[child] = self.times(child, bond, self.work[child], kept.mT)
        return float(tail_energies(s)[min(rank, len(s))])
