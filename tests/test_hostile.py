"""Folders made to harm whoever loads them: one line each, nothing run, and no memory taken for it."""

import hashlib
import json
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn

import tncompress as tnc
from tncompress.export import MANIFEST, WEIGHTS
from tncompress.manifest import checksum
from tncompress.weights import Unfilled, fill_weights, load_weights

ROOM = 192 * 2**20
"""What a refusal may ask for, beside a JSON of 60 MB that it has to read; a model of 1 TB needs more."""


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    spec = {"default": {"format": "svd", "rank": {"fixed": 2}}, "keep_dense": []}
    tnc.save(tnc.compress(network().eval(), spec), tmp_path / "m")
    return tmp_path / "m"


def sealed(folder, change):
    """Change the manifest as someone would who knows how its checksums are made."""
    manifest = json.loads((folder / MANIFEST).read_text())
    raw = (folder / WEIGHTS).read_bytes()
    manifest |= {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def put_pickle(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(folder.parent / "ran")))
    sealed(folder, lambda manifest: None)


def leave_the_folder(folder):
    (folder / WEIGHTS).rename(folder.parent / "other.safetensors")
    (folder / WEIGHTS).write_bytes((folder.parent / "other.safetensors").read_bytes())
    sealed(folder, lambda manifest: manifest.update(weights="../other.safetensors"))


def many_values(folder):
    (folder / MANIFEST).write_text('{"format_version": 2, "layers": [' + "[]," * 20_000_000 + "[]]}")


def deep_values(folder):
    (folder / MANIFEST).write_text('{"format_version": 2, "layers": ' + "[" * 60_000_000)


def larger_layer(folder):
    """A layer of 1 TB, in the manifest alone."""

    def change(manifest):
        geometry = manifest["layers"][1]["geometry"]
        geometry |= {"in_channels": 2**16, "out_channels": 2**16, "kernel_size": [8, 8]}
        manifest["layers"][1]["ranks"] = [2**16]

    sealed(folder, change)


def larger_source(folder):
    sealed(folder, lambda manifest: manifest.update(source={"source": "zoo:cnn4", "num_classes": 10**9}))


def larger_tensor(folder):
    """Weights whose header promises 1 TB."""
    raw = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    name = next(key for key in header if key.endswith("weight") or "factors" in key)
    header[name] |= {"shape": [2**19, 2**19], "data_offsets": [0, 2**40]}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    sealed(folder, lambda manifest: None)


def longer_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + b"{" + bytes(100))
    sealed(folder, lambda manifest: None)


def other_bits(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-3] ^= 4
    (folder / WEIGHTS).write_bytes(raw)


HOSTILE = {
    "a pickle": (put_pickle, "is in truth a pickle, which could run any code"),
    "a path out": (leave_the_folder, "a path that may leave the folder is not followed"),
    "20 million values": (many_values, "stands for more than 1000000 values"),
    "60 million levels": (deep_values, "stands for more than 1000000 values"),
    "a layer of 1 TB": (larger_layer, r"layer '1' was saved for ConvGeometry\(in_channels=65536"),
    "a model of 1 TB": (larger_source, "is far too large for"),
    "a tensor of 1 TB": (larger_tensor, "is not a whole safetensors file"),
    "a header of 1 TB": (longer_header, "is not a whole safetensors file"),
    "a wrong checksum": (other_bits, "is damaged, or holds another model's weights: its checksum differs"),
}


@pytest.fixture
def little_room():
    """No more address space than ``ROOM``: what is asked for counts, used or not."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_one_line_and_takes_no_memory(saved, kind, little_room):
    harm, words = HOSTILE[kind]
    harm(saved)
    large_text = (saved / MANIFEST).stat().st_size
    model = None if kind == "a model of 1 TB" else network
    tracemalloc.start()
    try:
        little_room()
        with pytest.raises((ValueError, OSError), match=words) as caught:
            tnc.load(saved, model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert peak < 3 * large_text + 8 * 2**20
    assert not (saved.parent / "ran").exists()


@pytest.mark.parametrize(
    "kind", [kind for kind in HOSTILE if kind not in ("a layer of 1 TB", "a model of 1 TB")]
)
def test_to_look_into_a_hostile_folder_is_no_more_dangerous(saved, kind, little_room):
    harm, words = HOSTILE[kind]
    harm(saved)
    little_room()
    with pytest.raises((ValueError, OSError), match=words) as caught:
        tnc.read_saved(saved, check=True)
    assert "\n" not in str(caught.value)


# --- reading weights in place -------------------------------------------------------------------------------


def test_what_is_read_in_place_is_what_was_saved(saved):
    """Tied, half, whole and scalar tensors; and what does not fit is told as by the slow way."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[3].weight = model[0].weight
    model.register_buffer("flags", torch.tensor([True, False]))
    tnc.save_weights(model, saved / "w.safetensors")
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    fresh[3].weight = fresh[0].weight
    fresh.register_buffer("flags", torch.tensor([False, False]))
    fill_weights(fresh, saved / "w.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    assert fresh[3].weight is fresh[0].weight
    for wrong in (nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(5, 4), *fresh[1:])):
        messages = []
        for read in (fill_weights, load_weights):
            with pytest.raises(ValueError, match="does not fit Sequential") as caught:
                read(wrong, saved / "w.safetensors")
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["zoo:resnet20", "torchvision:mobilenet_v3_small", "torchvision:swin_t"])
def test_a_model_made_to_be_loaded_differs_in_its_parameters_alone(name, tmp_path):
    torch.manual_seed(0)
    with Unfilled():
        made = tnc.build_model(name)
    usual = tnc.build_model(name)
    names = dict(usual.named_parameters())
    assert dict(made.named_parameters()).keys() == names.keys()
    assert all(p.requires_grad == names[key].requires_grad for key, p in made.named_parameters())
    for key, buffer in usual.named_buffers():
        assert torch.equal(made.get_buffer(key), buffer)
    tnc.save_weights(usual, tmp_path / "w.safetensors")
    fill_weights(made, tmp_path / "w.safetensors")
    for key, value in usual.state_dict().items():
        assert torch.equal(made.state_dict()[key], value)


COMMON = """
import sys, torch, tncompress as tnc
def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
def make():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(5000, 5000))
"""
SAVE = """
spec = {"default": {"format": "svd", "rank": {"fixed": 2}}, "keep_dense": ["2"]}
tnc.save(tnc.compress(make().eval(), spec), sys.argv[1])
"""
LOAD = """
before = peak()
model = tnc.load(sys.argv[1], make)
print(peak() - before)
"""


@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    for code in (SAVE, LOAD):
        line = [sys.executable, "-c", COMMON + code, str(tmp_path / "m")]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
    size = (tmp_path / "m" / WEIGHTS).stat().st_size
    assert size > 9e7
    assert size / 2 < int(done.stdout) < 1.5 * size
