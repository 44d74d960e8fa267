"""Identities of the atlas, against explicit truncations and float64 SVDs; controls; the norm of outputs."""

import copy
import math

import pytest
import torch
from conftest import GEOMETRIES, SHAPES, every_geometry
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress import cuts, kernel_spectra, linalg
from tncompress.cuts import Cut, all_cuts
from tncompress.kernel_spectra import control, output_spectra, short_name, spectra
from tncompress.linalg import unfold
from tncompress.metric import Metric

LARGE = {"square": (96, 96, 3, 3), "wide": (24, 200, 5, 5), "1x1": (160, 300, 1, 1), "line": (40, 64, 1, 7)}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


def slow(kernels, cut):
    """The joint singular values, by full SVDs in float64."""
    values = [torch.linalg.svdvals(unfold(k.double(), cut.modes(k.ndim)[0])) for k in kernels]
    return torch.stack(values).square().sum(0).sqrt()


def check(kernels, precision=linalg.JOINT_PRECISION):
    found = spectra(kernels)
    assert list(found) == [short_name(cut) for cut in all_cuts(kernels.ndim - 1)]
    for cut in all_cuts(kernels.ndim - 1):
        wanted = slow(kernels, cut)
        made = vector(found[short_name(cut)])
        assert_close(made, wanted, rtol=0, atol=precision * float(kernels.double().norm()))
        assert bool((made[:-1] >= made[1:]).all())


def row_of(kernel, cut, groups=1):
    """The row of one kernel, in a model of its own."""
    conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[kernel.ndim]
    layer = conv(kernel.shape[1], kernel.shape[0], kernel.shape[2:], dtype=kernel.dtype)
    layer.weight.data.copy_(kernel)
    (row,) = tnc.atlas(nn.Sequential(layer)).select(cut=cut)
    return row


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- spectra ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE.values()], ids=str)
def test_spectra_are_those_of_full_svds_in_float64(shape, dtype):
    check(random(1, *shape).to(dtype), 1e-12 if dtype == torch.float64 else linalg.JOINT_PRECISION)


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 1, 3, 2), (1, 1, 3, 3)], ids=str)
def test_groups_have_one_spectrum_together(shape):
    check(random(5, *shape).float())
    check(random(5, *shape), 1e-12)
    joint, format = random(5, *shape), tnc.SVD()
    if shape[0] > 1:
        (wanted,) = format.spectra_of_groups(joint)
        assert_close(vector(spectra(joint)["out|rest"]), wanted)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_scale_is_too_large_or_too_small(scale, dtype):
    check((random(1, 12, 10, 3, 3) * scale).to(dtype))


def test_the_ends_of_float64_are_no_trouble():
    for scale in (1e-250, 1e250):
        found, plain = spectra(random(1, 6, 5, 3, 3) * scale), spectra(random(1, 6, 5, 3, 3))
        for cut, s in found.items():
            assert_close(vector(s) / scale, vector(plain[cut]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3])
def test_values_that_are_zero_are_seen_to_be(rank, dtype):
    kernel = torch.einsum("or,ri->oi", random(20, rank, seed=1), random(rank, 90, seed=2))
    kernel = kernel.reshape(1, 20, 10, 3, 3).to(dtype)
    check(kernel)
    row = row_of(kernel[0], "out|rest")
    assert row.rank_for(1e-5) == rank
    assert row.rel_error(rank) < (1e-6 if dtype == torch.float32 else 1e-14)


def test_a_kernel_of_zeros_has_no_entropy_and_rank_one():
    row = row_of(torch.zeros(4, 3, 3, 3), "out|rest")
    assert (row.norm, row.entropy, row.effective_rank, row.rank_for(0.1), row.rel_error(2)) == (0, 0, 1, 1, 0)


def test_alike_matrices_are_decomposed_once(monkeypatch):
    calls = []
    whole = linalg.joint_singular_values

    def counted(matrices, **options):
        calls.append(matrices.shape)
        return whole(matrices, **options)

    monkeypatch.setattr(kernel_spectra, "joint_singular_values", counted)
    for shape, different in {(8, 6, 1, 1): 2, (8, 6, 1, 3): 4, (8, 6, 3, 3): 7, (8, 1, 3, 3): 4}.items():
        calls.clear()
        spectra(random(1, *shape))
        assert len(calls) == different, shape


# --- identities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if len(s) > 2], ids=str)
def test_the_discarded_weight_is_the_squared_loss_of_an_explicit_truncation(shape):
    kernel = random(*shape)
    for cut in all_cuts(len(shape)):
        row = row_of(kernel, cut)
        for rank in range(1, row.full + 1):
            loss = (kernel - cuts.truncate(kernel, cut, rank)).norm() / kernel.norm()
            assert float(row.tails[rank]) == pytest.approx(float(loss) ** 2, abs=1e-12)
            assert row.rel_error(rank) == pytest.approx(float(loss), abs=1e-7)


