"""Models by name: small CNNs, torchvision's models, factories in a file."""

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tncompress.factories import call_factory, split_factory

__all__ = [
    "CNN4",
    "CifarResNet",
    "build_model",
    "cnn4",
    "list_models",
    "resnet20",
    "resnet50",
]


class CNN4(nn.Module):
    """Four 3x3 convolutions (32, 64, 128, 256 channels) with BatchNorm, global pooling and a linear head."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1):
        super().__init__()
        _check_counts(num_classes=num_classes, in_channels=in_channels)
        self.conv1, self.bn1 = _conv3x3(in_channels, 32), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = _conv3x3(32, 64), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = _conv3x3(64, 128), nn.BatchNorm2d(128)
        self.conv4, self.bn4 = _conv3x3(128, 256), nn.BatchNorm2d(256)
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of images of at least 8x8 pixels."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = F.relu(self.bn4(self.conv4(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PaddedShortcut(nn.Module):
    """Every ``stride``-th pixel, with zero channels on both sides: a shortcut without parameters."""

    def __init__(self, extra_channels: int, stride: int):
        super().__init__()
        self.extra_channels, self.stride = extra_channels, stride

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """Return ``x``, smaller and with more channels."""
        before = self.extra_channels // 2
        return F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra_channels - before)
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
        self.conv2, self.bn2 = _conv3x3(out_channels, out_channels), nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else PaddedShortcut(out_channels - in_channels, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """Return the block's activations."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: widths 16, 32, 64, shortcuts of option A (He et al. 2016, section 4.2).

    ``depth`` counts the layers with weights, 6n + 2 for n blocks in each of the three stages.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}")
        _check_counts(num_classes=num_classes, in_channels=in_channels)
        self.conv1, self.bn1 = _conv3x3(in_channels, 16), nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cnn4(num_classes: int = 10, in_channels: int = 1) -> CNN4:
    """Return the plain four-layer CNN, with random weights.

    >>> import torch
    >>> cnn4(num_classes=7)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 7])
    """
    return CNN4(num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Return the CIFAR-style ResNet of depth 20, with random weights."""
    return CifarResNet(20, num_classes, in_channels)


def resnet50(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return torchvision's ResNet-50 with a stem for small images, with random weights.

    The first convolution is 3x3 without a stride, and nothing is pooled behind it.
    """
    from torchvision.models import resnet50 as build

    _check_counts(num_classes=num_classes, in_channels=in_channels)
    model = build(num_classes=num_classes)
    model.conv1 = _conv3x3(in_channels, 64)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as its other layers
    model.maxpool = nn.Identity()
    return model


_ZOO: dict[str, Callable[..., nn.Module]] = {"cnn4": cnn4, "resnet20": resnet20, "resnet50": resnet50}


def list_models() -> list[str]:
    """Return the names that ``build_model`` takes after ``zoo:``.

    >>> list_models()
    ['cnn4', 'resnet20', 'resnet50']
    """
    return sorted(_ZOO)


def build_model(source: str, *, num_classes: int | None = None, in_channels: int | None = None) -> nn.Module:
    """Return a model, not trained, from ``zoo:NAME``, ``torchvision:NAME`` or ``PATH/FILE.py:FACTORY``.

    ``num_classes`` and ``in_channels`` are passed on where given; a factory in a file gets those that it has
    parameters for. The file is run as a module with a private name, and must return an ``nn.Module``. Raises
    ``ValueError`` for an unknown name, ``FileNotFoundError`` for a file that is not there.

    >>> build_model("zoo:cnn4", num_classes=100).fc
    Linear(in_features=256, out_features=100, bias=True)
    """
    wanted = {"num_classes": num_classes, "in_channels": in_channels}
    given = {key: value for key, value in wanted.items() if value is not None}
    _check_counts(**given)
    place, _, name = source.rpartition(":")
    if place == "zoo":
        if name not in _ZOO:
            raise ValueError(f"unknown model {source!r}: the zoo has {', '.join(list_models())}")
        return _ZOO[name](**given)
    if place == "torchvision":
        return _from_torchvision(name, **given)
    if own := split_factory(source):
        return _from_file(*own, given)
    raise ValueError(
        f"unknown model {source!r}: wanted zoo:NAME ({', '.join(list_models())}), torchvision:NAME "
        "or PATH/FILE.py:FACTORY"
    )


# --- building -----------------------------------------------------------------------------------------------


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), *rest)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _from_torchvision(name: str, num_classes: int | None = None, in_channels: int | None = None) -> nn.Module:
    from torchvision import models

    if in_channels not in (None, 3):
        raise ValueError(
            f"torchvision:{name} takes images of 3 channels, got in_channels={in_channels}: "
            "repeat the channel, or give a factory of your own as FILE.py:FACTORY"
        )
    known = models.list_models()
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, n=4)
        near = f"close to it are {', '.join(close)}; " if close else ""
        raise ValueError(
            f"unknown model 'torchvision:{name}': {near}torchvision.models.list_models() lists all"
        )
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None  # its default is a download
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        return models.get_model(name, **options)
    except TypeError as error:
        raise ValueError(f"torchvision:{name} can not be built with num_classes={num_classes}") from error


def _from_file(path: Path, name: str, given: dict[str, int]) -> nn.Module:
    model = call_factory(path, name, "model", **given)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{path}:{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model
