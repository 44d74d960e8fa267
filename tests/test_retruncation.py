"""Compressed layers at smaller ranks: what is discarded is the error, exactly, and no kernel is rebuilt."""

import copy
import math

import pytest
import torch
from conftest import (
    GEOMETRIES,
    every_format,
    every_format_and_geometry,
    every_tree_and_shape,
)
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress import CP, MPS, ConvGeometry, TNConv, Tucker
from tncompress.canonical import bond_values, cut_bonds
from tncompress.retruncation import retruncate

pytestmark = pytest.mark.usefixtures("quick_cp")


def random_factors(format, shape, part=0.7, groups=1):
    ranks = format.feasible(shape, tuple(max(1, math.ceil(part * r)) for r in format.max_ranks(shape)))
    sizes = format.factor_shapes(shape, ranks, groups)
    factors = [5.0 ** (k % 3 - 1) * torch.randn(s, dtype=torch.float64) for k, s in enumerate(sizes)]
    return factors, ranks


def layer_of(format, geometry, part=0.7, dtype=torch.float64) -> TNConv:
    """A layer as training might leave it: random factors, both sides of each bond uneven."""
    made = ConvGeometry.of(geometry.layer(dtype))
    factors, _ = random_factors(format, made.kernel_shape, part, made.groups)
    bias = torch.randn(made.out_channels, dtype=dtype)
    return TNConv(format, made, [factor.to(dtype) for factor in factors], bias)


def dense_of(layer):
    return layer.geometry.kernels(layer.weight.detach().double())


def distance(one, other):
    return float((one - other).norm() / other.norm())


@every_tree_and_shape
def test_bonds_have_the_singular_values_of_the_kernel(format, shape):
    factors, ranks = random_factors(format, shape)
    found = bond_values(format.network(shape), factors)
    wanted = format.spectra(format.to_dense(factors, shape))
    for i, (rank, spectrum) in enumerate(zip(ranks, wanted, strict=True)):
        values = found[f"r{i}"]
        assert len(values) == rank
        k = min(rank, len(spectrum))
        assert_close(values[:k], spectrum[:k], rtol=1e-8, atol=1e-8 * float(spectrum[0]))


@every_tree_and_shape
@pytest.mark.parametrize("part", [0.3, 0.6])
def test_what_is_discarded_is_the_error(format, shape, part):
    """At most the root of the summed tails, at least the largest tail, and what the dense kernels say."""
    factors, before = random_factors(format, shape)
    ranks = format.feasible(shape, tuple(max(1, math.ceil(part * r)) for r in before))
    kernel = format.to_dense(factors, shape)
    made, error = cut_bonds(format.network(shape), factors, {f"r{i}": r for i, r in enumerate(ranks)})
    assert tuple(tuple(f.shape) for f in made) == format.factor_shapes(shape, ranks)
    assert distance(format.to_dense(made, shape), kernel) == pytest.approx(error, rel=1e-7, abs=1e-10)
    tails = [
        float(s[rank:].square().sum()) / float(kernel.square().sum())
        for s, rank in zip(format.spectra(kernel), ranks, strict=True)
    ]
    assert error**2 <= sum(tails) * (1 + 1e-9) + 1e-20
    assert error**2 >= max(tails) * (1 - 1e-9) - 1e-20


def test_a_bond_with_more_values_than_it_can_carry_is_cut_too():
    """An MPS with bonds far beyond the legs beside them, which no fit makes, but a user may."""
    format, shape = MPS(), (3, 2, 2, 2)
    factors = [torch.randn(s, dtype=torch.float64) for s in format.factor_shapes(shape, (7, 9, 8))]
    kernel = format.to_dense(factors, shape)
    made, error = cut_bonds(format.network(shape), factors, {"r0": 6, "r1": 8, "r2": 1})
    assert [f.shape for f in made] == list(map(torch.Size, format.factor_shapes(shape, (6, 8, 1))))
    assert distance(format.to_dense(made, shape), kernel) == pytest.approx(error, rel=1e-8)


