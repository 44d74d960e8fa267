"""Saving, loading and ONNX: what comes back is what went in, and what was damaged is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.export import MANIFEST, WEIGHTS
from tncompress.manifest import checksum

SOURCE = {"source": "zoo:cnn4", "num_classes": 10, "in_channels": 1}


def small_model(format="mps", dtype=torch.float32):
    torch.manual_seed(0)
    model = tnc.build_model("zoo:cnn4").to(dtype).eval()
    return tnc.compress(model, {"default": {"format": format, "rank": {"params_ratio": 0.2}}})


class Shared(nn.Module):
    """One convolution under two names, another whose weight is tied to a third's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = self.a
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 8, 3, padding=1)
        self.d.weight = self.c.weight
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(self.d(self.c(self.b(self.a(self.first(x))))))


@pytest.mark.parametrize("format", ["svd", "mps", "tucker", "cp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_model_is_bit_equal(tmp_path, format, dtype):
    small = small_model(format, dtype)
    tnc.save(small, tmp_path / "m", source=SOURCE)
    loaded = tnc.load(tmp_path / "m")
    x = torch.randn(4, 1, 28, 28, dtype=dtype)
    assert torch.equal(loaded(x), small(x))
    assert loaded.tncompress_plan == small.tncompress_plan
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in small.parameters()]


def test_a_fresh_process_loads_the_same(tmp_path):
    small = small_model()
    tnc.save(small, tmp_path / "m", source=SOURCE)
    x = torch.randn(4, 1, 28, 28)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import torch, tncompress as tnc, sys\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "y = tnc.load(sys.argv[1] + '/m')(torch.load(sys.argv[1] + '/x.pt'))\n"
        "torch.save(y, sys.argv[1] + '/y.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), small(x))


def test_shared_modules_and_tied_weights_survive(tmp_path):
    small = tnc.compress(Shared().eval(), {"default": {"format": "svd", "rank": {"fixed": 2}}})
    tnc.save(small, tmp_path / "m")
    loaded = tnc.load(tmp_path / "m", Shared)
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(loaded(x), small(x))
    assert loaded.a is loaded.b
    assert loaded.c.weight is loaded.d.weight


@pytest.mark.parametrize("how", ["instance", "factory", "name"])
def test_the_architecture_can_be_given(tmp_path, how):
    small = small_model()
    tnc.save(small, tmp_path / "m")
    model = {
        "instance": tnc.build_model("zoo:cnn4"),
        "factory": lambda: tnc.build_model("zoo:cnn4"),
        "name": "zoo:cnn4",
    }[how]
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(tnc.load(tmp_path / "m", model)(x), small(x))
    if how == "instance":
        assert isinstance(model.conv2, nn.Conv2d)


def test_a_recorded_file_is_not_run_unasked(tmp_path):
    bomb = tmp_path / "bomb.py"
    bomb.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(): pass\n")
    tnc.save(small_model(), tmp_path / "m", source={"source": f"{bomb}:make"})
    with pytest.raises(
        ValueError, match=r"was made from .*bomb.py:make, .* pass model= .*--model .*bomb.py:make\)$"
    ):
        tnc.load(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


def damage_bytes(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-5] ^= 1
    (folder / WEIGHTS).write_bytes(raw)


def edit_manifest(**changes):
    def edit(folder):
        manifest = json.loads((folder / MANIFEST).read_text()) | changes
        (folder / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))

    return edit


DAMAGE = {
    "a flipped bit": (damage_bytes, "checksum differs"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:100]), "checksum differs"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "holds no saved model"),
    "half a manifest": (lambda f: (f / MANIFEST).write_text('{"format_ver'), "is damaged"),
    "a newer version": (edit_manifest(format_version=99), "version 99"),
    "a missing key": (lambda f: (f / MANIFEST).write_text('{"format_version": 1}'), "'source' is missing"),
    "layers that are none": (edit_manifest(layers=[{"names": ["conv2"]}]), "layers.0.format' is missing"),
    "an unknown layer": (edit_manifest(layers=[]), "does not fit"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_line(tmp_path, kind):
    harm, words = DAMAGE[kind]
    tnc.save(small_model(), tmp_path / "m", source=SOURCE)
    harm(tmp_path / "m")
    with pytest.raises((ValueError, OSError), match=words) as caught:
        tnc.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused(tmp_path):
    tnc.save(small_model(), tmp_path / "m")
    with pytest.raises(ValueError, match="does not"):
        tnc.load(tmp_path / "m", "zoo:resnet20")


def test_a_folder_in_the_way_is_kept(tmp_path):
    small = small_model()
    tnc.save(small, tmp_path / "m", source=SOURCE)
    before = (tmp_path / "m" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="already holds a result"):
        tnc.save(small_model("cp"), tmp_path / "m")
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == before
    tnc.save(small_model("cp"), tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / WEIGHTS).read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other files"):
        tnc.save(small_model(), tmp_path / "photos", overwrite=True)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="is a file"):
        tnc.save(small_model(), tmp_path / "file", overwrite=True)
    assert (tmp_path / "photos" / "one.jpg").read_text() == "precious"


