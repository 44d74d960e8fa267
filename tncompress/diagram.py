"""The tensor diagram of a layer: a circle for each factor, a line for each index, as inline SVG.

Networks are drawn from what :meth:`tncompress.Format.network` declares, so that a format of your own is
drawn like the built-in ones: a chain in a row, a star (Tucker on all legs, CP) below its hub, anything else
(a ring) around a circle. An index that more than two tensors share, as CP's, is a dot that joins them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from tncompress.cuts import legs_of
from tncompress.formats import Format
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.plan import LayerPlan
from tncompress.storage import new_file

Network = tuple[tuple[str, ...], ...]
Point = tuple[float, float]

RADIUS, DOT, LEG, GAP, FAN = 18.0, 4.0, 30.0, 110.0, 100.0
"""Pixels: of a circle, of a dot, of an open line, between neighbours in a row, from a hub to its leaves."""
SPREAD, MOST = math.radians(50), math.radians(150)
"""The angle between two open lines of one factor, and between the outer ones at most."""
LETTER, LINE, MARGIN = 7.5, 13, 6.0
COLOURS = "svg{color:#222}@media (prefers-color-scheme:dark){svg{color:#ddd}}"
"""What a file says for itself; within a page a diagram has the colour of the text around it."""


@dataclass(frozen=True)
class Diagram:
    """A drawn tensor network: ``svg`` is its markup, ``description`` its words. Notebooks show it."""

    title: str
    description: str
    svg: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Write the diagram to an SVG file, which is dark on light or, in a dark browser, light on dark."""
        head, mark, rest = self.svg.partition("</desc>")
        with new_file(path) as place:
            place.write_text(f"{head}{mark}<style>{COLOURS}</style>{rest}", encoding="utf-8")


def draw(
    what: nn.Module | Format | LayerPlan,
    shape: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
    *,
    title: str | None = None,
) -> Diagram:
    """Return the tensor diagram of a compressed or dense layer, of a layer of a plan, or of a format.

    Of a format the kernel's ``shape`` ``(out, in, *spatial)`` has to be said; without ``ranks`` its bonds
    have names only. Numbers in the circles are those of ``layer.factors``, lines are the wider the larger
    their dimension. A grouped layer has this network for each of its groups. Raises ``ValueError`` for a
    format without a shape, or with ranks that it can't have, ``TypeError`` for what is no layer.

    >>> import tncompress as tnc
    >>> tnc.draw(tnc.Tucker(), (16, 8, 3, 3), ranks=(6, 12)).description
    '3 factors. 0: r0 = 6, in = 8. 1: r1 = 12, r0 = 6, kh = 3, kw = 3. 2: out = 16, r1 = 12.'
    """
    if isinstance(what, Format):
        if shape is None:
            raise ValueError(f"to draw {what} takes a kernel's shape, as in draw(format, (out, in, kh, kw))")
        size = tuple(shape)
        network, name = what.network(size), str(what)
        bonds = what.check_ranks(size, ranks) if ranks is not None else None
    else:
        if shape is not None or ranks is not None:
            raise ValueError("a layer has its own shape and ranks: leave them out, or draw its format")
        network, size, bonds, name = _of_layer(what)
    named = title if title is not None else name
    return Diagram(named, describe(network, size, bonds), diagram_svg(network, size, bonds, named))


def _of_layer(layer: Any) -> tuple[Network, tuple[int, ...], tuple[int, ...] | None, str]:
    if isinstance(layer, TNConv | LayerPlan):
        shape = layer.geometry.kernel_shape
        return layer.format.network(shape), shape, layer.ranks, str(layer.format)
    try:
        shape = ConvGeometry.of(layer).kernel_shape
    except ValueError as error:
        raise TypeError(
            f"wanted a convolution, a linear or a compressed layer, a LayerPlan or a format, got a "
            f"{type(layer).__name__}: of a model, draw one of its layers, model.get_submodule(name)"
        ) from error
    return (legs_of(len(shape)),), shape, (), "dense"


