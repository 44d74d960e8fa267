"""A frozen model computes what the model does, whatever is folded into what."""

import copy
import pickle

import pytest
import torch
from conftest import FORMATS, GEOMETRIES, applies
from test_contraction import layer_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import tncompress as tnc
from tncompress import cost_model, freezing
from tncompress.contraction import ConvCall
from tncompress.folding import fold, trace, units_of
from tncompress.layers import TNConv
from tncompress.prepacked import ACTIVATIONS, FrozenChain, FrozenConv, own_weights
from tncompress.strategies import all_contractions, merged_stages

SPEC = {"default": {"format": "mps", "rank": {"params_ratio": 0.5}}, "keep_dense": []}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Time nothing: what comes first is the fastest, unless a test says otherwise."""
    first = {"model": 0, "layer": 0}

    def in_turns(runs, seconds=None, **_):
        with torch.inference_mode():
            for run in runs:
                run()
        best = min(first["layer" if seconds is None else "model"], len(runs) - 1)
        return [float(k != best) for k in range(len(runs))]

    monkeypatch.setattr(freezing, "in_turns", in_turns)
    monkeypatch.setattr(cost_model, "in_turns", in_turns)
    monkeypatch.setattr(cost_model, "shortlist", lambda layer, calls, **_: all_contractions(layer.stages))
    return first


class Block(nn.Module):
    """A residual block; ``forward`` is handed in."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, (3, 1), padding=(1, 0))
        self.n, self.m = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6()
        self.gate = nn.Conv2d(8, 8, 1)
        self.how = how

    def forward(self, x):
        return self.how(self, x)


def iadded(s, x):
    y = s.m(s.b(s.relu(s.n(s.a(x)))))
    y += x
    return s.relu(y)


def added_left(s, x):
    return F.relu(torch.add(x, s.n(s.a(x))))


def added_twice(s, x):
    return s.n(s.a(x)) + s.m(s.b(x)) + x


def added_to_itself(s, x):
    y = s.a(x)
    return y + y


def added_with_alpha(s, x):
    return torch.add(s.a(x), x, alpha=2)


def added_a_number(s, x):
    return s.relu(s.a(x) + 1.5)


def added_broadcast(s, x):
    return s.relu6(s.a(x) + s.gate(x.mean((2, 3), keepdim=True)))


def added_to_broadcast(s, x):
    return s.gate(x.mean((2, 3), keepdim=True)) + s.a(x)


def used_twice(s, x):
    y = s.a(x)
    return s.n(y) + y.mean()


def called_twice(s, x):
    return s.n(s.a(s.n(s.a(x))))


def norm_after_activation(s, x):
    return s.n(s.relu6(s.a(x)))


def two_norms(s, x):
    return s.m(s.n(s.a(x))).relu()


def norm_after_addition(s, x):
    return s.n(s.a(x) + x)


def written_in_between(s, x):
    """The input of the convolution is written on before its output is added."""
    x = x * 1
    y = s.a(x)
    z = F.relu(x, inplace=True)
    return y + z


def written_by_a_method(s, x):
    x = x * 1
    y = s.a(x)
    x.add_(1)
    return s.relu(y + x)


def other_written_on(s, x):
    """What is added to is read again."""
    z = x * 2
    z += s.a(x)
    return z * z


def other_read_again(s, x):
    z = t = x * 2
    z += s.a(x)
    return z * t


def silus(s, x):
    return F.hardswish(s.a(F.silu(s.b(x)))) + F.gelu(s.gate(x))


def with_keywords(s, x):
    return s.a(input=x).relu()


def reads_a_weight(s, x):
    return s.n(s.a(x)) * s.b.weight.mean() + s.b(x)


MODELS = [
    iadded,
    added_left,
    added_twice,
    added_to_itself,
    added_with_alpha,
    added_a_number,
    added_broadcast,
    added_to_broadcast,
    used_twice,
    called_twice,
    norm_after_activation,
    two_norms,
    norm_after_addition,
    written_in_between,
    written_by_a_method,
    other_written_on,
    other_read_again,
    silus,
    with_keywords,
    reads_a_weight,
]


