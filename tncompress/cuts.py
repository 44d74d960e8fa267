"""Bipartitions ("cuts") of a kernel's legs, and what a kernel looks like across one.

A kernel is a tensor ``(out, in, *spatial)``; its legs are named ``out``, ``in`` and, by the number of
spatial dimensions, ``kw`` (1d), ``kh kw`` (2d) or ``kd kh kw`` (3d). Linear weights have ``out in``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tncompress.linalg import singular_values, tail_energies, truncated_svd, unfold, working_copy

LEGS = ("out", "in", "kd", "kh", "kw")


def legs_of(ndim: int) -> tuple[str, ...]:
    """Return the leg names of a kernel with ``ndim`` modes.

    >>> legs_of(4)
    ('out', 'in', 'kh', 'kw')
    """
    if not 2 <= ndim <= 5:
        raise ValueError(f"a kernel has 2 to 5 modes (out, in, and up to three spatial), got {ndim}")
    return LEGS[:2] + LEGS[len(LEGS) + 2 - ndim :]


def parse_legs(text: str) -> tuple[str, ...]:
    """Return the leg names in ``text``; an unknown or repeated name is a ``ValueError``."""
    legs = tuple(text.replace(",", " ").split())
    for leg in legs:
        if leg not in (*LEGS, "rest"):
            raise ValueError(f"unknown leg {leg!r} in {text!r}; legs are {', '.join(LEGS)} (or rest)")
    if len(set(legs)) != len(legs):
        raise ValueError(f"a leg is named twice in {text!r}")
    return legs


@dataclass(frozen=True)
class Cut:
    """A bipartition of kernel legs, written ``left|right``; one side may be ``rest``.

    >>> cut = Cut.parse("out kw|in kh")
    >>> cut.modes(4)
    ((0, 3), (1, 2))
    """

    left: tuple[str, ...]
    right: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Cut:
        """Return the cut that ``text``, such as ``"out|rest"``, stands for."""
        sides = text.split("|")
        if len(sides) != 2 or not all(side.strip() for side in sides):
            raise ValueError(
                f"a cut is written 'legs|legs', as in 'out|rest' or 'out kw|in kh', got {text!r}"
            )
        left, right = (parse_legs(side) for side in sides)
        if set(left) & set(right):
            raise ValueError(f"a leg stands on both sides of the cut {text!r}")
        if any("rest" in side and len(side) > 1 for side in (left, right)):
            raise ValueError(f"'rest' stands alone on its side of a cut, got {text!r}")
        return cls(left, right)

    @classmethod
    def of(cls, cut: str | Cut) -> Cut:
        """Return ``cut`` itself, or the cut that the text stands for; anything else is a ``TypeError``."""
        if isinstance(cut, Cut):
            return cut
        if not isinstance(cut, str):
            raise TypeError(
                f"a cut is a text such as 'out|rest' or 'out kw|in kh', or a Cut, got a {type(cut).__name__}"
            )
        return cls.parse(cut)

    def __str__(self) -> str:
        return f"{' '.join(self.left)}|{' '.join(self.right)}"

    def modes(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the modes of an ``ndim``-mode kernel on each side, in the kernel's order.

        Legs that the kernel does not have are passed over (``kh`` of a linear layer); a leg of the kernel
        that the cut does not place, or a side that is left empty, is a ``ValueError``.
        """
        names = legs_of(ndim)
        left, right = set(self.left) & set(names), set(self.right) & set(names)
        if "rest" in self.left:
            left = set(names) - right
        if "rest" in self.right:
            right = set(names) - left
        missing = [name for name in names if name not in left | right]
        if missing:
            raise ValueError(
                f"the cut '{self}' does not place leg {missing[0]} of a kernel ({' '.join(names)})"
            )
        if not left or not right:
            raise ValueError(f"the cut '{self}' leaves one side of a kernel ({' '.join(names)}) empty")
        left_modes = tuple(mode for mode, name in enumerate(names) if name in left)
        return left_modes, tuple(mode for mode in range(ndim) if mode not in left_modes)

    def crosses(self, other: Cut, ndim: int) -> bool:
        """Say whether each side of one cut holds legs of both sides of the other.

        Truncations along cuts that do not cross commute with each other's ranks, and their discarded weights
        add. Along crossing cuts the second truncation can raise the rank across the first again.
        """
        return all(set(mine) & set(theirs) for mine in self.modes(ndim) for theirs in other.modes(ndim))


def all_cuts(ndim: int) -> tuple[Cut, ...]:
    """Return every bipartition of an ``ndim``-mode kernel: 1, 3, 7, 15 of them for 2 to 5 modes.

    >>> [str(cut) for cut in all_cuts(3)]
    ['out|in kw', 'in|out kw', 'kw|out in']
    """
    names = legs_of(ndim)
    cuts = []
    for size in range(1, ndim // 2 + 1):
        for left in combinations(names, size):
            right = tuple(name for name in names if name not in left)
            if 2 * size < ndim or names[0] in left:
                cuts.append(Cut(left, right))
    return tuple(cuts)


def spectrum(kernel: Tensor, cut: str | Cut) -> Float[Tensor, " k"]:
    """Return the singular values of ``kernel`` across ``cut``, largest first, in float64.

    They are not normalised: their squares sum up to the squared Frobenius norm of the kernel.

    >>> spectrum(3 * torch.ones(2, 2, 1, 1), "out|rest").round(decimals=6)
    tensor([6., 0.], dtype=torch.float64)
    """
    kernel = _tensor(kernel, "a kernel")
    return singular_values(unfold(working_copy(kernel), Cut.of(cut).modes(kernel.ndim)[0]))


def _tensor(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"wanted {what} as a tensor of torch, got a {type(value).__name__}: "
            "torch.as_tensor(array) makes one"
        )
    return value


def entropy(s: Float[Tensor, " k"]) -> float:
    """Return the correlation entropy -sum p log p with p = s**2 / sum s**2, in nats.

    It is 0 for a product state across the cut (and for a zero kernel), log(rank) for equal singular values.
    Divide by ``log(2)`` for bits. ``s`` need not be normalised.

    >>> round(entropy(torch.tensor([5.0, 5.0])), 4)
    0.6931
    """
    s = _tensor(s, "singular values")
    p = s.square() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
    return float(torch.special.entr(p).sum())


def effective_rank(s: Float[Tensor, " k"]) -> float:
    """Return exp(entropy): the number of equal singular values that would have this entropy."""
    return math.exp(entropy(s))


def rel_error(s: Float[Tensor, " k"], rank: int) -> float:
    """Return the relative Frobenius error of a truncation to ``rank``: sqrt of the discarded weight."""
    tails = tail_energies(s)
    return math.sqrt(float(tails[rank] / tails[0])) if float(tails[0]) > 0 else 0.0


def truncate(kernel: Tensor, cut: str | Cut, rank: int) -> Tensor:
    """Return the best approximation of ``kernel`` with rank ``rank`` across ``cut``: dense in, dense out."""
    left, right = Cut.of(cut).modes(_tensor(kernel, "a kernel").ndim)
    u, _, svh = truncated_svd(unfold(working_copy(kernel), left), rank)
    order: Sequence[int] = left + right
    folded = (u @ svh).reshape([kernel.shape[mode] for mode in order])
    inverse = [order.index(mode) for mode in range(kernel.ndim)]
    return folded.permute(inverse).contiguous().to(kernel.dtype)
