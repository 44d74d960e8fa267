import argparse
import copy
import pickle
import sys

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from tncompress.weights import load_weights, save_weights
from tncompress.zoo import (
    CNN4,
    CifarResNet,
    build_model,
    cnn4,
    list_models,
    resnet20,
    resnet50,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and wait for them where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def count(model):
    return sum(p.numel() for p in model.parameters())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


# --- the models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 7])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [cnn4, resnet20, resnet50])
@pytest.mark.parametrize("size", [28, 32])
def test_logits_have_a_column_for_each_class(make, classes, channels, size):
    model = make(num_classes=classes, in_channels=channels)
    assert model(torch.randn(2, channels, size, size)).shape == (2, classes)


def test_cnn4_is_the_layers_it_names():
    model = cnn4().eval()
    names = [name for name, _ in model.named_children()]
    assert names == ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "conv4", "bn4", "fc"]
    pool = nn.MaxPool2d(2)
    slow = nn.Sequential(
        *(model.conv1, model.bn1, nn.ReLU(), pool, model.conv2, model.bn2, nn.ReLU(), pool),
        *(model.conv3, model.bn3, nn.ReLU(), pool, model.conv4, model.bn4, nn.ReLU()),
    )
    x = torch.randn(2, 1, 28, 28)
    assert_close(model(x), model.fc(slow(x).mean((2, 3))))
    assert count(model) == 9 * (32 + 32 * 64 + 64 * 128 + 128 * 256) + 2 * 480 + 2570


def test_resnet20_has_the_papers_depth_and_size():
    model = resnet20()
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 20
    assert count(model) == 269_722  # "0.27M" in table 6
    features = model.layer3(model.layer2(model.layer1(torch.randn(1, 16, 32, 32))))
    assert features.shape == (1, 64, 8, 8)


def test_shortcut_of_option_a_skips_pixels_and_pads_channels():
    shortcut = CifarResNet(8).layer2[0].shortcut
    assert list(shortcut.parameters()) == []
    x = torch.randn(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(shortcut(x), expected)
    assert isinstance(CifarResNet(14).layer2[1].shortcut, nn.Identity)


def test_a_block_adds_its_shortcut_before_the_last_relu():
    block = CifarResNet(8).layer2[0].eval()
    x = torch.randn(2, 16, 8, 8)
    convs = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)
    assert_close(block(x), (convs(x) + block.shortcut(x)).clamp_min(0))


@pytest.mark.parametrize("depth", [2, 18, 21, -4])
def test_depths_that_are_no_cifar_resnet_are_refused(depth):
    with pytest.raises(ValueError, match=rf"^depth must be 6n \+ 2 .* got {depth}$"):
        CifarResNet(depth)


@pytest.mark.parametrize(
    "make", [cnn4, resnet20, resnet50, lambda **k: build_model("torchvision:resnet18", **k)]
)
def test_counts_below_one_are_refused(make):
    with pytest.raises(ValueError, match=r"^num_classes must be at least 1, got 0$"):
        make(num_classes=0)
    with pytest.raises(ValueError, match=r"^in_channels must be at least 1, got -1$"):
        make(in_channels=-1)


# --- build_model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_models())
def test_the_zoo_builds_each_model_it_lists(name):
    model = build_model(f"zoo:{name}", num_classes=5, in_channels=2)
    assert model(torch.randn(1, 2, 32, 32)).shape == (1, 5)
    assert type(build_model(f"zoo:{name}")) in (CNN4, CifarResNet, torchvision.models.ResNet)


def test_torchvision_models_are_built_with_random_weights():
    model = build_model("torchvision:squeezenet1_1", num_classes=4, in_channels=3)
    assert isinstance(model, torchvision.models.SqueezeNet)
    assert model.classifier[1].out_channels == 4
    assert build_model("torchvision:SqueezeNet1_1").classifier[1].out_channels == 1000


