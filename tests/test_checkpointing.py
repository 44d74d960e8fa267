"""Activations computed again in the backward pass: the same outputs and gradients, for less memory."""

import copy
import pickle

import pytest
import torch
from conftest import every_format_and_geometry
from test_contraction import layer_of, outputs_and_gradients
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import tncompress as tnc
from tncompress.layers import TNConv, checkpoint_activations_
from tncompress.measure import activation_bytes

pytestmark = pytest.mark.usefixtures("quick_cp")

FORMATS = {
    "svd": (tnc.SVD(), (12,)),
    "tucker": (tnc.Tucker(), (12, 12)),
    "mps": (tnc.MPS(), (12, 12, 12)),
    "cp": (tnc.CP(), (12,)),
}


@pytest.fixture(params=FORMATS)
def layer(request):
    format, ranks = FORMATS[request.param]
    return TNConv.from_dense(nn.Conv2d(16, 24, 3, padding=1), format, ranks)


def convolutions_of_a_step(layer, x):
    """Return how many convolutions a training step runs forwards."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.convolution.default
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        layer(x).sum().backward()
    return counter.count


@every_format_and_geometry
def test_outputs_and_gradients_stay_the_same_to_the_bit(format, geometry):
    layer, x = layer_of(format, geometry), geometry.input()
    for contraction in ("chain", "kernel"):
        layer.contract(contraction)
        wanted = outputs_and_gradients(checkpoint_activations_(layer, False), x)
        found = outputs_and_gradients(checkpoint_activations_(layer), x)
        assert layer.checkpointing
        for got, value in zip(found, wanted, strict=True):
            assert torch.equal(got, value)


def test_a_checkpointed_layer_keeps_what_the_dense_one_keeps(layer):
    x = torch.randn(2, 16, 10, 10)
    dense = activation_bytes(layer.to_dense(), x)
    assert dense == 4 * x.numel()
    assert activation_bytes(layer, x) >= dense + 4 * 2 * 12 * 100
    assert activation_bytes(checkpoint_activations_(layer), x) == dense


def test_merged_weights_are_computed_again_too(layer):
    x = torch.randn(2, 16, 10, 10)
    layer.contract("kernel")
    assert activation_bytes(layer, x) > 4 * x.numel()
    assert activation_bytes(checkpoint_activations_(layer), x) == 4 * x.numel()


def test_only_a_training_step_runs_more(layer):
    x, count = torch.randn(2, 16, 6, 6), len(layer.running)
    assert convolutions_of_a_step(layer, x) == count
    checkpoint_activations_(layer)
    assert count < convolutions_of_a_step(layer, x) < 2 * count  # the last one's output is not needed
    assert convolutions_of_a_step(layer.eval(), x) == count
    layer.train().requires_grad_(False)
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_copies_and_pickles_keep_it_and_files_do_not(layer, tmp_path):
    checkpoint_activations_(layer)
    assert "checkpointing" in repr(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.checkpointing
        x = torch.randn(2, 16, 6, 6)
        for got, value in zip(outputs_and_gradients(other, x), outputs_and_gradients(layer, x), strict=True):
            assert torch.equal(got, value)
    assert not [key for key in layer.state_dict() if "check" in key]
    model = tnc.compress(tnc.build_model("zoo:cnn4"), {"default": {"format": "svd"}})
    tnc.save(checkpoint_activations_(model), tmp_path / "saved", source={"source": "zoo:cnn4"})
    loaded = tnc.load(tmp_path / "saved")
    assert not any(m.checkpointing for m in loaded.modules() if isinstance(m, TNConv))
    checkpoint_activations_(model, False)
    assert not any(m.checkpointing for m in model.modules() if isinstance(m, TNConv))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_whole(layer, backend):
    torch.compiler.reset()
    x = torch.randn(2, 16, 6, 6)
    wanted = outputs_and_gradients(layer, x)
    compiled = torch.compile(checkpoint_activations_(layer), fullgraph=True, backend=backend)
    x = x.clone().requires_grad_()
    out = compiled(x)
    ramp = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    grads = torch.autograd.grad((out * ramp).sum() + out.square().sum(), [x, *layer.parameters()])
    for got, value in zip([out.detach(), *grads], wanted, strict=True):
        assert_close(got, value, rtol=1e-4, atol=1e-5)


def test_function_transforms_go_on_without_it(layer):
    checkpoint_activations_(layer)
    x, parameters = torch.randn(2, 16, 6, 6), dict(layer.named_parameters())

    def loss(values):
        return torch.func.functional_call(layer, values, (x,)).square().mean()

    found = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, value in parameters.items():
        assert_close(found[name], value.grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_gradients_stay(layer):
    x = torch.randn(1, 16, 4, 4)

    def second():
        (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), layer.factors[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(layer.factors))

    wanted = second()
    checkpoint_activations_(layer)
    for got, value in zip(second(), wanted, strict=True):
        assert_close(got, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


def test_a_model_without_compressed_layers_is_told_of():
    with pytest.raises(ValueError, match="compress it first"):
        checkpoint_activations_(nn.Sequential(nn.Conv2d(3, 4, 3)))


# --- how much is kept ---------------------------------------------------------------------------------------


def test_what_autograd_keeps_is_counted_once():
    x = torch.randn(3, 4, 5, 5)
    both = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    assert activation_bytes(both, x) == 4 * 75 * (4 + 8)  # ReLU's output is the second one's input
    in_place = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1))
    assert activation_bytes(in_place, x) == 4 * 75 * (4 + 8)
    assert activation_bytes(nn.Linear(5, 7), torch.randn(6, 5)) == 4 * 30
    frozen = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)).requires_grad_(False)
    assert activation_bytes(frozen, x) == 0
    assert activation_bytes(both.eval(), x) == 4 * 75 * (4 + 8)


def test_two_views_of_one_storage_are_counted_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(5, 7), nn.Linear(5, 7)

        def forward(self, x):
            return self.one(x[:3]) + self.other(x.view(x.shape)[3:])

    assert activation_bytes(Twice(), torch.randn(6, 5)) == 4 * 30


def test_it_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        assert activation_bytes(model, torch.randn(2, 3, 6, 6)) > 0
    assert not model[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- layout and mixed precision in training -----------------------------------------------------------------


def laid_out(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


class Layouts(TorchDispatchMode):
    """Notes whether every 4d input and output of a convolution is channels_last."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.seen += [("forward", laid_out(args[0]), laid_out(out), out.dtype)]
        elif func is torch.ops.aten.convolution_backward.default and out[0] is not None:
            self.seen += [("backward", laid_out(args[0]), laid_out(out[0]), out[0].dtype)]
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("moved", [False, True], ids=["factors-as-they-are", "factors-moved"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_channels_last_and_autocast_hold_through_the_chain(layer, dtype, moved, checkpointing):
    checkpoint_activations_(layer, checkpointing)
    layer = layer.to(memory_format=torch.channels_last) if moved else layer
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    with Layouts() as mode:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            out = layer(x)
        out.backward(torch.randn_like(out))
    assert {name for name, *_ in mode.seen} == {"forward", "backward"}
    for name, before, after, kind in mode.seen:
        assert before, name
        assert after, name
        assert kind == (dtype or torch.float32)
    assert laid_out(out)
    assert laid_out(x.grad)
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_is_near_to_full_precision(layer, checkpointing):
    checkpoint_activations_(layer, checkpointing)
    x = torch.randn(2, 16, 6, 6)
    wanted = outputs_and_gradients(layer, x)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(leaf)
    out = out.float()
    ramp = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    found = torch.autograd.grad((out * ramp).sum() + out.square().sum(), [leaf, *layer.parameters()])
    for got, value in zip([out.detach(), *found], wanted, strict=True):
        assert float((got - value).norm() / value.norm()) < 0.03
