"""Tensor diagrams: well formed, complete, for every format, and readable without colours of their own."""

import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import FORMATS, GEOMETRIES, SHAPES, applies
from torch import nn

import tncompress as tnc
from tncompress import formats
from tncompress.cuts import legs_of
from tncompress.diagram import Diagram, diagram_svg, draw

NAMESPACE = "{http://www.w3.org/2000/svg}"
KERNEL = (32, 16, 3, 3)
TREE = (("in", "r0"), ("kh", "r1"), ("r0", "r1", "r2"), ("kw", "r3"), ("out", "r4"), ("r3", "r4", "r2"))
DOUBLE = (("in", "r0", "r1"), ("out", "kh", "kw", "r0", "r1"))
TRACED = (("in", "r0", "r0"), ("out", "kh", "kw"))
APART = (("in",), ("out",), ("kh",), ("kw",))
DANGLING = (("in", "r0"), ("out", "kh", "kw", "r0", "r1"))
BOTH = (("in", "r0", "r1"), ("kh", "r0"), ("kw", "r0", "r1"), ("out", "r1"))
WIDE = tuple((*(("out", "in", "kh", "kw")[i : i + 1]), f"r{i}", f"r{(i + 1) % 9}") for i in range(9))

SHARED = (("in", "r0", "kh", "kw"), ("out", "in", "r0"))

OWN = {"tree": (TREE, 5), "double": (DOUBLE, 2), "traced": (TRACED, 1), "apart": (APART, 0)}
OWN |= {"dangling": (DANGLING, 2), "two dots": (BOTH, 2), "long ring": (WIDE, 9), "shared leg": (SHARED, 1)}


@pytest.fixture
def ring(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "own_format"))
    from tensor_ring import TensorRing

    yield TensorRing()
    formats.FORMATS.pop("ring", None)
    sys.modules.pop("tensor_ring", None)


def parse(svg):
    return ElementTree.fromstring(svg)


def texts(svg):
    return [element.text for element in parse(svg).iter(f"{NAMESPACE}text")]


def boxes(svg):
    """Return where each text is, about: left, top, right, bottom."""
    for element in parse(svg).iter(f"{NAMESPACE}text"):
        x, y, width = float(element.get("x")), float(element.get("y")), 7.0 * len(element.text)
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[element.get("text-anchor")] * width
        yield element.text, (left, y - 9, left + width, y + 2)


def circles(svg):
    found = [element for element in parse(svg).iter(f"{NAMESPACE}circle") if float(element.get("r")) > 5]
    return [(float(c.get("cx")), float(c.get("cy")), float(c.get("r"))) for c in found]


