"""What a saved model can be written as: each kind of file is opened by the program that it is for."""

import json
import shutil

import pytest
import safetensors
import torch
from test_strip import run_without_us
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.onnx_export import _prepared, run_onnx, session
from tncompress.targets import TARGETS

SPEC = {
    "default": {"format": "mps", "rank": {"params_ratio": 0.3}},
    "rules": [
        {"pattern": "3", "format": "tucker"},
        {"pattern": "6", "format": "cp"},
        {"pattern": "9", "format": {"name": "svd", "cut": "out kw|in kh"}},
    ],
    "keep_dense": ["0"],
}
SHAPE = (3, 12, 10)
FACTORY = """
from torch import nn

def make():
    def block(i, o, **k):
        return nn.Conv2d(i, o, 3, padding=1, bias=False, **k), nn.BatchNorm2d(o), nn.ReLU()
    return nn.Sequential(
        *block(3, 12), *block(12, 16, stride=2), *block(16, 16, padding_mode="reflect"), *block(16, 24),
        nn.Conv2d(24, 24, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )
"""


def network():
    scope = {}
    exec(FACTORY, scope)
    torch.manual_seed(0)
    model = scope["make"]()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    return model.eval()


@pytest.fixture
def small():
    return tnc.compress(network(), SPEC)


@pytest.fixture
def saved(small, tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    tnc.save(small, tmp_path / "m", source={"source": "net.py:make"}, input_shape=SHAPE)
    return tmp_path / "m"


# --- ONNX ---------------------------------------------------------------------------------------------------


def kinds_in(path):
    import onnx

    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    return [node.op_type for node in model.graph.node]


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_onnx_computes_the_same_fused_and_folded_or_not(small, tmp_path, fused, fold):
    path = tmp_path / "m.onnx"
    before = {key: value.clone() for key, value in small.state_dict().items()}
    error = tnc.export_onnx(small, path, torch.randn(1, *SHAPE), fused=fused, fold_batchnorm=fold)
    assert error < 1e-4
    for batch in (1, 4):
        x = torch.randn(batch, *SHAPE)
        assert_close(run_onnx(path, x), small(x).detach(), rtol=1e-3, atol=1e-4)
    kinds = kinds_in(path)
    assert not fold or "BatchNormalization" not in kinds
    if fused:
        assert not {"MatMul", "Einsum"} & set(kinds)  # nothing is merged when it runs
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())
    assert str(small[3].contraction) == "chain"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_what_is_exported_is_merged_and_folded_beforehand(small, fused, fold):
    x = torch.randn(2, *SHAPE)
    ready = _prepared(small, x, fused=fused, fold_batchnorm=fold)
    assert (ready is small) is not (fused or fold)
    assert any(isinstance(m, nn.BatchNorm2d) for m in ready.modules()) is not fold
    assert any(isinstance(m, tnc.TNConv) for m in ready.modules()) is not (fused or fold)
    assert_close(ready(x), small(x), rtol=1e-4, atol=1e-5)


def test_an_input_that_the_model_does_not_take_is_named(small, tmp_path):
    with pytest.raises(RuntimeError) as raised:
        tnc.export_onnx(small, tmp_path / "m.onnx", torch.randn(1, 7, 9, 9))
    assert "was run on torch.float32 (3, 7, 9, 9)" in raised.value.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_a_model_that_can_not_be_followed_is_not_folded(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"torch\.fx can't follow Branching, as fused and fold_batchnorm"):
        tnc.export_onnx(
            Branching(), tmp_path / "m.onnx", torch.randn(1, *SHAPE), fused=True, fold_batchnorm=True
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_is_smaller_and_near(small, tmp_path, kind):
    torch.manual_seed(0)
    images = torch.randn(64, *SHAPE)
    tnc.export_onnx(small, tmp_path / "m.onnx", images[:1], fold_batchnorm=True)
    batches = [(images[:40], torch.zeros(40)), images[40:]] if kind == "static" else None
    path = tnc.quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", batches)
    kinds = set(kinds_in(path))
    assert kinds & ({"QuantizeLinear", "QLinearConv"} if kind == "static" else {"ConvInteger"})
    wanted = small(images).detach()
    for batch in (1, 64):
        found = run_onnx(path, images[:batch])
        assert 0 < (found - wanted[:batch]).norm() / wanted[:batch].norm() < 0.15
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        tnc.quantize_onnx(tmp_path / "m.onnx", path, batches)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "q.onnx"]


