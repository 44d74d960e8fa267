"""Frozen models of torchvision compute what they compute when they are not frozen."""

import pytest
import torch
import torchvision
from test_freeze import settled

import tncompress as tnc
from tncompress import cost_model, freezing
from tncompress.freezing import Frozen
from tncompress.layers import TNConv

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]

MODELS = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "vit_b_16": 224,
}
"""The image side of each: as small as the model takes."""

SPEC = {"default": {"format": "tucker", "rank": {"rank_fraction": 0.5}}, "keep_dense": []}
"""Formats and ranks are no matter here; the fit is not, so that the cheapest is taken."""


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Time nothing: the ways of one model are compared one by one, and its layers run as chains."""
    monkeypatch.setattr(cost_model, "in_turns", lambda runs, **_: [float(k) for k in range(len(runs))])
    monkeypatch.setattr(freezing, "in_turns", lambda runs, **_: [float(k) for k in range(len(runs))])


def build(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, **options)
    for module in model.modules():
        if isinstance(getattr(module, "layer_scale", None), torch.Tensor):
            torch.nn.init.normal_(module.layer_scale)  # 1e-6 as built, which would hide what its block does
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.05)  # the head of a ViT
    return settled(model)


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_freeze_a_model_computes_what_it_computes(name, compressed):
    model, side = build(name), MODELS[name]
    model = tnc.compress(model, SPEC) if compressed else model
    assert any(isinstance(m, TNConv) for m in model.modules()) is compressed
    x, other = torch.randn(2, 3, side, side), torch.randn(3, 3, side, side)
    with torch.inference_mode():
        wanted = model(x), model(other)
    maker = freezing._Maker(model, x, None)
    maker.choose(False)
    assert maker.traced
    for way in maker.ways(False):
        frozen = maker.make(way)
        assert maker.sound(frozen), f"{way}: {frozen.rel_error}"
        check(frozen, (x, other), wanted)


def check(frozen: Frozen, inputs, wanted):
    """Compare a frozen model, on the inputs that it was made with and on others."""
    with torch.inference_mode():
        for x, value in zip(inputs, wanted, strict=True):
            found = frozen(x)
            assert found.shape == value.shape
            assert float((found - value).norm()) <= 1e-4 * float(value.norm())
            assert float(value.std()) > 1e-6 * float(value.abs().max())  # it says something of the input
