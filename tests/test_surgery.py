"""A compressed model is an ordinary module, and the model that it was made from is untouched."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.plan import Plan
from tncompress.planner import make_plan
from tncompress.spec import Settings

SPEC = {"default": {"format": "tucker", "rank": {"fixed": 3}}}
FORMATS = ("svd", "mps", "tucker", "cp")


class Net(nn.Module):
    """Stem, a convolution under two names, a strided one without bias, nested containers, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.again = self.a
        self.blocks = nn.ModuleDict(
            {"one": nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.ReLU())}
        )
        self.list = nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 12)])
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.again(self.a(self.stem(x)).relu())
        x = self.blocks["one"](x).mean((2, 3))
        for linear in self.list:
            x = linear(x)
        return self.head(x)


@pytest.fixture
def model():
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 9)


def state(module):
    return copy.deepcopy(module.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def tn_names(module):
    return [name for name, m in module.named_modules(remove_duplicate=False) if isinstance(m, tnc.TNConv)]


def test_the_model_is_untouched_and_the_copy_is_of_its_class(model, x):
    before, wanted = state(model), model(x)
    small = tnc.compress(model, SPEC, example_inputs=x)
    assert type(small) is Net
    assert same(before, state(model))
    assert torch.equal(model(x), wanted)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *small.modules()])
    assert not hasattr(model, "tncompress_plan")
    for p in small.parameters():
        p.data.zero_()
    assert same(before, state(model))


