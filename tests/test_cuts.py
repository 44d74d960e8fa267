import math
from itertools import chain

import numpy
import pytest
import torch
from conftest import every_geometry
from torch.testing import assert_close

from tncompress.cuts import (
    Cut,
    all_cuts,
    effective_rank,
    entropy,
    legs_of,
    parse_legs,
    rel_error,
    spectrum,
    truncate,
)
from tncompress.linalg import tail_energies

SHAPES = {2: (6, 5), 3: (4, 5, 3), 4: (4, 5, 3, 2), 5: (3, 4, 2, 3, 2)}
every_ndim = pytest.mark.parametrize("ndim", SHAPES)
every_cut = pytest.mark.parametrize(
    "cut", [cut for ndim in SHAPES for cut in all_cuts(ndim)], ids=lambda cut: str(cut).replace(" ", ".")
)


def kernel_for(cut, dtype=torch.float64):
    return torch.randn(SHAPES[len(cut.left) + len(cut.right)], dtype=dtype)


def rank_across(kernel, cut):
    """The slow way: move the legs with einsum's letters, count singular values."""
    left, right = cut.modes(kernel.ndim)
    letters = "abcde"[: kernel.ndim]
    target = "".join(letters[mode] for mode in (*left, *right))
    rows = math.prod(kernel.shape[mode] for mode in left)
    return int(torch.linalg.matrix_rank(torch.einsum(f"{letters}->{target}", kernel).reshape(rows, -1)))


def full_rank(kernel, cut):
    sides = [math.prod(kernel.shape[mode] for mode in side) for side in cut.modes(kernel.ndim)]
    return min(sides)


def product_kernel(rank, shape):
    """A sum of ``rank`` random product terms."""
    letters = "abcde"[: len(shape)]
    factors = [torch.randn(rank, size, dtype=torch.float64) for size in shape]
    return torch.einsum(",".join("r" + letter for letter in letters) + "->" + letters, *factors)


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ndim", "count"), [(2, 1), (3, 3), (4, 7), (5, 15)])
def test_all_cuts_are_the_bipartitions_each_once(ndim, count):
    cuts = [frozenset(map(frozenset, cut.modes(ndim))) for cut in all_cuts(ndim)]
    assert len(cuts) == len(set(cuts)) == count
    for sides in cuts:
        assert sorted(chain(*sides)) == list(range(ndim))


@every_cut
def test_a_cut_is_what_it_prints(cut):
    assert Cut.parse(str(cut)) == cut


@pytest.mark.parametrize(
    ("text", "ndim", "modes"),
    [
        ("out|rest", 4, ((0,), (1, 2, 3))),
        ("rest|out", 4, ((1, 2, 3), (0,))),
        ("kw out|kh,in", 4, ((0, 3), (1, 2))),
        ("out kw|in kh", 3, ((0, 2), (1,))),
        ("out kw|in kh", 2, ((0,), (1,))),
        ("in|rest", 5, ((1,), (0, 2, 3, 4))),
    ],
)
def test_modes_are_the_numbers_of_the_legs(text, ndim, modes):
    assert Cut.parse(text).modes(ndim) == modes


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("out", "a cut is written 'legs|legs'"),
        ("out|in|kh", "a cut is written"),
        ("out|", "a cut is written"),
        (" |in", "a cut is written"),
        ("out|wide", "unknown leg 'wide'"),
        ("out out|in", "named twice"),
        ("out in|in kh", "both sides"),
        ("rest|rest", "both sides"),
        ("out|in rest", "'rest' stands alone"),
    ],
)
def test_a_cut_that_is_none_is_an_error(text, match):
    with pytest.raises(ValueError, match=match):
        Cut.parse(text)


@pytest.mark.parametrize(
    ("text", "ndim", "match"),
    [
        ("out|in", 4, "does not place leg kh"),
        ("out kw|in kh", 5, "does not place leg kd"),
        ("kw|rest", 2, "leaves one side"),
        ("out in|rest", 2, "leaves one side"),
    ],
)
def test_a_cut_that_a_kernel_cannot_have_is_an_error(text, ndim, match):
    with pytest.raises(ValueError, match=match):
        Cut.parse(text).modes(ndim)