def settled(model):
    """Return the model in eval mode with BatchNorms that do something."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def folds(frozen):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())


WAYS = ["packed", "all packed", "plain", "packed, dense"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
@pytest.mark.parametrize("how", MODELS, ids=lambda how: how.__name__)
def test_whatever_follows_a_convolution_the_outputs_stay(how, compressed, way, untimed):
    model, x = settled(Block(how)), torch.randn(3, 8, 6, 7)
    model = tnc.compress(model, SPEC) if compressed else model
    before = copy.deepcopy(model.state_dict())
    wanted = model(x.clone())
    untimed["model"] = WAYS.index(way)
    frozen = tnc.freeze(model, x)
    if how is other_read_again or (how is reads_a_weight and compressed):
        assert frozen.way.startswith("as it is")  # the tracer misses the alias, and how the weight is made
    else:
        assert frozen.way == (way if compressed or way != "packed, dense" else "plain")
    assert frozen.rel_error < 1e-5
    with torch.inference_mode():
        assert_close(frozen(x.clone()), wanted, **CLOSE)
        other = torch.randn(2, 8, 9, 5)
        assert_close(frozen(other.clone()), model(other.clone()), **CLOSE)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("how", "norms", "nodes"),
    [(iadded, 0, 2), (added_left, 0, 1), (added_twice, 0, 3), (two_norms, 1, 3), (called_twice, 1, 4)],
)
def test_what_can_be_folded_is_folded(how, norms, nodes):
    graph = trace(settled(Block(how)))
    for unit in units_of(graph):
        fold(graph, unit)
    left = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    assert len(left) == nodes
    assert folds(tnc.freeze(settled(Block(how)), torch.randn(1, 8, 5, 5))) == norms


@pytest.mark.parametrize("name", [n for n in GEOMETRIES if not n.startswith("linear")])
def test_every_geometry_is_frozen_with_its_norm(name):
    geometry = GEOMETRIES[name]
    x = geometry.input(torch.float32)
    for format in ("mps-mixed", "cp", "tucker-all"):
        layer = layer_of(FORMATS[format], geometry, torch.float32)
        if x.ndim < layer.geometry.ndim + 2:
            x = x[None]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[layer.geometry.ndim]
        model = settled(nn.Sequential(layer, norm(layer.geometry.out_channels), nn.ReLU()))
        frozen = tnc.freeze(model, x)
        assert frozen.way == "packed"
        assert folds(frozen) == 0
        with torch.inference_mode():
            assert_close(frozen(x), model(x), rtol=1e-3, atol=1e-4 * float(model(x).abs().max()))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_frozen_chain_computes_its_layer_in_every_contraction(name, pack):
    geometry = GEOMETRIES[name]
    for format in FORMATS.values():
        if not applies(next(n for n, f in FORMATS.items() if f is format), geometry.kernel_shape):
            continue
        layer = layer_of(format, geometry, torch.float32).requires_grad_(False)
        x = geometry.input(torch.float32)
        wanted = copy.deepcopy(layer).double()(x.double())
        for way in all_contractions(layer.stages):
            stages = merged_stages(layer.stages, way.merged)
            chain = FrozenChain(layer.geometry, stages, own_weights(layer, way), layer.bias, pack=pack)
            gap = float((chain(x).double() - wanted).norm() / wanted.norm())
            assert gap < 1e-5


# --- a module like any other --------------------------------------------------------------------------------


@pytest.fixture
def frozen_and_input():
    x = torch.randn(2, 8, 6, 6)
    return tnc.freeze(tnc.compress(settled(Block(iadded)), SPEC), x), x


def test_copies_of_a_frozen_model_compute_the_same(frozen_and_input):
    frozen, x = frozen_and_input
    with torch.inference_mode():
        wanted = frozen(x)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        with torch.inference_mode():
            assert torch.equal(other(x), wanted)
        assert other.layers == frozen.layers
    assert not list(frozen.parameters())
    other.load_state_dict({key: torch.zeros_like(value) for key, value in frozen.state_dict().items()})
    with torch.inference_mode():
        assert torch.equal(other(x), x.relu())
        assert_close(copy.deepcopy(frozen).double()(x.double()).float(), wanted, **CLOSE)
        assert_close(copy.deepcopy(frozen).bfloat16()(x.bfloat16()).float(), wanted, rtol=0.1, atol=0.1)


def test_gradients_counters_and_autocast_see_torchs_own_convolutions(frozen_and_input):
    frozen, x = frozen_and_input
    with torch.inference_mode():
        wanted = frozen(x)
    leaf = x.clone().requires_grad_()
    out = frozen(leaf)
    assert_close(out, wanted, **CLOSE)
    assert out.requires_grad
    out.sum().backward()
    assert leaf.grad.abs().sum() > 0
    with FlopCounterMode(display=False) as counter:
        frozen(x)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16 or frozen(x).dtype == torch.float32
    assert_close(torch.vmap(frozen)(x[None]), wanted[None], **CLOSE)
    assert_close(torch.jit.trace(frozen, x, check_trace=False)(x), wanted, **CLOSE)


@pytest.mark.usefixtures("unchecked")
def test_a_frozen_model_compiles_and_exports(frozen_and_input):
    frozen, x = frozen_and_input
    torch.compiler.reset()
    with torch.no_grad():
        wanted = frozen(x)
        assert_close(torch.compile(frozen, fullgraph=True, backend="eager")(x), wanted, **CLOSE)
        program = torch.export.export(frozen, (x,), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
        assert_close(program.module()(torch.cat([x, x])), frozen(torch.cat([x, x])), **CLOSE)


def test_a_changed_weight_is_packed_again():
    conv = nn.Conv2d(8, 8, 3)
    layer = TNConv.from_dense(conv, tnc.SVD(), (4,)).requires_grad_(False)
    chain, x = (
        FrozenChain(layer.geometry, layer.running, own_weights(layer), layer.bias),
        torch.randn(1, 8, 5, 5),
    )
    assert_close(chain(x), layer(x), **CLOSE)
    chain.convolutions[0].weight.mul_(2)
    assert_close(chain(x), 2 * layer(x) - layer.bias[:, None, None], **CLOSE)
    last = chain.convolutions[-1]
    last.bias = last.bias + 1
    assert_close(chain(x), 2 * layer(x) - layer.bias[:, None, None] + 1, **CLOSE)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("window", "way"), [(1, "product"), (1, "packed"), (3, "packed")])
def test_every_way_is_the_same_convolution(window, way, bias, dtype, activation):
    weight = torch.randn(12, 20, window, window, dtype=dtype)
    call = ConvCall((1, 1), (window // 2, window // 2), (1, 1))
    made = [FrozenConv(weight, torch.randn(12, dtype=dtype) if bias else None, call, activation)]
    made.append(copy.deepcopy(made[0]))
    made[0].way, made[1].way = way, "plain"
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
    for size in ((2, 20, 5, 7), (3, 20, 1, 1), (1, 20, 9, 2)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size, dtype=dtype).contiguous(memory_format=layout)
            found, wanted = (each(x) for each in made)
            assert_close(found, wanted, **close)
            for other in (torch.randn_like(wanted), torch.randn(1, 12, 1, 1, dtype=dtype)):
                before = other.clone()
                assert_close(made[0](x, other), made[1](x, other), **close)
                assert torch.equal(other, before)


@pytest.mark.parametrize(
    "call",
    [
        ConvCall((2, 2), (0, 0), (1, 1)),
        ConvCall((1, 1), (1, 1), (1, 1)),
        ConvCall((1, 1), (0, 0), (1, 1), groups=2),
        ConvCall((1, 1), (0, 0), (1, 1), pad=(1, 0, 0, 0)),
    ],
)
def test_what_is_no_product_of_matrices_is_not_tried_as_one(call):
    assert "product" not in FrozenConv(torch.randn(4, 4 // call.groups, 1, 1), None, call).ways
    assert "product" not in FrozenConv(torch.randn(4, 4, 3, 3), None, ConvCall((1, 1), (0, 0), (1, 1))).ways


def test_the_backend_is_used_and_can_be_missing(monkeypatch):
    conv = nn.Conv2d(8, 8, 3).requires_grad_(False)
    layer = TNConv.from_dense(conv, tnc.SVD(), (4,)).requires_grad_(False)
    x = torch.randn(1, 8, 5, 5)
    runs = []
    real = FrozenConv._prepared
    monkeypatch.setattr(
        FrozenConv, "_prepared", lambda *args: (run := real(*args)) and (runs.append(1) or run)
    )
    made = [FrozenChain(layer.geometry, layer.running, own_weights(layer), layer.bias) for _ in range(2)]
    wanted = made[0](x)
    assert len(runs) == (2 if torch.backends.mkldnn.is_available() else 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
    for name in ("convolution", "linear"):
        monkeypatch.setattr(f"torch.ops.mkldnn._reorder_{name}_weight", _missing, raising=False)
    runs.clear()
    assert_close(made[1](x), wanted, **CLOSE)
    assert not runs


def _missing(*_):
    raise RuntimeError("no such kernel")


# --- models of other kinds ----------------------------------------------------------------------------------


class Branching(nn.Module):
    """No tracer gets through: what is done depends on numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x, scale):
        x = self.norm(self.conv(x))
        return {"out": x * scale if x.sum() > 0 else x, "sum": x.sum()}