def test_int8_of_nothing_is_refused(tmp_path, unchecked):
    with pytest.raises(FileNotFoundError, match="there is no ONNX file"):
        tnc.quantize_onnx(tmp_path / "none.onnx", tmp_path / "q.onnx")
    (tmp_path / "m.onnx").write_bytes(b"none")
    with pytest.raises(ValueError, match="static quantization takes the ranges of activations from data"):
        tnc.quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="static")
    with pytest.raises(ValueError, match="wanted the kind static or dynamic, got 'int4'"):
        tnc.quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int4")
    with pytest.raises(ValueError, match="onnxruntime can't quantize"):
        tnc.quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# --- ahead of time ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_package_compiled_ahead_of_time_computes_the_same(tmp_path, unchecked):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    small = tnc.compress(model, {"default": {"format": "cp", "rank": {"fixed": 3}}, "keep_dense": []})
    assert tnc.export_aoti(small, tmp_path / "m.pt2", torch.randn(2, 3, 9, 9)) < 1e-4
    package = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    for batch in (1, 5):
        x = torch.randn(batch, 3, 9, 9)
        assert_close(package(x), small(x), rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_without_a_compiler_there_is_one_line(small, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    def none():
        raise RuntimeError("No working C++ compiler found in\n config.cpp.cxx: (None, 'g++')")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and found none .*install g\+\+") as e:
        tnc.export_aoti(small, tmp_path / "m.pt2", torch.randn(2, *SHAPE))
    assert "\n" not in str(e.value)
    monkeypatch.delattr("torch._inductor.aoti_load_package")
    with pytest.raises(ValueError, match=r"has no AOTInductor packages: they came with torch 2\.6"):
        tnc.export_aoti(small, tmp_path / "m.pt2", torch.randn(2, *SHAPE))
    with pytest.raises(ValueError, match=r"ends in \.pt2, got .*m\.so"):
        tnc.export_aoti(small, tmp_path / "m.so", torch.randn(2, *SHAPE))
    assert not list(tmp_path.iterdir())


# --- the command --------------------------------------------------------------------------------------------


def made(run, line):
    return json.loads(run(f"{line} --model net.py:make --json").stdout)


def test_strip_and_merge_by_command_compute_the_same(run, saved, small, tmp_path):
    facts = made(run, "export m --to strip")
    assert facts["relative_difference"] < 1e-5
    assert facts["chains"] + facts["dense_again"] == len(small.tncompress_plan.compressed)
    x = torch.randn(2, *SHAPE)
    plain = torch.load(saved / "stripped.pt", weights_only=False)
    (output,) = run_without_us([(plain, x)], tmp_path)
    assert_close(output, small(x).detach(), rtol=1e-5, atol=1e-6)
    assert made(run, "export m --to merged --out dense.safetensors")["relative_difference"] < 1e-5
    dense = network()
    tnc.load_weights(dense, tmp_path / "dense.safetensors")
    assert_close(dense(x), small(x), rtol=1e-4, atol=1e-5)


def test_torch_export_by_command_takes_the_shape_from_the_folder(run, saved, small):
    assert made(run, "export m --to torch-export --dynamic-size")["relative_difference"] < 1e-5
    program = torch.export.load(saved / "model.pt2").module()
    x = torch.randn(5, 3, 15, 17)
    assert_close(program(x), small(x), rtol=1e-4, atol=1e-5)


def test_factors_tell_what_network_they_are(run, saved, small):
    assert made(run, "export m --to safetensors")["compressed_layers"] > 3
    with safetensors.safe_open(saved / "factors.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["tncompress"])
        for name, layer in small.named_modules():
            if not isinstance(layer, tnc.TNConv):
                continue
            found = told[name]
            parts = [file.get_tensor(f"{name}.factors.{i}") for i in range(len(found["factor_shapes"]))]
            shaped = [part.reshape(size) for part, size in zip(parts, found["factor_shapes"], strict=True)]
            terms, kernel = found["equation"].split("->")
            groups = layer.geometry.groups
            kernels = [
                torch.einsum(f"{terms}->{kernel}", *(part[g] if groups > 1 else part for part in shaped))
                for g in range(groups)
            ]
            assert_close(layer.geometry.weight(torch.stack(kernels)), layer.weight)


def test_networks_are_opened_by_tensornetwork(run, saved, small):
    import tensornetwork

    facts = made(run, "export m --to tensornetwork")
    index = json.loads((saved / "tensornetwork" / "networks.json").read_text())
    assert facts["networks"] == sum(len(entry["files"]) for entry in index.values())
    for name, entry in index.items():
        layer = small.get_submodule(name)
        kernels = []
        for file in entry["files"]:
            nodes = tensornetwork.load_nodes(str(saved / "tensornetwork" / file))
            free = {
                leg: edge
                for node in nodes
                for leg, edge in zip(node.axis_names, node.edges, strict=True)
                if edge.is_dangling()
            }
            order = [free[leg] for leg in entry["dangling_axes"]]
            kernels.append(tensornetwork.contractors.auto(nodes, output_edge_order=order).tensor)
        assert_close(layer.geometry.weight(torch.stack(kernels)), layer.weight)
        again = tensornetwork.load_nodes(str(saved / "tensornetwork" / entry["files"][0]))
        if layer.geometry.groups == 1:
            back = tnc.from_tensornetwork(again, layer)
            assert all(torch.equal(a, b) for a, b in zip(back.factors, layer.factors, strict=True))


def test_layers_for_tltorch_compute_the_same_and_the_others_are_told(run, saved, small, unchecked):
    import tensorly

    facts = made(run, "export m --to tltorch")
    assert any("groups" in words for words in facts["left_out"])
    layers = torch.load(saved / "tltorch.pt", weights_only=False)
    assert len(layers) == facts["layers"] > 0
    before = tensorly.get_backend()
    tensorly.set_backend("pytorch")
    try:
        for name, layer in layers.items():
            ours = small.get_submodule(name)
            x = torch.randn(2, ours.in_channels, 7, 6)
            assert_close(layer(x), ours(x), rtol=1e-4, atol=1e-5)
    finally:
        tensorly.set_backend(before)


@pytest.mark.slow
def test_int8_by_command(run, tmp_path, unchecked):
    torch.manual_seed(0)
    small = tnc.compress(tnc.build_model("zoo:cnn4").eval(), {"default": {"rank": {"params_ratio": 0.2}}})
    source = {"source": "zoo:cnn4", "num_classes": 10, "in_channels": 1}
    tnc.save(small, tmp_path / "m", source=source)
    line = "export m --to onnx --int8 static --data digits --fold-batchnorm --json"
    facts = json.loads(run(line).stdout)
    assert facts["relative_difference"] < 1e-4
    assert facts["int8_difference"] < 0.2
    assert facts["bytes"] < 0.5 * facts["float_bytes"]
    assert facts["bytes"] == (tmp_path / "m" / "model.onnx").stat().st_size
    assert session(tmp_path / "m" / "model.onnx").get_inputs()[0].shape[1:] == [1, 32, 32]


REFUSED = {
    "unknown": ("export m --to tflite", "unknown export format 'tflite'; the formats are onnx, torch-export"),
    "dynamic size": (
        "export m --to onnx --dynamic-size",
        "--dynamic-size is for --to torch-export, got --to",
    ),
    "fused": ("export m --to strip --fused", "--fused is for --to onnx, got --to strip"),
    "int8": ("export m --to onnx --int8 static", "from images: name them with --data"),
    "shape": ("export m --to onnx --input-shape 3by4", "--input is a shape such as 3x224x224, got '3by4'"),
    "taken": ("export m --to merged --out net.py", "net.py is there already"),
    "foreign folder": ("export m --to tensornetwork --out photos", "holds other files"),
    "no result": ("export nothing --to strip", "holds no saved model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_misuse_is_one_line_and_changes_nothing(run, saved, kind, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("precious")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "pycache" not in str(p)}
    line, words = REFUSED[kind]
    result = run(f"{line} --model net.py:make", code=1)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert {
        p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "pycache" not in str(p)
    } == before


def test_what_runs_wants_a_shape_and_the_rest_does_not(run, small, tmp_path):
    (tmp_path / "net.py").write_text(FACTORY.replace("nn.Sequential(", "nn.Sequential(nn.Identity(),"))
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3))
    spec = {"default": {"format": "svd", "rank": {"fixed": 2}}, "keep_dense": []}
    tnc.save(tnc.compress(model, spec), tmp_path / "m")
    (tmp_path / "one.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3))\n"
    )
    for to, target in TARGETS.items():
        if target.needs_input and to != "onnx":
            error = run(f"export m --to {to} --model one.py:make", code=1).stderr
            assert f"--to {to} runs the model, and the folder does not say on what" in error
    facts = json.loads(run("export m --to merged --model one.py:make --json").stdout)
    assert "relative_difference" not in facts


# --- info ---------------------------------------------------------------------------------------------------


def test_info_says_what_is_there_and_loads_nothing(run, saved, small, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(tnc.TNConv, "__init__", lambda *a, **k: 1 / 0)
    found = json.loads(run("info m --json").stdout)
    monkeypatch.undo()
    held = small.state_dict()
    assert found["params"] == sum(tensor.numel() for tensor in held.values())
    assert found["params_dense"] == sum(tensor.numel() for tensor in network().state_dict().values())
    assert found["input_shape"] == [*SHAPE]
    assert found["bytes"] == (saved / "model.safetensors").stat().st_size
    tnc.save_weights(network(), saved.parent / "dense.safetensors")
    dense = (saved.parent / "dense.safetensors").stat().st_size
    assert abs(found["bytes_dense"] - dense) < 4000  # the header
    plan = {layer.name: layer for layer in small.tncompress_plan.compressed}
    assert [layer["names"][0] for layer in found["layers"]] == [*plan]
    for layer in found["layers"]:
        wanted = plan[layer["names"][0]]
        assert layer["params"] == wanted.params
        assert layer["params_dense"] == wanted.params_dense
        assert tuple(layer["ranks"]) == wanted.ranks
    assert {"python", "torch"} <= found["versions"].keys()
    assert "compressed layers: 4" in str(tnc.read_saved(saved)) or found["layers"]


def test_info_reads_the_weights_only_when_asked(run, saved):
    raw = bytearray((saved / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (saved / "model.safetensors").write_bytes(raw)
    assert "tucker" in run("info m").stdout
    assert "its checksum differs" in run("info m --check", code=1).stderr


def test_the_card_says_how_to_load_and_what_was_measured(small, tmp_path):
    tnc.save(small, tmp_path / "m", history={"accuracy_dense": 0.95, "accuracy": 0.9412, "more": [1]})
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'tnc.load("m", model)' in card
    assert "accuracy after fine-tuning: 94.12 %" in card
    for layer in small.tncompress_plan.compressed:
        assert f"| {layer.name} | " in card
