"""What older releases saved still loads: a folder of each version of the format stays in ``tests/files``.

All numbers in them are small integers, in float64, so that outputs are the same to the last bit on every
machine. A folder is made by the release that writes its version: ``python tests/test_versions.py NAME``.
"""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import tncompress as tnc
from tncompress.layers import TNConv

FILES = Path(__file__).parent / "files"
FOLDERS = {"saved-version-1-sealed": 1, "saved-version-2": 2}
SPEC = {
    "default": {"format": "mps", "rank": {"fixed": 2}},
    "rules": [
        {"pattern": "1", "format": "tucker"},
        {"pattern": "2", "format": "cp"},
        {"pattern": "3", "format": {"name": "svd", "cut": "out kw|in kh"}},
        {"pattern": "4", "format": {"name": "tucker", "legs": "all"}},
    ],
    "keep_dense": [],
    "allow_larger": True,
}


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, groups=2, padding="same", bias=False),
        nn.ConvTranspose2d(4, 4, 2, stride=2, output_padding=1),
        nn.Conv2d(4, 4, (2, 3), dilation=(2, 1)),
        nn.BatchNorm2d(4, eps=0.0),
        nn.Flatten(1, 2),
        nn.Linear(9, 3),
    ).double()


def inputs():
    return torch.arange(2 * 2 * 5 * 8).reshape(2, 2, 5, 8).remainder(5).sub(2).double()


def whole_numbers(model):
    """Every weight a whole number from -2 to 2, and statistics that normalise without rounding."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape).double()
    model[5].running_mean.fill_(3.0)
    model[5].running_var.fill_(4.0)
    return model


def write(folder):
    torch.manual_seed(0)
    small = whole_numbers(tnc.compress(network().eval(), SPEC))
    shape = {"input_shape": (2, 5, 8)} if tnc.export.FORMAT_VERSION > 1 else {}
    tnc.save(small, folder, history={"accuracy": 0.5}, **shape)
    output = {"output": small(inputs()).detach()}
    safetensors.torch.save_file(output, folder / "expected.safetensors")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_each_version_loads_to_the_same_bits(name):
    folder = FILES / name
    small = tnc.load(folder, network)
    wanted = safetensors.torch.load_file(folder / "expected.safetensors")["output"]
    assert wanted.abs().max() > 100
    assert len(wanted.unique()) > 20
    assert torch.equal(small(inputs()), wanted)
    kinds = [str(layer.format) for layer in small if isinstance(layer, TNConv)]
    assert kinds == ["mps", "tucker", "cp", "svd(out kw|in kh)", "tucker(all)", "mps"]
    assert [layer.format for layer in small.tncompress_plan.compressed] == [
        layer.format for layer in small if isinstance(layer, TNConv)
    ]


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_in_it_is_read_without_its_weights(name):
    found = tnc.read_saved(FILES / name, check=True)
    assert (
        found.format_version == json.loads((FILES / name / "tncompress.json").read_text())["format_version"]
    )
    assert found.format_version == FOLDERS[name]
    assert len(found.layers) == 6
    assert found.params == sum(t.numel() for t in tnc.load(FILES / name, network).state_dict().values())
    assert found.input_shape == ((2, 5, 8) if found.format_version > 1 else None)
    assert ("torch" in found.versions) is (found.format_version > 1)


def test_there_is_a_folder_of_the_version_that_is_written(tmp_path):
    """What is written now has the keys that it had when the folder was made: a change is a new version."""
    version = tnc.export.FORMAT_VERSION
    (name,) = [name for name, number in FOLDERS.items() if number == version]
    write(tmp_path / "now")
    now, then = (
        json.loads((folder / "tncompress.json").read_text()) for folder in (tmp_path / "now", FILES / name)
    )
    assert now.keys() == then.keys()
    for mine, theirs in zip(now["layers"], then["layers"], strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["geometry"].keys() == theirs["geometry"].keys()
    assert now["plan"].keys() == then["plan"].keys()


if __name__ == "__main__":
    write(FILES / sys.argv[1])
