"""The laws of a compressed layer, stated once and tried on random layers, formats and ranks.

The grids of the other tests name their layers; here hypothesis draws them: any axis count, stride, dilation,
padding, groups, direction, memory format. What a layer does is compared with torch's own layer, and what a
fit promises with plain singular values.
"""

import math
from dataclasses import replace

import numpy
import pytest
import torch
from drawn import TREES, Drawn, drawn, law
from hypothesis import assume
from hypothesis import strategies as st
from test_formats import gram, side_of
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from tncompress.cuts import legs_of
from tncompress.formats import CP, MPS, SVD, Format, Tucker
from tncompress.layers import TNConv

pytestmark = pytest.mark.usefixtures("quick_cp")

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-7, torch.bfloat16: 1e-12, torch.float16: 1e-12}
"""What a predicted error may be off by: in half precision rounding is part of the prediction."""


# --- oracles ------------------------------------------------------------------------------------------------


def gap(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative distance, or the plain one from zero."""
    return float((got - wanted).detach().norm() / (wanted.detach().norm() or 1.0))


def kernels_of(case: Drawn, weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the kernel ``(out, in, *spatial)`` of each group, by slicing torch's weight."""
    blocks = weight.detach().chunk(case.groups)
    return [block.transpose(0, 1) if case.transposed else block for block in blocks]


def cuts_of(format: Format, shape) -> list[set[str]]:
    """Return the legs on one side of each bond of a tree, as the format's name and options say."""
    sizes = dict(zip(legs_of(len(shape)), shape, strict=True))
    kept = [leg for leg, size in sizes.items() if leg in ("in", "out") or size > 1]
    if isinstance(format, SVD):
        return [set(format.cut.split("|")[0].split())]
    if isinstance(format, Tucker):
        spatial = [leg for leg in kept if leg not in ("in", "out")]
        if not spatial:
            return [{"out"}]
        return [{"in"}, *({leg} for leg in spatial if format.legs == "all"), {"out"}]
    order = [leg for leg in format.order.split() if leg in kept]
    if order.index("in") > order.index("out"):
        order.reverse()
    return [set(order[:k]) for k in range(1, len(order))]


def singular(kernel: torch.Tensor, legs: set[str]) -> numpy.ndarray:
    names = legs_of(kernel.ndim)
    rows = [mode for mode, leg in enumerate(names) if leg in legs]
    columns = [mode for mode in range(kernel.ndim) if mode not in rows]
    height = math.prod(kernel.shape[mode] for mode in rows)
    matrix = kernel.permute(*rows, *columns).reshape(height, -1)
    return numpy.linalg.svd(matrix.double().numpy(), compute_uv=False)


def tails_of(case: Drawn, weight: torch.Tensor, ranks) -> list[float]:
    """Return what each bond alone must discard, over all groups, relative to the squared norm."""
    kernels = kernels_of(case, weight)
    cuts = cuts_of(case.format, case.shape)
    total = float(weight.detach().double().square().sum())
    return [
        sum(float((singular(kernel, cut)[rank:] ** 2).sum()) for kernel in kernels) / total
        for cut, rank in zip(cuts, ranks, strict=True)
    ]


def through_the_kernel(dense: nn.Module, layer: TNConv, x, **options) -> torch.Tensor:
    """Return what torch's own layer makes of ``x`` with the weight that the factors stand for."""
    own = {"weight": layer.weight} | ({"bias": layer.bias} if layer.bias is not None else {})
    return functional_call(dense, own, (x,), options)


# --- what a layer computes ----------------------------------------------------------------------------------


@law(drawn(), st.sampled_from(tuple(EXACT)), examples=300)
def test_at_full_ranks_the_layer_is_the_dense_layer(case, dtype):
    dense, x, layer = case.dense(dtype), case.input(dtype), case.layer(dtype, case.full)
    wanted = dense(x)
    out = layer(x)
    assert (out.dtype, out.shape) == (dtype, wanted.shape)
    assert gap(out, wanted) <= EXACT[dtype]
    assert layer.rel_error <= EXACT[dtype]
    assert gap(layer.weight, dense.weight) <= EXACT[dtype]


@law(drawn(), examples=300)
def test_outputs_and_gradients_are_those_through_the_rebuilt_kernel(case):
    dense, layer, x = case.dense(), case.random_layer(), case.input().requires_grad_()
    out, slow = layer(x), through_the_kernel(dense, layer, x)
    assert gap(out, slow) <= 1e-12
    leaves = [x, *layer.parameters()]
    probe = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, probe)
    wanted = torch.autograd.grad(slow, leaves, probe)
    for got, right in zip(found, wanted, strict=True):
        assert gap(got, right) <= 1e-9
    assert gap(layer.to_dense()(x), slow) <= 1e-12