@every_format_and_geometry
def test_layers_of_every_kind_are_cut_as_reported(format, geometry):
    layer = layer_of(format, geometry)
    small = nn.Sequential(layer)
    before = copy.deepcopy(small.state_dict())
    found = retruncate(small, tnc.RankFraction(0.6))
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())
    (row,), fresh = found.layers, found.model[0]
    assert fresh.ranks == row.ranks
    assert all(a <= b for a, b in zip(row.ranks, row.ranks_before, strict=True))
    assert row.params == sum(f.numel() for f in fresh.factors)
    error = distance(dense_of(fresh), dense_of(layer))
    assert error == pytest.approx(row.rel_error, rel=1e-6, abs=1e-7)
    assert found.rel_error == pytest.approx(row.rel_error, rel=1e-9)
    assert_close(fresh.bias, layer.bias)
    assert fresh.bias is not layer.bias
    if row.ranks == row.ranks_before:
        assert row.reason == "the policy asks for no smaller ranks"


@every_format
def test_it_is_about_as_near_as_a_fit_of_the_whole_kernel(format):
    layer = layer_of(format, GEOMETRIES["2d"])
    found = retruncate(nn.Sequential(layer), tnc.RankFraction(0.5))
    kernels, ranks = dense_of(layer), found.layers[0].ranks
    wanted = format.fit_groups(kernels, ranks).rel_error
    assert wanted * (1 - 1e-6) - 1e-9 <= found.layers[0].rel_error <= 1.1 * wanted + 1e-9


def test_trees_are_cut_without_their_kernels(monkeypatch):
    layers = [layer_of(format, GEOMETRIES["2d-grouped"]) for format in (MPS(), Tucker(), tnc.SVD())]

    def refuse(*_):
        raise AssertionError("the kernel was rebuilt")

    for layer in layers:
        monkeypatch.setattr(type(layer.format), "to_dense", refuse)
        found = retruncate(nn.Sequential(layer), {"rank_fraction": 0.5})
        assert found.layers[0].params < found.layers[0].params_before


POLICIES = [
    tnc.FixedRank(2),
    tnc.ParamsRatio(0.2),
    tnc.Energy(0.9),
    tnc.RelError(0.3),
    tnc.Entropy(0.8),
    tnc.EVBMF(0.5),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.tag)
@pytest.mark.parametrize("format", [MPS(), Tucker(), CP()], ids=str)
def test_every_policy_says_how_far(format, policy):
    layer = layer_of(format, GEOMETRIES["2d"], part=0.9)
    kernels = dense_of(layer)
    (row,) = retruncate(nn.Sequential(layer), policy).layers
    assert row.params <= row.params_before
    if isinstance(policy, tnc.ParamsRatio):
        assert row.params <= 0.2 * kernels.numel()
    if isinstance(policy, tnc.RelError | tnc.Energy):
        assert row.rel_error <= 0.3 if isinstance(policy, tnc.RelError) else math.sqrt(0.1) + 1e-9
    if isinstance(policy, tnc.FixedRank):
        assert set(row.ranks) == {2}
    if isinstance(policy, tnc.Entropy):
        spectra = format.spectra_of_groups(kernels) or [
            torch.linalg.svdvals(kernels[0].movedim(m, 0).flatten(1)) for m in range(4)
        ]
        wanted = []
        for s in spectra:
            p = (s.square() / s.square().sum()).clamp_min(1e-300)
            wanted.append(math.ceil(0.8 * math.exp(-float((p * p.log()).sum()))))
        wanted = wanted if len(row.ranks) > 1 else [max(wanted)]
        assert row.ranks == tuple(min(w, r) for w, r in zip(wanted, row.ranks_before, strict=True))


def pair():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3, groups=2))
    spec = {"default": {"format": "mps", "rank": {"params_ratio": 0.6}}, "keep_dense": []}
    return model, tnc.compress(model, spec)