def check(svg, network, shape, ranks):
    """Ask for every factor once and for every index once by name and size, within the frame and apart."""
    size = dict(zip(legs_of(len(shape)), shape, strict=True)) | {f"r{i}": n for i, n in enumerate(ranks)}
    wanted = [str(i) for i in range(len(network))]
    wanted += [f"{leg} = {size[leg]}" for leg in dict.fromkeys(leg for legs in network for leg in legs)]
    assert Counter(texts(svg)) == Counter(wanted)
    left, top, width, height = map(float, parse(svg).get("viewBox").split())
    placed = list(boxes(svg))
    for _, (x0, y0, x1, y1) in placed:
        assert left <= x0 < x1 <= left + width
        assert top <= y0 < y1 <= top + height
    for i, (mine, a) in enumerate(placed):
        for other, b in placed[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (mine, other)
    assert len(circles(svg)) == len(network)
    for x, y, r in circles(svg):
        assert sum(math.dist((x, y), other[:2]) < 2 * r for other in circles(svg)) == 1


def every_index_ends_where_it_should(svg, network, legs):
    """Count lines: one for each kernel leg, for each bond of two factors, from each factor to a dot."""
    ends = Counter(leg for factor in network for leg in factor)
    twice = {leg for factor in network for leg, n in Counter(factor).items() if n > 1}
    plain = [leg for leg in ends if ends[leg] == (1 if leg in legs else 2) and leg not in twice]
    dotted = [leg for leg in ends if leg not in plain]
    lines = list(parse(svg).iter(f"{NAMESPACE}path"))
    joined = sum(len({i for i, factor in enumerate(network) if leg in factor}) for leg in dotted)
    joined += sum(leg in legs for leg in dotted)
    assert len(lines) == len(plain) + joined
    small = [c for c in parse(svg).iter(f"{NAMESPACE}circle") if float(c.get("r")) < 5]
    assert len(small) == len(dotted)


PAIRS = [
    pytest.param(format, shape, id=f"{name}-{kind}")
    for name, format in FORMATS.items()
    for kind, shape in SHAPES.items()
    if applies(name, shape)
]


@pytest.mark.parametrize(("format", "shape"), PAIRS)
@pytest.mark.parametrize("scale", [1, 64], ids=["small", "large"])
def test_a_diagram_has_every_factor_and_index_once(format, shape, scale):
    shape = (shape[0] * scale, shape[1] * scale, *shape[2:])
    network, ranks = format.network(shape), format.max_ranks(shape)
    svg = draw(format, shape, ranks).svg
    check(svg, network, shape, ranks)
    every_index_ends_where_it_should(svg, network, legs_of(len(shape)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_format_of_ones_own_is_drawn_as_well(ring, shape):
    network, ranks = ring.network(shape), ring.max_ranks(shape)
    check(draw(ring, shape, ranks).svg, network, shape, ranks)


@pytest.mark.parametrize(("network", "bonds"), OWN.values(), ids=OWN.keys())
def test_any_network_is_drawn(network, bonds):
    ranks = tuple(range(10, 10 + bonds))
    shape = KERNEL
    svg = diagram_svg(network, shape, ranks)
    check(svg, network, shape, ranks)
    every_index_ends_where_it_should(svg, network, legs_of(4))


def test_no_two_lines_of_a_tree_cross():
    lines = [
        tuple(map(float, re.findall(r"-?[\d.]+", element.get("d"))))
        for element in parse(diagram_svg(TREE, KERNEL, (2, 3, 4, 5, 6))).iter(f"{NAMESPACE}path")
    ]

    def side(a, b, c):
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    for i, (*one, x, y) in enumerate(lines):
        a, b = one, (x, y)
        for *other, u, v in lines[:i]:
            c, d = other, (u, v)
            crossed = side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
            assert not crossed


def test_larger_dimensions_have_wider_lines():
    def widths(ranks):
        root = parse(diagram_svg(tnc.MPS().network(KERNEL), KERNEL, ranks))
        return [float(element.get("stroke-width")) for element in root.iter(f"{NAMESPACE}path")]

    small, large = widths((4, 4, 4)), widths((4, 40, 4))
    assert sum(a != b for a, b in zip(small, large, strict=True)) == 1
    assert all(a <= b for a, b in zip(small, large, strict=True))


def test_without_ranks_bonds_have_names_only():
    assert set(texts(draw(tnc.CP(), KERNEL).svg)) >= {"r0", "out = 32"}


def test_a_diagram_can_stand_in_any_page_more_than_once():
    """No ids to collide, no styles to leak, no colours of its own, nothing fetched or run."""
    svg = draw(tnc.Tucker("all"), KERNEL, (4, 3, 3, 4)).svg
    root = parse(svg)
    for element in root.iter():
        assert element.tag.removeprefix(NAMESPACE) in {"svg", "g", "title", "desc", "path", "circle", "text"}
        assert not set(element.attrib) & {"id", "class", "href", "onload"}
        for name in ("fill", "stroke"):
            assert element.get(name) in (None, "none", "currentColor")
    assert root.get("role") == "img"
    assert next(iter(root)).tag == f"{NAMESPACE}title"


def test_words_from_a_model_are_escaped():
    name = "</title><script>alert(1)</script>&"
    svg = draw(tnc.CP(), KERNEL, (8,), title=name).svg
    assert "<script" not in svg
    assert parse(svg).find(f"{NAMESPACE}title").text == name


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_layers_are_drawn_with_their_own_ranks(geometry):
    dense = geometry.layer()
    shape = tnc.ConvGeometry.of(dense).kernel_shape
    layer = tnc.TNConv.from_dense(dense, tnc.MPS(), (1,) * len(tnc.MPS().max_ranks(shape)))
    made = draw(layer)
    assert made == draw(tnc.MPS(), shape, layer.ranks)
    check(draw(dense).svg, (legs_of(len(shape)),), shape, ())


def test_layers_of_a_plan_are_drawn():
    plan = tnc.make_plan(tnc.build_model("zoo:cnn4"), {"default": {"format": "tucker"}})
    for layer in plan.compressed:
        made = draw(layer, title=layer.name)
        assert isinstance(made, Diagram)
        check(made.svg, layer.format.network(layer.geometry.kernel_shape), layer.shape, layer.ranks)


def test_the_words_say_what_the_picture_shows():
    made = draw(tnc.SVD(), (8, 4, 3, 3), (5,))
    assert made.description == "2 factors. 0: r0 = 5, in = 4, kh = 3, kw = 3. 1: out = 8, r0 = 5."
    assert f"<desc>{made.description}</desc>" in made.svg
    assert made._repr_html_() == made.svg
    assert "svg" not in repr(made)


def test_a_file_has_colours_for_light_and_dark(tmp_path):
    made = draw(tnc.MPS(), KERNEL, (8, 8, 8))
    made.save(tmp_path / "mps.svg")
    text = (tmp_path / "mps.svg").read_text()
    assert "prefers-color-scheme:dark" in text
    style = parse(text).find(f"{NAMESPACE}style")
    assert text.replace(f"<style>{style.text}</style>", "") == made.svg


def test_what_can_not_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"draw mps takes a kernel's shape"):
        draw(tnc.MPS())
    with pytest.raises(ValueError, match=r"mps on a kernel .* takes 3 rank\(s\)"):
        draw(tnc.MPS(), KERNEL, (3, 3))
    with pytest.raises(ValueError, match="its own shape and ranks"):
        draw(nn.Conv2d(4, 4, 3), (4, 4, 3, 3))
    with pytest.raises(TypeError, match=r"got a CNN4: .* model\.get_submodule"):
        draw(tnc.build_model("zoo:cnn4"))
    with pytest.raises(ValueError, match=r"a rank for each bond \(r0, r1\)"):
        diagram_svg(DOUBLE, KERNEL, (3,))
    with pytest.raises(ValueError, match="got 6"):
        diagram_svg(DOUBLE, (2,) * 6)


def test_drawing_leaves_the_layer_as_it_is():
    torch.manual_seed(0)
    layer = tnc.TNConv.from_dense(nn.Conv2d(8, 8, 3), tnc.CP(), (5,))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    draw(layer)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