@law(drawn(groups=(1, 2)), examples=12)
def test_gradients_are_those_of_finite_differences(case):
    layer, x = case.random_layer(), case.input().requires_grad_()
    names = dict(layer.named_parameters())

    def run(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *names.values()), fast_mode=True)


@law(drawn(kinds=("transposed",)), st.data())
def test_output_sizes_are_those_of_torch(case, data):
    dense, layer, x = case.dense(), case.random_layer(), case.input()
    ndim = len(case.kernel)
    least = [
        (length - 1) * stride - 2 * pad + dilation * (size - 1) + 1
        for length, stride, pad, dilation, size in zip(
            x.shape[-ndim:], dense.stride, dense.padding, dense.dilation, dense.kernel_size, strict=True
        )
    ]
    size = [n + data.draw(st.integers(0, s - 1)) for n, s in zip(least, dense.stride, strict=True)]
    assume(min(size) >= 1)
    if data.draw(st.booleans()):
        size = [*x.shape[: x.ndim - ndim - 1], case.channels[1], *size]
    out = layer(x, size)
    assert list(out.shape[-ndim:]) == size[-ndim:]
    assert gap(out, through_the_kernel(dense, layer, x, output_size=size)) <= 1e-12
    axis = data.draw(st.integers(1, ndim))
    size[-axis] = least[-axis] + dense.stride[-axis]
    with pytest.raises(ValueError, match="wanted an output size from"):
        layer(x, size)
    with pytest.raises(ValueError, match="requested an output size"):
        dense(x, size)


@law(drawn(kinds=("transposed",)))
def test_a_transposed_convolution_is_the_gradient_of_the_plain_one(case):
    dense, layer, x = case.dense(), case.random_layer(), case.input()
    layer.bias = None
    out = layer(x)
    at = torch.zeros_like(out).requires_grad_()
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(case.kernel) - 1]
    there = convolve(at, layer.weight, None, dense.stride, dense.padding, dense.dilation, case.groups)
    beyond = [(0, n - m) for n, m in zip(there.shape, x.shape, strict=True)]  # output_padding >= stride
    probe = F.pad(x, sum(reversed(beyond), ()))
    assert gap(out, torch.autograd.grad(there, at, probe)[0]) <= 1e-12


@law(drawn(kinds=("plain", "transposed"), groups=(2, 3)))
def test_groups_are_layers_run_side_by_side(case):
    layer, x = case.random_layer(), case.input()
    out, inward, *_ = case.shape
    single = replace(layer.geometry, groups=1, in_channels=inward, out_channels=out)
    channel = x.ndim - len(case.kernel) - 1
    biases = layer.bias.detach().chunk(case.groups) if layer.bias is not None else [None] * case.groups
    outputs = [
        TNConv(case.format, single, [factor[g] for factor in layer.tensors()], biases[g])(part)
        for g, part in enumerate(x.chunk(case.groups, channel))
    ]
    assert gap(layer(x), torch.cat(outputs, channel)) <= 1e-12


