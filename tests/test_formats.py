import math
from dataclasses import dataclass, replace
from itertools import count, pairwise

import pytest
import tensornetwork
import torch
from conftest import (
    GEOMETRIES,
    every_format,
    every_format_and_geometry,
    every_format_and_shape,
    every_misfit,
    every_tree_and_shape,
)
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tncompress.contraction import chain_macs, dense_macs, macs_ratio
from tncompress.cuts import legs_of
from tncompress.formats import CP, MPS, SVD, Format, Tucker, make_format, register_format
from tncompress.formats.base import FORMATS as REGISTRY
from tncompress.formats.chain import ChainFormat
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def relative(wrong: torch.Tensor, right: torch.Tensor) -> float:
    return float((wrong - right).detach().norm() / right.detach().norm())


def ranks_at(format: Format, shape, fraction: float) -> tuple[int, ...]:
    """Ranks at a fraction of the largest, which the network can have."""
    wanted = tuple(max(1, round(fraction * top)) for top in format.max_ranks(shape))
    return format.feasible(shape, wanted)


def some_ranks(format: Format, shape) -> list[tuple[int, ...]]:
    fractions = (0.2, 0.6) if isinstance(format, CP) else (0.0, 0.3, 0.6, 0.9)
    return sorted({ranks_at(format, shape, fraction) for fraction in fractions})


def random_factors(format: Format, shape, ranks, dtype=torch.float64, groups=1) -> list[torch.Tensor]:
    return [torch.randn(size, dtype=dtype) for size in format.factor_shapes(shape, ranks, groups)]


def random_layer(format: Format, dense: nn.Module, fraction: float) -> TNConv:
    """A layer of random factors in the place of ``dense``: any network will do where no fit is asked for."""
    geometry = ConvGeometry.of(dense)
    ranks = ranks_at(format, geometry.kernel_shape, fraction)
    factors = random_factors(format, geometry.kernel_shape, ranks, dense.weight.dtype, geometry.groups)
    return TNConv(format, geometry, factors, dense.bias.detach().clone() if dense.bias is not None else None)


def contract(format: Format, factors, shape) -> torch.Tensor:
    """The kernel by tensornetwork's ncon: an oracle that knows only ``format.network``.

    A bond that more than two factors share (CP) is joined by copy tensors.
    """
    network = format.network(shape)
    number = {leg: -1 - i for i, leg in enumerate(legs_of(len(shape)))}
    tensors, labels, fresh = list(factors), [], count(1)
    ends: dict[str, list[int]] = {}
    for legs in network:
        labels.append([number[leg] if leg in number else next(fresh) for leg in legs])
        for leg, label in zip(legs, labels[-1], strict=True):
            if leg not in number:
                ends.setdefault(leg, []).append(label)
    for bond, (first, *others) in ends.items():
        size = next(
            f.shape[legs.index(bond)] for legs, f in zip(network, factors, strict=True) if bond in legs
        )
        for i, other in enumerate(others):
            last = i == len(others) - 1
            copy = torch.zeros((size,) * (2 if last else 3), dtype=factors[0].dtype)
            copy[(torch.arange(size),) * copy.ndim] = 1
            tensors.append(copy)
            labels.append([first, other] if last else [first, other, first := next(fresh)])
    return tensornetwork.ncon(tensors, labels, backend="pytorch")


def side_of(format: Format, shape, bond: str) -> tuple[list[int], list[int]]:
    """Which factors lie on either side of a bond of a tree: found by walking over the other bonds."""
    network = format.network(shape)
    left = {next(k for k, legs in enumerate(network) if bond in legs)}
    while True:
        touched = {leg for k in left for leg in network[k] if leg.startswith("r") and leg != bond}
        grown = left | {k for k, legs in enumerate(network) if touched & set(legs)}
        if grown == left:
            return sorted(left), sorted(set(range(len(network))) - left)
        left = grown


def spectrum_across(kernel: torch.Tensor, legs) -> torch.Tensor:
    names = legs_of(kernel.ndim)
    rows = [names.index(leg) for leg in legs if leg in names]
    columns = [mode for mode in range(kernel.ndim) if mode not in rows]
    matrix = kernel.permute(*rows, *columns).reshape(math.prod(kernel.shape[mode] for mode in rows), -1)
    return torch.linalg.svdvals(matrix.double())


