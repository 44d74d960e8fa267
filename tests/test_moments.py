"""Calibration: the moments are those of all patches at once, however they come, and fits keep to them."""

import copy
import json
import math
import weakref

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import tncompress as tnc
from tests.conftest import GEOMETRIES, every_geometry
from tests.drawn import law
from tncompress.discovery import find_layers
from tncompress.geometry import ConvGeometry
from tncompress.metric import Metric
from tncompress.patches import patches
from tncompress.shifts import Shifts

DEPTHWISE = ("depthwise",)


def brute(x, geometry):
    """Mean and covariance of all patches of ``x``, in float64."""
    seen = patches(x.double(), geometry)
    mean = seen.mean(1)
    centred = seen - mean[:, None]
    return mean, centred.mT @ centred / seen.shape[1]


def small_net(norm=True, bias=False, dtype=torch.float64):
    """Two convolutions, the second with a follower or a bias or neither, and a classifier."""
    torch.manual_seed(1)
    middle = [nn.BatchNorm2d(12)] if norm else []
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding=1, bias=bias),
        *middle,
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).to(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def images(count=20, dtype=torch.float64):
    return torch.randn(count, 3, 9, 8, dtype=dtype) + 1


def inputs_and_outputs(model, x):
    """The input and the output of every module, by name."""
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda m, a, o, name=name: seen.update({name: (a[0].clone(), o.clone())})
        )
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


# --- the moments --------------------------------------------------------------------------------------------


@every_geometry
def test_moments_are_those_of_all_patches_at_once(geometry):
    layer, x = geometry.layer(), geometry.input() + 2
    made = tnc.calibrate(nn.Sequential(layer), [x, x + 1], include=DEPTHWISE)
    moments, form = made.layers["0"], ConvGeometry.of(layer)
    pooled = torch.cat([patches(x, form), patches(x + 1, form)], 1)
    assert moments.count == pooled.shape[1]
    assert_close(moments.mean.flatten(1), pooled.mean(1))
    centred = pooled - pooled.mean(1, keepdim=True)
    assert_close(moments.covariance, centred.mT @ centred / moments.count)
    assert moments.mean.shape == (form.groups, *form.kernel_shape[1:])


