"""Repair by least squares: never worse, exact where it can be, through any network, and it tells."""

import copy
import json
import sys

import pytest
import torch
from conftest import GEOMETRIES, every_format, every_format_and_geometry
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress import front_to_back, layer_solver
from tncompress.layer_solver import Partners, Solver, collect
from tncompress.layers import TNConv
from tncompress.running import channels_last, runs_channels_last

pytestmark = pytest.mark.usefixtures("quick_cp")


class Residual(nn.Module):
    """Residual, branching, grouped, depthwise, dilated and transposed layers, with BatchNorm and without."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.left, self.right = nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.norm(self.a(x))))
        x = torch.relu(torch.cat([self.left(x), self.right(x)], 1))
        x = torch.relu(self.up(self.depth(x)))
        return self.head(x.mean((2, 3)))


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 6, 3, stride=2), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def images(*sizes):
    return [torch.randn(size, 3, 8, 8, dtype=torch.float64) + 0.5 for size in sizes]


def compressed(dense, format, ratio=0.4):
    spec = {
        "default": {"format": format, "rank": {"params_ratio": ratio}},
        "keep_dense": [],
        "include": ["depthwise"],
    }
    return tnc.compress(dense, tnc.Spec.parse(spec))


def errors(report):
    return {layer.name: layer for layer in report.layers if layer.error_before is not None}


@every_format_and_geometry
def test_a_layer_whose_last_factor_is_solved_for_is_never_worse(format, geometry):
    never_worse(format, geometry, "last")


@every_format
@pytest.mark.parametrize("geometry", ["2d-grouped", "2d-transposed"])
def test_a_layer_whose_factors_are_all_solved_for_is_never_worse(format, geometry):
    never_worse(format, GEOMETRIES[geometry], "all")


def never_worse(format, geometry, factors):
    """On the inputs of another network, and against the slow error: outputs of the layer itself."""
    dense = geometry.layer()
    shape = geometry.kernel_shape
    ranks = format.feasible(shape, tuple(max(1, rank // 2) for rank in format.max_ranks(shape)))
    layer = TNConv.from_dense(dense, format, ranks)
    xs = [geometry.input() for _ in range(3)]
    outputs = [dense(x).detach() for x in xs]
    inputs = [x + 0.3 * torch.randn_like(x) for x in xs]

    def missing():
        return sum(float((layer(x) - y).square().sum()) for x, y in zip(inputs, outputs, strict=True))

    with torch.no_grad():
        before = missing()
        found = Solver(factors=factors).solve(Partners("it", layer, dense), inputs, outputs)
        assert missing() <= before * (1 + 1e-9)
        assert found.error_after <= found.error_before * (1 + 1e-9)
        total = torch.cat([y.movedim(y.ndim - 1 - layer.geometry.ndim, -1).flatten(0, -2)
                           if y.ndim > 1 else y[None] for y in outputs])  # fmt: skip
        spread = float((total - total.mean(0)).square().sum())
        assert found.error_after == pytest.approx((missing() / spread) ** 0.5, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("geometry", ["2d", "2d-grouped", "2d-transposed", "linear", "1d-same-even-circular"])
def test_full_ranks_and_exact_inputs_give_the_dense_outputs(geometry):
    """Whatever the last factor was: a kernel that is off comes back, as far as the data tell."""
    geometry, format = GEOMETRIES[geometry], tnc.MPS()
    dense = geometry.layer()
    layer = TNConv.from_dense(dense, format, format.max_ranks(geometry.kernel_shape))
    x = torch.randn(40, *geometry.input_shape[1:], dtype=torch.float64)
    with torch.no_grad():
        layer.factors[-1].normal_()
        Solver(ridge=1e-9).solve(Partners("it", layer, dense), [x], [dense(x)])
        assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
        assert_close(layer.weight, dense.weight, rtol=1e-4, atol=1e-4)
    assert layer.rel_error == pytest.approx(0, abs=1e-4)


def test_few_patches_leave_a_layer_near_the_dense_one():
    dense = nn.Conv2d(16, 8, 3).double()
    layer = TNConv.from_dense(dense, tnc.SVD(), (8,))
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        Solver().solve(Partners("it", layer, dense), [x], [dense(x) + 0.1 * torch.randn(1, 8, 2, 2).double()])
    assert layer.weight.isfinite().all()
    assert float((layer.weight - dense.weight).detach().norm() / dense.weight.detach().norm()) < 0.3


@pytest.mark.parametrize("format", ["svd", "tucker", "mps", "cp"])
@pytest.mark.parametrize(("make", "factors"), [(chain, "all"), (Residual, "last")])
def test_no_layer_of_a_network_is_worse_afterwards(make, format, factors):
    dense = make().double().eval()
    small = compressed(dense, format)
    mended = tnc.repair(small, dense, images(6, 10), least_squares=factors)
    found = errors(mended.tncompress_repair)
    assert len(found) >= 4
    for layer in found.values():
        assert layer.error_after <= layer.error_before * (1 + 1e-6), layer
        assert layer.images == 16
    first = mended.tncompress_repair.steps[0]
    assert first.error_after < first.error_before


def weighed_error(small, dense, xs, calibration):
    """Return E[e' G e] of the first layer's output error e, where both networks have the same inputs."""
    with torch.no_grad():
        gap = (small[0](torch.cat(xs)) - dense[0](torch.cat(xs))).movedim(1, -1).flatten(0, -2)
    return float(((gap @ calibration.layers["0"].gradient[0]) * gap).sum(1).mean())


@pytest.mark.parametrize("format", ["svd", "tucker", "mps"])
def test_gradients_make_small_what_the_loss_feels(format):
    dense, xs = chain().double().eval(), images(24, 40)
    dense[3].running_mean.normal_()
    small = compressed(dense, format, ratio=0.25)
    moments = tnc.calibrate(dense, xs, gradients="teacher", gradient_batches=2)
    options = {"batchnorm": False, "classifier": False, "ridge": 1e-6}
    plain = tnc.repair(small, dense, xs, **options)
    weighed = tnc.repair(small, dense, xs, calibration=moments, **options)
    assert weighed.tncompress_repair.layers[0].reason is None  # what was fitted is taken
    assert weighed_error(weighed, dense, xs, moments) < weighed_error(plain, dense, xs, moments)


def test_equal_weights_for_all_outputs_change_nothing():
    dense, xs = chain().double().eval(), images(24, 40)
    small = compressed(dense, "tucker")
    moments = tnc.calibrate(dense, xs, gradients="teacher")
    for layer in moments.layers.values():
        layer.gradient.copy_(torch.eye(layer.gradient.shape[-1]))
    plain = tnc.repair(small, dense, xs).state_dict()
    for name, found in tnc.repair(small, dense, xs, calibration=moments).state_dict().items():
        assert_close(found, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_calibration_without_gradients_or_of_other_weights_is_refused():
    dense, xs = chain().double().eval(), images(24)
    small = compressed(dense, "svd")
    with pytest.raises(ValueError, match=r'this one has none: calibrate\(..., gradients="teacher"\)'):
        tnc.repair(small, dense, xs, calibration=tnc.calibrate(dense, xs))
    other = tnc.calibrate(chain().double().eval(), xs, gradients="teacher")
    with pytest.raises(ValueError, match="the moments are of other weights of layer '0'"):
        tnc.repair(small, dense, xs, calibration=other)


def test_it_is_the_slow_loop_of_a_whole_pass_for_each_layer():
    dense, xs = Residual().double().eval(), images(40, 88)
    small = compressed(dense, "svd")
    fast = tnc.repair(small, dense, xs, batchnorm=False, classifier=False)
    slow = copy.deepcopy(small).to(memory_format=torch.channels_last)
    dense = dense.to(memory_format=torch.channels_last)  # in which repair runs them: sums are in one order
    norms = {"a": (slow.norm, dense.norm)}
    for name in ("stem", "a", "b", "left", "right", "depth", "up", "head"):
        layer, partner = slow.get_submodule(name), dense.get_submodule(name)
        if not isinstance(layer, TNConv):
            continue
        taken, wanted = [], []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, taken=taken: taken.append(args[0])),
            partner.register_forward_hook(lambda _, args, y, wanted=wanted: wanted.append(y)),
        ]
        with torch.no_grad():
            for x in xs:
                slow(x), dense(x)
            for hook in hooks:
                hook.remove()
            pair = Partners(name, layer, partner, *norms.get(name, ()))
            Solver(batchnorm=False).solve(pair, taken, wanted)
    for (name, found), wanted in zip(fast.state_dict().items(), slow.state_dict().values(), strict=True):
        assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=name)


class Viewing(nn.Module):
    """Views channels and lines as one, which memory with channels last does not let it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).view(len(x), -1))