@law(drawn(kinds=("plain", "transposed"), groups=(3,)), st.permutations(range(3)))
def test_permuted_groups_have_permuted_factors(case, order):
    dense = case.dense()
    layer = TNConv.from_dense(dense, case.format, case.asked)
    with torch.no_grad():
        blocks = dense.weight.chunk(3)
        dense.weight.copy_(torch.cat([blocks[g] for g in order]))
    turned = TNConv.from_dense(dense, case.format, case.asked)
    assert turned.rel_error == pytest.approx(layer.rel_error, rel=1e-9, abs=1e-15)
    for got, factor in zip(turned.tensors(), layer.tensors(), strict=True):
        assert_close(got, factor[list(order)])


@law(drawn())
def test_a_layer_without_bias_is_linear_in_its_input(case):
    layer, x = case.random_layer(), case.input()
    layer.bias = None
    y = torch.randn_like(x)
    assert gap(layer(2 * x - 3 * y), 2 * layer(x) - 3 * layer(y)) <= 1e-11
    assert not layer(torch.zeros_like(x)).any()


@law(drawn(kinds=("plain", "linear")))
def test_a_bias_is_added_once_to_every_pixel(case):
    layer, x = case.random_layer(), case.input()
    bare = TNConv(case.format, layer.geometry, layer.tensors())
    assume(layer.bias is not None)
    bias = layer.bias.reshape(-1, *[1] * len(case.kernel))
    assert gap(layer(x), bare(x) + bias) <= 1e-12


@law(drawn(kinds=("plain",)), st.data(), examples=60)
def test_wrapped_layers_commute_with_shifts(case, data):
    options = case.options | {"padding": "same", "padding_mode": "circular", "stride": 1}
    ndim = len(case.kernel)
    lengths = [3 * size + data.draw(st.integers(1, 3)) for size in case.kernel]
    case = replace(case, options=options, input_shape=(2, case.channels[0], *lengths))
    layer, x, axes = case.random_layer(), case.input(), tuple(range(-ndim, 0))
    shifts = tuple(data.draw(st.integers(0, length - 1)) for length in lengths)
    assert gap(layer(x.roll(shifts, axes)), layer(x).roll(shifts, axes)) <= 1e-12


# --- what a fit promises ------------------------------------------------------------------------------------


@law(drawn(), st.sampled_from(DTYPES), examples=250)
def test_the_predicted_error_is_the_measured_one_over_all_groups(case, dtype):
    dense, layer = case.dense(dtype), case.layer(dtype)
    assert layer.ranks == case.ranks
    assert {factor.dtype for factor in layer.factors} == {dtype}
    measured = gap(layer.double().weight, dense.weight.double())
    assert layer.rel_error == pytest.approx(measured, rel=1e-6, abs=ROUNDING[dtype])


@law(drawn(families=TREES), examples=250)
def test_the_error_lies_between_the_largest_tail_and_the_sum_of_tails(case):
    """One bond: optimal (Eckart-Young). More: no better than the worst cut, no worse than all together.

    The sum is at most the largest tail times the number of bonds: within its square root of the best fit.
    """
    dense, layer = case.dense(), case.layer()
    tails = tails_of(case, dense.weight, case.ranks)
    rounding = 1e-9 * sum(tails) + 1e-14  # a Gram matrix knows squares to 1e-16 of the largest
    assert max(tails) - rounding <= layer.rel_error**2 <= sum(tails) + rounding


SLACK = {SVD: 1e-9, MPS: 0.01, Tucker: 1e-5, CP: 0.02}
"""How much the error may rise all the same: least squares in turns and greedy truncation are not optimal."""


@law(drawn(), st.floats(0, 1), st.floats(0, 1), examples=150)
def test_the_error_does_not_rise_where_all_bonds_grow(case, one, other):
    errors = []
    for fraction in sorted((one, other)):
        ranks = tuple(max(1, round(fraction * top)) for top in case.full)
        errors.append(case.layer(ranks=case.format.feasible(case.shape, ranks)).rel_error)
    assert errors[1] <= errors[0] * (1 + SLACK[type(case.format)]) + 1e-7