def test_a_model_that_cannot_be_traced_stays_as_it_is():
    model, x = tnc.compress(settled(Branching()), SPEC), {"x": torch.randn(2, 8, 6, 6), "scale": 2.0}
    frozen = tnc.freeze(model, x)
    assert frozen.way.startswith("as it is")
    with torch.inference_mode():
        assert_close(frozen(**x), model(**x), **CLOSE)
    assert not frozen.model.conv.factors[0].requires_grad


def test_a_module_with_hooks_keeps_them():
    model, x, seen = settled(Block(iadded)), torch.randn(1, 8, 5, 5), []
    wanted = model(x)
    model.n.register_forward_hook(lambda *_: seen.append("norm"))
    model.b.register_forward_hook(lambda *_: seen.append("conv"))
    frozen = tnc.freeze(model, x)
    seen.clear()
    with torch.inference_mode():
        assert_close(frozen(x), wanted, **CLOSE)
    assert seen == ["norm", "conv"]


def test_a_norm_without_statistics_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(2, 3, 6, 6)
    frozen = tnc.freeze(model, x)
    assert folds(frozen) == 1
    assert_close(frozen(x), model(x), **CLOSE)


def test_a_layer_whose_weight_is_read_becomes_dense():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.linear.weight, self.linear.bias)

    model = tnc.compress(Reads(), {"default": {"format": "svd", "rank": {"fixed": 2}}, "keep_dense": []})
    x = torch.randn(2, 8)
    frozen = tnc.freeze(model, x)
    assert not any(isinstance(m, TNConv) for m in frozen.modules())
    assert_close(frozen(x), model(x), **CLOSE)


