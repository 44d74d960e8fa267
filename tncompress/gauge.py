"""The freedom that factors have: many of them stand for one kernel.

On a bond, one side can be multiplied by any invertible matrix and the other by its inverse. Gradient flow
conserves how uneven the two sides are (``A.T A - B B.T``, Du et al. 2018), so that an uneven start stays
one. :func:`balance_` gives both sides of each bond the square root of its singular values. Weight decay
on factors pulls at this gauge; :func:`squared_norm` of the kernel does not, and its gradient is that of a
decay of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import opt_einsum
import torch
from torch import Tensor, nn

from tncompress.layers import TNConv
from tncompress.linalg import bond_scale, working_copy

Network = tuple[tuple[str, ...], ...]
Neighbours = dict[int, list[tuple[str, int]]]


def squared_norm(layer: TNConv) -> Tensor:
    """Return the squared Frobenius norm of the layer's kernel, without building it; gradients flow.

    The network is contracted with a copy of itself, in the cheapest order of pairs: for a chain that is a
    sweep from an end, for CP the elementwise product of Gram matrices.
    """
    shape, groups = layer.geometry.kernel_shape, layer.geometry.groups
    tensors = layer.tensors()
    network = layer.format.network(shape)
    run = _norm_contraction(network, tuple(tuple(t.shape) for t in tensors), groups > 1)
    return run(*tensors, *tensors)


@lru_cache(maxsize=256)
def _norm_contraction(
    network: Network, shapes: tuple[tuple[int, ...], ...], stacked: bool
) -> Callable[..., Any]:
    letters: dict[str, str] = {}
    terms = []
    for copied in (False, True):
        for legs in network:
            names = [f"{leg}'" if copied and leg.startswith("r") else leg for leg in legs]
            for name in names:
                letters.setdefault(name, opt_einsum.get_symbol(1 + len(letters)))
            own = "".join(letters[name] for name in names)
            terms.append(opt_einsum.get_symbol(0) + own if stacked else own)
    return opt_einsum.contract_expression(f"{','.join(terms)}->", *shapes, *shapes, optimize="auto")


def frobenius_gradients(layers: Iterable[TNConv]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each trained factor of ``layers`` with the gradient of half the squared norm of its kernel."""
    found: list[tuple[nn.Parameter, Tensor]] = []
    for layer in layers:
        wanted = [factor for factor in layer.factors if factor.requires_grad]
        if wanted:
            with torch.enable_grad():
                gradients = torch.autograd.grad(0.5 * squared_norm(layer), wanted)
            found += zip(wanted, gradients, strict=True)
    return found


def balance_(model: nn.Module) -> list[nn.Parameter]:
    """Balance the bonds of all compressed layers of ``model`` in place; return the factors that changed.

    Kernels stay as they are, but for rounding. Layers with a frozen factor, or whose network has a loop,
    are left alone.
    """
    changed: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, TNConv) and all(factor.requires_grad for factor in module.factors):
            network = module.format.network(module.geometry.kernel_shape)
            if (balanced := balanced_factors(network, module.tensors(), module.geometry.groups)) is not None:
                for factor, tensor in zip(module.factors, balanced, strict=True):
                    factor.data.copy_(tensor.reshape(factor.shape))
                changed += module.factors
    return changed


def balanced_factors(network: Network, tensors: Sequence[Tensor], groups: int = 1) -> list[Tensor] | None:
    """Return factors of the same kernel with all bonds balanced, those of several groups stacked.

    None where the network is neither a tree nor has one bond for all (CP): there each term's vectors get
    equal norms.
    """
    work = [working_copy(tensor) for tensor in tensors]
    if groups > 1:
        parts = [balanced_factors(network, [tensor[g] for tensor in work]) for g in range(groups)]
        found = [part for part in parts if part is not None]
        return [torch.stack(own) for own in zip(*found, strict=True)] if len(found) == groups else None
    if len(owners := bonds_of(network)) == 1 and len(network) > 2:
        ((bond, ends),) = owners.items()
        if len(ends) == len(network):
            return _equal_norms(network, work, bond)
    neighbours = tree_of(network)
    return Tree(network, work, neighbours).balanced() if neighbours is not None else None