@law(drawn(families=TREES), st.data(), examples=250)
def test_the_error_does_not_rise_where_one_bond_grows(case, data):
    bond = data.draw(st.integers(0, len(case.full) - 1))
    more = data.draw(st.integers(case.ranks[bond], case.full[bond]))
    ranks = (*case.ranks[:bond], more, *case.ranks[bond + 1 :])
    assert (
        case.layer(ranks=ranks).rel_error <= case.layer().rel_error * (1 + SLACK[type(case.format)]) + 1e-12
    )


def with_kernel_of(case: Drawn, layer: TNConv) -> nn.Module:
    dense = case.dense()
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    return dense


@law(drawn(families=TREES), examples=200)
def test_a_kernel_of_low_rank_is_exact_at_its_rank(case):
    dense = with_kernel_of(case, case.random_layer())
    layer = TNConv.from_dense(dense, case.format, case.ranks)
    assert layer.rel_error <= 1e-12
    assert gap(layer(case.input()), dense(case.input())) <= 1e-11


@law(drawn(families=("cp",)), examples=40)
def test_a_sum_of_few_products_is_found_again(case):
    case = replace(case, asked=(min(2, *case.full),))
    layer = TNConv.from_dense(with_kernel_of(case, case.random_layer()), case.format, case.asked)
    assert layer.rel_error <= 0.05


def stack(case: Drawn, factor: torch.Tensor) -> torch.Tensor:
    """Return a factor with its axis of groups, also where there is but one."""
    return factor.detach() if case.groups > 1 else factor.detach()[None]


@law(drawn(families=TREES), examples=150)
def test_factors_of_the_kernel_that_factors_make_are_the_same_up_to_signs(case):
    """Both sides of a bond are turned to its principal directions, so rotations are no freedom any more."""
    first = case.layer()
    second = TNConv.from_dense(with_kernel_of(case, first), case.format, case.ranks)
    assert second.rel_error <= 1e-12
    assert gap(second.weight, first.weight) <= 1e-10
    for cut in cuts_of(case.format, case.shape):
        for one, other in zip(*(kernels_of(case, layer.weight) for layer in (first, second)), strict=True):
            assert_close(singular(one, cut), singular(other, cut), rtol=1e-9, atol=1e-10)
    network = case.format.network(case.shape)
    for legs, *factors in zip(network, first.tensors(), second.tensors(), strict=True):
        for mode in (mode for mode, leg in enumerate(legs, start=1) if leg.startswith("r")):
            spectra = [torch.linalg.svdvals(stack(case, f).movedim(mode, 1).flatten(2)) for f in factors]
            assert_close(*spectra, rtol=1e-6, atol=1e-8)


@law(drawn(families=TREES), examples=150)
def test_bonds_are_split_evenly_over_their_two_sides(case):
    layer, network = case.layer(), case.format.network(case.shape)
    for bond in (f"r{i}" for i in range(len(case.asked))):
        for factors in zip(*(stack(case, factor) for factor in layer.tensors()), strict=True):
            sides = side_of(case.format, case.shape, bond)
            left, right = (gram(network, factors, side, bond) for side in sides)
            assert_close(left, right, rtol=1e-8, atol=1e-9)


@law(drawn(), st.sampled_from((-1.0, 1e-6, 3.0, 1e8)), examples=100)
def test_a_scaled_kernel_has_the_same_error_and_a_scaled_output(case, scale):
    dense, x = case.dense(), case.input()
    dense.bias = None
    layer = TNConv.from_dense(dense, case.format, case.asked)
    with torch.no_grad():
        dense.weight.mul_(scale)
    scaled = TNConv.from_dense(dense, case.format, case.asked)
    if isinstance(case.format, CP):  # a sign is enough to lead least squares to another minimum
        assert scaled.rel_error == pytest.approx(layer.rel_error, rel=0.2, abs=1e-2)
    else:
        assert scaled.rel_error == pytest.approx(layer.rel_error, rel=1e-5, abs=1e-12)
        assert gap(scaled(x), scale * layer(x)) <= 1e-8