def test_a_failure_leaves_the_old_result(tmp_path, monkeypatch):
    tnc.save(small_model(), tmp_path / "m", source=SOURCE)
    before = shutil.copytree(tmp_path / "m", tmp_path / "copy")
    monkeypatch.setattr("tncompress.manifest.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tnc.save(small_model("cp"), tmp_path / "m", overwrite=True)
    for name in (MANIFEST, WEIGHTS):
        assert (tmp_path / "m" / name).read_bytes() == (before / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "m"]


def test_a_place_that_cannot_be_written_is_told():
    with pytest.raises(OSError, match="can't be written"):
        tnc.save(small_model(), "/proc/none/m")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["svd", "mps", "tucker", "cp"])
def test_onnx_agrees_with_torch(tmp_path, format):
    import onnxruntime

    small = small_model(format)
    error = tnc.export_onnx(small, tmp_path / "m.onnx", torch.randn(1, 1, 28, 28))
    assert error < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for batch in (1, 5):
        x = torch.randn(batch, 1, 28, 28)
        (y,) = session.run(None, {"input": x.numpy()})
        assert_close(torch.from_numpy(y), small(x).detach(), rtol=1e-3, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_onnx_that_is_off_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tncompress.onnx_export._onnx_error", lambda *_: 0.5)
    with pytest.raises(ValueError, match=r"off by 0\.5"):
        tnc.export_onnx(small_model(), tmp_path / "m.onnx", torch.randn(1, 1, 28, 28))
    assert list(tmp_path.iterdir()) == []


def test_what_the_first_release_saved_still_loads():
    """Its factors have the legs of the network, its manifest has no checksum, its geometries no groups."""
    folder = Path(__file__).parent / "files" / "saved-version-1"
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Conv2d(6, 6, 3, stride=(1, 2), padding=(0, 1), padding_mode="reflect"),
        nn.Conv2d(6, 5, (1, 3), bias=False),
        nn.Flatten(),
        nn.Linear(105, 4),
    )
    small = tnc.load(folder, model)
    assert [type(layer).__name__ for layer in small] == ["Conv2d", "TNConv", "TNConv", "Flatten", "TNConv"]
    wanted = safetensors.torch.load_file(folder / "expected.safetensors")["output"]
    assert_close(small(torch.linspace(-1, 1, 360).reshape(2, 2, 9, 10)), wanted)


@pytest.mark.parametrize(
    "kind", ["depthwise", "subclasses", "parametrized", "compressed", "grouped", "transposed"]
)
@pytest.mark.parametrize("format", ["mps", "cp"])
def test_layers_of_every_kind_are_loaded_onto_the_dense_model(tmp_path, kind, format):
    made = {
        "depthwise": lambda: nn.Conv2d(6, 12, 5, groups=6),
        "subclasses": lambda: type("Mine", (nn.Conv2d,), {})(6, 8, 3),
        "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3)),
        "compressed": lambda: tnc.TNConv.from_dense(nn.Conv2d(6, 8, 3), tnc.SVD(), (4,)),
        "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
        "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2, output_padding=1),
    }

    def model():
        return nn.Sequential(made[kind](), nn.ReLU()).eval()

    include = [kind] if kind in ("depthwise", "subclasses", "parametrized", "compressed") else []
    settings = {"format": format, "rank": {"fixed": 1}}
    small = tnc.compress(
        model(), {"default": settings, "keep_dense": [], "include": include, "allow_larger": True}
    )
    assert isinstance(small[0], tnc.TNConv)
    tnc.save(small, tmp_path / "m")
    x = torch.randn(2, 6, 9, 8)
    assert torch.equal(tnc.load(tmp_path / "m", model)(x), small(x))
