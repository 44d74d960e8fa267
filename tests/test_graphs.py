"""Compilers and exporters see one graph, for every geometry and format."""

import copy

import pytest
import torch
from conftest import FORMATS, GEOMETRIES, applies
from torch.testing import assert_close

from tncompress.layers import TNConv

pytestmark = pytest.mark.usefixtures("unchecked")  # the checks of signatures are not to be compiled

FORMAT_OF = dict(zip(GEOMETRIES, [*FORMATS] * len(GEOMETRIES), strict=False))
"""A format for every geometry, each several times; a chain that a format makes does not depend on padding."""


@pytest.fixture(params=GEOMETRIES)
def layer_and_input(request):
    geometry, name = GEOMETRIES[request.param], FORMAT_OF[request.param]
    if not applies(name, geometry.kernel_shape):
        name = "mps"
    format = FORMATS[name]
    ranks = tuple(max(1, top // 2) for top in format.max_ranks(geometry.kernel_shape))
    return TNConv.from_dense(geometry.layer(torch.float32), format, ranks), geometry.input(torch.float32)


def test_a_layer_compiles_to_one_graph(layer_and_input):
    layer, x = layer_and_input
    torch.compiler.reset()
    assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_a_layer_exports_with_a_dynamic_batch(layer_and_input):
    layer, x = layer_and_input
    if x.ndim < layer.geometry.ndim + 2:
        x = x[None]
    x = torch.cat([x, x])
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(layer, (x,), dynamic_shapes=(batch,))
    more = torch.cat([x, 2 * x, -x])
    assert_close(program.module()(more), layer(more))


def test_autocast_and_casts_act_as_on_a_dense_layer(layer_and_input):
    layer, x = layer_and_input
    dense = layer.to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dense(x).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        cast = copy.deepcopy(layer).to(dtype)
        assert cast(x.to(dtype)).dtype == dtype
        assert {p.dtype for p in cast.parameters()} == {dtype}
    assert_close(copy.deepcopy(layer).double()(x.double()).float(), layer(x), rtol=1e-4, atol=1e-5)