def spectra_by_walk(format: Format, kernel: torch.Tensor) -> list[torch.Tensor]:
    """The singular values at each bond of a tree, by a full SVD of the kernel."""
    network, count = format.network(kernel.shape), len(format.max_ranks(kernel.shape))
    sides = [side_of(format, kernel.shape, f"r{i}")[0] for i in range(count)]
    return [spectrum_across(kernel, [leg for k in side for leg in network[k]]) for side in sides]


# --- the layer ----------------------------------------------------------------------------------------------


@every_dtype
@every_format_and_geometry
def test_at_full_ranks_the_layer_is_the_dense_layer(format, geometry, dtype):
    dense, x = geometry.layer(dtype), geometry.input(dtype)
    layer = TNConv.from_dense(dense, format, format.max_ranks(geometry.kernel_shape))
    out = layer(x)
    assert out.dtype == dtype
    assert out.shape == dense(x).shape
    assert relative(out, dense(x)) <= DTYPES[dtype]
    assert layer.rel_error <= DTYPES[dtype]


@every_format_and_geometry
def test_below_full_ranks_the_layer_is_the_dense_layer_of_its_kernel(format, geometry):
    """Outputs and the gradients of input, factors and bias are those through the rebuilt kernel."""
    dense = geometry.layer()
    layer = random_layer(format, dense, 0.5)
    x = geometry.input().requires_grad_()
    leaves = [x, *layer.parameters()]
    out = layer(x)
    slow = functional_call(
        dense, {"weight": layer.weight} | ({"bias": layer.bias} if layer.bias is not None else {}), x
    )
    assert relative(out, slow) <= 1e-12
    probe = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, leaves, probe), torch.autograd.grad(slow, leaves, probe), strict=True
    ):
        assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    assert relative(layer.to_dense()(x), slow) <= 1e-12


@every_misfit
def test_a_format_that_cannot_cut_a_kernel_says_so(format, geometry):
    with pytest.raises(ValueError, match=r"does not place leg kd|leaves one side|nothing to cut"):
        format.max_ranks(geometry.kernel_shape)
    with pytest.raises(ValueError, match=r"does not place leg kd|leaves one side|nothing to cut"):
        TNConv.from_dense(geometry.layer(), format, (1,))


@every_format_and_geometry
def test_macs_are_those_that_torch_counts(format, geometry):
    dense, x = geometry.layer(torch.float32), geometry.input(torch.float32)
    geo = ConvGeometry.of(dense)
    samples = math.prod(x.shape[: -1 - geo.ndim])
    lengths = x.shape[x.ndim - geo.ndim :]
    x = x.reshape(samples, geo.in_channels, *lengths)  # torch counts nothing for a matrix times a vector
    layer = random_layer(format, dense, 0.5)
    for module, formula in (
        (dense, dense_macs(geo, lengths, samples)),
        (layer, chain_macs(geo, layer.stages, lengths, samples)),
    ):
        with FlopCounterMode(display=False) as counter:
            module(x)
        assert formula == counter.get_total_flops() // 2


@every_format_and_geometry
def test_the_macs_ratio_is_that_of_a_large_input(format, geometry):
    geo = ConvGeometry.of(geometry.layer())
    stages = format.stages(geo.kernel_shape, ranks_at(format, geo.kernel_shape, 0.5))
    lengths = [6 * 10**6] * geo.ndim
    wanted = chain_macs(geo, stages, lengths) / dense_macs(geo, lengths)
    assert macs_ratio(geo, stages) == pytest.approx(wanted, rel=1e-4)


@every_format_and_geometry
def test_every_axis_is_padded_and_strided_by_one_stage(format, geometry):
    shape = geometry.kernel_shape
    stages = format.stages(shape, ranks_at(format, shape, 0.5))
    assert sorted(axis for stage in stages for axis in stage.axes) == list(range(len(shape) - 2))
    for stage in stages:
        for axis, size in enumerate(stage.shape[2:]):
            assert size == (shape[2 + axis] if axis in stage.axes else 1)


# --- the fit ------------------------------------------------------------------------------------------------


