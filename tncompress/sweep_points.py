"""The grid of a sweep: sets of layers x cuts x how far, and which of its points are the same truncation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tncompress.cuts import Cut, all_cuts
from tncompress.cutting import TruncatedLayer
from tncompress.discovery import Layer, find_layers
from tncompress.policies import RankFraction, RankPolicy, make_policy
from tncompress.spec import matches_any

FRACTIONS = 0.75, 0.5, 0.35, 0.25, 0.125, 0.0625
"""Of the full rank; where a sweep is not told how far to go."""

_WORDS = re.compile(r"(each|all|(first|last) (\d+))$")


@dataclass(frozen=True)
class Point:
    """One truncation: these ``layers``, along these ``cuts`` in this order, as far as ``amount``.

    ``label`` says what was asked for: a layer's name, ``all``, ``first 2``, or names joined by ``+``.
    """

    label: str
    layers: tuple[str, ...]
    cuts: tuple[str, ...]
    amount: RankPolicy

    def __str__(self) -> str:
        return f"{self.label} {', '.join(self.cuts)} {amount_text(self.amount)}"

    def about(self) -> list[Any]:
        """Return what the truncation depends on, as plain values."""
        return [list(self.layers), list(self.cuts), {self.amount.tag: self.amount.to_value()}]

    @property
    def patterns(self) -> list[str]:
        """Patterns that match these layers and no other."""
        return [exactly(name) for name in self.layers]


@dataclass(frozen=True)
class LeftOut:
    """A layer, or a set of layers with certain ``cuts``, that a sweep has no rows of, and why."""

    label: str
    cuts: tuple[str, ...]
    reason: str


def exactly(name: str) -> str:
    """Return a pattern, as in a spec, that matches this name alone."""
    return f"re:^{re.escape(name)}$"


def amount_text(amount: RankPolicy) -> str:
    """Return how far, in short.

    >>> amount_text(RankFraction(0.25)), amount_text(make_policy({"rel_error": 0.2}))
    ('0.25', 'rel_error 0.2')
    """
    value = amount.to_value()
    shown = f"{value:g}" if isinstance(value, int | float) else str(value)
    return shown if isinstance(amount, RankFraction) else f"{amount.tag} {shown}"


def make_grid(
    model: nn.Module, layers: Any, cuts: Any, fractions: Sequence[float] | None, amounts: Sequence[Any]
) -> tuple[list[Point], list[LeftOut]]:
    """Return the points in their order, and what is left out; see :func:`tncompress.sweep`."""
    found = [layer for layer in find_layers(model, ("depthwise", "subclasses")) if layer.geometry.ndim > 0]
    left = [LeftOut(layer.name, (), layer.obstacle) for layer in found if layer.obstacle]
    free = {layer.name: layer for layer in found if not layer.obstacle}
    if not free:
        raise ValueError("the model has no convolution that can be truncated: there is nothing to sweep")
    policies = _policies(fractions, amounts)
    points: list[Point] = []
    for label, names in _layer_sets(layers, list(free.values())).items():
        ndims = {name: len(free[name].geometry.kernel_shape) for name in names}
        for steps in _cut_sets(cuts, max(ndims.values())):
            reasons = {name: _misfit(steps, ndims[name]) for name in names}
            texts = tuple(str(cut) for cut in steps)
            left += [LeftOut(name, texts, why) for name, why in reasons.items() if why]
            fitting = tuple(name for name in names if not reasons[name])
            points += [Point(label, fitting, texts, policy) for policy in policies if fitting]
    if not points:
        raise ValueError(f"no cut fits any of the layers: {left[-1].reason}")
    return list(dict.fromkeys(points)), list(dict.fromkeys(left))


def _policies(fractions: Sequence[float] | None, amounts: Sequence[Any]) -> list[RankPolicy]:
    if isinstance(amounts, RankPolicy | Mapping):
        amounts = [amounts]
    if fractions is None:
        fractions = () if amounts else FRACTIONS
    made = [RankFraction(f) for f in fractions] + [make_policy(amount) for amount in amounts]
    if not made:
        raise ValueError("wanted at least one fraction of the full rank, such as 0.5, got none")
    return list(dict.fromkeys(made))


# --- layers -------------------------------------------------------------------------------------------------


def _layer_sets(asked: Any, free: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Return the sets of layers by label; a list holds several entries, a tuple of names is one set."""
    entries = [asked]
    if isinstance(asked, list) or (isinstance(asked, tuple) and not _is_set(asked)):
        entries = list(asked)
    sets: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        sets |= _one_entry(entry, free)
    if not sets:
        raise ValueError("wanted layers to truncate, such as 'each' or 'last 2', got none")
    return sets


