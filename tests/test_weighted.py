"""The norm of the output: what a fit in it promises, against the slow obvious answer."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import FORMATS, every_format_and_shape, every_tree_and_shape
from test_formats import ranks_at
from torch.testing import assert_close

from tncompress import CP, MPS, SVD, Entropy, ParamsRatio, RelError, Settings, Tucker
from tncompress.formats import Format
from tncompress.metric import Metric, roots
from tncompress.ranks import choose
from tncompress.weighted import WeightedKernels, fit_in_metric, whiten

pytestmark = pytest.mark.usefixtures("quick_cp")

SHAPE = (6, 7, 3, 3)
PATCH = SHAPE[1:]


def patches(count, patch=PATCH, groups=1, rank=None):
    """Correlated patches ``(groups, count, d)``, of directions that number ``rank``."""
    d = math.prod(patch)
    mix = torch.randn(groups, rank or d, d, dtype=torch.float64) * torch.logspace(0, -1.5, d).double()
    return torch.randn(groups, count, rank or d, dtype=torch.float64) @ mix


def metric_of(x, patch=PATCH):
    return Metric(patch, x.mT @ x / x.shape[1])


def kernel_of(shape=SHAPE, groups=1):
    return torch.randn(groups, *shape, dtype=torch.float64)


def rebuilt(format, fit, kernels):
    dense = format.to_dense(fit.factors, tuple(kernels.shape[1:]))
    return dense if len(kernels) > 1 else dense[None]


def output_error(x, kernels, found):
    """The relative error of the outputs, patch by patch."""
    wrong = x @ (kernels - found).flatten(2).mT
    return float(wrong.norm() / (x @ kernels.flatten(2).mT).norm())


# --- the metric ---------------------------------------------------------------------------------------------


def product_metric(patch=PATCH, groups=2):
    channels, window = patches(50, patch[:1], groups), patches(50, patch[1:], groups)
    return Metric(patch, None, channels.mT @ channels, window.mT @ window)


def whole_of(metric):
    kron = [torch.kron(a, b) for a, b in zip(metric.channels, metric.window, strict=True)]
    return Metric(metric.patch, torch.stack(kron))


def test_the_norm_is_that_of_the_outputs():
    x, kernels = patches(40, groups=2), kernel_of(groups=2)
    outputs = x @ kernels.flatten(2).mT
    assert_close(metric_of(x).squared_norm(kernels), outputs.square().mean(1).sum(1))


@pytest.mark.parametrize("modes", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_a_marginal_is_the_trace_over_the_other_legs(modes):
    x = patches(40, groups=2)
    rest = [mode for mode in range(3) if mode not in modes]
    split = x.unflatten(2, PATCH).permute(0, 1, *(2 + mode for mode in (*rest, *modes)))
    rows = split.reshape(2, -1, math.prod(PATCH[mode] for mode in modes))
    assert_close(metric_of(x).marginal(modes), rows.mT @ rows / 40)


@pytest.mark.parametrize("modes", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_a_product_of_moments_is_the_kronecker_product(modes):
    metric, kernels = product_metric(), kernel_of(groups=2)
    whole = whole_of(metric)
    assert_close(metric.times(kernels), whole.times(kernels))
    assert_close(metric.marginal(modes), whole.marginal(modes))


def test_roots_are_roots_and_leave_out_what_is_not_there():
    moments = metric_of(patches(20, rank=9)).whole
    root, inverse = roots(moments)
    assert_close(root @ root, moments)
    projector = root @ inverse
    assert_close(projector @ projector, projector)
    assert round(float(projector.diagonal(dim1=1, dim2=2).sum())) == 9


def test_moments_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"whole moments of patches \(7, 3, 3\) are \(groups, 63, 63\), got"):
        Metric(PATCH, torch.eye(62)[None])
    with pytest.raises(ValueError, match="given whole, or as channels and window"):
        Metric(PATCH, channels=torch.eye(7)[None])


# --- fits ---------------------------------------------------------------------------------------------------


@every_format_and_shape
def test_a_fit_in_the_metric_is_no_worse_than_the_plain_one_and_says_how_good(format: Format, shape):
    x = patches(5 * math.prod(shape[1:]), shape[1:], groups=2)
    kernels, metric = kernel_of(shape, groups=2), metric_of(x, shape[1:])
    ranks = ranks_at(format, shape, 0.4)
    fit, plain = fit_in_metric(format, kernels, ranks, metric), format.fit_groups(kernels, ranks)
    assert_close(
        fit.output_error, output_error(x, kernels, rebuilt(format, fit, kernels)), rtol=1e-9, atol=1e-9
    )
    assert fit.output_error <= 1.001 * output_error(x, kernels, rebuilt(format, plain, kernels)) + 1e-7
    assert_close(fit.rel_error, float((rebuilt(format, fit, kernels) - kernels).norm() / kernels.norm()))
    assert fit.loss == fit.output_error


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 3.0])
@pytest.mark.parametrize("kind", ["whole", "tiny", "product", "gradient"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_draft_says_how_good_it_is(format: Format, kind, ridge):
    kernels, product = kernel_of(groups=2), product_metric()
    whole = metric_of(patches(300, groups=2)) if kind != "product" else whole_of(product)
    if kind == "tiny":
        whole = Metric(PATCH, whole.whole * 1e-30)
    rows = patches(9, (6,), groups=2)
    metric = product if kind == "product" else replace(whole, gradient=rows.mT @ rows)
    metric = metric if kind == "gradient" else replace(metric, gradient=None)
    fit = fit_in_metric(format, kernels, ranks_at(format, SHAPE, 0.4), metric, ridge=ridge, draft=True)
    lost, total = (
        float(whole.squared_norm(k).sum()) for k in (kernels - rebuilt(format, fit, kernels), kernels)
    )
    assert_close(fit.output_error, math.sqrt(lost / total), rtol=1e-7, atol=1e-9)
    assert fit.output_error > 1e-3


@pytest.mark.parametrize("draft", [True, False])
def test_fits_at_one_rank_after_another_are_those_made_apart(draft):
    kernels, metric = kernel_of(), metric_of(patches(300))
    weighted = WeightedKernels(kernels, metric, ridge=1e-2)
    for format in (Tucker(), MPS(), Tucker(), SVD("in|rest")):
        for ratio in (0.2, 0.5):
            ranks = ranks_at(format, SHAPE, ratio)
            apart = fit_in_metric(format, kernels, ranks, metric, ridge=1e-2, draft=draft)
            fit = weighted.fit(format, ranks, draft=draft)
            assert all(map(torch.equal, fit.factors, apart.factors))
            assert (fit.rel_error, fit.output_error) == (apart.rel_error, apart.output_error)


@every_tree_and_shape
def test_at_full_ranks_the_fit_is_exact(format: Format, shape):
    """CP's largest rank is exact by slices, which whitening turns: it is left out."""
    x = patches(5 * math.prod(shape[1:]), shape[1:])
    kernels = kernel_of(shape)
    fit = fit_in_metric(format, kernels, format.max_ranks(shape), metric_of(x, shape[1:]))
    assert fit.output_error < 1e-9
    assert fit.rel_error < 1e-7