def test_half_precision_takes_and_gives_full():
    model, x = tnc.compress(settled(Block(iadded)), SPEC), torch.randn(2, 8, 6, 6)
    frozen = tnc.freeze(model, x, dtype=torch.bfloat16)
    out = frozen(x)
    assert out.dtype == torch.float32
    assert {b.dtype for b in frozen.buffers() if b.is_floating_point()} == {torch.bfloat16}
    assert 1e-5 < frozen.rel_error < 2e-2


def test_what_is_slower_is_not_returned(untimed):
    model, x = tnc.compress(settled(Block(iadded)), SPEC), torch.randn(1, 8, 6, 6)
    frozen = tnc.freeze(model, x)
    assert {layer.contraction for layer in frozen.layers} != {"kernel"}
    assert all(layer.seconds <= layer.dense_seconds for layer in frozen.layers)
    untimed["layer"] = 99  # the last of each: dense
    frozen = tnc.freeze(model, x)
    assert {layer.contraction for layer in frozen.layers} == {"kernel"}
    assert [tuple(m.weight.shape) for m in frozen.modules() if isinstance(m, FrozenConv)] == [
        (8, 8, 3, 3),
        (8, 8, 3, 1),
    ]


def test_compress_keeps_dense_what_is_no_faster(untimed):
    model, x = settled(Block(iadded)), torch.randn(1, 8, 6, 6)
    small = tnc.compress(model, SPEC, example_inputs=x, keep_dense_if_slower=True)
    assert all(isinstance(m, TNConv) for m in (small.a, small.b, small.gate))
    untimed["layer"] = 99  # the last of all contractions: the kernel
    small = tnc.compress(model, SPEC, example_inputs=x, keep_dense_if_slower=True)
    assert type(small.a) is type(small.b) is nn.Conv2d
    assert isinstance(small.gate, TNConv)  # which no input reaches
    reasons = {skip.name: skip.reason for skip in small.tncompress_plan.skipped}
    assert "no faster as a tensor network (dense" in reasons["a"]
    assert_close(tnc.merge(small)(x), model(x), **CLOSE)
    with pytest.raises(ValueError, match="it wants example_inputs"):
        tnc.compress(model, SPEC, keep_dense_if_slower=True)


