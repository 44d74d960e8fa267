"""A stripped model computes the same, and needs nothing but torch."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import FORMATS, GEOMETRIES, applies, every_format_and_geometry
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress import MPS
from tncompress.layers import TNConv

SPEC = {"default": {"format": "mps", "rank": {"params_ratio": 0.4}}, "keep_dense": []}
WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tncompress", "jaxtyping"):
            raise ImportError(f"no {name} here")
sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(1)
try:
    import tncompress
except ImportError:
    pass
else:
    sys.exit("tncompress was found")
pairs = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.save([model(x) for model, x in pairs], sys.argv[2])
assert "tncompress" not in sys.modules
"""


def run_without_us(pairs, folder):
    """The outputs of pickled ``(model, input)`` pairs in a process that can't import the library."""
    torch.save(pairs, folder / "pairs.pt")
    arguments = [str(folder / "pairs.pt"), str(folder / "outputs.pt")]
    made = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True)
    assert not made.returncode, made.stderr
    return torch.load(folder / "outputs.pt")


def compressed(format, geometry, dtype=torch.float64):
    dense = geometry.layer(dtype)
    ranks = tuple(-(-most // 2) for most in format.max_ranks(geometry.kernel_shape))
    return TNConv.from_dense(dense, format, format.feasible(geometry.kernel_shape, ranks))


@every_format_and_geometry
def test_the_outputs_and_gradients_are_the_same(format, geometry, quick_cp):
    layer, x = compressed(format, geometry), geometry.input()
    plain = tnc.strip(layer)
    assert not any(isinstance(m, TNConv) for m in plain.modules())
    assert all(type(m).__module__.startswith("torch.nn") for m in plain.modules())
    if type(plain) is nn.Sequential:
        assert torch.equal(plain(x), layer(x))
        if all(stage.copies == 1 for stage in layer.stages):
            assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in layer.parameters())
    else:
        assert "its chain would hold" in plain.tncompress_strip[""]
        assert plain.weight.numel() == layer.geometry.num_weights
    assert_close(plain(x), layer(x), atol=1e-12, rtol=1e-12)
    inward = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((layer, plain), inward, strict=True):
        module(leaf).square().sum().backward()
    assert_close(inward[1].grad, inward[0].grad, atol=1e-10, rtol=1e-10)


def test_all_of_them_run_where_the_library_is_missing(tmp_path, quick_cp):
    pairs, wanted = [], []
    for name, format in FORMATS.items():
        for geometry in GEOMETRIES.values():
            if applies(name, geometry.kernel_shape):
                layer, x = compressed(format, geometry, torch.float32), geometry.input(torch.float32)
                pairs.append((tnc.strip(layer), x))
                wanted.append(layer(x).detach())
    outputs = run_without_us(pairs, tmp_path)
    assert len(outputs) > 500
    for output, expected in zip(outputs, wanted, strict=True):
        assert_close(output, expected, atol=1e-6 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["zoo:cnn4", "zoo:resnet20", "torchvision:resnet18"])
def test_whole_models_run_where_the_library_is_missing(name, tmp_path, unchecked):
    model = tnc.build_model(name, num_classes=10).eval()
    small = tnc.compress(model, {"default": {"format": "svd", "rank": {"fixed": 2}}})
    x = torch.randn(2, 1 if name.endswith("cnn4") else 3, 32, 32)
    before = copy.deepcopy(small.state_dict())
    plain = tnc.strip(small)
    (output,) = run_without_us([(plain, x)], tmp_path)
    assert_close(output, small(x).detach())
    assert not plain.training
    assert small.tncompress_plan is not None
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())
    kept = {key for key in small.state_dict() if ".factors." not in key}
    assert {key for key in kept if not key.endswith(".bias")} <= set(plain.state_dict())
    assert list(plain.tncompress_strip.values()) == ["svd: a chain of 2"] * len(plain.tncompress_strip)