@pytest.mark.parametrize("scale", [1e-60, 1e60])
@pytest.mark.parametrize("format", [SVD("in|rest"), Tucker(), MPS(), CP()], ids=str)
def test_the_scale_of_the_moments_makes_no_difference(format, scale):
    """Nor does float32, in which the steps of conjugate gradients are for a kernel in float32."""
    kernels, metric = kernel_of().float(), metric_of(patches(400))
    ranks = ranks_at(format, SHAPE, 0.4)
    fit = fit_in_metric(format, kernels, ranks, metric)
    scaled = fit_in_metric(format, kernels, ranks, Metric(PATCH, metric.whole * scale))
    assert scaled.output_error == pytest.approx(fit.output_error, rel=1e-4)
    fine = fit_in_metric(format, kernels.double(), ranks, metric)
    assert fit.output_error == pytest.approx(fine.output_error, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("directions", [None, 20], ids=["full", "rank-deficient"])
def test_out_rest_is_response_pca_and_the_whitened_svd(rank, directions):
    """The closed form: project the outputs on their leading principal directions (Zhang et al. 2016)."""
    x, kernels = patches(200, rank=directions), kernel_of()
    metric = metric_of(x)
    fit = fit_in_metric(SVD(), kernels, (rank,), metric)
    w = kernels[0].flatten(1)
    values, vectors = torch.linalg.eigh(w @ metric.whole[0] @ w.mT)
    top = vectors[:, -rank:]
    assert_close(
        x @ rebuilt(SVD(), fit, kernels)[0].flatten(1).mT, x @ (top @ top.mT @ w).mT, atol=1e-7, rtol=1e-6
    )
    whitened = torch.linalg.svdvals(whiten(SVD(), kernels, metric)[0].flatten(1))
    for tail in (values[:-rank].sum(), whitened[rank:].square().sum()):
        assert_close(fit.output_error**2 * values.sum(), tail.clamp_min(0))


@pytest.mark.parametrize("name", ["svd", "svd-separable", "mps", "tucker", "cp"])
def test_rank_deficient_moments_stay_finite_and_a_ridge_keeps_the_kernel(name):
    """Where the data say nothing, the ridge keeps the factors near the kernel."""
    format, kernels = FORMATS[name], kernel_of()
    metric = metric_of(patches(10))
    ranks = ranks_at(format, SHAPE, 0.5)
    errors = [
        fit_in_metric(format, kernels, ranks, metric, ridge=ridge).rel_error for ridge in (0.0, 1e-2, 1e3)
    ]
    assert all(map(math.isfinite, errors))
    plain = format.fit_groups(kernels, ranks).rel_error
    assert errors[2] == pytest.approx(plain, rel=2e-2, abs=2e-3)
    assert errors[1] <= errors[0] + 1e-3


def test_sweeps_never_raise_the_error_and_do_lower_it():
    kernels, metric = kernel_of(), metric_of(patches(300))
    for format in (MPS(), Tucker(), CP(), SVD("out kw|in kh")):
        ranks = ranks_at(format, SHAPE, 0.4)
        errors = [fit_in_metric(format, kernels, ranks, metric, sweeps=n).output_error for n in (0, 1, 2, 6)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.999 * errors[0]


def test_the_last_factor_alone_is_least_squares():
    x, kernels, format = patches(300), kernel_of(), Tucker()
    start = format.fit_groups(kernels, (4, 3)).factors
    fit = fit_in_metric(format, kernels, (4, 3), metric_of(x), start=start, last_only=True)
    assert_close(list(fit.factors[:2]), list(start[:2]))
    features = x[0] @ torch.einsum("rckl,ci->rikl", start[1], start[0]).flatten(1).mT
    wanted = torch.linalg.lstsq(features, x[0] @ kernels[0].flatten(1).mT).solution
    assert_close(fit.factors[2].flatten(1).mT, wanted, atol=1e-8, rtol=1e-6)


def test_a_start_is_improved_upon():
    kernels, metric = kernel_of(), metric_of(patches(300))
    poor = [torch.randn_like(factor) for factor in MPS().fit(kernels[0], (3, 6, 4)).factors]
    first = fit_in_metric(MPS(), kernels, (3, 6, 4), metric, start=poor, sweeps=1)
    again = fit_in_metric(MPS(), kernels, (3, 6, 4), metric, start=first.factors, sweeps=30)
    assert again.output_error < first.output_error


def test_gradients_weigh_the_outputs():
    """The two-sided fit is the best in tr(G D C D'): for one cut, the SVD whitened on both sides."""
    kernels, metric = kernel_of(), metric_of(patches(300))
    g = metric_of(patches(80, SHAPE[:1]), SHAPE[:1]).whole
    sided = fit_in_metric(SVD(), kernels, (3,), replace(metric, gradient=g))
    one = fit_in_metric(SVD(), kernels, (3,), metric)

    steadied = g[0] + 1e-3 * g[0].diagonal().mean() * torch.eye(6).double()

    def weighted(fit):
        d = (kernels - rebuilt(SVD(), fit, kernels))[0].flatten(1)
        return float((steadied @ d @ metric.whole[0] @ d.mT).trace())

    s = torch.linalg.svdvals(roots(steadied[None])[0][0] @ whiten(SVD(), kernels, metric)[0].flatten(1))
    assert weighted(sided) < weighted(one)
    assert weighted(sided) == pytest.approx(float(s[3:].square().sum()), rel=1e-6)


def test_half_precision_says_the_error_of_the_rounded_factors():
    x, kernels = patches(300), kernel_of().bfloat16()
    fit = fit_in_metric(Tucker(), kernels, (7, 6), metric_of(x))
    assert fit.factors[0].dtype == torch.bfloat16
    found = Tucker().to_dense([f.double() for f in fit.factors], SHAPE)[None]
    assert fit.output_error == pytest.approx(output_error(x, kernels.double(), found))
    assert fit.output_error > 1e-4


# --- policies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["svd", "svd-separable", "mps", "tucker", "cp"])
def test_policies_go_by_the_output(name):
    x, kernels = patches(300), kernel_of((8, 10, 3, 3))
    x = patches(300, (10, 3, 3))
    metric, format = metric_of(x, (10, 3, 3)), FORMATS[name]
    limit = math.inf
    ranks, fit = choose(kernels, Settings(format=format, rank=RelError(0.3)), limit=limit, metric=metric)
    assert fit.output_error <= 0.3
    plain, _ = choose(kernels, Settings(format=format, rank=RelError(0.3)), limit=limit)
    assert format.num_params((8, 10, 3, 3), ranks) < format.num_params((8, 10, 3, 3), plain)
    settings = Settings(format=format, rank=ParamsRatio(0.4))
    ranks, fit = choose(kernels, settings, limit=limit, metric=metric)
    assert format.num_params((8, 10, 3, 3), ranks) <= 0.4 * 720
    blind, _ = choose(kernels, settings, limit=limit)
    assert fit.output_error <= 1.02 * fit_in_metric(format, kernels, blind, metric, ridge=1e-2).output_error
    ranks, _ = choose(kernels, Settings(format=format, rank=Entropy()), limit=limit, metric=metric)
    blind, _ = choose(kernels, Settings(format=format, rank=Entropy()), limit=limit)
    assert sum(ranks) <= sum(blind)