@pytest.mark.parametrize("ndim", [0, 1, 6])
def test_a_kernel_has_two_to_five_legs(ndim):
    with pytest.raises(ValueError, match="a kernel has 2 to 5 modes"):
        legs_of(ndim)


def test_legs_are_separated_by_commas_or_spaces():
    assert parse_legs("out, kh  kw") == parse_legs("out kh kw") == ("out", "kh", "kw")


# --- spectra and truncation ---------------------------------------------------------------------------------


@every_cut
def test_the_discarded_weight_is_the_squared_error(cut):
    kernel = kernel_for(cut)
    s = spectrum(kernel, cut)
    assert len(s) == full_rank(kernel, cut)
    assert_close(s.square().sum(), kernel.square().sum())
    for rank in range(1, len(s) + 1):
        error = (kernel - truncate(kernel, cut, rank)).square().sum()
        assert_close(error, s[rank:].square().sum(), rtol=1e-10, atol=1e-12)
        assert_close(error, tail_energies(s)[rank], rtol=1e-10, atol=1e-12)
        assert rel_error(s, rank) == pytest.approx(math.sqrt(error / kernel.square().sum()), abs=1e-12)


@every_cut
def test_truncation_gives_the_rank_and_a_second_one_nothing_new(cut):
    kernel = kernel_for(cut)
    for rank in range(1, full_rank(kernel, cut)):
        once = truncate(kernel, cut, rank)
        assert rank_across(once, cut) == rank
        assert_close(truncate(once, cut, rank), once, rtol=0, atol=1e-13)


@every_cut
def test_truncation_to_the_full_rank_is_the_kernel(cut):
    kernel = kernel_for(cut)
    assert_close(truncate(kernel, cut, full_rank(kernel, cut)), kernel, rtol=0, atol=1e-13)


@every_geometry
def test_no_random_kernel_of_the_rank_is_nearer(geometry):
    kernel = torch.randn(geometry.kernel_shape, dtype=torch.float64)
    for cut in all_cuts(kernel.ndim):
        rank = max(1, full_rank(kernel, cut) // 2)
        best = (kernel - truncate(kernel, cut, rank)).norm()
        for _ in range(5):
            other = truncate(kernel + 0.1 * torch.randn_like(kernel), cut, rank)
            assert (kernel - other).norm() >= best * (1 - 1e-12)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("in|rest", "out|rest"),
        ("in kh|out kw", "in|rest"),
        ("out|rest", "out in|kh kw"),
        ("kh|rest", "in kh|rest"),
    ],
)
@pytest.mark.parametrize("ranks", [(2, 2), (3, 2), (1, 3)], ids=str)
def test_nested_cuts_add_exactly_and_keep_their_ranks(inner, outer, ranks):
    kernel = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    cuts = Cut.parse(inner), Cut.parse(outer)
    first = truncate(kernel, cuts[0], ranks[0])
    both = truncate(first, cuts[1], ranks[1])
    discarded = (kernel - first).square().sum() + (first - both).square().sum()
    assert_close((kernel - both).square().sum(), discarded, rtol=1e-12, atol=0)
    assert tuple(rank_across(both, cut) for cut in cuts) == ranks


def test_crossing_cuts_restore_each_others_rank():
    kernel = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    cuts = Cut.parse("out kh|in kw"), Cut.parse("out in|kh kw")
    first = truncate(kernel, cuts[0], 2)
    both = truncate(first, cuts[1], 2)
    assert rank_across(both, cuts[1]) == 2
    assert rank_across(both, cuts[0]) > 2


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_the_cut_cannot_have_is_an_error(rank):
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 6\].*got {rank}"):
        truncate(torch.randn(6, 4, 3), Cut.parse("out|rest"), rank)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_truncation_keeps_dtype_and_leaves_its_input_alone(dtype):
    kernel = torch.randn(6, 5, 3, 3).to(dtype)
    before = kernel.clone()
    small = truncate(kernel, Cut.parse("in|rest"), 2)
    assert small.dtype == dtype
    assert small.shape == kernel.shape
    assert small.is_contiguous()
    assert torch.equal(kernel, before)