@every_dtype
@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_the_predicted_error_is_the_measured_one(format, shape, dtype):
    kernel = torch.randn(shape, dtype=dtype)
    for ranks in some_ranks(format, shape):
        fit = format.fit(kernel, ranks)
        measured = relative(contract(format, [f.double() for f in fit.factors], shape), kernel.double())
        assert fit.rel_error == pytest.approx(measured, rel=1e-5, abs=DTYPES[dtype] / 10)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("format", [SVD(), SVD("out kh|in kw"), MPS(), Tucker(), Tucker("all")], ids=str)
def test_float32_kernels_are_fitted_as_well_as_float64_ones(format, share, scale):
    """Large enough for the quick way, which looks for what to keep in float32."""
    shape = (72, 56, 3, 3)
    left, right = torch.randn(72, 20), torch.randn(20, 56 * 9)
    kernel = (left @ right / 20**0.5 + 0.3 * torch.randn(72, 56 * 9)).reshape(shape)
    kernel *= scale
    ranks = ranks_at(format, shape, share)
    quick, exact = format.fit(kernel, ranks), format.fit(kernel.double(), ranks)
    assert quick.rel_error == pytest.approx(exact.rel_error, rel=1e-5 if len(ranks) == 1 else 1e-4)
    measured = relative(contract(format, [f.double() for f in quick.factors], shape), kernel.double())
    assert quick.rel_error == pytest.approx(measured, rel=1e-5)


@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_factors_have_the_shapes_the_network_says(format, shape):
    sizes = dict(zip(legs_of(len(shape)), shape, strict=True))
    for ranks in some_ranks(format, shape):
        factors = format.decompose(torch.randn(shape), ranks)
        sizes |= {f"r{i}": rank for i, rank in enumerate(ranks)}
        wanted = tuple(tuple(sizes[leg] for leg in legs) for legs in format.network(shape))
        assert (
            tuple(tuple(factor.shape) for factor in factors) == wanted == format.factor_shapes(shape, ranks)
        )
        assert sum(factor.numel() for factor in factors) == format.num_params(shape, ranks)


@every_format_and_shape
def test_the_kernel_is_the_contraction_of_the_network(format, shape):
    factors = random_factors(format, shape, ranks_at(format, shape, 0.6))
    assert_close(format.to_dense(factors, shape), contract(format, factors, shape), rtol=1e-10, atol=1e-10)


@every_tree_and_shape
def test_spectra_are_those_of_the_cuts_that_the_bonds_make(format, shape):
    kernel = torch.randn(shape, dtype=torch.float64)
    wanted = spectra_by_walk(format, kernel)
    assert format.max_ranks(shape) == tuple(len(s) for s in wanted)
    for got, s in zip(format.spectra(kernel), wanted, strict=True):
        assert_close(got, s, rtol=1e-9, atol=1e-12)


@every_tree_and_shape
def test_the_error_lies_between_the_largest_tail_and_the_sum_of_tails(format, shape):
    """One bond: optimal (Eckart-Young). More: no better than the worst cut, no worse than all together."""
    kernel = torch.randn(shape, dtype=torch.float64)
    for ranks in some_ranks(format, shape):
        tails = [
            float(s[rank:].square().sum())
            for s, rank in zip(spectra_by_walk(format, kernel), ranks, strict=True)
        ]
        squared = (format.fit(kernel, ranks).rel_error * float(kernel.norm())) ** 2
        assert max(tails) * (1 - 1e-9) - 1e-20 <= squared <= sum(tails) * (1 + 1e-9) + 1e-20


@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_the_error_does_not_rise_with_the_ranks(format, shape):
    """All bonds grow together. One alone may not help where another is too tight: the fit is greedy."""
    kernel = torch.randn(shape, dtype=torch.float64)
    slack = {SVD: 1e-9, MPS: 1e-3, Tucker: 1e-5, CP: 0.01}[type(format)]
    steps = 5 if isinstance(format, CP) else 12
    path = sorted({ranks_at(format, shape, step / steps) for step in range(steps + 1)})
    errors = [format.fit(kernel, ranks).rel_error for ranks in path]
    assert errors[-1] < 1e-12 < 0.4 < errors[0] or len(path) == 1
    for (smaller, worse), (larger, better) in pairwise(zip(path, errors, strict=True)):
        assert better <= worse * (1 + slack) + 1e-7, (smaller, larger)