def _equal_norms(network: Network, work: list[Tensor], bond: str) -> list[Tensor]:
    norms = []
    for legs, tensor in zip(network, work, strict=True):
        norms.append(tensor.movedim(legs.index(bond), 0).flatten(1).norm(dim=1))
    mean = torch.stack(norms).log().mean(0).exp()  # zero where a vector of the term is
    for k, (legs, norm) in enumerate(zip(network, norms, strict=True)):
        place = [1] * len(legs)
        place[legs.index(bond)] = -1
        scale = torch.where(mean > 0, mean / norm, torch.ones_like(norm))
        work[k] = work[k] * scale.reshape(place)
    return work


def bonds_of(network: Network) -> dict[str, list[int]]:
    """Return the bonds of a network, each with the factors that hold it."""
    bonds = sorted({leg for legs in network for leg in legs if leg.startswith("r")})
    return {bond: [k for k, legs in enumerate(network) if bond in legs] for bond in bonds}


def tree_of(network: Network) -> Neighbours | None:
    """Return each factor's bonds with the factor at the other end; None where they do not form a tree."""
    owners, count = bonds_of(network), len(network)
    if any(len(ends) != 2 for ends in owners.values()) or len(owners) != count - 1:
        return None
    neighbours: Neighbours = {k: [] for k in range(count)}
    for bond, (one, other) in owners.items():
        neighbours[one].append((bond, other))
        neighbours[other].append((bond, one))
    seen, waiting = {0}, [0]
    while waiting:
        fresh = [other for _, other in neighbours[waiting.pop()] if other not in seen]
        seen.update(fresh)
        waiting += fresh
    return neighbours if len(seen) == count else None


class Tree:
    """Factors of a tree, in work: turned to isometries towards the first, whose norm is carried outwards.

    ``values`` are the singular values of the kernel across each bond, once they were found.
    """

    def __init__(self, network: Network, work: list[Tensor], neighbours: Neighbours) -> None:
        self.network, self.work, self.neighbours = network, list(work), neighbours
        self.values: dict[str, Tensor] = {}

    def balanced(self) -> list[Tensor]:
        """Return the factors with both sides of every bond even."""
        self.gather(0, None)
        self._spread(0, None, self.work[0])
        return self.work

    def gather(self, k: int, parent: int | None) -> None:
        """Turn all factors behind ``k``, seen from ``parent``, to isometries; ``k`` takes over their norm."""
        for bond, child in self.neighbours[k]:
            if child != parent:
                self.gather(child, k)
                self.push(child, bond, k)

    def push(self, child: int, bond: str, k: int) -> None:
        """Turn ``child`` to an isometry towards factor ``k``, which takes over its norm."""
        axis = self.network[child].index(bond)
        rows = self.work[child].movedim(axis, -1)
        q, r = torch.linalg.qr(rows.flatten(0, -2))
        if q.shape[1] < len(r.mT):  # more values on the bond than the child has: the rest is zero
            missing = len(r.mT) - q.shape[1]
            q, r = nn.functional.pad(q, (0, missing)), nn.functional.pad(r, (0, 0, 0, missing))
        self.work[child] = q.reshape(rows.shape).movedim(-1, axis)
        self.work[k] = self.times(k, bond, self.work[k], r.mT)

    def _spread(self, k: int, parent: int | None, carrier: Tensor) -> None:
        """Balance the bonds from factor ``k`` outwards; ``carrier`` is that one with the whole norm."""
        for bond, child in self.neighbours[k]:
            if child == parent:
                continue
            columns = carrier.movedim(self.network[k].index(bond), -1).flatten(0, -2)
            if len(columns) < columns.shape[1]:
                columns = nn.functional.pad(columns, (0, 0, 0, columns.shape[1] - len(columns)))
            _, s, vh = torch.linalg.svd(torch.linalg.qr(columns, mode="r").R)
            self.values[bond] = s
            scale = bond_scale(s)
            turned = self.times(child, bond, self.work[child], vh.mT)
            self.work[k] = self.times(k, bond, self.work[k], vh.mT / scale)
            self.work[child] = self.times(child, bond, turned, torch.diag(scale))
            self._spread(child, k, self.times(child, bond, turned, torch.diag(s)))

    def times(self, k: int, bond: str, tensor: Tensor, matrix: Tensor) -> Tensor:
        """Return ``tensor``, legs as of factor ``k``, with ``matrix`` applied to the leg ``bond``."""
        axis = self.network[k].index(bond)
        return torch.tensordot(tensor, matrix, dims=([axis], [0])).movedim(-1, axis)