def _is_set(asked: tuple[Any, ...]) -> bool:
    return all(isinstance(name, str) and not _WORDS.match(name) for name in asked)


def _one_entry(entry: Any, free: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    names = [layer.name for layer in free]
    if isinstance(entry, tuple | list) and entry and _is_set(tuple(entry)):
        chosen = [name for part in entry for name in _named(part, free)]
        return {"+".join(map(str, entry)): tuple(name for name in names if name in chosen)}
    if not isinstance(entry, str):
        raise ValueError(
            f"layers are 'each', 'all', 'first 2', 'last 2', names, or tuples of names, got {entry!r}"
        )
    words = _WORDS.match(entry)
    if words is None:
        return {entry: _named(entry, free)}
    if entry == "each":
        return {name: (name,) for name in names}
    if entry == "all":
        return {entry: tuple(names)}
    count = int(words[3])
    if not 1 <= count <= len(names):
        raise ValueError(f"the model has {len(names)} layers to truncate, got layers={entry!r}")
    return {entry: tuple(names[:count] if words[2] == "first" else names[-count:])}


def _named(pattern: str, free: Sequence[Layer]) -> tuple[str, ...]:
    """Return the layers that a name or pattern means, as their first names."""
    found = tuple(layer.name for layer in free if matches_any(pattern, layer.names))
    if not found:
        names = ", ".join(layer.name for layer in free[:8]) + (", ..." if len(free) > 8 else "")
        raise ValueError(f"no layer that can be truncated is called {pattern!r}; these can: {names}")
    return found


# --- cuts ---------------------------------------------------------------------------------------------------


def _cut_sets(asked: Any, ndim: int) -> list[tuple[Cut, ...]]:
    """Return what is carried out together: one cut, or several in their order."""
    if isinstance(asked, str) and asked == "all":
        return [(cut,) for cut in all_cuts(ndim)]
    entries = [asked] if isinstance(asked, str | Cut) else list(asked)
    sets = [(entry,) if isinstance(entry, str | Cut) else tuple(entry) for entry in entries]
    if not sets or not all(sets):
        raise ValueError("wanted 'all' or cuts such as 'out|rest', got none")
    return [tuple(Cut.of(cut) for cut in steps) for steps in sets]


def _misfit(cuts: Iterable[Cut], ndim: int) -> str:
    try:
        for cut in cuts:
            cut.modes(ndim)
    except ValueError as error:
        return str(error)
    return ""


def partition(cut: Cut, shape: Sequence[int]) -> tuple[int, ...]:
    """Return what a cut separates: the modes on the side of the first one, without modes of dimension 1.

    Cuts with the same partition are the same to a kernel of this shape. It is empty where one side is.

    >>> partition(Cut.parse("kh|rest"), (8, 4, 3, 1)), partition(Cut.parse("out in kw|kh"), (8, 4, 3, 1))
    ((0, 1), (0, 1))
    >>> partition(Cut.parse("kw|rest"), (8, 4, 3, 1))
    ()
    """
    left, right = ([mode for mode in side if shape[mode] > 1] for side in cut.modes(len(shape)))
    if not left or not right:
        return ()
    return tuple(min(left, right))


def content(layers: Iterable[TruncatedLayer]) -> dict[str, list[Any]]:
    """Return by name what was really done to each kernel: partitions and ranks, one truncation after another.

    Cuts that were left at their full rank did nothing, and a layer with no other is not there. Truncations
    with the same content have the same kernels.
    """
    found = {}
    for layer in layers:
        done = [
            [list(partition(Cut.parse(cut.cut), layer.shape)), cut.asked]
            for cut in layer.cuts
            if cut.asked < cut.full
        ]
        if done:
            found[layer.name] = done
    return found
