"""Exported programs take batches (and images) of any size, and compute what the model computes."""

import copy

import pytest
import torch
from conftest import FORMATS, GEOMETRIES
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.layers import TNConv

pytestmark = pytest.mark.usefixtures("unchecked", "quick_cp")  # checks of signatures are not to be traced

SPEC = {"default": {"format": "tucker", "rank": {"fixed": 3}}}
PAIRS = [
    ("svd", "linear"), ("mps-mixed", "1d-same-even-circular"), ("tucker", "2d-stride"),
    ("svd-kw", "2d-reflect"), ("cp", "2d-grouped"), ("mps", "2d-same-even-dilated"),
    ("tucker-all", "3d-anisotropic"),
    ("cp-merged", "2d-transposed"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_layers_stripped_or_not_take_any_batch(name, kind):
    format, geometry = FORMATS[name], GEOMETRIES[kind]
    ranks = tuple(-(-most // 2) for most in format.max_ranks(geometry.kernel_shape))
    layer = TNConv.from_dense(geometry.layer(torch.float32), format, ranks)
    x = geometry.input(torch.float32)
    for model in (nn.Sequential(layer), tnc.strip(layer)):
        run = tnc.export_program(model, x[:1]).module()
        for size in (1, 2, 5):
            batch = torch.randn(size, *x.shape[1:])
            assert_close(run(batch), layer(batch), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def small():
    return tnc.compress(tnc.build_model("zoo:resnet20", in_channels=1), SPEC)


@pytest.mark.parametrize("stripped", [False, True], ids=["compressed", "stripped"])
def test_a_network_takes_images_of_any_size(small, stripped, tmp_path):
    small.train()
    before = copy.deepcopy(small.state_dict())
    model = tnc.strip(small) if stripped else small
    path = tmp_path / "small.pt2"
    tnc.export_program(model, torch.randn(1, 1, 28, 28), path=path, dynamic_size=True)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())
    run = torch.export.load(path).module()
    small.eval()
    for shape in ((1, 1, 28, 28), (3, 1, 40, 33)):
        x = torch.randn(shape)
        assert_close(run(x), small(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(FileExistsError):
        tnc.export_program(model, torch.randn(1, 1, 28, 28), path=path, overwrite=False)


class Two(nn.Module):
    """Two inputs, by name; a mapping of outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 8, 3), nn.Linear(6, 8)

    def forward(self, x, *, y, scale=2):
        return {"sum": self.a(x).mean(2) + scale * self.b(y), "list": [self.a(x)]}


def test_inputs_may_have_names_and_outputs_may_be_nested():
    model = tnc.compress(nn.Sequential(Two()), SPEC | {"keep_dense": []})[0]
    run = tnc.export_program(model, {"x": torch.randn(1, 4, 9), "y": torch.randn(1, 6)}).module()
    x, y = torch.randn(4, 4, 9), torch.randn(4, 6)
    assert_close(run(x=x, y=y), model(x, y=y))


class Batched(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(36, 3)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Moody(nn.Module):
    """Another result whenever it is traced."""

    def forward(self, x):
        return x * (2 if torch.compiler.is_exporting() else 1)


def test_what_does_not_export_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"can't export Batched with a free batch \(.*does its forward dep"):
        tnc.export_program(Batched(), torch.randn(2, 4))
    with pytest.raises(
        ValueError, match=r"can't export Flat with a free batch and image size .*: try without"
    ):
        tnc.export_program(Flat(), torch.randn(1, 1, 6, 6), dynamic_size=True)
    tnc.export_program(Flat(), torch.randn(1, 1, 6, 6))
    with pytest.raises(ValueError, match="output is off by 1, wanted at most 1e-05"):
        tnc.export_program(Moody(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="tensors with a batch axis"):
        tnc.export_program(Flat(), {"x": 3})
