"""Every way to contract a layer computes what the chain computes, and so do its gradients."""

import copy
import pickle

import pytest
import torch
from conftest import GEOMETRIES, every_format_and_geometry
from torch import nn
from torch.testing import assert_close

from tncompress import layers, strategies
from tncompress.formats import CP, MPS, Tucker
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.strategies import Contraction, all_contractions, merged_stages

pytestmark = pytest.mark.usefixtures("quick_cp")

LAWFUL = {"rtol": 1e-9, "atol": 1e-11}


def layer_of(format, geometry, dtype=torch.float64) -> TNConv:
    """Return a layer with random factors at about half of the full ranks: no fit, no error to look at."""
    dense = geometry.layer(dtype)
    ranks = tuple(max(1, top // 2) for top in format.max_ranks(geometry.kernel_shape))
    groups = getattr(dense, "groups", 1)
    shapes = format.factor_shapes(geometry.kernel_shape, ranks, groups)
    factors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return TNConv(format, ConvGeometry.of(dense), factors, dense.bias)


def outputs_and_gradients(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    wanted = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    grads = torch.autograd.grad((out * wanted).sum() + out.square().sum(), [x, *layer.parameters()])
    return [out.detach(), *grads]


@every_format_and_geometry
def test_every_contraction_has_the_outputs_and_gradients_of_the_chain(format, geometry):
    layer, x = layer_of(format, geometry), geometry.input()
    wanted = outputs_and_gradients(layer, x)
    for contraction in [*all_contractions(layer.stages), Contraction.of("einsum", layer.stages)]:
        layer.contract(contraction)
        assert layer.contraction == contraction
        for got, value in zip(outputs_and_gradients(layer, x), wanted, strict=True):
            assert_close(got, value, **LAWFUL)
        with torch.no_grad():
            assert_close(layer(x), wanted[0], **LAWFUL)
            assert_close(layer(x), wanted[0], **LAWFUL)


@every_format_and_geometry
def test_everything_merged_is_the_dense_kernel(format, geometry):
    layer = layer_of(format, geometry).contract("kernel")
    (stage,) = layer.running
    (weight,) = layer.weights()
    kernels = layer.geometry.kernels(layer.weight).flatten(0, 1)  # (groups * out, in, ...), also transposed
    assert weight.shape == kernels.shape == stage.stored_shape(layer.geometry.groups)
    assert_close(weight, kernels, **LAWFUL)
    assert stage.axes == tuple(range(layer.geometry.ndim))


# --- what is kept between calls -----------------------------------------------------------------------------


@pytest.fixture
def merged():
    geometry = GEOMETRIES["2d-grouped"]
    return layer_of(MPS(), geometry).requires_grad_(False).contract((1, 2, 1)), geometry.input()


def step(layer):
    layer.requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(GEOMETRIES["2d-grouped"].input_shape, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    layer.requires_grad_(False)


def load(layer):
    layer.load_state_dict({key: value + 1 for key, value in layer.state_dict().items()})


def assign(layer):
    layer.load_state_dict({key: value + 1 for key, value in layer.state_dict().items()}, assign=True)


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.factors[1].mul_(2)


def through_data(layer):
    for factor in layer.factors:
        factor.data.mul_(2)


def new_data(layer):
    for factor in layer.factors:
        factor.data = factor.data * 2


def new_data_and_back(layer):
    """Storage that is given back may be given out again, at the same address."""
    for factor in layer.factors:
        factor.data = factor.data * 2
        factor.data = factor.data.clone()


def new_parameter(layer):
    layer.factors[2] = nn.Parameter(torch.randn_like(layer.factors[2]), requires_grad=False)


def cast_twice(layer):
    layer.float().double()


def channels_last(layer):
    layer.to(memory_format=torch.channels_last)
    layer.factors[2].data.mul_(2)


CHANGES = [
    step,
    load,
    assign,
    in_inference_mode,
    through_data,
    new_data,
    new_data_and_back,
    new_parameter,
    cast_twice,
    channels_last,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_of_the_factors_is_seen(merged, change, mode):
    layer, x = merged
    with mode():
        before = layer(x)
    change(layer)
    chain = copy.deepcopy(layer).contract("chain")
    with mode():
        assert_close(layer(x), chain(x), **LAWFUL)
        assert change is cast_twice or not torch.allclose(layer(x), before)


def test_a_change_that_no_sample_sees_is_known_by_the_version(merged, monkeypatch):
    monkeypatch.setattr(strategies, "SAMPLE", 1)
    layer, x = merged
    layer(x)
    for changed in (lambda f: f[-1, -1, -1].mul_(2), lambda f: f.copy_(torch.cat([f[:1], f[1:] + 1]))):
        changed(layer.factors[1])
        assert_close(layer(x), copy.deepcopy(layer).contract("chain")(x), **LAWFUL)


def test_merged_weights_are_made_once_in_inference_and_always_where_gradients_are_wanted(merged, monkeypatch):
    calls = []
    make = layers.merged_weights
    monkeypatch.setattr(layers, "merged_weights", lambda *args: calls.append(1) or make(*args))
    layer, x = merged
    for _ in range(3):
        layer(x)
    assert len(calls) == 1
    with torch.inference_mode():
        layer(x)
    assert len(calls) == 1
    layer.requires_grad_()
    for _ in range(2):
        layer(x).sum().backward()
    assert len(calls) == 3
    with torch.no_grad():
        layer(x)
    assert len(calls) == 3  # the factors are still what they were


def test_parameters_made_in_inference_mode_are_never_stale():
    with torch.inference_mode():
        layer = layer_of(MPS(), GEOMETRIES["2d"]).requires_grad_(False).contract("kernel")
        x = GEOMETRIES["2d"].input()
        layer(x)
        layer.factors[0].mul_(3)
        wanted = copy.deepcopy(layer).contract("chain")(x)
        assert_close(layer(x), wanted, **LAWFUL)


def test_copies_keep_the_contraction_and_not_what_was_made(merged):
    layer, x = merged
    wanted, keys = layer(x), set(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.contraction == layer.contraction
        assert other._kept._made is None
        assert_close(other(x), wanted, **LAWFUL)
        with torch.no_grad():
            other.factors[0].zero_()
        assert_close(layer(x), wanted, **LAWFUL)
    assert keys == {"bias", *(f"factors.{i}" for i in range(4))}


def test_functional_calls_and_vmap_see_their_own_factors(merged):
    layer, x = merged
    layer(x)
    states = [{k: v * s for k, v in layer.state_dict().items()} for s in (1.0, 0.5)]
    with torch.no_grad():
        for state in states:
            chain = copy.deepcopy(layer).contract("chain")
            chain.load_state_dict(state)
            assert_close(torch.func.functional_call(layer, state, (x,)), chain(x), **LAWFUL)
        stacked = {k: torch.stack([state[k] for state in states]) for k in states[0]}
        both = torch.vmap(lambda state: torch.func.functional_call(layer, state, (x,)))(stacked)
        for got, state in zip(both, states, strict=True):
            assert_close(got, torch.func.functional_call(layer, state, (x,)), **LAWFUL)


# --- compilers, exporters, and what else a module is asked --------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("contraction", ["kernel", "einsum", (1, 2, 1), (3, 1)])
@pytest.mark.parametrize("name", ["2d-stride", "2d-grouped", "2d-transposed", "2d-same-even"])
def test_every_contraction_compiles_and_exports(contraction, name):
    geometry = GEOMETRIES[name]
    layer = layer_of(MPS(), geometry, torch.float32).contract(contraction)
    x = geometry.input(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer(x)
        layer.factors[0].mul_(2)
        assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert_close(program.module()(torch.cat([x, x])), layer(torch.cat([x, x])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contraction", ["kernel", "einsum", (2, 2)])
def test_an_output_size_is_taken_by_every_contraction(contraction):
    geometry = GEOMETRIES["2d-transposed"]
    layer, x = layer_of(MPS(), geometry), geometry.input()
    size = [n - 1 for n in layer(x).shape[2:]]
    wanted = layer(x, output_size=size)
    assert_close(layer.contract(contraction)(x, output_size=size), wanted, **LAWFUL)
    with pytest.raises(ValueError, match="wanted an output size"):
        layer(x, output_size=[99, 99])


def test_counts_and_names_of_contractions():
    stages = Tucker("all").stages((8, 6, 3, 3), (3, 2, 2, 4))
    found = all_contractions(stages)
    assert len(found) == len(set(found)) == 2 ** (len(stages) - 1)
    assert [str(found[0]), str(found[-1])] == ["chain", "kernel"]
    assert all(Contraction.of(c.merged, stages) == c for c in found)
    cp = CP().stages((8, 6, 3, 3), (5,))
    merged = merged_stages(cp, (1, 2, 1))
    assert [(s.shape, s.groups) for s in merged] == [
        ((5, 6, 1, 1), 1),
        ((5, 1, 3, 3), 5),
        ((8, 5, 1, 1), 1),
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("fastest", "wanted a contraction 'chain'"), ((1, 2), "add up to the 4"), ((4, 0), "add up to the 4")],
)
def test_a_contraction_that_is_none_is_refused(wanted, message):
    layer = layer_of(MPS(), GEOMETRIES["2d"])
    with pytest.raises(ValueError, match=message):
        layer.contract(wanted)
    assert str(layer.contraction) == "chain"