class Block(nn.Module):
    """A layer under two names, a frozen one, and a hook."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.again = self.a
        self.down = nn.Conv2d(8, 12, 4, padding="same", bias=False)
        self.fc = nn.Linear(12, 20)

    def forward(self, x):
        return self.fc(self.down(self.again(self.a(x)).relu()).mean((2, 3)))


def test_sharing_modes_gradients_and_hooks_are_kept():
    model, calls = Block(), []
    small = tnc.compress(model, SPEC)
    small.down.eval()
    small.fc.factors[0].requires_grad_(False)
    handle = small.a.register_forward_hook(lambda *_: calls.append("after"))
    plain = tnc.strip(small)
    x = torch.randn(2, 8, 7, 7)
    assert torch.equal(plain(x), small(x))
    assert plain.a is plain.again
    assert (plain.training, plain.down.training, plain.down[0].training) == (True, False, False)
    assert [p.requires_grad for p in plain.fc.parameters()] == [False, True, True]
    assert calls == ["after"] * 4
    handle.remove()
    assert [key for key in plain.state_dict() if key.startswith("down")] == [
        f"down.{i}.weight" for i in range(4)
    ]
    assert [type(m).__name__ for m in plain.down.children()] == (
        ["Conv2d", "ZeroPad2d", "Conv2d", "ZeroPad2d", "Conv2d", "Conv2d"]
    )
    for p in plain.parameters():
        p.data.zero_()
    assert small(x).abs().sum() > 0


def test_a_chain_that_copies_more_than_it_saves_becomes_dense():
    dense = nn.Conv2d(16, 6, (1, 3), bias=False)
    large = TNConv.from_dense(dense, tnc.SVD("kw|rest"), (3,))
    plain = tnc.strip(large)
    assert type(plain) is nn.Conv2d
    assert plain.tncompress_strip == {"": "svd(kw|rest): dense: its chain would hold 432 weights, it has 288"}
    assert type(tnc.strip(TNConv.from_dense(dense, tnc.SVD("kw|rest"), (1,)))) is nn.Sequential


def test_frozen_factors_stay_frozen_where_their_memory_is_laid_out_anew():
    turned = TNConv.from_dense(nn.ConvTranspose2d(6, 6, 3), MPS(), (2, 4, 3))
    copied = TNConv.from_dense(nn.Conv2d(6, 8, (3, 5)), tnc.SVD("kw|rest"), (1,))
    for layer in (turned, copied):
        layer.factors.requires_grad_(False)
        plain = tnc.strip(layer)
        assert type(plain) is nn.Sequential
        assert [name for name, p in plain.named_parameters() if p.requires_grad] == [f"{len(plain) - 1}.bias"]


def test_tied_factors_stay_tied():
    model = nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2)))
    small = tnc.compress(model, SPEC)
    small[1].factors = small[0].factors
    plain = tnc.strip(small)
    assert all(a is b for a, b in zip(plain[0].parameters(), plain[1].parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_memory_format_are_kept(dtype):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).to(dtype).to(memory_format=torch.channels_last)
    plain = tnc.strip(tnc.compress(model, SPEC))
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in plain.parameters() if p.ndim == 4)
    assert plain(torch.randn(2, 8, 5, 5, dtype=dtype)).dtype == dtype


class Reader(nn.Module):
    """Reads a weight, a size, and nothing of the third layer."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(12, 10)
        self.sized = nn.ConvTranspose1d(6, 6, 3, stride=2)
        self.plain = nn.Linear(12, 10)
        nn.init.zeros_(self.plain.bias)

    def forward(self, x):
        y = self.sized(x, output_size=(12,)).mean(1)
        return nn.functional.linear(y, self.read.weight) + self.plain(y)


def test_what_is_read_by_its_parent_becomes_dense():
    small = tnc.compress(Reader(), SPEC)
    plain = tnc.strip(small)
    x = torch.randn(2, 6, 5)
    assert_close(plain(x), small(x))
    assert plain.tncompress_strip == {
        "read": "mps: dense: Reader uses its weight",
        "sized": "mps: dense: Reader uses its output_size",
        "plain": "mps: a chain of 2",
    }
    assert [type(m) for m in plain.children()] == [nn.Linear, nn.ConvTranspose1d, nn.Sequential]


def test_torchs_own_transformer_runs_on():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    small = tnc.compress(model, SPEC)
    x = torch.randn(2, 5, 16)
    assert_close(tnc.strip(small)(x), small(x))


def test_layers_named_become_dense():
    model = nn.Sequential(nn.Conv1d(6, 6, 3), nn.Conv1d(6, 8, 3))
    plain = tnc.strip(tnc.compress(model, SPEC), dense=["1"])
    assert [type(m) for m in plain] == [nn.Sequential, nn.Conv1d]
    assert plain.tncompress_strip["1"] == "mps: dense: named by '1'"
    with pytest.raises(ValueError, match="'2' matches no compressed layer"):
        tnc.strip(tnc.compress(model, SPEC), dense=["2"])


def test_what_can_not_be_stripped_is_refused(unchecked):
    model = nn.Sequential(nn.Conv1d(6, 6, 3), nn.ReLU())
    small = tnc.compress(model, SPEC)
    small[1].aside = [small[0]]
    with pytest.raises(ValueError, match=r"holds a tncompress\.layers\.TNConv in an attribute"):
        tnc.strip(small)
    small = tnc.compress(tnc.build_model("zoo:resnet20"), SPEC)
    small.layer1[0].register_forward_hook(print)
    with pytest.raises(ValueError, match=r"'layer1\.0' in CifarResNet has hooks"):
        tnc.strip(small)


FILE = """
from torch import nn
class Own(nn.Module):
    def __init__(self, shaky):
        super().__init__()
        self.conv, self.shaky = nn.Conv2d(4, 6, 3), shaky
    def forward(self, x):
        return self.conv(x) if not self.shaky or x.sum() > 0 else x
def steady():
    return Own(False)
def shaky():
    return Own(True)
"""


def test_models_from_a_file_of_a_factory(tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    small = tnc.compress(tnc.build_model(f"{tmp_path}/own.py:steady"), SPEC)
    x = torch.randn(1, 4, 5, 5)
    (output,) = run_without_us([(tnc.strip(small), x)], tmp_path)
    assert_close(output, small(x).detach())
    small = tnc.compress(tnc.build_model(f"{tmp_path}/own.py:shaky"), SPEC)
    with pytest.raises(ValueError, match="Own is of a class that only tncompress can load, and can't be tra"):
        tnc.strip(small)


def test_a_dense_model_is_copied():
    model = nn.Sequential(nn.Conv1d(6, 6, 3))
    plain = tnc.strip(model)
    assert plain is not model
    assert plain.tncompress_strip == {}
    assert b"tncompress" not in pickle.dumps(plain).replace(b"tncompress_strip", b"")