# --- entropy ------------------------------------------------------------------------------------------------


@every_cut
def test_a_product_kernel_has_no_entropy(cut):
    s = spectrum(product_kernel(1, kernel_for(cut).shape), cut)
    assert entropy(s) == pytest.approx(0, abs=1e-12)
    assert effective_rank(s) == pytest.approx(1)


@every_cut
def test_a_maximally_correlated_kernel_has_the_logarithm_of_its_rank(cut):
    kernel = kernel_for(cut)
    left, right = cut.modes(kernel.ndim)
    order = (*left, *right)
    rows = math.prod(kernel.shape[mode] for mode in left)
    matrix = torch.eye(rows, kernel.numel() // rows, dtype=torch.float64)
    folded = matrix.reshape([kernel.shape[mode] for mode in order])
    kernel = folded.permute([order.index(mode) for mode in range(kernel.ndim)])
    rank = full_rank(kernel, cut)
    assert entropy(spectrum(kernel, cut)) == pytest.approx(math.log(rank))
    assert effective_rank(spectrum(kernel, cut)) == pytest.approx(rank)


@every_cut
def test_entropy_does_not_depend_on_scale_and_is_bounded_by_the_rank(cut):
    kernel = kernel_for(cut)
    s = spectrum(kernel, cut)
    p = (s.square() / s.square().sum()).tolist()
    assert entropy(s) == pytest.approx(-sum(x * math.log(x) for x in p))
    assert entropy(spectrum(1e-3 * kernel, cut)) == pytest.approx(entropy(s))
    assert 1 < effective_rank(s) < len(s)


@every_cut
def test_a_cut_may_be_given_as_its_text(cut):
    kernel = kernel_for(cut)
    assert torch.equal(spectrum(kernel, str(cut)), spectrum(kernel, cut))
    assert torch.equal(truncate(kernel, str(cut), 1), truncate(kernel, cut, 1))
    assert spectrum(kernel, cut).norm() == pytest.approx(kernel.norm().item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: spectrum(torch.ones(2, 2), ("out", "in")),
            r"such as 'out\|rest' .* got a tuple",
        ),
        (lambda: truncate(torch.ones(2, 2), 1, 1), "a cut is a text such as .* got a int"),
        (
            lambda: spectrum(numpy.ones((2, 2)), "out|in"),
            r"a kernel as a tensor .* ndarray: torch\.",
        ),
        (lambda: truncate(numpy.ones((2, 2)), "out|in", 1), "a kernel as a tensor of torch, got a ndarray"),
        (lambda: entropy(numpy.ones(3)), "singular values as a tensor of torch, got a ndarray"),
        (lambda: effective_rank([1.0, 2.0]), "singular values as a tensor of torch, got a list"),
    ],
)
def test_what_is_no_cut_and_no_tensor_is_refused_with_what_would_do(call, message, unchecked):
    with pytest.raises(TypeError, match=message):
        call()


@every_ndim
def test_terms_of_a_sum_of_products_bound_the_rank_of_every_cut(ndim):
    for rank in (1, 2, 3):
        kernel = product_kernel(rank, SHAPES[ndim])
        for cut in all_cuts(ndim):
            assert rank_across(kernel, cut) == min(rank, full_rank(kernel, cut))
            assert rel_error(spectrum(kernel, cut), min(rank, full_rank(kernel, cut))) < 1e-7


@every_cut
def test_a_zero_kernel_has_no_error_and_no_entropy(cut):
    kernel = torch.zeros_like(kernel_for(cut))
    s = spectrum(kernel, cut)
    assert s.tolist() == [0] * len(s)
    assert (entropy(s), rel_error(s, 1), effective_rank(s)) == (0, 0, 1)
    assert torch.equal(truncate(kernel, cut, 1), kernel)