def test_a_kept_layer_leaves_its_norm_alone(untimed):
    model, x = settled(Block(iadded)), torch.randn(4, 8, 6, 6)
    untimed["layer"] = 99
    small = tnc.compress(model, SPEC, calibration=[x], example_inputs=x, keep_dense_if_slower=True)
    assert_close(small(x), model(x), **CLOSE)


@pytest.mark.parametrize("by", ["measurement", "model"])
def test_contractions_are_chosen_for_the_whole_model(by, untimed):
    model, x = tnc.compress(settled(Block(iadded)), SPEC), torch.randn(1, 8, 6, 6)
    untimed["layer"] = 1
    keys, wanted = set(model.state_dict()), model(x)
    assert tnc.choose_contractions_(model, x, by=by) is model
    if by == "measurement":
        assert [str(m.contraction) for m in (model.a, model.gate)] == ["1+1+2", "chain"]
    assert set(model.state_dict()) == keys
    assert_close(model(x), wanted, **CLOSE)


@pytest.mark.usefixtures("unchecked")
def test_contractions_are_chosen_in_two_ways_only():
    with pytest.raises(ValueError, match="by 'measurement' or by 'model', got 'luck'"):
        tnc.choose_contractions_(nn.Sequential(), torch.randn(1), by="luck")


def test_what_is_wrong_is_never_taken(monkeypatch):
    model, x = settled(Block(iadded)), torch.randn(1, 8, 6, 6)
    right = freezing.folded_weights

    def wrong(unit):
        weights, bias = right(unit)
        return [1.01 * w for w in weights], bias

    monkeypatch.setattr(freezing, "folded_weights", wrong)
    frozen = tnc.freeze(model, x)
    assert frozen.way == "as it is"
    assert_close(frozen(x), model(x), **CLOSE)


def test_errors_say_what_is_wanted():
    model, x = settled(Block(iadded)), torch.randn(1, 8, 6, 6)
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        tnc.freeze(model, x, dtype=torch.int8)
    with pytest.raises(ValueError, match="for inference"):
        tnc.freeze(model, x).train()
    with pytest.raises(ValueError, match=r"torch\.compile"):
        tnc.freeze(torch.compile(model), x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet", "densenet121", "swin_t"]
)
def test_torchvision_models_are_frozen(name, untimed):
    import torchvision

    options = {"init_weights": False} if name == "googlenet" else {}
    model, x = getattr(torchvision.models, name)(weights=None, **options).eval(), torch.randn(1, 3, 64, 64)
    small = tnc.compress(model, {"default": {"format": "svd", "rank": {"params_ratio": 0.5}}})
    for each in (model, small):
        frozen = tnc.freeze(each, x)
        assert frozen.way == "packed"
        assert frozen.rel_error < 1e-5