@law(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 99), st.booleans(), examples=30)
def test_the_split_into_batches_makes_no_difference(sizes, seed, single):
    """Also where the mean is a thousand times the spread, and batches differ in their means."""
    torch.manual_seed(seed)
    dtype = torch.float32 if single else torch.float64
    model = small_net(dtype=dtype)
    x = torch.randn(sum(sizes), 3, 6, 5, dtype=dtype) + 1000 + torch.arange(sum(sizes))[:, None, None, None]
    whole, parts = tnc.calibrate(model, [x]), tnc.calibrate(model, x.split(sizes))
    mean, covariance = brute(x, ConvGeometry.of(model[0]))
    for made in (whole, parts):
        moments = made.layers["0"]
        assert made.images == len(x)
        scale = covariance.abs().max()
        assert_close(moments.covariance / scale, covariance / scale, atol=1e-6, rtol=0)
        assert_close(moments.mean.flatten(1), mean, rtol=1e-7, atol=0)
    for name in ["0"] if single else whole.layers:  # the inputs of others are rounded by the batch
        one, other = whole.layers[name], parts.layers[name]
        scale = float(one.covariance.diagonal(dim1=1, dim2=2).max())
        assert_close(other.covariance, one.covariance, atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize("window", [(3, 3), (1, 3), (3, 1), (2, 4), (5, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("lines", [None, 7])
def test_squares_by_shifts_are_those_of_the_patches(window, dilation, groups, lines, monkeypatch):
    monkeypatch.setattr("tncompress.shifts.GAIN", 1e9)
    layer = nn.Conv2d(4, 6, window, dilation=dilation, padding=(1, 2), groups=groups)
    geometry, x = ConvGeometry.of(layer), torch.randn(3, 4, 19, 21, dtype=torch.float64)
    seen = patches(x, geometry).mT
    if lines is not None:  # of the first image
        seen = seen[..., : lines * geometry.output_length(21, 1)]
    shifts = Shifts.of(geometry, (19, 21), seen.shape[2], 2**30)
    assert_close(shifts.squares(seen), seen @ seen.mT)


@pytest.mark.parametrize(
    ("options", "pays"),
    [
        ({"padding": 1}, True),
        ({"padding": 1, "groups": 2}, True),
        ({"kernel_size": 5, "padding": 2, "padding_mode": "reflect"}, True),
        ({"stride": 2}, False),
        ({"kernel_size": 1}, False),
        ({"dilation": 9, "padding": 9}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [2**22, 2**32])
def test_moments_by_shifts_are_those_of_the_patches(options, pays, limit):
    """Far from zero, where an error in the means would show; few of the numbers fit at once, or all."""
    layer = nn.Conv2d(4, 6, **({"kernel_size": 3} | options))
    geometry, x = ConvGeometry.of(layer), torch.rand(6, 4, 26, 23) + 30
    count = math.prod(geometry.output_length(n, axis) for axis, n in enumerate((26, 23)))
    assert (Shifts.of(geometry, (26, 23), count, 2**30) is not None) is pays
    moments = tnc.calibrate(nn.Sequential(layer), x.split(4), memory_limit=limit).layers["0"]
    mean, covariance = brute(x, geometry)
    assert_close(moments.mean.flatten(1), mean, rtol=1e-6, atol=0)
    assert_close(moments.covariance, covariance, rtol=1e-4, atol=1e-5 * float(covariance.abs().max()))


def test_half_precision_is_summed_in_single():
    model, x = small_net(dtype=torch.bfloat16), images(dtype=torch.bfloat16)
    made = tnc.calibrate(model, [x]).layers["0"]
    mean, covariance = brute(x, ConvGeometry.of(model[0]))
    assert_close(made.covariance, covariance, rtol=1e-5, atol=1e-5)
    assert_close(made.mean.flatten(1), mean, rtol=1e-6, atol=1e-6)


def test_a_covariance_of_many_blocks_is_symmetric_and_whole():
    model = nn.Sequential(nn.Linear(700, 3).double())
    x = torch.randn(50, 700, dtype=torch.float64)
    covariance = tnc.calibrate(model, x.split(20)).layers["0"].covariance[0]
    assert_close(covariance, torch.cov(x.T, correction=0))
    assert torch.equal(covariance, covariance.T)


def test_a_shared_layer_pools_its_calls():
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False).double()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    made = tnc.calibrate(model, [x])
    form = ConvGeometry.of(layer)
    both = torch.cat([x, layer(x).relu().detach()])
    assert list(made.layers) == ["0"]
    assert_close(made.layers["0"].covariance, brute(both, form)[1])


def test_a_transposed_layer_called_with_an_output_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 3, stride=2).double()

        def forward(self, x):
            return self.up(x, output_size=(12, 12))

    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    made = tnc.calibrate(Net(), [x]).layers["up"]
    assert made.count == 2 * 12 * 12
    form = ConvGeometry.of(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1))
    assert_close(made.covariance, brute(x, form)[1])


def test_the_model_is_left_as_it_was():
    model = small_net().train()
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]

    def batches():
        yield images(4)
        raise KeyboardInterrupt

    for given, error in (([images(4)], None), (batches(), KeyboardInterrupt)):
        if error is None:
            tnc.calibrate(model, given, gradients="teacher")
        else:
            with pytest.raises(error):
                tnc.calibrate(model, given, gradients="teacher")
        assert [module.training for module in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert_close(model.state_dict(), before, rtol=0, atol=0)


# --- the memory limit ---------------------------------------------------------------------------------------


def test_separable_moments_are_the_partial_traces_and_exact_for_a_product():
    model = nn.Sequential(nn.Conv1d(3, 4, 2, stride=2).double())
    x = torch.randn(50, 3, 8, dtype=torch.float64)
    x[:, :, 1::2] = 0.5 * x[:, :, ::2] + 0.1 * x[:, :, 1::2]
    whole = tnc.calibrate(model, [x]).layers["0"]
    made = tnc.calibrate(model, [x], memory_limit=800)
    assert made.separable == ("0",)
    moments = made.layers["0"]
    split = whole.covariance.reshape(3, 2, 3, 2)
    total = float(whole.covariance[0].trace())
    assert_close(moments.channels[0], split.diagonal(dim1=1, dim2=3).sum(-1))
    assert_close(moments.window[0] * total, split.diagonal(dim1=0, dim2=2).sum(-1))
    uncentred, exact = moments.metric(centred=False), whole.metric(centred=False)
    assert_close(uncentred.marginal((0,)), exact.marginal((0,)))
    assert_close(uncentred.marginal((1,)), exact.marginal((1,)))
    a, b = (torch.randn(1, n, n, dtype=torch.float64) for n in (3, 2))
    a, b = a @ a.mT, b @ b.mT
    product = Metric((3, 2), torch.kron(a[0], b[0])[None])
    from tncompress.moments import product as parts

    found = parts(product.marginal((0,)), product.marginal((1,)))
    assert_close(torch.kron(found[0][0], found[1][0]), product.whole[0])


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made in the block held at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.alive[id(tensor)] = weakref.ref(tensor)
        storages = {}
        for key, ref in list(self.alive.items()):
            tensor = ref()
            if tensor is None:
                del self.alive[key]
            else:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(storages.values()))
        return out


@pytest.mark.parametrize("limit", [2**13, 2**16, 150_000, 2**18, 2**20, 2**22])
@pytest.mark.parametrize("side", [10, 32])  # of images small and large enough for shifts
def test_the_memory_limit_is_honoured(limit, side):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.Conv2d(12, 16, 3), nn.Conv2d(16, 6, 5), nn.Conv2d(6, 30, 1)
    )
    x = torch.randn(60 * 10**2 // side**2, 2, side, side)
    with Allocated() as plain, torch.no_grad():
        model(x)
    with Allocated() as measured:
        made = tnc.calibrate(model, [x])
    default = measured.peak - plain.peak
    with Allocated() as measured:
        made = tnc.calibrate(model, [x], memory_limit=limit)
    assert measured.peak - plain.peak <= limit
    assert made.num_bytes <= limit
    assert {*made.layers, *made.left_out} == {"0", "1", "2", "3"}
    if limit == 2**22:
        assert not made.separable
        assert default > 150_000  # what the smaller limits forbid
    if limit == 150_000:
        assert made.separable == ("1", "2")
        assert not made.left_out
    if limit == 2**13:
        assert made.left_out
    plan = tnc.make_plan(
        model, {"keep_dense": [], "default": {"format": "svd", "rank": {"fixed": 1}}}, calibration=made
    )
    for names in (made.left_out, made.separable):
        assert all(any(name in note for note in plan.notes) for name in names)


# --- BatchNorms that follow ---------------------------------------------------------------------------------


class Wired(nn.Module):
    def __init__(self, wiring):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


WIRINGS = {
    "direct": (lambda m, x: m.norm(m.one(x)), {"one": "norm"}),
    "two in a row": (lambda m, x: m.other(m.two(m.norm(m.one(x)))), {"one": "norm", "two": "other"}),
    "something between": (lambda m, x: m.norm(m.one(x).relu()), {}),
    "changed in place": (lambda m, x: m.norm(m.one(x).relu_()), {}),
    "a residual": (lambda m, x: m.norm(m.one(x) + x), {}),
    "another consumer": (lambda m, x: m.norm(y := m.one(x)) + y, {"one": "norm"}),
    "a norm of two layers": (lambda m, x: m.norm(m.one(x)) + m.norm(m.two(x)), {}),
    "two norms": (lambda m, x: m.norm(y := m.one(x)) + m.other(y), {}),
    "one call of two": (lambda m, x: m.norm(m.one(x)) + m.one(x), {}),
    "twice": (lambda m, x: m.norm(m.one(x)) + m.norm(m.one(-x)), {"one": "norm"}),
    "by name": (lambda m, x: m.norm(input=m.one(input=x)), {"one": "norm"}),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_the_norm_that_follows_a_layer_is_known_by_what_it_is_given(wiring):
    forward, wanted = WIRINGS[wiring]
    assert tnc.calibrate(Wired(forward), torch.randn(9, 3, 4, 4).split(3)).norms == wanted


def test_without_bias_or_norm_the_metric_is_about_zero():
    x = images()
    for norm, bias in ((True, False), (False, True), (False, False)):
        model = small_net(norm, bias)
        made = tnc.calibrate(model, [x])
        seen = patches(model[:2](x).detach(), ConvGeometry.of(model[2]))
        centred = seen - seen.mean(1, keepdim=True) if norm or bias else seen
        assert made.keeps_mean("2") is (norm or bias)
        assert_close(made.metric("2").whole, centred.mT @ centred / seen.shape[1])


# --- gradients ----------------------------------------------------------------------------------------------


def test_gradients_are_those_of_each_image_by_itself():
    model, x, y = small_net(), images(20), torch.arange(20) % 5
    made = tnc.calibrate(
        model, list(zip(x.split(6), y.split(6), strict=True)), gradients="labels", gradient_batches=3
    )
    wanted = torch.zeros(12, 12, dtype=torch.float64)
    for one, label in zip(x[:18], y[:18], strict=True):
        middle = model[2](model[:2](one[None])).detach().requires_grad_()
        loss = F.cross_entropy(model[3:](middle.clone()), label[None])
        rows = torch.autograd.grad(loss, middle)[0][0].flatten(1)
        wanted += rows @ rows.T / 18
    assert_close(made.layers["2"].gradient[0], wanted)
    teacher = [tnc.calibrate(model, x.split(n), gradients="teacher").layers["2"].gradient for n in (5, 20)]
    assert_close(*teacher)


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    made = tnc.calibrate(small_net(), [images()], gradients="teacher", memory_limit=80_000)
    made.save(tmp_path / "m.safetensors")
    return made, tmp_path / "m.safetensors"


def test_loaded_moments_equal_saved_ones(saved):
    made, path = saved
    loaded = tnc.Calibration.load(path)
    assert made.separable
    for field in ("images", "digests", "biased", "norms", "unreached", "left_out"):
        assert getattr(loaded, field) == getattr(made, field)
    assert list(loaded.layers) == list(made.layers)
    for name, moments in made.layers.items():
        assert loaded.layers[name].count == moments.count
        assert_close(loaded.layers[name].tensors(), moments.tensors(), rtol=0, atol=0)


def test_a_damaged_file_is_one_line(saved):
    _, path = saved
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"m\.safetensors") as error:
            tnc.Calibration.load(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        tnc.Calibration.load(path)


def test_a_foreign_file_is_one_line(tmp_path):
    tnc.save_weights(small_net(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds no moments"):
        tnc.Calibration.load(tmp_path / "w.safetensors")
    torch.save({}, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"is in truth a file of torch\.save"):
        tnc.Calibration.load(tmp_path / "p.safetensors")
    with pytest.raises(FileNotFoundError, match="no file of moments"):
        tnc.Calibration.load(tmp_path / "none.safetensors")


# --- plans and models ---------------------------------------------------------------------------------------


def spec(format, ratio=0.4, include=()):
    rank = {"params_ratio": ratio}
    return {
        "keep_dense": [],
        "include": include,
        "allow_larger": True,
        "default": {"format": format, "rank": rank},
    }


SOME = [
    "linear",
    "1d-even-stride-nobias",
    "2d",
    "2d-reflect",
    "2d-grouped",
    "2d-transposed",
    "3d-anisotropic",
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("format", ["svd", "mps", "tucker", "cp"])
@pytest.mark.parametrize("kind", SOME)
def test_mean_and_error_of_the_output_are_those_promised(kind, format, bias):
    """On the calibration data: the mean output is the dense one's, and the error is what the plan says."""
    layer, x = GEOMETRIES[kind].layer(), torch.cat([GEOMETRIES[kind].input() for _ in range(8)]) + 1
    if not bias:
        layer.bias = None
    model = nn.Sequential(layer)
    made = tnc.calibrate(model, x.split(5))
    plan = tnc.make_plan(model, spec(format, 0.6), calibration=made)
    small = tnc.compress(model, plan)
    with torch.no_grad():
        dense, out = model(x), small(x)
        channel = dense.ndim - 1 - ConvGeometry.of(layer).ndim
        rest = [axis for axis in range(dense.ndim) if axis != channel]
        if layer.bias is not None:
            assert_close(out.mean(rest), dense.mean(rest))
        about = dense.mean(rest, keepdim=True) if layer.bias is not None else 0
        error = float((out - dense).norm() / (dense - about).norm())
    (promised,) = plan.compressed
    assert promised.output_error > 1e-3
    assert error == pytest.approx(promised.output_error, rel=1e-6)
    plain = tnc.make_plan(model, spec(format, 0.6)).compressed[0]
    assert plain.output_error is None


@pytest.mark.parametrize("inplace", [False, True])
def test_the_norm_behind_a_layer_keeps_its_mean(inplace):
    model, x = small_net(), images(40)
    before = inputs_and_outputs(model, x)["3"][1].mean((0, 2, 3))
    running = model[3].running_mean.clone()
    made = tnc.calibrate(model, [x])
    rules = spec("svd") | {"keep_dense": ["0", "7"]}
    small = tnc.compress(model, rules, calibration=made, inplace=inplace)
    assert_close(inputs_and_outputs(small, x)["3"][1].mean((0, 2, 3)), before)
    assert (small is model) is inplace
    assert torch.equal(model[3].running_mean, running) is not inplace
    assert not torch.allclose(small[3].running_mean, running)


def test_the_error_of_one_cut_is_what_its_eigenvalues_discard():
    model, x = small_net(bias=True), images(40)
    made = tnc.calibrate(model, [x])
    weight, covariance = model[2].weight.detach().flatten(1), made.layers["2"].covariance[0]
    values = torch.linalg.eigvalsh(weight @ covariance @ weight.T)
    rules = spec("svd") | {"keep_dense": ["0", "7"], "default": {"format": "svd", "rank": {"fixed": 5}}}
    small = tnc.compress(model, rules, calibration=made)
    seen = inputs_and_outputs(model, x)["2"]
    error = (small[2](seen[0]) - seen[1]).detach().square().sum(1).mean()
    assert float(error) == pytest.approx(float(values[:-5].sum()), rel=1e-3)
    wanted = math.sqrt(float(values[:-5].sum() / values.sum()))
    assert small.tncompress_plan.compressed[0].output_error == pytest.approx(wanted, rel=1e-3)


def test_a_plan_gives_the_model_that_its_spec_gives(tmp_path):
    model, x = small_net(), images(40)
    batches = x.split(10)
    direct = tnc.compress(model, spec("mps"), calibration=batches)
    plan = tnc.make_plan(model, spec("mps"), calibration=batches)
    plan.save(tmp_path / "plan.json")
    loaded = tnc.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert "output error" in str(loaded)
    with pytest.raises(ValueError, match="made with calibration data: give it calibration"):
        tnc.compress(model, loaded)
    again = tnc.compress(model, loaded, calibration=tnc.calibrate(model, batches))
    for other in (tnc.compress(model, plan), again):
        assert_close(other.state_dict(), direct.state_dict(), rtol=0, atol=0)
        assert other.tncompress_plan == plan
    with pytest.raises(ValueError, match="was it made with other calibration data"):
        tnc.compress(model, loaded, calibration=[x.square()])


def test_old_plans_are_read_without_output_errors():
    fields = json.loads(json.dumps(tnc.make_plan(small_net(), spec("svd")).to_dict()))
    del fields["notes"]
    for layer in fields["compressed"]:
        del layer["output_error"]
    plan = tnc.Plan.from_dict(fields)
    assert plan.notes == ()
    assert "output error" not in str(plan)


def test_layers_that_are_never_reached_are_named():
    model = small_net()
    model.spare = nn.Linear(6, 6).double()
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    made = tnc.calibrate(model, [images()])
    assert made.unreached == ("spare",)
    plan = tnc.make_plan(model, spec("svd"), calibration=made)
    (note,) = plan.notes
    assert note == "planned by plain truncation, since the calibration data never reach them: spare"
    assert note in " ".join(str(plan).split())
    last = plan.compressed[-1]
    assert (last.name, last.output_error) == ("spare", None)


# --- what is no calibration data ----------------------------------------------------------------------------


def nan_at(index):
    x = images(9)
    x[index, 0, 0, 0] = math.nan
    return x.split(3)


class Bad(nn.Module):
    def forward(self, x):
        return (x - 2).log()


BATCHES = {
    "none": ([], "at least one batch"),
    "NaN": (lambda: nan_at(4), r"batch 2 of the calibration data holds NaN or infinity"),
    "infinity": (lambda: [images(2), images(2) / 0], r"batch 2 of the calibration data holds NaN"),
    "shape": (
        lambda: [images(2), torch.randn(2, 4, 9, 8).double()],
        r"can't be run on batch 2 \(2, 4, 9, 8\): .*expected input",
    ),
    "no tensor": (["a.png"], "batch 1 of the calibration data is a str: wanted a tensor"),
    "empty": (lambda: [images(2), images(0)], r"batch 2 of the calibration data is \(0, 3, 9, 8\)"),
    "dtype": (lambda: [images().float()], "can't be run on batch 1"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_bad_batches_are_one_line(kind):
    batches, words = BATCHES[kind]
    with pytest.raises(ValueError, match=words) as error:
        tnc.calibrate(small_net(), batches() if callable(batches) else batches)
    assert "\n" not in str(error.value)


def test_a_model_that_makes_nan_is_told_from_data_that_hold_them():
    model = small_net()
    model[1] = Bad()
    with pytest.raises(
        ValueError, match="input of layer '2' holds NaN or infinity in batch 1, itself finite"
    ):
        tnc.calibrate(model, [images()])


def test_misuse_is_one_line():
    model, x = small_net(), images()
    with pytest.raises(ValueError, match="'labels' wants batches"):
        tnc.calibrate(model, [x], gradients="labels")
    made = tnc.calibrate(model, [x])
    other = small_net()
    with torch.no_grad():
        other[2].weight += 1
    with pytest.raises(ValueError, match=r"of other weights of layer '2' with kernel \(12, 8, 3, 3\)"):
        tnc.make_plan(other, spec("svd"), calibration=made)
    with pytest.raises(ValueError, match="of another model: this one has no layer '2'"):
        tnc.compress(nn.Sequential(model[0], model[1]), spec("svd"), calibration=made)
    with pytest.raises(ValueError, match="on the meta device"):
        tnc.calibrate(copy.deepcopy(model).to("meta"), [x])


def test_every_layer_of_a_model_can_be_asked_for():
    made = tnc.calibrate(small_net(), [images()])
    assert {layer.name for layer in find_layers(small_net())} == set(made.layers)
    assert made.metric("none") is None
