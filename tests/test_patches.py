"""Patches: the layer is one matrix product with them, whatever its geometry."""

import math

import pytest
import torch
from hypothesis import strategies as st

from tests.conftest import every_geometry
from tests.drawn import drawn, law
from tncompress.geometry import ConvGeometry
from tncompress.patches import patch_chunks, patches


def rows(out, geometry):
    """The output of a layer as ``(groups, pixels, out)``, the channel moved behind the pixels."""
    channel = out.ndim - 1 - geometry.ndim
    return out.movedim(channel, -1).reshape(-1, geometry.groups, geometry.kernel_shape[0]).transpose(0, 1)


def check(layer, x):
    geometry = ConvGeometry.of(layer)
    seen = patches(x, geometry)
    out = seen @ geometry.kernels(layer.weight).flatten(2).mT
    if layer.bias is not None:
        out = out + layer.bias.reshape(geometry.groups, 1, -1)
    torch.testing.assert_close(out, rows(layer(x), geometry))


@every_geometry
def test_the_layer_is_a_product_with_the_patches(geometry):
    check(geometry.layer(), geometry.input())


@law(drawn(), examples=150)
def test_so_it_is_for_drawn_layers_and_memory_formats(case):
    check(case.dense(), case.input())


@law(drawn(), st.integers(1, 200), examples=100)
def test_chunks_are_the_patches_piece_by_piece(case, numbers):
    geometry, x = ConvGeometry.of(case.dense()), case.input()
    pieces = list(patch_chunks(x, geometry, numbers=numbers))
    seen = patches(x, geometry)
    assert torch.equal(torch.cat(pieces, 1), seen)
    spatial = case.dense()(x).shape[-len(case.kernel) :] if case.kernel else ()
    one_line = seen.numel() // seen.shape[1] * math.prod(spatial[1:])
    assert max(piece.numel() for piece in pieces) <= max(numbers, one_line)


@pytest.mark.parametrize("make", [torch.nn.Linear, lambda i, o: torch.nn.Conv2d(i, o, 1)])
def test_a_pointwise_layer_copies_nothing(make):
    layer = make(3, 5)
    x = torch.randn(1, 3, 4, 6) if isinstance(layer, torch.nn.Conv2d) else torch.randn(7, 3)
    assert patches(x, ConvGeometry.of(layer)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("shape", [(2, 5, 6, 6), (6, 6), (1, 2, 3, 6, 6)])
def test_an_input_that_the_layer_does_not_take_is_an_error(shape):
    with pytest.raises(ValueError, match="3 input channels got a"):
        patches(torch.randn(shape), ConvGeometry.of(torch.nn.Conv2d(3, 4, 3)))