def describe(network: Network, shape: Sequence[int], ranks: Sequence[int] | None = None) -> str:
    """Return a network in words: every factor with its indices and their dimensions."""
    size = _sizes(network, shape, ranks)
    factors = (f"{i}: {', '.join(_label(leg, size) for leg in legs)}." for i, legs in enumerate(network))
    return f"{len(network)} factor{'s' * (len(network) > 1)}. {' '.join(factors)}"


def diagram_svg(
    network: Network, shape: Sequence[int], ranks: Sequence[int] | None = None, title: str = "tensor network"
) -> str:
    """Return a network as one ``<svg>`` element with no ids, styles or scripts, in the colour of the text.

    ``network`` names the legs of every factor as :meth:`tncompress.Format.network` does, ``shape`` is the
    kernel's, ``ranks`` are the dimensions of ``r0``, ``r1``, ... (None: names only).
    """
    size = _sizes(network, shape, ranks)
    graph = _Graph.of(network, legs_of(len(shape)))
    places, outward = _layout(graph)
    canvas = _Canvas()
    for ends, bond in graph.edges.items():
        _draw_edges(canvas, ends, bond, places, size, graph.factors)
    for vertex, legs in enumerate(graph.open):
        room = RADIUS if vertex < graph.factors else 0.0
        _draw_open(canvas, legs, places[vertex], outward[vertex], size, room)
    for vertex, place in enumerate(places):
        if vertex < graph.factors:
            canvas.circle(place, vertex, ", ".join(_label(leg, size) for leg in network[vertex]))
        else:
            canvas.dot(place)
            if shared := graph.dots[vertex]:
                canvas.text(_step(place, outward[vertex], 16.0), outward[vertex], _label(shared, size))
    return canvas.svg(title, describe(network, shape, ranks))


# --- what is joined to what ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Graph:
    """Vertices are the factors, then a dot for each index that more of them share than a line can join."""

    factors: int
    open: tuple[tuple[str, ...], ...]
    edges: Mapping[tuple[int, int], tuple[str, ...]]
    dots: Mapping[int, str]

    @classmethod
    def of(cls, network: Network, legs: Sequence[str]) -> _Graph:
        ends: dict[str, list[int]] = {}
        for number, factor in enumerate(network):
            for leg in factor:
                ends.setdefault(leg, []).append(number)
        edges: dict[tuple[int, int], tuple[str, ...]] = {}
        dots: dict[int, str] = {}
        held: list[tuple[str, ...]] = [()] * len(network)
        for leg, (first, *others) in ends.items():
            if leg in legs and not others:
                held[first] += (leg,)
            elif leg not in legs and len(others) == 1 and others[0] != first:
                edges[first, others[0]] = (*edges.get((first, others[0]), ()), leg)
            else:
                dot = len(held)
                dots[dot] = "" if leg in legs else leg  # an open line says its own name
                held.append((leg,) if leg in legs else ())
                edges |= {(factor, dot): ("",) for factor in (first, *others)}
        return cls(len(network), tuple(held), edges, dots)

    def neighbours(self, vertex: int) -> list[int]:
        """Return the vertices that one is joined to, in the order of the declaration."""
        return sorted({a + b - vertex for a, b in self.edges if vertex in (a, b)})

    def walk(self, start: int) -> list[int]:
        """Return all vertices depth first: around a loop, or through a tree whose lines then do not cross."""
        order: list[int] = []
        waiting = [*reversed(range(len(self.open))), start]
        while waiting:
            if (vertex := waiting.pop()) not in order:
                order.append(vertex)
                waiting += reversed(self.neighbours(vertex))
        return order


def _sizes(network: Network, shape: Sequence[int], ranks: Sequence[int] | None) -> dict[str, int]:
    legs = legs_of(len(shape))
    size = dict(zip(legs, shape, strict=True))
    bonds = dict.fromkeys(leg for factor in network for leg in factor if leg not in legs)
    if ranks is None:
        return size
    size |= {f"r{i}": rank for i, rank in enumerate(ranks)}
    if len(bonds) != len(ranks) or not set(bonds) <= set(size):
        wanted = ", ".join(f"r{i}" for i in range(len(bonds))) or "none"
        raise ValueError(f"wanted a rank for each bond ({wanted}) of {network}, got {tuple(ranks)}")
    return size