def test_torchvision_backbones_are_not_downloaded(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    assert build_model("torchvision:lraspp_mobilenet_v3_large", num_classes=3) is not None


def test_torchvision_refuses_what_it_can_not_build():
    with pytest.raises(
        ValueError, match=r"^torchvision:resnet18 takes images of 3 channels, got in_channels=1: .*$"
    ):
        build_model("torchvision:resnet18", in_channels=1)
    with pytest.raises(
        ValueError, match=r"^unknown .*'torchvision:resnet19': close to it are resnet18, .*lists all$"
    ):
        build_model("torchvision:resnet19")
    with pytest.raises(
        ValueError, match=r"^unknown model 'torchvision:qqqq': torchvision.models.list_models\(\).*$"
    ):
        build_model("torchvision:qqqq")


@pytest.mark.parametrize(
    "source", ["cnn4", "", "net.py", "net.py:", "timm:resnet18", ":cnn4", "net.txt:f", "zoo:x:y"]
)
def test_other_sources_are_refused(source):
    with pytest.raises(
        ValueError,
        match=r"^unknown model .* wanted zoo:NAME \(cnn4, resnet20, resnet50\), .* PATH/FILE.py:FACTORY$",
    ):
        build_model(source)


def test_names_not_in_the_zoo_list_those_that_are():
    with pytest.raises(ValueError, match=r"^unknown model 'zoo:vgg': the zoo has cnn4, resnet20, resnet50$"):
        build_model("zoo:vgg")


@pytest.fixture
def net_file(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        """
from __future__ import annotations
import dataclasses
import functools
from torch import nn

@dataclasses.dataclass
class Config:
    width: int = 4

class Net(nn.Module):
    def __init__(self, num_classes=2, width=Config().width):
        super().__init__()
        self.fc = nn.Linear(width, num_classes)

def plain():
    return Net()

def channels_only(in_channels=9):
    return Net(width=in_channels)

def anything(**options):
    return Net(options["num_classes"], options["in_channels"])

def positional(num_classes=3, /):
    return Net(num_classes)

wide = functools.partial(Net, width=64)
ready = Net()
number = 3

def broken():
    raise RuntimeError("no luck")

def wrong():
    return {}

def _hidden():
    return Net()
"""
    )
    return file


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        ("Net", (5, 4)),
        ("plain", (2, 4)),
        ("channels_only", (2, 6)),
        ("anything", (5, 6)),
        ("positional", (3, 4)),
        ("wide", (5, 64)),
    ],
)
def test_a_factory_gets_what_its_signature_accepts(net_file, factory, shape):
    model = build_model(f"{net_file}:{factory}", num_classes=5, in_channels=6)
    assert model.fc.weight.shape == shape


def test_a_model_file_is_private_yet_its_models_pickle(net_file):
    sys.modules.pop("net", None)  # of another test
    path, modules = list(sys.path), set(sys.modules)
    model = build_model(f"{net_file}:Net")
    assert sys.path == path
    assert "net" not in sys.modules
    assert all(name.startswith("_tncompress_model_") for name in set(sys.modules) - modules)
    assert not (net_file.parent / "__pycache__").exists()
    assert torch.equal(pickle.loads(pickle.dumps(model)).fc.weight, model.fc.weight)
    assert type(build_model(f"{net_file}:Net")) is type(model)


def test_a_changed_model_file_is_run_anew(net_file):
    before = build_model(f"{net_file}:plain")
    net_file.write_text(net_file.read_text().replace("width: int = 4", "width: int = 8"))
    assert build_model(f"{net_file}:plain").fc.in_features == 8
    assert copy.deepcopy(before).fc.in_features == 4