@pytest.mark.parametrize(("first", "second"), [("out|rest", "out in|kh kw"), ("kw|rest", "out in kh|kw")])
def test_discarded_weights_of_nested_cuts_add(first, second):
    kernel = random(9, 8, 3, 4)
    once = cuts.truncate(kernel, Cut.parse(first), 2)
    twice = cuts.truncate(once, Cut.parse(second), 2)
    lost = float((kernel - twice).norm() / kernel.norm()) ** 2
    a, b = row_of(kernel, first).tails[2], row_of(once, second).tails[2]
    assert lost == pytest.approx(a + (1 - a) * b, abs=1e-13)
    assert row_of(twice, first).rank_for(1e-7) <= 2


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_cp_of_some_rank_bounds_the_rank_across_every_cut(rank):
    factors = [random(size, rank, seed=size) for size in (11, 9, 5, 4)]
    kernel = torch.einsum("or,ir,hr,wr->oihw", *factors)
    for cut in all_cuts(4):
        assert row_of(kernel, cut).rank_for(1e-9) <= rank
    assert max(row_of(kernel, cut).rank_for(1e-9) for cut in all_cuts(4)) == rank


def test_a_product_across_a_cut_has_no_entropy_and_a_maximally_correlated_kernel_the_most():
    product = torch.einsum("oh,iw->oihw", random(5, 3, seed=1), random(6, 4, seed=2))
    row = row_of(product, "out kh|in kw")
    assert row.entropy == pytest.approx(0, abs=1e-12)
    assert row_of(product, "out|rest").entropy > 0.1
    for rank in (1, 3, 6):
        left, right = (torch.linalg.qr(random(18, rank, seed=s)).Q for s in (1, 2))
        kernel = (left @ right.mT).reshape(6, 3, 6, 3).permute(0, 2, 1, 3).contiguous()
        row = row_of(kernel, "out kh|in kw")
        assert row.entropy == pytest.approx(math.log(rank), abs=1e-9)
        assert row.effective_rank == pytest.approx(rank)


def test_what_rows_say_follows_from_the_definitions():
    row = tnc.CutRow("a", 1, "out|rest", "trained", "norm", (4, 2, 3, 3), 1, (2.0, 1.0, 1.0, 0.0))
    assert (row.sides, row.full, row.norm) == ((4, 18), 4, pytest.approx(6**0.5))
    assert [row.rank_for(loss) for loss in (0, 0.4, 0.41, 0.57, 0.58, 0.99)] == [3, 3, 2, 2, 1, 1]
    assert row.params_ratio(2) == pytest.approx(2 * 22 / 72)
    assert row.loss_at_rank(0.25) == row.loss_at_rank(0.01) == row.rel_error(1)
    assert row.loss_at_rank(0.251) == row.rel_error(2)
    assert (row.loss_at_params(22 / 72), row.loss_at_params(0.3)) == (row.rel_error(1), None)
    assert row.loss_at_params(1.0) == row.rel_error(3)
    assert row.relative_entropy == pytest.approx(cuts.entropy(torch.tensor(row.spectrum)) / math.log(4))
    for call, words in (
        (lambda: row.rel_error(5), r"the rank across out\|rest is 0 to 4, got 5"),
        (lambda: row.rank_for(1.0), "from 0 to below 1, got 1.0"),
        (lambda: tnc.CutRow("a", 1, "out|rest", "trained", "norm", (4, 2, 3, 3), 1, (1.0,)), "4 singular"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# --- models -------------------------------------------------------------------------------------------------


@every_geometry
def test_every_layer_is_read_and_left_as_it_was(geometry):
    layer = geometry.layer(torch.float32)
    model = nn.Sequential(layer, layer).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = tnc.atlas(model, linear=True, include=("depthwise",), controls=("random", "shuffled"), seed=3)
    assert found.layers == ("0",)  # a module under two names is one layer
    kernels = tnc.ConvGeometry.of(layer).kernels(layer.weight.detach())
    for row in found.select(kernel="trained"):
        assert (row.shape, row.groups) == (geometry.kernel_shape, len(kernels))
        assert_close(vector(row.spectrum), slow(kernels, Cut.parse(row.cut)), rtol=0, atol=1e-6)
        assert row.norm == pytest.approx(float(layer.weight.detach().norm()), rel=1e-5)
    for row in found.select(kernel="shuffled"):
        assert row.norm == pytest.approx(float(layer.weight.detach().norm()), rel=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "name", ["2d", "2d-grouped", "2d-transposed", "1d", "3d", "linear", "2d-transposed-grouped"]
)
def test_the_random_control_is_what_torch_begins_with(name):
    layer = GEOMETRIES[name].layer(torch.float32)
    geometry, drawn = tnc.ConvGeometry.of(layer), []
    original = nn.init.kaiming_uniform_

    def watched(tensor, *args, generator=None, **options):
        drawn.append(generator.initial_seed())
        return original(tensor, *args, generator=generator, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.init, "kaiming_uniform_", watched)
        made = control("random", layer.weight, geometry, 5, name)
    torch.manual_seed(drawn[0])
    assert torch.equal(made, geometry.build_dense(bias=False).weight)


def test_controls_go_by_seed_and_layer():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, groups=2))
    weight, geometry = model[1].weight.detach(), tnc.ConvGeometry.of(model[1])
    for kind in ("random", "shuffled"):
        made = [control(kind, weight, geometry, seed, name) for seed, name in ((0, "a"), (0, "b"), (1, "a"))]
        assert torch.equal(made[0], control(kind, weight, geometry, 0, "a"))
        assert not torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])
    for own, other in zip(
        weight.chunk(2), control("shuffled", weight, geometry, 0, "a").chunk(2), strict=True
    ):
        assert torch.equal(own.flatten().sort().values, other.flatten().sort().values)
    one, two = (tnc.atlas(model, controls="random", seed=seed) for seed in (0, 1))
    assert one == tnc.atlas(model, controls=("random",), seed=0)
    assert one.select(kernel="trained") == two.select(kernel="trained")
    assert one.select(kernel="random") != two.select(kernel="random")