def test_layers_may_have_policies_of_their_own():
    _, small = pair()
    found = retruncate(small, {"1": {"rank_fraction": 0.5}, "*": tnc.FixedRank(3)})
    halves, *others = (next(r for r in found.layers if r.name == n) for n in ("1", "0", "3"))
    assert halves.ranks == tuple(math.ceil(r / 2) for r in halves.ranks_before)
    assert all(max(row.ranks) == 3 for row in others)
    only = retruncate(small, tnc.FixedRank(2), layers=["3"])
    assert [row.name for row in only.layers] == ["3"]
    assert only.model[1].ranks == small[1].ranks


def test_the_plan_of_the_model_follows(tmp_path):
    _, small = pair()
    found = retruncate(small, {"rank_fraction": 0.5})
    planned = {layer.name: layer for layer in found.model.tncompress_plan.compressed}
    for row in found.layers:
        assert planned[row.name].ranks == row.ranks == found.model.get_submodule(row.name).ranks
        assert planned[row.name].params == row.params
    assert small.tncompress_plan.params > found.model.tncompress_plan.params
    tnc.save(found.model, tmp_path / "c")
    again = tnc.load(tmp_path / "c", pair()[0])
    x = torch.randn(2, 3, 9, 9)
    assert_close(again(x), found.model.eval()(x))
    assert again.tncompress_plan == found.model.tncompress_plan


def test_what_belongs_to_a_layer_is_kept():
    _, small = pair()
    small[1].factors[0].requires_grad_(False)
    small[1].contract((1, 2, 1))
    small[1].eval()
    calls = []
    small[1].register_forward_hook(lambda *_: calls.append(1))
    shared = nn.ModuleDict({"a": small, "b": nn.Sequential(small[1])})
    found = retruncate(shared, {"rank_fraction": 0.5}).model
    new = found["a"][1]
    assert found["b"][0] is new
    assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in small[1].parameters()]
    assert str(new.contraction) == "1+2+1"
    assert not new.training
    new(torch.randn(1, 8, 5, 5))
    assert calls
    half = pair()[1].half()
    rows = retruncate(half, {"rank_fraction": 0.5})
    for row in rows.layers:
        before, after = half.get_submodule(row.name), rows.model.get_submodule(row.name)
        assert after.factors[0].dtype == torch.half
        assert distance(dense_of(after), dense_of(before)) == pytest.approx(row.rel_error, rel=1e-3)


def test_it_prints_and_is_plain_data():
    found = retruncate(pair()[1], {"rank_fraction": 0.5})
    assert f"3 layers truncated again, relative error {found.rel_error:.4f}" in str(found)
    assert found.to_dict()["layers"][0]["ranks"] == found.layers[0].ranks


@pytest.mark.parametrize(
    ("policy", "options", "words"),
    [
        (
            {"rank_fraction": 0.5},
            {"layers": ["conv9"]},
            "the pattern 'conv9' matches no compressed layer; those",
        ),
        ({"conv9": {"fixed": 1}}, {}, "the pattern 'conv9' matches no compressed layer"),
        ({"*": {"fixed": 1}}, {"layers": ["1"]}, "a policy for each layer in a mapping, or layers beside"),
        ({"ranks": 3}, {}, "unknown rank policy 'ranks'; the tags are fixed"),
        ({"1": {"fixed": [50, 2, 2]}}, {}, r"layer '1' .*takes 3 rank\(s\) of at most .*got \(50, 2, 2\)"),
    ],
)
def test_what_cannot_be_is_one_line(policy, options, words):
    with pytest.raises(ValueError, match=words):
        retruncate(pair()[1], policy, **options)


def test_a_dense_model_has_no_ranks_to_lower():
    with pytest.raises(ValueError, match="the model holds no compressed layer: there are no ranks to lower"):
        retruncate(pair()[0], {"rank_fraction": 0.5})


def test_a_layer_that_cannot_be_smaller_stays_and_says_why():
    _, small = pair()
    found = retruncate(small, {"params_ratio": 0.001})
    assert all("hold" in row.reason and row.ranks == row.ranks_before for row in found.layers)
    assert found.rel_error == 0
    with torch.no_grad():
        small[1].factors[1].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layer '1' .*holds NaN or infinity"):
        retruncate(small, {"rank_fraction": 0.5})
