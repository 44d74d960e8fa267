"""Passes in lockstep: the slow loop's tensors, one pass each, and nothing left behind."""

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tncompress.lockstep import in_lockstep
from tncompress.probe import probe


class Branching(nn.Module):
    """A residual connection, two branches that are joined again, a choice of Python's, a linear end."""

    def __init__(self, choosy=False):
        super().__init__()
        self.choosy = choosy
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.join = nn.Conv2d(10, 6, 3, padding=1, stride=2)
        self.head = nn.Linear(6, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        turned = self.choosy and float(x[0, 0, 0, 0]) > 0
        x = torch.relu(self.stem(x))
        if turned:
            right, left = self.right(x), self.left(x)
        else:
            left, right = self.left(x), self.right(x)
        x = self.join(torch.cat([x + left, right], 1)).relu_()
        return self.head(x.mean((2, 3)))


NAMES = ["stem", "left", "right", "join", "head"]


def models(**options):
    dense = Branching(**options).double().eval()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return small, dense


def batches(*sizes, offset=0.0):
    return [torch.randn(size, 3, 6, 6, dtype=torch.float64) + offset for size in sizes]


def layers_of(small, dense, names=NAMES):
    return {name: (small.get_submodule(name), dense.get_submodule(name)) for name in names}


def nudge(layer):
    """Change a layer in a way that depends on nothing but itself."""
    with torch.no_grad():
        layer.weight.mul_(0.5).add_(0.01)


def at_layer(model, name, xs, which):
    """Return the layer's inputs (0) or outputs (1) in whole forward passes: the slow obvious way."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, args, out: seen.append((args[0], out)[which].clone())
    )
    with torch.no_grad():
        for x in xs:
            model(x)
    hook.remove()
    return seen


@pytest.mark.parametrize("sizes", [(4,), (2, 3, 1), (1, 1, 1, 1)])
def test_tensors_are_those_of_one_whole_pass_for_each_layer(sizes):
    small, dense = models()
    slow = copy.deepcopy(small)
    xs, order = batches(*sizes), []

    def visit(name, inputs, outputs):
        order.append(name)
        for found, wanted in zip(inputs, at_layer(slow, name, xs, 0), strict=True):
            assert_close(found, wanted)
        for found, wanted in zip(outputs, at_layer(dense, name, xs, 1), strict=True):
            assert_close(found, wanted)
        nudge(small.get_submodule(name))
        nudge(slow.get_submodule(name))

    small.calls = dense.calls = 0
    in_lockstep(small, dense, layers_of(small, dense), xs, visit)
    assert order == NAMES
    assert small.calls == len(xs)


def test_one_pass_over_the_data_in_all():
    small, dense = models()
    in_lockstep(small, dense, layers_of(small, dense), batches(2, 2), lambda *_: None)
    assert (small.calls, dense.calls) == (2, 2)


def test_where_batches_go_different_ways_a_layer_is_solved_on_those_that_are_there():
    """The right branch comes first for the first batch, which is not at the left one when that is solved."""
    small, dense = models(choosy=True)
    xs, seen = batches(2, 3, 4), {}
    for x, first in zip(xs, (1.0, -1.0, -1.0), strict=True):
        x[0, 0, 0, 0] = first

    def visit(name, inputs, outputs):
        seen[name] = [len(x) for x in inputs]
        for found, wanted in zip(outputs, at_layer(dense, name, xs, 1)[-len(outputs) :], strict=True):
            assert_close(found, wanted)

    in_lockstep(small, dense, layers_of(small, dense), xs, visit)
    everything = [2, 3, 4]
    assert seen == {"stem": everything, "left": [3, 4]} | dict.fromkeys(["right", "join", "head"], everything)


def test_branches_that_the_dense_model_takes_in_another_order_are_kept_for_later():
    small, dense = models()
    dense.forward = partial(_turned, dense)
    xs, order = batches(2, 1), []

    def visit(name, inputs, outputs):
        order.append(name)
        for found, wanted in zip(outputs, at_layer(dense, name, xs, 1), strict=True):
            assert_close(found, wanted)

    in_lockstep(small, dense, layers_of(small, dense), xs, visit)
    assert order == NAMES


def _turned(self, x):
    x = torch.relu(self.stem(x))
    right, left = self.right(x), self.left(x)
    return self.head(self.join(torch.cat([x + left, right], 1)).relu_().mean((2, 3)))


def test_layers_out_of_reach_are_not_visited():
    small, dense = models()
    small.spare, dense.spare = nn.Linear(2, 2), nn.Linear(2, 2)
    seen = []
    layers = layers_of(small, dense, ["spare", *NAMES])
    in_lockstep(small, dense, layers, batches(2), lambda name, *_: seen.append(name))
    assert seen == NAMES


def counted():
    return [thread for thread in threading.enumerate() if thread.is_alive()]


def clean(*models):
    return not any(m._forward_hooks or m._forward_pre_hooks for model in models for m in model.modules())


class Broken(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if len(x) == 1:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("of the model"), KeyboardInterrupt("by the user")])
@pytest.mark.parametrize("where", ["small", "dense", "visit"])
def test_an_error_leaves_no_thread_and_no_hook(error, where):
    small, dense = models()
    before, modes = counted(), [m.train(m is small).training for m in (small, dense)]
    if where != "visit":
        target = {"small": small, "dense": dense}[where]
        target.right = nn.Sequential(target.right, Broken(error))
    names = [name for name in NAMES if name != "right"]

    def visit(name, inputs, outputs):
        if where == "visit" and name == "join":
            raise error

    with pytest.raises(type(error), match=str(error)):
        in_lockstep(small, dense, layers_of(small, dense, names), batches(2, 1, 2), visit)
    assert counted() == before
    assert clean(small, dense)
    assert [small.training, dense.training] == modes


def test_a_model_that_swallows_exceptions_is_ended_all_the_same():
    small, dense = models()

    def stubborn(x):
        try:
            return dense.head(dense.stem(x).mean((2, 3)))
        except Exception:
            return dense.head(x)

    dense.forward = stubborn
    before = counted()
    in_lockstep(small, dense, layers_of(small, dense, ["stem"]), batches(2, 2), lambda *_: None)
    assert counted() == before


def test_what_torch_keeps_for_each_thread_goes_along():
    small, dense = models()
    small, dense = small.float(), dense.float()
    found = []

    def visit(name, inputs, outputs):
        found.append((name, outputs[0].dtype, outputs[0].requires_grad))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_lockstep(small, dense, layers_of(small, dense), [torch.randn(2, 3, 6, 6)], visit)
    assert found == [(name, torch.bfloat16, False) for name in NAMES]


def test_a_probe_tells_calls_norms_and_the_last_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.spare, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
            self.norm_a, self.norm_b, self.norm_c = (nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x):
            x = self.norm_a(self.a(x))
            y = self.b(x)
            x = self.norm_b(y) + y  # not the only one that takes it
            x = self.norm_c(self.c(self.c(x)))
            return self.head(x.mean((2, 3)))

    net, x = Net().eval(), torch.randn(4, 3, 5, 5)
    layers = {name: net.get_submodule(name) for name in ("spare", "head", "c", "b", "a")}
    found = probe(net, layers, x)
    assert list(found.calls.items()) == [("a", 1), ("b", 1), ("c", 2), ("head", 1)]
    assert found.norms == {"a": "norm_a"}
    assert found.last == "head"
    assert 4 * 75 * 4 * 2 <= found.activations <= 4 * 75 * 4 * 6
    assert clean(net)


def test_the_last_layer_is_the_one_whose_output_nothing_touches():
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1))
    assert probe(net, {"0": net[0]}, torch.randn(2, 3)).last is None
