"""What stands in the way of compressing a layer: what is said of it, and what `include` makes of it."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import tncompress as tnc
from tncompress.plan import LayerPlan
from tncompress.planner import make_plan

EXACT = {"default": {"format": "svd", "rank": {"energy": 1.0}}, "keep_dense": [], "allow_larger": True}
HALF = {"default": {"format": "svd", "rank": {"params_ratio": 0.5}}, "keep_dense": []}


class Plain(nn.Conv2d):
    """A subclass that changes nothing of the forward pass."""


class Standardized(nn.Conv2d):
    """A subclass that convolves with another weight than its own, as some published networks do."""

    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


class Padded(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(nn.functional.pad(input, (1, 1, 1, 1)), weight, bias)


def old_norm(name, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(nn.utils, name)(layer)


INCLUDED = {
    "depthwise": lambda: nn.Conv2d(6, 12, 5, groups=6, padding=2),
    "subclasses": lambda: Plain(6, 8, 3),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(6, 8, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(6, 8, 3)),
    "spectral norm, transposed": lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(6, 8, 3)),
    "old weight norm": lambda: old_norm("weight_norm", nn.Conv2d(6, 8, 3)),
    "old spectral norm": lambda: old_norm("spectral_norm", nn.Conv2d(6, 8, 3)),
    "compressed": lambda: tnc.TNConv.from_dense(nn.Conv2d(6, 8, 3, groups=2), tnc.Tucker(), (2, 3)),
}
"""Layers that are compressed only if `include` has their word (one of `weight norm`: parametrized)."""


def word_for(kind):
    return "parametrized" if "norm" in kind else kind


@pytest.mark.parametrize("kind", INCLUDED)
def test_what_is_left_alone_says_how_to_include_it(kind):
    model = nn.Sequential(INCLUDED[kind]())
    (skip,) = make_plan(model, HALF).layers
    assert f"unless include names {word_for(kind)!r}" in skip.reason
    assert type(tnc.compress(model, HALF)[0]) is type(model[0])


@pytest.mark.parametrize("kind", INCLUDED)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_what_is_included_is_the_same_layer_at_full_rank(kind, training, inplace):
    model = nn.Sequential(INCLUDED[kind]()).double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    model(x)
    model.eval()
    wanted = model(x).detach()
    before = copy.deepcopy(model.state_dict())
    small = tnc.compress(model.train(training), EXACT | {"include": [word_for(kind)]}, inplace=inplace)
    assert type(small[0]) is tnc.TNConv
    assert (small is model) is inplace
    if not inplace:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_close(small.eval()(x), wanted, rtol=1e-11, atol=1e-12)
    assert_close(tnc.merge(small)(x), wanted, rtol=1e-11, atol=1e-12)
    assert type(tnc.merge(small)[0]) in (nn.Conv2d, nn.ConvTranspose2d)
    small.train()(x).square().sum().backward()
    assert all(factor.grad is not None for factor in small[0].factors)
    copy.deepcopy(small), pickle.dumps(small)


@pytest.mark.parametrize("kind", INCLUDED)
def test_what_is_included_counts_what_it_holds(kind):
    """Weight norm holds more than the kernel, a compressed layer less: the totals are those of the models."""
    model = nn.Sequential(INCLUDED[kind](), nn.ReLU())
    small = tnc.compress(model, EXACT | {"include": [word_for(kind)]})
    plan = small.tncompress_plan
    assert plan.params_model == sum(p.numel() for p in model.parameters())
    assert plan.params == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("kind", [Standardized, Padded])
def test_a_subclass_that_computes_something_else_is_never_compressed(kind):
    model = nn.Sequential(kind(6, 8, 3))
    (skip,) = make_plan(model, HALF | {"include": ["subclasses"]}).layers
    assert "of its own, which would be lost" in skip.reason


def test_a_layer_that_is_compressed_again_gets_smaller_or_stays():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    spec = {"default": {"format": "mps", "rank": {"params_ratio": 0.6}}, "keep_dense": []}
    once = tnc.compress(model, spec)
    again = {"include": ["compressed"], "keep_dense": ["1"]}
    twice = tnc.compress(once, spec | again | {"default": {"format": "cp", "rank": {"params_ratio": 0.3}}})
    assert [layer.format.name for layer in twice] == ["cp", "mps"]
    assert twice.tncompress_plan.params == sum(p.numel() for p in twice.parameters())
    assert torch.equal(twice[1].factors[0], once[1].factors[0])
    error = (twice[0].weight - once[0].weight).norm() / once[0].weight.norm()
    assert twice[0].rel_error == pytest.approx(float(error.detach()), rel=1e-4)
    larger = {"default": {"format": "mps", "rank": {"params_ratio": 0.9}}}
    for layer in make_plan(once, spec | again | larger).compressed:
        assert layer.params < layer.params_dense == sum(f.numel() for f in once[0].factors)


def test_words_of_include_are_checked():
    with pytest.raises(ValueError, match=r"spec: include\.0: input should be 'depthwise', 'subclasses'"):
        make_plan(nn.Sequential(nn.Linear(3, 3)), {"include": ["everything"]})


# --- held in two places -------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """Layers that are registered, and that the forward pass takes from somewhere else."""

    def __init__(self, hide):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)])
        self.place = hide(self.convs)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return x


HIDING = {
    "list": list,
    "tuple in a list": lambda convs: [(1, convs[0]), (2, convs[1])],
    "mapping": lambda convs: {"a": convs[0], "b": {"c": convs[1]}},
    "keys": lambda convs: {convs[1]: "its name"},
    "bound method": lambda convs: [convs[1].forward],
    "partial": lambda convs: functools.partial(convs[1], 1),
    "set": set,
}


@pytest.mark.parametrize("kind", HIDING)
def test_a_layer_that_is_also_held_where_torch_does_not_look_stays_dense(kind):
    model = Hidden(HIDING[kind])
    plan = make_plan(model, HALF)
    layer = plan.layers[1]
    assert "it is also held in 'place'" in layer.reason
    tnc.compress(model, HALF, inplace=True)
    assert isinstance(model.convs[1], nn.Conv2d)


def test_a_list_of_blocks_is_no_obstacle():
    model = Hidden(lambda convs: [nn.Sequential(convs[0])])
    assert all(isinstance(layer, LayerPlan) for layer in make_plan(model, HALF).layers)


# --- wrapped, quantized, on the meta device -----------------------------------------------------------------


def ddp(model):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


WRAPPERS = {
    "compile": (lambda m: torch.compile(m, backend="eager"), "wrapped by torch.compile: pass its _orig_mod"),
    "parallel": (nn.DataParallel, "wrapped by DataParallel: pass its module, wrap the result"),
    "distributed": (ddp, "wrapped by DistributedDataParallel: pass its module"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_wrapped_model_is_refused_with_what_to_do(kind, inside, tmp_path):
    wrap, words = WRAPPERS[kind]
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3))
    plan = make_plan(model, HALF)
    wrapped = nn.Sequential(nn.ReLU(), wrap(model)) if inside else wrap(model)
    words = ("module '1' is " if inside else "the model is ") + words

    def save():
        tnc.save(wrapped, tmp_path / "m")

    for act in (
        lambda: make_plan(wrapped, HALF),
        lambda: tnc.compress(wrapped, plan),
        lambda: tnc.merge(wrapped),
        save,
    ):
        with pytest.raises(ValueError, match=words) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_what_is_no_model_says_what_is_wanted(unchecked):
    for value, words in (
        (nn.Conv2d, r"^wanted a model, got the class Conv2d: make one, Conv2d\(\)$"),
        (nn.Conv2d(4, 8, 3).state_dict(), "got OrderedDict: build the model and load_state_dict into it"),
        ([nn.Conv2d(4, 8, 3)], "^wanted a model, a torch.nn.Module, got list$"),
    ):
        for act in (make_plan, tnc.compress):
            with pytest.raises(TypeError, match=words):
                act(value, HALF)


def test_a_model_compiled_in_place_is_compressed():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3))
    x = torch.randn(1, 4, 8, 8)
    model.compile(backend="eager")
    assert_close(tnc.compress(model, EXACT)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_a_traced_graph_is_compressed():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    small = tnc.compress(model, EXACT)
    x = torch.randn(1, 4, 8, 8)
    assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(small.get_submodule("0"), tnc.TNConv)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_layers_are_listed_and_left_alone():
    import torch.ao.nn.quantized as quantized

    linear = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})[0]
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), quantized.Conv2d(8, 8, 3), quantized.ConvTranspose2d(8, 8, 3), linear
    )
    plan = make_plan(model, HALF)
    assert [layer.kind for layer in plan.layers] == ["Conv2d", "Conv2d", "ConvTranspose2d", "Linear"]
    assert [isinstance(layer, LayerPlan) for layer in plan.layers] == [True, False, False, False]
    assert {layer.reason for layer in plan.skipped} == {"its weight is quantized: compress before quantizing"}
    assert isinstance(tnc.compress(model, HALF, inplace=True)[1], quantized.Conv2d)


def test_a_weight_that_is_no_plain_tensor_is_left_alone():
    class Other(torch.Tensor):
        pass

    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    model[0].weight = nn.Parameter(torch.randn(8, 4, 3, 3).as_subclass(Other))
    (skip,) = make_plan(model, HALF).layers
    assert "its weight is a Other, no plain tensor" in skip.reason


def test_pruned_layers_are_left_alone():
    from torch.nn.utils import prune

    model = nn.Sequential(prune.l1_unstructured(nn.Conv2d(4, 8, 3), "weight", 0.5), nn.Conv2d(8, 4, 3))
    small = tnc.compress(model, HALF | {"include": ["parametrized"]})  # also: it can be copied
    assert "no plain parameter (pruning?)" in small.tncompress_plan.layers[0].reason
    assert isinstance(small[1], tnc.TNConv)


@pytest.mark.parametrize("format", ["svd", "mps", "tucker", "cp"])
@pytest.mark.parametrize("rank", [{"params_ratio": 0.4}, {"fixed": 2}])
def test_a_plan_needs_no_weights_and_is_carried_out_with_them(format, rank):
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ConvTranspose2d(12, 8, 3, groups=2), nn.Linear(9, 9))
    spec = {"default": {"format": format, "rank": rank}, "keep_dense": []}
    empty = copy.deepcopy(model).to("meta")
    plan = make_plan(empty, spec, example_inputs=torch.randn(1, 8, 9, 9, device="meta"))
    assert all(layer.rel_error is None and layer.macs for layer in plan.compressed)
    assert "no weights" in str(plan)
    assert tnc.Plan.from_dict(plan.to_dict()) == plan
    small = tnc.compress(model, plan)
    assert small.tncompress_plan.params == plan.params == sum(p.numel() for p in small.parameters())
    for planned in small.tncompress_plan.compressed:
        assert planned.rel_error == small.get_submodule(planned.name).rel_error
    tnc.compress(model, small.tncompress_plan)
    with pytest.raises(
        ValueError, match=r"layer '0' .* is on the meta device: a plan needs no weights, compr"
    ):
        tnc.compress(empty, plan)


def test_an_error_cannot_be_planned_without_weights():
    model = nn.Sequential(nn.Conv2d(8, 12, 3)).to("meta")
    for rank in ({"rel_error": 0.1}, {"energy": 0.9}):
        with pytest.raises(
            ValueError, match=rf"layer '0' .*: {next(iter(rank))} needs its weights: load them"
        ):
            make_plan(model, {"default": {"rank": rank}, "keep_dense": []})


# --- failing on the way -------------------------------------------------------------------------------------

MEMORY = {
    "python": MemoryError(),
    "cpu": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_out_of_memory_names_the_layer_and_what_to_try(kind, monkeypatch):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3))
    plan = make_plan(model, HALF)
    plan.fits.clear()

    def fails(*_):
        raise MEMORY[kind]

    monkeypatch.setattr(tnc.SVD, "fit", fails)
    words = r"out of memory while decomposing layer '0' with kernel \(8, 4, 3, 3\): free memory"
    for act in (lambda: make_plan(model, HALF), lambda: tnc.compress(model, plan, inplace=True)):
        with pytest.raises(MemoryError, match=words):
            act()
    assert isinstance(model[0], nn.Conv2d)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    monkeypatch.setattr(tnc.SVD, "fit", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug of our own")))
    with pytest.raises(RuntimeError, match="a bug of our own"):
        make_plan(nn.Sequential(nn.Conv2d(4, 8, 3)), HALF)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_layers_are_put_in_puts_all_back(error):
    class Guarded(nn.Sequential):
        def __setattr__(self, name, value):
            if name == "2" and isinstance(value, tnc.TNConv):
                raise error("not this one")
            super().__setattr__(name, value)

    model = Guarded(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    layers = list(model)
    with pytest.raises(error, match="not this one"):
        tnc.compress(model, HALF, inplace=True)
    assert all(now is before for now, before in zip(model, layers, strict=True))
    assert not hasattr(model, "tncompress_plan")


def test_a_model_that_cannot_be_copied_is_told_so():
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    model.lock = __import__("threading").Lock()
    with pytest.raises(ValueError, match=r"Sequential can't be copied \(cannot pickle .*inplace=True"):
        tnc.compress(model, HALF)
    assert isinstance(tnc.compress(model, HALF, inplace=True)[0], tnc.TNConv)


def test_a_model_compressed_without_gradients_can_be_trained():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    with torch.inference_mode():
        small = tnc.compress(model, HALF, example_inputs=torch.randn(1, 4, 8, 8))
    small(torch.randn(2, 4, 8, 8)).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())


# --- the layer in the model's own code ----------------------------------------------------------------------


def test_the_attributes_of_torchs_layer_can_be_read_and_not_written():
    dense = nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, dilation=2, groups=2, padding_mode="circular")
    layer = tnc.TNConv.from_dense(dense, tnc.SVD(), (1,))
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(dense, name)
        with pytest.raises(AttributeError):
            setattr(layer, name, 3)
    linear = tnc.TNConv.from_dense(nn.Linear(5, 4), tnc.SVD(), (1,))
    assert (linear.in_features, linear.out_features) == (5, 4)
    for absent in ("stride", "transposed", "whatever"):
        with pytest.raises(AttributeError, match=absent):
            getattr(linear, absent)
    turned = tnc.TNConv.from_dense(nn.ConvTranspose1d(5, 4, 3, stride=2, output_padding=1), tnc.SVD(), (1,))
    assert turned.output_padding == (1,)


@pytest.mark.parametrize("size", [(9, 14), (10, 15), (2, 5, 10, 14)])
def test_a_transposed_layer_takes_the_size_that_it_is_asked_for(size):
    dense = nn.ConvTranspose2d(4, 5, (3, 4), stride=(2, 2), padding=(1, 1)).double()
    layer = tnc.TNConv.from_dense(dense, tnc.MPS(), tnc.MPS().max_ranks((5, 4, 3, 4)))
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    assert_close(layer(x, output_size=size), dense(x, output_size=size))
    with pytest.raises(ValueError, match=r"wanted an output size from 9 to 10 on spatial axis 0 .* got 11"):
        layer(x, output_size=(11, 14))
    with pytest.raises(ValueError, match=r"wanted an output size of 2 numbers, got \(9,\)"):
        layer(x, output_size=(9,))
    plain = tnc.TNConv.from_dense(nn.Conv2d(4, 5, 3), tnc.SVD(), (1,))
    with pytest.raises(TypeError, match="output_size is for transposed convolutions"):
        plain(x.float(), output_size=(3, 5))


def test_parametrizations_are_gone_from_the_result():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(6, 8, 3)))
    small = tnc.compress(model, HALF | {"include": ["parametrized"]})
    assert not any(parametrize.is_parametrized(module) for module in small.modules())
    assert parametrize.is_parametrized(model[0])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_weight_is_left_alone():
    (skip,) = make_plan(nn.Sequential(nn.Linear(0, 4)), HALF).layers
    assert skip.reason == "its weight is empty"