def test_layouts_come_out_as_they_were_and_a_model_that_takes_one_only_keeps_it(monkeypatch):
    seen = []
    module = sys.modules[tnc.repair.__module__]
    monkeypatch.setattr(module, "channels_last", lambda *_, on: seen.append(on) or channels_last(*_, on=on))
    x = torch.randn(16, 3, 6, 6, dtype=torch.float64)
    for dense in (Viewing().double().eval(), Residual().double().eval()):
        x = x if isinstance(dense, Viewing) else torch.cat(images(16))
        assert runs_channels_last(dense, x) is isinstance(dense, Residual)
        small = compressed(dense, "tucker")
        before = [p.stride() for model in (dense, small) for p in model.parameters()]
        memory = [p.data_ptr() for p in dense.parameters()]
        mended = tnc.repair(small, dense, [x])
        assert [p.stride() for model in (dense, mended) for p in model.parameters()] == before
        assert [p.data_ptr() for p in dense.parameters()] == memory
        assert seen.pop() is isinstance(dense, Residual)


@pytest.mark.parametrize("sizes", [(7, 17), (1,) * 24])
def test_batches_may_be_cut_as_one_likes(sizes):
    dense, x = Residual().double().eval(), torch.cat(images(24))
    small = compressed(dense, "svd")
    whole = tnc.repair(small, dense, x.split(12))
    parts = tnc.repair(small, dense, x.split(sizes))
    assert_close(parts(x), whole(x), rtol=1e-5, atol=1e-6)