@every_format_and_shape
def test_a_kernel_built_from_factors_is_recovered_at_its_ranks(format, shape):
    ranks = (3,) if isinstance(format, CP) else ranks_at(format, shape, 0.4)
    ranks = tuple(min(rank, top) for rank, top in zip(ranks, format.max_ranks(shape), strict=True))
    kernel = contract(format, random_factors(format, shape, ranks), shape)
    assert format.fit(kernel, ranks).rel_error < (1e-4 if isinstance(format, CP) else 1e-12)


@every_format_and_shape
def test_full_ranks_are_exact_on_a_kernel_of_many_magnitudes(format, shape):
    kernel = torch.randn(shape, dtype=torch.float64)
    for mode, size in enumerate(shape):
        kernel = kernel * torch.logspace(0, -3, size).double().reshape(
            [-1 if m == mode else 1 for m in range(len(shape))]
        )
    fit = format.fit(kernel, format.max_ranks(shape))
    assert relative(contract(format, fit.factors, shape), kernel) <= 1e-12


@every_format
@pytest.mark.usefixtures("quick_cp")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_fit_keeps_the_dtype_and_leaves_the_kernel_alone(format, dtype):
    kernel = nn.Parameter(torch.randn(8, 6, 3, 3).to(dtype))
    before = kernel.detach().clone()
    fit = format.fit(kernel, ranks_at(format, kernel.shape, 0.5))
    assert torch.equal(kernel, before)
    assert kernel.grad is None
    for factor in fit.factors:
        assert factor.dtype == dtype
        assert factor.is_contiguous()
        assert not factor.requires_grad
        assert bool(factor.isfinite().all())
    rebuilt = format.to_dense([factor.double() for factor in fit.factors], kernel.shape)
    assert relative(rebuilt, before.double()) == pytest.approx(fit.rel_error, rel=1e-6, abs=1e-7)


@every_format
@pytest.mark.usefixtures("quick_cp")
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_relative_error_does_not_depend_on_the_scale(format, scale):
    kernel = torch.randn(8, 6, 3, 3)
    ranks = ranks_at(format, kernel.shape, 0.25)
    assert format.fit(scale * kernel, ranks).rel_error == pytest.approx(
        format.fit(kernel, ranks).rel_error, rel=1e-3
    )