# --- where it is put ----------------------------------------------------------------------------------------


def _layout(graph: _Graph) -> tuple[list[Point], list[float]]:
    """Return the place of each vertex, and the angle (clockwise from the right) of what is open there."""
    number = len(graph.open)
    joined = [graph.neighbours(vertex) for vertex in range(number)]
    ends = [vertex for vertex in range(number) if len(joined[vertex]) <= 1]
    order = graph.walk(ends[0] if ends else 0)
    linked = all(later in joined[earlier] for earlier, later in pairwise(order))
    if linked and len(graph.edges) == number - 1 and max(map(len, joined)) <= 2:
        return _row(order, [len(legs) for legs in graph.open])
    hubs = [vertex for vertex in range(number) if len(joined[vertex]) == number - 1]
    if len(hubs) == 1 and number <= 7:
        return _star(hubs[0], number)
    return _around(order)


def _row(order: Sequence[int], legs: Sequence[int]) -> tuple[list[Point], list[float]]:
    """Put the vertices in a row; what is open at its two ends leans away from it."""
    places, inner = {order[0]: (0.0, 0.0)}, order[1:-1]
    for here, after in pairwise(order):
        room = sum(max(0, legs[vertex] - 1) for vertex in (here, after) if vertex in inner)
        places[after] = (places[here][0] + GAP + 24.0 * room, 0.0)
    turns = dict.fromkeys(order, math.pi / 2)
    if len(order) > 1:
        turns[order[0]] += _spread(legs[order[0]]) / 2
        turns[order[-1]] -= _spread(legs[order[-1]]) / 2
    return [places[vertex] for vertex in range(len(order))], [turns[v] for v in range(len(order))]


def _star(hub: int, number: int) -> tuple[list[Point], list[float]]:
    """Put the leaves on a half circle below the hub, from left to right in their order."""
    leaves = [vertex for vertex in range(number) if vertex != hub]
    turns = {leaf: math.pi * (1 - i / (len(leaves) - 1)) for i, leaf in enumerate(leaves)}
    turns[hub] = -math.pi / 2
    reach = FAN if len(leaves) <= 4 else 1.5 * FAN  # for the labels between them
    places = [_step((0.0, 0.0), turns[v], 0.0 if v == hub else reach) for v in range(number)]
    return places, [turns[vertex] for vertex in range(number)]


def _around(order: Sequence[int]) -> tuple[list[Point], list[float]]:
    """Put the vertices on a circle, from the upper left downwards."""
    number = len(order)
    radius = max(0.6 * GAP, GAP / (2 * math.sin(math.pi / number)))
    turns = {vertex: math.pi * (1 + (1 - 2 * i) / number) for i, vertex in enumerate(order)}
    places = [_step((0.0, 0.0), turns[vertex], radius) for vertex in range(number)]
    return places, [turns[vertex] for vertex in range(number)]


# --- how it looks -------------------------------------------------------------------------------------------


def _draw_edges(
    canvas: _Canvas,
    ends: tuple[int, int],
    bonds: Sequence[str],
    places: Sequence[Point],
    size: Mapping[str, int],
    factors: int,
) -> None:
    """Draw the bonds between two vertices: a line, or bows where there are several."""
    here, there = (places[end] for end in ends)
    length = math.dist(here, there)
    along = math.atan2(there[1] - here[1], there[0] - here[0])
    start = _step(here, along, RADIUS)
    end = _step(there, along + math.pi, RADIUS if ends[1] < factors else DOT)
    middle = ((here[0] + there[0]) / 2, (here[1] + there[1]) / 2)
    side = _side(middle, along, [place for number, place in enumerate(places) if number not in ends])
    for number, bond in enumerate(bonds):
        bend = (number - (len(bonds) - 1) / 2) * 0.5 * length
        canvas.line(start, end, _width(bond, size), _step(middle, side, bend) if bend else None)
        if bond:
            canvas.text(_step(middle, side, bend / 2 + 14), side, _label(bond, size))