def test_model_files_that_fail_say_so(net_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no model file .*absent.py$"):
        build_model(f"{tmp_path}/absent.py:Net")
    callables = "Config, Net, plain, channels_only, anything, positional, broken, wrong"
    for name in ("nothing", "number", "ready"):
        with pytest.raises(
            ValueError, match=rf"^.*net.py has no factory '{name}': its callables are {callables}$"
        ):
            build_model(f"{net_file}:{name}")
    with pytest.raises(TypeError, match=r"^.*net.py:wrong must return a torch.nn.Module, got dict$"):
        build_model(f"{net_file}:wrong")
    with pytest.raises(RuntimeError, match="no luck") as caught:
        build_model(f"{net_file}:broken")
    assert "net.py:broken" in caught.value.__notes__[0]


def test_a_model_file_that_can_not_be_run_leaves_no_module(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("import no_such_module_anywhere\n")
    modules = set(sys.modules)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere") as caught:
            build_model(f"{file}:f")
        assert "bad.py" in caught.value.__notes__[0]
    assert set(sys.modules) == modules
    (tmp_path / "no_such_module_anywhere.py").touch()
    with pytest.raises(ModuleNotFoundError) as caught:
        build_model(f"{file}:f")
    assert caught.value.__notes__[0].endswith(f"if PYTHONPATH={tmp_path} is set")
    (tmp_path / "empty.py").write_text("from torch.nn import Linear")
    with pytest.raises(ValueError, match=r"its callables are none$"):
        build_model(f"{tmp_path}/empty.py:f")


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cnn4, resnet20, Tied])
def test_saved_weights_come_back_bit_for_bit(make, tmp_path):
    model, other = make(), make()
    save_weights(model, tmp_path / "new" / "w.safetensors")
    load_weights(other, tmp_path / "new" / "w.safetensors")
    assert_close(state_of(other), state_of(model), rtol=0, atol=0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_loaded_tied_weights_stay_tied(tmp_path):
    model = Tied()
    save_weights(Tied(), tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert model.first.weight is model.second.weight


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(cnn4(), path)
    before = path.read_bytes()

    def full_disk(model, filename):
        open(filename, "wb").write(b"half")  # noqa: PTH123, SIM115
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_model", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_weights(cnn4(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_are_saved_as_safetensors_only(tmp_path):
    with pytest.raises(ValueError, match=r"^weights are saved as safetensors: .* got .*w.pt$"):
        save_weights(cnn4(), tmp_path / "w.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
def test_checkpoints_of_every_wrapping_are_read(prefix, key, tmp_path):
    model, other = cnn4(), cnn4()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert_close(state_of(other), state_of(model), rtol=0, atol=0)


def test_a_wrapped_model_keeps_its_prefix(tmp_path):
    wrapped, other = nn.ModuleDict({"module": cnn4()}), nn.ModuleDict({"module": cnn4()})
    save_weights(wrapped, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert_close(state_of(other), state_of(wrapped), rtol=0, atol=0)


def test_old_checkpoints_without_batch_counts_are_read(tmp_path):
    model, other = cnn4(), cnn4()
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert_close(state_of(other), state_of(model), rtol=0, atol=0)


def test_what_torch_renames_when_loading_is_read(tmp_path):
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    old = {"weight_g": torch.ones(2, 1), "weight_v": torch.eye(2, 3), "bias": torch.zeros(2)}
    torch.save(old, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert_close(model.weight.detach(), torch.eye(2, 3))


def test_weights_take_the_models_dtype_and_keep_its_parameters(tmp_path):
    save_weights(cnn4().half(), tmp_path / "w.safetensors")
    model = cnn4()
    parameters = list(model.parameters())
    load_weights(model, tmp_path / "w.safetensors")
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert model.fc.weight.dtype == torch.float32


def without_conv1(state):
    return {key: value for key, value in state.items() if key != "conv1.weight"}


MISFITS = {
    "a key missing": (without_conv1, r"1 keys missing \(conv1.weight\)"),
    "a key too many": (lambda state: {**state, "extra": torch.ones(1)}, r"1 unexpected \(extra\)"),
    "another head": (
        lambda state: {**state, "fc.weight": torch.ones(7, 256)},
        r"1 of another shape \(fc.weight \(7, 256\) for \(10, 256\)\)",
    ),
    "no tensor": (lambda state: {**state, "fc.bias": "x"}, r"1 of another shape \(fc.bias .*\)"),
    "another model": (
        lambda state: resnet20().state_dict(),
        r"18 keys missing \(conv2.weight, .*\); 108 unexpected \(layer1.0.conv1.weight, .*\); "
        r"6 of another shape \(conv1.weight \(16, 3, 3, 3\) for \(32, 1, 3, 3\), bn1.weight .*, ...\)",
    ),
    "nothing": (lambda state: {}, r"26 keys missing \(conv1.weight, bn1.weight, ...\)"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_of_another_architecture_are_refused_and_change_nothing(name, tmp_path):
    change, words = MISFITS[name]
    torch.save(dict(change(cnn4().state_dict())), tmp_path / "w.pt")
    model = cnn4()
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"^.*w.pt does not fit CNN4: {words}$"):
        load_weights(model, tmp_path / "w.pt")
    assert_close(state_of(model), before, rtol=0, atol=0)


def test_absent_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no weights file .*absent.pt$"):
        load_weights(cnn4(), tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match=r"^no weights file .*: it is a folder$"):
        load_weights(cnn4(), tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 50_000, -1])
@pytest.mark.parametrize(
    ("suffix", "words"), [("safetensors", "not a whole safetensors file"), ("pt", "is damaged")]
)
def test_truncated_weights_are_refused_in_one_line(suffix, words, kept, tmp_path):
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save(cnn4().state_dict(), path)
    else:
        save_weights(cnn4(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"^.*w.{suffix} .*{words}.*: fetch or save it again$"):
        load_weights(cnn4(), path)


@pytest.mark.parametrize(
    "garbage", [b"<html>not found</html>", b"version https://git-lfs", b"\x80\x02.", bytes(4000)]
)
def test_files_of_another_kind_are_refused_in_one_line(garbage, tmp_path):
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(garbage)
        with pytest.raises(ValueError, match=rf"^.*{name} (.*: fetch or save it again|is in truth .*)$"):
            load_weights(cnn4(), tmp_path / name)


def test_pickled_objects_are_refused_with_advice(tmp_path):
    for content, words in (
        (cnn4(), "tncompress.zoo.CNN4"),
        ({"state_dict": cnn4().state_dict(), "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
    ):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(
            ValueError, match=rf"^.*w.pt holds a pickled {words}, .* save model.state_dict\(\).*$"
        ):
            load_weights(cnn4(), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {0: torch.ones(2)}])
def test_checkpoints_without_a_state_dict_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"^.*w.pt holds a \w+, wanted a state dict \(name -> tensor\)$"):
        load_weights(cnn4(), tmp_path / "w.pt")