@pytest.mark.parametrize("best", ["plain", "packed", "product"])
def test_convolutions_run_in_their_fastest_way_and_each_kind_is_measured_once(best, monkeypatch):
    measured = []

    def in_turns(runs, **_):
        ways = [run.func.__self__.way for run in runs]
        measured.append([run() for run in runs])
        return [float(way != best) for way in ways]

    layers = [nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)]
    frozen = tnc.freeze(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(6, 2, 1)).eval(), torch.randn(2, 6, 7, 7))
    convolutions = [m for m in frozen.modules() if isinstance(m, FrozenConv)]
    for convolution in convolutions:
        convolution.way = convolution.ways[-1]
    monkeypatch.setattr(cost_model, "in_turns", in_turns)
    x, known = torch.randn(2, 6, 7, 7), {}
    with torch.inference_mode():
        wanted = frozen(x)
        for _ in range(2):
            cost_model.choose_packing_(frozen, lambda: frozen(x), known)
        assert_close(frozen(x), wanted)
    assert convolutions[-1].way == best  # of 1x1
    assert {each.way for each in convolutions[:2]} == {"plain" if best == "product" else best}
    assert len(measured) == len(known) == 3  # with the ReLU is another kind
    for one, *others in measured:
        for other in others:
            assert_close(one, other)


class Feedforward(nn.Module):
    """Linear layers with what follows them in transformers: activations, a residual sum, a second call."""

    def __init__(self, activation):
        super().__init__()
        self.inward, self.after, self.outward = nn.Linear(24, 40), activation, nn.Linear(40, 24, bias=False)
        self.twice = nn.Linear(24, 24)

    def forward(self, x):
        x = x + self.outward(self.after(self.inward(x)))
        return F.relu(self.twice(self.twice(x)) + x)


@pytest.mark.parametrize("size", [(3, 24), (2, 5, 24), (2, 4, 4, 24), (24,)])
@pytest.mark.parametrize("way", ["plain", "product"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Tanh()])
def test_linear_layers_are_frozen_with_what_follows_them(activation, way, size):
    model, x = Feedforward(activation).eval(), torch.randn(size)
    small = tnc.compress(model, {"default": {"format": "svd", "rank": {"fixed": 6}}, "keep_dense": []})
    for each in (model, small):
        frozen = tnc.freeze(each, x)
        layers = [m for m in frozen.modules() if isinstance(m, FrozenConv)]
        assert len(layers) == (3 if each is model else 6)
        for layer in layers:
            layer.way = way
        with torch.no_grad():
            assert_close(frozen(x), each(x), **CLOSE)
        with torch.inference_mode():  # whatever was chosen before, layers can be measured again
            cost_model.choose_packing_(frozen, lambda frozen=frozen: frozen(x))
        folded = any(layer.activation for layer in layers[:2])
        assert folded == (not isinstance(activation, nn.Tanh))


def test_a_frozen_linear_layer_sees_other_batches_dtypes_and_layouts():
    frozen = tnc.freeze(nn.Sequential(nn.Linear(12, 7), nn.ReLU()).eval(), torch.randn(4, 12))
    layer = next(m for m in frozen.modules() if isinstance(m, FrozenConv))
    layer.way = "product"
    for x in (torch.randn(9, 12), torch.randn(12, 5).T, torch.randn(0, 12), torch.randn(2, 3, 12)[:, 1:]):
        assert_close(frozen(x), F.relu(F.linear(x, layer.weight, layer.bias)), **CLOSE)
    x = torch.randn(4, 12, requires_grad=True)
    frozen(x).sum().backward()
    assert x.grad is not None