def test_every_name_of_a_shared_module_is_replaced(model, x):
    small = tnc.compress(model, SPEC)
    assert small.a is small.again
    assert tn_names(small) == ["a", "again", "blocks.one.0", "list.0", "list.1"]
    assert isinstance(small.stem, nn.Conv2d)
    assert isinstance(small.head, nn.Linear)
    small(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(model, dtype):
    small = tnc.compress(model.to(dtype), SPEC)
    assert {p.dtype for p in small.parameters()} == {dtype}
    y = small(torch.randn(2, 3, 9, 9, dtype=dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


def test_mode_gradients_and_hooks_are_kept(model, x):
    model.train()
    model.a.eval()
    model.blocks["one"][0].weight.requires_grad_(False)
    model.list[0].bias.requires_grad_(False)
    calls = []
    model.a.register_forward_hook(lambda *_: calls.append("after"))
    model.a.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.list[0].register_full_backward_hook(lambda *_: calls.append("back"))
    model.list[1].register_forward_hook(lambda *_, **__: calls.append("keywords"), with_kwargs=True)
    small = tnc.compress(model, SPEC)
    assert (small.training, small.a.training, small.list[0].training) == (True, False, True)
    assert {p.requires_grad for p in small.blocks["one"][0].factors} == {False}
    assert {p.requires_grad for p in small.list[0].factors} == {True}
    assert not small.list[0].bias.requires_grad
    small(x).sum().backward()
    assert calls == ["before", "after", "before", "after", "keywords", "back"]


def test_a_full_backward_hook_still_sees_the_gradient_of_the_input(model, x):
    seen = []
    model.list[0].register_full_backward_hook(lambda _, inward, outward: seen.append((inward, outward)))
    small = tnc.compress(model, SPEC)
    small(x).sum().backward()
    ((inward, outward),) = seen
    assert_close(inward[0], outward[0] @ small.list[0].weight)


def test_the_handle_of_a_hook_still_removes_it(model, x):
    calls = []
    handle = model.a.register_forward_hook(lambda *_: calls.append(1))
    tnc.compress(model, SPEC, inplace=True)
    model(x)
    handle.remove()
    model(x)
    assert calls == [1, 1]  # it runs twice in a pass


def test_layers_may_be_called_by_keyword(x):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.conv(input=x)

    model = Keyword()
    small = tnc.compress(model, SPEC | {"keep_dense": []}, example_inputs=x)
    assert tn_names(small) == ["conv"]
    assert small.tncompress_plan.macs is not None
    assert_close(small(x), tnc.merge(small)(x))
    assert_close(tnc.repair(small, model, [x])(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)))


def test_modules_that_read_the_weight_themselves_still_work():
    """nn.TransformerEncoderLayer calls a fused kernel with its layers' weights in eval mode."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    spec = {"default": {"format": "svd", "rank": {"params_ratio": 0.5}}, "keep_dense": []}
    small = tnc.compress(model, spec)
    assert tn_names(small) == ["linear1", "linear2"]
    with torch.no_grad():
        assert_close(small(x), tnc.merge(small)(x))
    assert_close(small(x), tnc.merge(small)(x))


def test_channels_last_3d_is_kept():
    model = nn.Sequential(nn.Conv3d(4, 6, 3), nn.Conv3d(6, 8, 3), nn.Conv3d(8, 2, 1))
    model = model.to(memory_format=torch.channels_last_3d)
    small = tnc.compress(model, {"default": {"format": "svd", "rank": {"fixed": 4}}})
    window, _ = small[1].factors
    assert window.ndim == 5
    assert window.is_contiguous(memory_format=torch.channels_last_3d)


def test_channels_last_is_kept(x):
    model = Net().to(memory_format=torch.channels_last).eval()
    small = tnc.compress(
        model,
        {
            "default": {"format": "tucker", "rank": {"fixed": [3, 3]}},
            "rules": [{"pattern": "list.*", "keep_dense": True}],
        },
    )
    core = small.a.factors[1]
    assert core.ndim == 4
    assert core.is_contiguous(memory_format=torch.channels_last)
    assert_close(small(x.to(memory_format=torch.channels_last)), small(x))


def test_weights_need_not_be_contiguous(model):
    wanted = tnc.compress(model, SPEC).a.weight
    model.a.weight.data = model.a.weight.data.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    assert not model.a.weight.is_contiguous()
    assert_close(tnc.compress(model, SPEC).a.weight, wanted)


def test_inplace_changes_the_model_itself(model, x):
    wanted = tnc.compress(model, SPEC)(x)
    assert tnc.compress(model, SPEC, inplace=True) is model
    assert "a" in tn_names(model)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_failure_on_the_way_leaves_the_model_whole(model, inplace, monkeypatch):
    before, plan = state(model), make_plan(model, SPEC)
    plan.fits.clear()
    made = []
    fit = tnc.Tucker.fit

    def fails_later(self, kernel, ranks):
        made.append(1)
        if len(made) == 3:
            raise MemoryError("no room")
        return fit(self, kernel, ranks)

    monkeypatch.setattr(tnc.Tucker, "fit", fails_later)
    with pytest.raises(MemoryError):
        tnc.compress(model, plan, inplace=inplace)
    assert same(before, state(model))
    assert tn_names(model) == []


def test_a_plan_gives_what_the_spec_gives(model, tmp_path):
    plan = make_plan(model, SPEC)
    plan.save(tmp_path / "plan.json")
    wanted = state(tnc.compress(model, SPEC))
    assert same(wanted, state(tnc.compress(model, plan)))
    assert same(wanted, state(tnc.compress(model, Plan.load(tmp_path / "plan.json"))))
    assert same(wanted, state(tnc.compress(model, plan)))  # a plan is not used up
    for layer in plan.compressed:
        compressed = tnc.compress(model, plan).get_submodule(layer.name)
        assert compressed.ranks == layer.ranks
        assert compressed.rel_error == layer.rel_error


def test_a_plan_for_other_weights_is_refused(model):
    plan = make_plan(model, SPEC)
    model.blocks["one"][0].weight.data[0, 0, 0, 0] += 1e-3
    before = state(model)
    with pytest.raises(
        ValueError, match=r"other weights of layer 'blocks\.one\.0' with kernel \(12, 8, 3, 3\)"
    ):
        tnc.compress(model, plan, inplace=True)
    assert same(before, state(model))


@pytest.mark.parametrize("change", [{"stride": (2, 2)}, {"padding": (0, 0)}, {"padding_mode": "zeros"}])
def test_a_plan_for_another_geometry_is_refused(model, change):
    plan = make_plan(model, SPEC)
    for name, value in change.items():
        setattr(model.a, name, value)
    with pytest.raises(ValueError, match=r"made for ConvGeometry\(.* at layer 'a' .* but there it is ConvG"):
        tnc.compress(model, plan)


@pytest.mark.parametrize("format", FORMATS)
def test_a_loaded_plan_fits_the_same_weights_in_another_memory_format(model, format):
    plan = make_plan(model, {"default": {"format": format, "rank": {"params_ratio": 0.5}}})
    loaded = Plan.from_dict(plan.to_dict())
    other = tnc.compress(model.to(memory_format=torch.channels_last), loaded)
    for name, wanted in tnc.compress(model, plan).state_dict().items():
        assert torch.equal(other.state_dict()[name], wanted), name


def test_a_plan_for_another_model_is_refused(model):
    plan = make_plan(model, SPEC)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="does not fit this model at layer 'a'"):
        tnc.compress(other, plan)
    untied = copy.deepcopy(model)
    untied.again = copy.deepcopy(untied.a)
    with pytest.raises(ValueError, match="does not fit this model at layer 'a'"):
        tnc.compress(untied, plan)


def test_a_promise_that_is_not_kept_is_refused(model, tmp_path):
    plan = make_plan(model, SPEC)
    fields = plan.to_dict()
    fields["compressed"][0]["rel_error"] *= 1.01
    with pytest.raises(ValueError, match="promised an error"):
        tnc.compress(model, Plan.from_dict(fields))


def test_a_compressed_model_is_left_alone(model, x):
    small = tnc.compress(model, SPEC)
    again = tnc.compress(small, {"default": {"format": "cp"}})
    assert torch.equal(again(x), small(x))
    assert all("already compressed" in s.reason for s in again.tncompress_plan.skipped if s.name == "a")


@pytest.mark.parametrize("format", FORMATS)
def test_merge_gives_dense_layers_that_agree(model, x, format):
    small = tnc.compress(model.double(), {"default": {"format": format, "rank": {"params_ratio": 0.5}}})
    merged = tnc.merge(small)
    assert tn_names(merged) == []
    assert merged.a is merged.again
    assert type(merged.a) is nn.Conv2d
    assert (merged.a.padding_mode, merged.blocks["one"][0].stride) == ("reflect", (2, 2))
    assert_close(merged(x.double()), small(x.double()), rtol=1e-10, atol=1e-12)
    assert merged.state_dict().keys() == model.state_dict().keys()
    assert "a" in tn_names(small)


def test_merge_keeps_what_compress_keeps(model, x):
    model.train()
    model.a.eval()
    model.a.weight.requires_grad_(False)
    model.list[0].bias.requires_grad_(False)
    calls = []
    model.a.register_forward_hook(lambda *_: calls.append("a"))
    merged = tnc.merge(tnc.compress(model, SPEC))
    merged(x)
    assert calls == ["a", "a"]
    for old, new in zip(model.modules(), merged.modules(), strict=True):
        assert old.training == new.training
    for old, new in zip(model.parameters(), merged.parameters(), strict=True):
        assert old.requires_grad == new.requires_grad
        assert new.is_leaf


def test_models_made_from_one_plan_share_nothing(model):
    plan = make_plan(model, SPEC)
    first, second = tnc.compress(model, plan), tnc.compress(model, plan)
    wanted = state(second)
    for p in first.parameters():
        p.data.zero_()
    assert same(wanted, state(second))
    assert same(wanted, state(tnc.compress(model, plan)))


def test_a_single_layer_is_merged_by_itself(model):
    layer = tnc.compress(model, SPEC).a
    with pytest.raises(ValueError, match="of a single layer take to_dense"):
        tnc.merge(layer)


@pytest.mark.parametrize("format", FORMATS)
def test_it_behaves_as_any_module(model, x, format):
    small = tnc.compress(model, {"default": {"format": format, "rank": {"params_ratio": 0.5}}})
    wanted = small(x)
    assert torch.equal(copy.deepcopy(small)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), wanted)
    other = copy.deepcopy(small)
    for p in other.parameters():
        p.data.normal_()
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), wanted)
    assert_close(copy.deepcopy(small).double()(x.double()).float(), wanted, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert small(x).dtype == torch.bfloat16
    average = torch.optim.swa_utils.AveragedModel(small)
    average.update_parameters(small)
    assert torch.equal(average(x), wanted)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(x).square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_it_compiles_and_exports_whole(format, x):
    """In a process of its own: the import hook that checks shapes in these tests is not to be compiled."""
    code = (
        "import sys, torch, tncompress as tnc\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import torch.nn as nn\n"
        "torch.manual_seed(0)\n"
        "model = tnc.build_model('zoo:cnn4').eval()\n"
        f"small = tnc.compress(model, {{'default': {{'format': {format!r}}}}})\n"
        "x = torch.randn(2, 1, 16, 16)\n"
        "wanted = small(x)\n"
        "torch.testing.assert_close(torch.compile(small, fullgraph=True, backend='eager')(x), wanted)\n"
        "batch = torch.export.Dim('batch')\n"
        "program = torch.export.export(small, (x,), dynamic_shapes=({0: batch},))\n"
        "more = torch.randn(5, 1, 16, 16)\n"
        "torch.testing.assert_close(program.module()(more), small(more))\n"
        "print('whole')\n"
    )
    run = subprocess.run([sys.executable, "-c", code, "."], capture_output=True, text=True)
    assert run.stdout.strip() == "whole", run.stderr[-2000:]


def test_importing_is_light_and_changes_no_library():
    code = """
import sys, time
start = time.process_time()
import torch
torchs = time.process_time() - start
def world():
    return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed()

before = world()
start = time.process_time()
import tncompress
spent = time.process_time() - start
assert before == world()
heavy = "torchvision tensornetwork tensorly tltorch matplotlib onnx onnxruntime sklearn rich typer triton"
heavy += " quimb pandas polars ray accelerate scipy"
heavy = heavy.split()
print(spent / torchs, *[name for name in heavy if name in sys.modules])
"""
    found = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        share, *heavy = run.stdout.split()
        assert heavy == []
        found.append(float(share))
    assert min(found) < 0.35  # of what importing torch takes


def test_peers_keep_their_backends():
    code = (
        "import tensornetwork, tensorly\n"
        "before = tensornetwork.backend_contextmanager.get_default_backend(), tensorly.get_backend()\n"
        "import torch, tncompress as tnc\n"
        "model = tnc.build_model('zoo:cnn4')\n"
        "tnc.compress(model, tnc.Spec())\n"
        "after = tensornetwork.backend_contextmanager.get_default_backend(), tensorly.get_backend()\n"
        "assert before == after, (before, after)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_take_formats_and_policies_as_values(model):
    spec = tnc.Spec(default=Settings(format=tnc.SVD("out kw|in kh"), rank=tnc.FixedRank(4)))
    small = tnc.compress(model, spec)
    assert str(small.a.format) == "svd(out kw|in kh)"
    assert small.a.ranks == (4,)