@every_format
def test_the_same_kernel_gives_the_same_factors_whatever_was_drawn_before(format):
    kernel = torch.randn(8, 6, 3, 3)
    ranks = ranks_at(format, kernel.shape, 0.4)
    first = format.fit(kernel, ranks)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = format.fit(kernel.clone(memory_format=torch.channels_last), ranks)
    assert first.rel_error == second.rel_error
    assert all(torch.equal(a, b) for a, b in zip(first.factors, second.factors, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@every_format
def test_a_fit_follows_neither_the_default_device_nor_the_default_dtype(format):
    kernel = torch.randn(8, 6, 3, 3)
    ranks = ranks_at(format, kernel.shape, 0.4)
    wanted = format.decompose(kernel, ranks)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = format.decompose(kernel, ranks)
    finally:
        torch.set_default_dtype(torch.float32)
    for got, factor in zip(found, wanted, strict=True):
        assert torch.equal(got, factor)
        assert got.dtype == torch.float32


@every_format_and_shape
def test_a_zero_kernel_is_fitted_without_error(format, shape):
    fit = format.fit(torch.zeros(shape), ranks_at(format, shape, 0.5))
    assert fit.rel_error == 0
    assert all(bool(factor.isfinite().all()) for factor in fit.factors)
    assert torch.equal(format.to_dense(fit.factors, shape), torch.zeros(shape))


@every_format
def test_a_kernel_of_lower_rank_than_the_bonds_gives_harmless_factors(format):
    """Directions that a kernel does not have must not blow up the gauge of the bond."""
    vectors = [torch.randn(size) for size in (8, 6, 3, 3)]
    kernel = torch.einsum("a,b,c,d->abcd", *vectors)
    fit = format.fit(kernel, ranks_at(format, kernel.shape, 0.6))
    assert fit.rel_error < 1e-5
    for factor in fit.factors:
        assert float(factor.abs().max()) < 100 * float(kernel.norm())


@every_tree_and_shape
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_bonds_are_split_evenly(format, shape, fraction):
    """The two sides of a bond have the same Gram matrix: gradient flow keeps what differs between them."""
    kernel = 100 * torch.randn(shape, dtype=torch.float64)
    ranks = ranks_at(format, shape, fraction)
    factors, network = format.fit(kernel, ranks).factors, format.network(shape)
    for i in range(len(ranks)):
        left, right = (gram(network, factors, side, f"r{i}") for side in side_of(format, shape, f"r{i}"))
        assert_close(left, right, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("format", [CP(), CP(merged=True)], ids=str)
@pytest.mark.parametrize("rank", [3, 20])
def test_terms_of_cp_are_shared_evenly_by_their_vectors(format, rank):
    kernel = torch.randn(6, 7, 3, 3, dtype=torch.float64)
    assert format.spectra(kernel) is None
    norms = [
        factor.movedim(legs.index("r0"), 0).flatten(1).norm(dim=1)
        for legs, factor in zip(format.network(kernel.shape), format.decompose(kernel, (rank,)), strict=True)
    ]
    for norm in norms[1:]:
        assert_close(norm, norms[0], rtol=1e-6, atol=0)


def gram(network, factors, side, bond) -> torch.Tensor:
    """The Gram matrix, over a bond, of all factors on one side of it."""
    names = sorted({leg for k in side for leg in network[k]})
    letter = {leg: chr(ord("a") + i) for i, leg in enumerate(names)}
    ends = [leg for leg in names if leg != bond and sum(leg in network[k] for k in side) == 1]
    terms = ",".join("".join(letter[leg] for leg in network[k]) for k in side)
    block = torch.einsum(
        f"{terms}->{letter[bond]}{''.join(letter[leg] for leg in ends)}", *(factors[k] for k in side)
    )
    return block.flatten(1) @ block.flatten(1).mT


@pytest.mark.parametrize("ranks", [(4, 8, 4), (8, 16, 8), (9, 20, 10)])
def test_mps_is_better_than_a_plain_truncation(ranks):
    from tensorly.decomposition import tensor_train

    kernel = torch.randn(12, 10, 3, 3, dtype=torch.float64)
    theirs = tensor_train(kernel.permute(1, 2, 3, 0).numpy(), [1, *ranks, 1]).to_tensor()
    error = relative(torch.from_numpy(theirs).permute(3, 0, 1, 2), kernel)
    assert MPS().fit(kernel, ranks).rel_error < 0.995 * error


@pytest.mark.parametrize("ranks", [(12, 24), (24, 48), (40, 80)], ids=str)
@pytest.mark.parametrize("legs", ["channels", "all"])
def test_tucker_is_as_good_as_tensorlys(legs, ranks):
    from tensorly import tucker_to_tensor
    from tensorly.decomposition import partial_tucker

    kernel, small, wide = torch.randn(96, 48, 3, 3), (2, 2) if legs == "all" else (), (3, 3)
    (core, bases), _ = partial_tucker(kernel.numpy(), [ranks[1], ranks[0], *(small or wide)], init="svd")
    error = relative(torch.from_numpy(tucker_to_tensor((core, bases))), kernel)
    assert Tucker(legs).fit(kernel, (ranks[0], *small, ranks[1])).rel_error < 1.0001 * error


@pytest.mark.parametrize("rank", [4, 12, 24])
def test_cp_is_as_good_as_tensorlys(rank):
    from tensorly.decomposition import parafac

    kernel = torch.randn(12, 10, 3, 3, dtype=torch.float64)
    theirs = parafac(kernel.numpy(), rank, init="svd", n_iter_max=500, tol=1e-9, random_state=0)
    error = relative(torch.from_numpy(theirs_to_dense(theirs)), kernel)
    assert CP().fit(kernel, (rank,)).rel_error <= 1.01 * error


def theirs_to_dense(cp):
    import numpy

    weights, factors = cp
    return numpy.einsum("r,ar,br,cr,dr->abcd", weights, *factors)


# --- ranks --------------------------------------------------------------------------------------------------


@every_format_and_shape
def test_wrong_ranks_are_an_error_that_names_the_kernel(format, shape):
    kernel, top = torch.randn(shape), format.max_ranks(shape)
    where = str(shape).replace("(", r"\(").replace(")", r"\)")
    for ranks, match in (
        ((*top, 1), rf"{where} takes {len(top)} rank\(s\)"),
        ((), rf"{where} takes {len(top)} rank\(s\)"),
        ((0, *top[1:]), "ranks start at 1"),
        ((*top[:-1], top[-1] + 1), rf"of at most .*got .*{top[-1] + 1}"),
    ):
        with pytest.raises(ValueError, match=match):
            format.fit(kernel, ranks)


@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_ranks_that_the_network_cannot_have_are_lowered(format, shape):
    """What is left out was zero anyhow: the fit at the lower ranks is as good."""
    kernel, top = torch.randn(shape, dtype=torch.float64), format.max_ranks(shape)
    assert format.feasible(shape, top) == top
    for i in range(len(top)):
        asked = tuple(rank if j == i else 1 for j, rank in enumerate(top))
        ranks = format.feasible(shape, asked)
        assert all(got <= wanted for got, wanted in zip(ranks, asked, strict=True))
        assert format.feasible(shape, ranks) == ranks
        fit = format.fit(kernel, asked)
        assert [tuple(factor.shape) for factor in fit.factors] == list(format.factor_shapes(shape, ranks))
        for bond, s in enumerate([] if isinstance(format, CP) else spectra_by_walk(format, kernel)):
            rebuilt = contract(format, fit.factors, shape)
            across = spectra_by_walk(format, rebuilt)[bond]
            assert float(across[ranks[bond] :].norm()) <= 1e-12 * float(s.norm())


@dataclass(frozen=True)
class Odd:
    """A value that stands for no format."""


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("ring", "unknown format 'ring'; the formats are cp, mps, svd, tucker"),
        (3, "unknown format 3"),
        (None, "unknown format None"),
        ({}, "unknown format None"),
        ({"name": ["mps"]}, "unknown format"),
        ({"name": "mps", "ordre": "in out"}, "format 'mps' has no option 'ordre'; its options are order"),
        ({"name": "mps", "order": 3}, "option 'order' is like 'in spatial out', got 3"),
        ({"name": "cp", "merged": 1}, "option 'merged' is like False, got 1"),
        ({"name": "mps", "order": "in spatial"}, "names in and out"),
        ({"name": "mps", "order": "in out rest"}, "names in and out"),
        ({"name": "mps", "order": "in kh spatial out"}, "named twice"),
        ({"name": "mps", "order": "inspatial out"}, "unknown leg 'inkd'"),
        ({"name": "mps", "order": "in wide out"}, "unknown leg 'wide'"),
        ({"name": "tucker", "legs": "some"}, "tucker's legs are 'channels' or 'all', got 'some'"),
        ({"name": "svd", "cut": "out"}, "a cut is written"),
    ],
    ids=str,
)
def test_a_format_that_is_none_is_an_error(value, match):
    with pytest.raises(ValueError, match=match):
        make_format(value)


@every_format
def test_a_format_is_what_its_dictionary_says(format):
    assert make_format(format.to_dict()) == format
    assert make_format(format) is format
    assert str(format).startswith(format.name)


def test_names_stand_for_the_defaults():
    assert [make_format(name) for name in ("cp", "mps", "svd", "tucker")] == [CP(), MPS(), SVD(), Tucker()]
    assert sorted(REGISTRY) == ["cp", "mps", "svd", "tucker"]


# --- layers by hand -----------------------------------------------------------------------------------------


def test_factors_that_do_not_make_a_network_are_refused():
    geometry, format = ConvGeometry.of(nn.Conv2d(4, 6, 3)), SVD()
    good = [torch.randn(2, 4, 3, 3), torch.randn(6, 2)]
    assert TNConv(format, geometry, good).ranks == (2,)
    for factors, match in (
        (good[:1], "wants factors with legs"),
        ([good[0].flatten(2), good[1]], "wants factors with legs"),
        ([good[0], torch.randn(6, 3)], r"wants factors \(\(3, 4, 3, 3\), \(6, 3\)\), got"),
        ([torch.randn(2, 5, 3, 3), good[1]], r"got \(\(2, 5, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=match):
            TNConv(format, geometry, factors)


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.Bilinear(4, 4, 3), nn.Embedding(4, 3)], ids=lambda m: type(m).__name__
)
def test_a_layer_that_has_no_kernel_is_refused(layer):
    with pytest.raises(ValueError, match="wanted a convolution or a linear layer"):
        TNConv.from_dense(layer, SVD(), (1,))


@pytest.mark.parametrize("training", [True, False])
def test_a_dense_layer_made_from_another_is_in_its_mode(training):
    layer = TNConv.from_dense(nn.Conv2d(4, 6, 3), SVD(), (6,)).train(training)
    assert layer.to_dense().training is training


def test_a_layer_does_not_share_its_bias_with_the_dense_one():
    dense = nn.Conv2d(4, 6, 3)
    layer = TNConv.from_dense(dense, SVD(), (6,))
    with torch.no_grad():
        layer.bias.add_(1)
    assert not torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_geometry_survives_json_and_builds_its_layer(name):
    import json

    layer = GEOMETRIES[name].layer()
    geometry = ConvGeometry.of(layer)
    assert ConvGeometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
    built = geometry.build_dense(bias=layer.bias is not None, dtype=torch.float64)
    assert type(built) is type(layer)
    built.load_state_dict(layer.state_dict())
    x = GEOMETRIES[name].input()
    assert torch.equal(built(x), layer(x))


def test_a_new_format_is_one_class():
    """Its place in specs, plans, layers and files follows from being registered."""
    from tncompress import compress

    @register_format("two-cores")
    @dataclass(frozen=True)
    class TwoCores(ChainFormat):
        def grouping(self, ndim):
            return (1, *range(2, ndim)), (0,)

    try:
        model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3), nn.Conv2d(12, 3, 1))
        small = compress(model, {"default": {"format": "two-cores", "rank": {"fixed": 4}}})
        assert small[1].format == TwoCores()
        svd = compress(model, {"default": {"format": "svd", "rank": {"fixed": 4}}})
        x = torch.randn(1, 3, 8, 8)
        assert_close(small(x), svd(x))
    finally:
        del REGISTRY["two-cores"]