def _side(middle: Point, along: float, others: Sequence[Point]) -> float:
    """Return the angle at which the label of a line stands: away from the other vertices, else above it."""
    left, right = along - math.pi / 2, along + math.pi / 2
    left, right = sorted((left, right), key=math.sin)  # the upper one first
    labels = [_step(middle, side, 0.4 * GAP) for side in (left, right)]
    free, taken = (sum(1 / (1 + math.dist(label, other)) for other in others) for label in labels)
    return right if free > taken + 1e-6 else left


def _draw_open(
    canvas: _Canvas, legs: Sequence[str], place: Point, outward: float, size: Mapping[str, int], room: float
) -> None:
    """Draw the kernel's legs of one vertex, spread around the way outward, from left to right below it."""
    for number, leg in enumerate(legs):
        turn = outward + _spread(len(legs)) * (0.5 - number / max(1, len(legs) - 1))
        end = _step(place, turn, RADIUS + LEG)
        canvas.line(_step(place, turn, room), end, _width(leg, size))
        canvas.text(_step(end, turn, 11.0), turn, _label(leg, size))


def _spread(legs: int) -> float:
    return min(max(0, legs - 1) * SPREAD, MOST)


def _step(place: Point, turn: float, length: float) -> Point:
    return place[0] + length * math.cos(turn), place[1] + length * math.sin(turn)


def _label(leg: str, size: Mapping[str, int]) -> str:
    return f"{leg} = {size[leg]}" if leg in size else leg


def _width(leg: str, size: Mapping[str, int]) -> float:
    return min(1.2 + 0.4 * math.log2(max(1, size.get(leg, 4))), 5.2)


class _Canvas:
    """Marks, and how far they reach."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.marks: list[str] = []
        self.reach: list[Point] = []

    def line(self, start: Point, end: Point, width: float, bow: Point | None = None) -> None:
        self.reach += [start, end] if bow is None else [start, end, bow]
        between = f"Q{bow[0]:.1f} {bow[1]:.1f} " if bow else "L"
        path = f"M{start[0]:.1f} {start[1]:.1f}{between}{end[0]:.1f} {end[1]:.1f}"
        self.lines.append(f'<path d="{path}" stroke-width="{width:.1f}"/>')

    def circle(self, place: Point, number: int, hint: str) -> None:
        self.reach += [(place[0] + x, place[1] + y) for x in (-RADIUS, RADIUS) for y in (-RADIUS, RADIUS)]
        x, y = (f"{value:.1f}" for value in place)
        self.marks.append(
            f'<g><title>{escape(f"factor {number}: {hint}")}</title><circle cx="{x}" cy="{y}" r="{RADIUS:g}" '
            'stroke="currentColor" stroke-width="1.6" fill-opacity=".13"/></g>'
        )
        self._write(place, "middle", str(number))

    def dot(self, place: Point) -> None:
        x, y = (f"{value:.1f}" for value in place)
        self.marks.append(f'<circle cx="{x}" cy="{y}" r="{DOT:g}"/>')

    def text(self, place: Point, turn: float, words: str) -> None:
        """Write words that begin, end or are centred at a place, by the way that leads to it."""
        across = math.cos(turn)
        anchor = "middle" if abs(across) < 0.3 else "start" if across > 0 else "end"
        width = LETTER * len(words)
        left = place[0] - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
        self.reach += [(left, place[1] - LINE), (left + width, place[1] + LINE)]
        self._write(place, anchor, words)

    def _write(self, place: Point, anchor: str, words: str) -> None:
        x, y = f"{place[0]:.1f}", f"{place[1] + 0.35 * LINE:.1f}"
        self.marks.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>')

    def svg(self, title: str, description: str) -> str:
        left, top = (min(values) - MARGIN for values in zip(*self.reach, strict=True))
        right, bottom = (max(values) + MARGIN for values in zip(*self.reach, strict=True))
        width, height = right - left, bottom - top
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="{left:.1f} {top:.1f} {width:.1f} {height:.1f}" style="max-width:100%;height:auto" '
            f'font-family="system-ui,sans-serif" font-size="{LINE}" font-weight="400" fill="currentColor">'
            f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
            f'<g stroke="currentColor" fill="none" stroke-linecap="round">{"".join(self.lines)}</g>'
            f"{''.join(self.marks)}</svg>"
        )