def test_small_batches_of_one_shape_are_joined():
    xs = [*images(*[1] * 40), torch.randn(3, 3, 9, 9), torch.randn(64, 3, 9, 9), torch.randn(1, 3, 9, 9)]
    found = list(front_to_back._joined(xs))
    assert [len(x) for x in found] == [32, 8, 3, 64, 1]
    assert_close(torch.cat(found[:2]), torch.cat(xs[:40]))
    assert list(front_to_back._joined([])) == []


def test_of_many_pixels_each_image_gives_some_whatever_the_batches(monkeypatch):
    monkeypatch.setattr(layer_solver, "PATCHES_PER_INPUT", 2)
    monkeypatch.setattr(layer_solver, "LEAST_PATCHES", 1)
    layer = nn.Conv2d(3, 5, 3, padding=1).double()
    geometry, x = tnc.ConvGeometry.of(layer), torch.cat(images(20))
    y = layer(x).detach()
    seen, held = collect(geometry, [x], [y])
    assert seen.count + held.count == 20 * 3  # 2 x 27 patches of 20 images
    assert held.count == 2 * 3
    again, _ = collect(geometry, x.split(3), y.split(3))
    assert_close(again.moments()[0], seen.moments()[0])
    exact = geometry.kernels(layer.weight.detach()).flatten(2)
    assert seen.squared_error(exact, layer.bias.detach()[None]) < 1e-12


def test_means_are_the_dense_ones_by_bias_or_by_batchnorm():
    dense, xs = chain().double().eval(), images(16)
    with torch.no_grad():
        dense[3].running_mean.normal_()
    small = compressed(dense, "svd", 0.2)
    mended = tnc.repair(small, dense, xs, batchnorm=False)
    for index in (0, 3, 5):  # a bias, a BatchNorm behind a layer without, a bias
        found, wanted = mended[: index + 1](xs[0]), dense[: index + 1](xs[0])
        assert_close(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_without_bias_and_batchnorm_neither_changes():
    dense = chain().double().eval()
    small = compressed(dense, "svd", 0.2)
    mended = tnc.repair(small, dense, images(16), bias=False, batchnorm=False)
    assert torch.equal(mended[0].bias, small[0].bias)
    assert torch.equal(mended[3].running_mean, small[3].running_mean)
    for layer in errors(mended.tncompress_repair).values():
        assert layer.error_after <= layer.error_before * (1 + 1e-6)


def test_a_layer_called_twice_or_never_is_named_and_left():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3)
            self.once = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.once(self.twice(torch.relu(self.twice(x))))

    dense = Net().double().eval()
    small = compressed(dense, "svd")
    mended = tnc.repair(small, dense, images(9))
    found = {layer.name: layer for layer in mended.tncompress_repair.layers}
    assert found["twice"].reason == "the model calls it 2 times in a pass"
    assert found["never"].reason == "the model never calls it"
    assert found["once"].reason is None
    assert found["once"].images == 9
    assert torch.equal(mended.twice.factors[0], small.twice.factors[0])
    assert not torch.equal(mended.twice.bias, small.twice.bias)  # which the bias correction sees to
    assert "2 times" in str(mended.tncompress_repair)