@every_format_and_geometry
def test_a_layer_takes_the_memory_format_of_its_kind(format, geometry):
    """As the dense layer does: 2d layers can be moved to channels_last, 3d layers to channels_last_3d."""
    dense = geometry.layer()
    layer = random_layer(format, dense, 0.5)
    kind = {2: torch.channels_last, 3: torch.channels_last_3d}.get(layer.geometry.ndim)
    if kind is None:
        return
    x = geometry.input()
    wanted = layer(x)
    layer = layer.to(memory_format=kind)
    assert all(factor.is_contiguous(memory_format=kind) for factor in layer.factors)
    assert_close(layer(x), wanted, rtol=1e-10, atol=1e-12)
    assert_close(layer.to_dense()(x), wanted, rtol=1e-10, atol=1e-12)


@every_format_and_geometry
def test_tensors_of_a_layer_are_those_it_was_made_of(format, geometry):
    geo = ConvGeometry.of(geometry.layer())
    ranks = ranks_at(format, geo.kernel_shape, 0.5)
    factors = random_factors(format, geo.kernel_shape, ranks, groups=geo.groups)
    layer = TNConv(format, geo, factors)
    for got, factor in zip(layer.tensors(), factors, strict=True):
        assert torch.equal(got, factor)
    other = TNConv(format, geo, [torch.zeros_like(factor) for factor in factors])
    other.load_state_dict({f"factors.{i}": factor for i, factor in enumerate(factors)})
    assert all(torch.equal(a, b) for a, b in zip(other.factors, layer.factors, strict=True))
    sum(tensor.square().sum() for tensor in layer.tensors()).backward()
    assert all(torch.equal(factor.grad, 2 * factor) for factor in layer.factors)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 0},
        {"groups": 3},
        {"stride": (0, 1)},
        {"stride": (1,)},
        {"kernel_size": (3, 3, 3, 3)},
        {"padding": ((1, 1), (1, -1))},
        {"out_channels": -8},
        {"transposed": True},
        {"output_padding": (0, -1), "transposed": True},
        {"padding_mode": "mirror"},
    ],
    ids=str,
)
def test_a_geometry_that_no_convolution_has_is_refused(change):
    with pytest.raises(ValueError, match=r"no convolution has the geometry|unknown padding mode 'mirror'"):
        replace(ConvGeometry.of(nn.Conv2d(4, 8, 3)), **change)