def test_what_cannot_be_read_is_listed_with_the_reason():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3)
    )
    model[1].weight.data[0, 0, 0, 0] = math.nan
    model[3].to("meta")
    found = tnc.atlas(model)
    assert (found.layers, len(found.rows)) == (("0",), 7)
    reasons = {skip.name: skip.reason for skip in found.skipped}
    assert reasons["1"] == "its weight holds NaN or infinity"
    assert "depthwise" in reasons["2"]
    assert "meta" in reasons["3"]
    assert all(reason in str(found) and reason in found.to_markdown() for reason in reasons.values())
    assert tnc.atlas(model, include=("depthwise",)).layers == ("0", "2")


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.Sequential(nn.Linear(3, 4)), {}, "no convolution .*linear=True"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, device="meta")), {}, "no layer .* layer '0': .*meta device"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), {}, "layer '0' is lazy"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3)),
            {"controls": ("trained",)},
            "unknown control 'trained'.*shuffled",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {"losses": (0.1, 1.0)}, "between 0 and 1, got 1.0"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {"include": ("all",)}, "include"),
        (nn.DataParallel(nn.Conv2d(3, 4, 3)), {}, "wrapped by DataParallel"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_wrong_input_is_one_clear_line(model, options, words):
    with pytest.raises(ValueError, match=words) as error:
        tnc.atlas(model, **options)
    assert "\n" not in str(error.value)


# --- the norm of the output ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_across_out_the_data_see_the_principal_components_of_the_outputs(bias):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(6, 9, (3, 2), bias=bias)
    )
    x = torch.randn(40, 4, 7, 8) + 0.5
    found = tnc.atlas(model.double(), calibration=[x[:16].double(), x[16:].double()])
    assert (found.metrics, found.images) == (("norm", "data"), 40)
    seen = x.double()
    for name, layer in (("0", model[0]), ("2", model[2])):
        seen = model[1](seen) if name == "2" else seen
        y = nn.functional.conv2d(seen, layer.weight, None, padding=layer.padding).transpose(0, 1).flatten(1)
        y = (y - y.mean(1, keepdim=True) if bias else y).detach() / math.sqrt(y.shape[1])
        (row,) = found.select(layer=name, cut="out|rest", metric="data")
        assert_close(vector(row.spectrum), torch.linalg.svdvals(y), rtol=1e-6, atol=1e-7)
        for other in found.select(layer=name, metric="data"):
            assert other.norm == pytest.approx(float(y.norm()), rel=1e-6)
        seen = layer(seen).detach()


def test_where_moments_are_a_product_every_cut_between_them_is_exact():
    inward, window = 5, 6
    a, b = (m @ m.mT for m in (random(inward, inward, seed=1), random(window, window, seed=2)))
    metric = Metric((inward, 3, 2), torch.kron(a, b)[None])
    split = Metric((inward, 3, 2), None, *((a * float(b.trace()))[None], (b / float(b.trace()))[None]))
    kernels = {"trained": random(1, 7, inward, 3, 2), "random": 1e-12 * random(1, 7, inward, 3, 2, seed=9)}
    values, vectors = torch.linalg.eigh(torch.kron(a, b))
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    for which in (metric, split):
        found = output_spectra(kernels, which)
        for kind, stack in kernels.items():
            whitened = (stack.flatten(2) @ root).reshape(stack.shape)
            for name in ("out|rest", "in|rest", "out in|kh kw"):
                wanted = slow(whitened, Cut.parse(name))
                made = vector(found[kind][name])
                assert_close(made / wanted[0], wanted / wanted[0], rtol=0, atol=1e-6)


def test_a_layer_without_moments_says_that_it_has_no_rows_of_data():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    moments = tnc.calibrate(model, [torch.randn(8, 3, 9, 9)])
    short = copy.copy(moments)
    object.__setattr__(short, "layers", {"0": moments.layers["0"]})
    found = tnc.atlas(model, calibration=short)
    assert {row.layer for row in found.select(metric="data")} == {"0"}
    assert [(skip.name, "no data-weighted rows" in skip.reason) for skip in found.skipped] == [("1", True)]
    model[0].weight.data += 1
    with pytest.raises(ValueError, match="layer '0'"):
        tnc.atlas(model, calibration=moments)