def test_the_memory_limit_bounds_the_images():
    dense = chain().double().eval()
    small = compressed(dense, "svd")
    limit = 2_000_000
    few = tnc.repair(small, dense, images(*[8] * 40), memory_limit=limit).tncompress_repair
    assert 8 < max(layer.images for layer in few.layers if layer.name != "7") < 320
    with pytest.raises(ValueError, match="does not hold the activations of one image"):
        tnc.repair(small, dense, images(8), memory_limit=10_000)


def test_layers_whose_moments_are_too_large_get_their_means_alone():
    dense = nn.Sequential(nn.Linear(300, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    small = compressed(dense, "svd", 0.5)
    x = torch.randn(20, 300, dtype=torch.float64) + 1
    mended = tnc.repair(small, dense, [x], memory_limit=3_000_000, batchnorm=False)
    found = mended.tncompress_repair.layers[0]
    assert "too much for the memory limit" in found.reason
    assert_close(mended[0](x).mean(0), dense[0](x).mean(0))
    assert torch.equal(mended[0].factors[0], small[0].factors[0])


def test_the_classifier_is_solved_for_where_it_stayed_dense():
    dense, xs = Residual().double().eval(), images(64)
    small = tnc.compress(dense, {"default": {"format": "svd", "rank": {"params_ratio": 0.15}}})
    assert isinstance(small.head, nn.Linear)
    plain = tnc.repair(small, dense, xs, classifier=False)
    mended = tnc.repair(small, dense, xs, classifier=True)
    assert not torch.equal(mended.head.weight, small.head.weight)
    assert torch.equal(plain.head.weight, small.head.weight)
    assert float((mended(xs[0]) - dense(xs[0])).norm()) < float((plain(xs[0]) - dense(xs[0])).norm())


def test_a_report_prints_and_is_plain_data():
    dense = chain().double().eval()
    report = tnc.repair(compressed(dense, "mps"), dense, images(16), classifier=True).tncompress_repair
    plain = json.loads(json.dumps(report.to_dict()))
    assert [step["name"] for step in plain["steps"]] == ["least squares", "BatchNorm", "classifier"]
    assert plain["images"] == 16
    assert all(step["kl_before"] >= 0 for step in plain["steps"])
    text = str(report)
    assert "least squares" in text
    assert "distance to the dense outputs, 16 images" in text


def test_outputs_that_are_no_tensor_are_not_measured():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return {"features": self.conv(x)}

    dense = Named().double().eval()
    report = tnc.repair(compressed(dense, "svd"), dense, images(8)).tncompress_repair
    assert report.steps[0].error_after is None
    assert report.layers[0].error_after <= report.layers[0].error_before
    assert "-" in str(report)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (lambda: [], "at least one batch"),
        (lambda: [*images(4), images(1)[0] * torch.nan], "batch 1 of the calibration inputs"),
        (lambda: [torch.randn(4, 5, 8, 8).double()], r"does not take calibration inputs \(4, 5, 8, 8\)"),
    ],
)  # fmt: skip
def test_bad_batches_are_one_clear_line(batches, said):
    dense = chain().double().eval()
    small = compressed(dense, "svd")
    with pytest.raises(ValueError, match=said) as caught:
        tnc.repair(small, dense, batches())
    assert "\n" not in str(caught.value)


def test_a_model_that_was_not_made_from_dense_is_refused():
    small = compressed(chain().double(), "svd")
    with pytest.raises(ValueError, match="small was not made from dense: that has no layer '0'"):
        tnc.repair(small, Residual().double(), images(4))
    other = chain().double()
    other[2] = nn.Conv2d(8, 12, 5)
    with pytest.raises(ValueError, match="small was not made from dense: layer '2' is"):
        tnc.repair(small, other, images(4))


@pytest.mark.parametrize(("option", "value"), [("least_squares", "both"), ("ridge", -1.0)])
def test_wrong_options_are_refused(unchecked, option, value):
    dense = chain().double()
    with pytest.raises(ValueError, match=f"{option} is"):
        tnc.repair(compressed(dense, "svd"), dense, images(4), **{option: value})


def test_models_that_take_long_are_repaired_on_the_first_images(monkeypatch):
    module = sys.modules["tncompress.repair"]
    monkeypatch.setattr(module, "PASS_MACS", 1)
    monkeypatch.setattr(module, "FEWEST", 20)
    dense, xs = chain().double().eval(), images(32)
    small = compressed(dense, "mps")
    few = tnc.repair(small, dense, xs)
    assert {layer.images for layer in few.tncompress_repair.layers} == {20}
    same = tnc.repair(small, dense, [torch.cat(list(xs))[:20]])
    assert_close(few(xs[0]), same(xs[0]))
