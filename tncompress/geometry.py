"""What a convolution does besides its kernel: stride, padding, dilation, groups, and which way it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DENSE_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVS, *TRANSPOSED)
"""The layer classes that can be compressed."""

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class ConvGeometry:
    """The geometry of a convolution over ``ndim`` spatial axes; a linear layer has none.

    ``padding`` holds one ``(before, after)`` pair of pixels for each axis, so that ``"same"`` with an even
    kernel has a place; ``padding_mode`` is torch's (``zeros``, ``reflect``, ``replicate``, ``circular``).
    A ``transposed`` convolution takes its padding away from the output and adds ``output_padding``.

    >>> geometry = ConvGeometry.of(nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2))
    >>> geometry.kernel_shape, geometry.weight_shape, geometry.padding
    ((4, 3, 3, 3), (8, 3, 3, 3), ((1, 1), (1, 1)))
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        groups = self.groups >= 1 and self.in_channels % self.groups == self.out_channels % self.groups == 0
        sizes = (*self.kernel_size, *self.stride, *self.dilation)
        counts = (self.in_channels, self.out_channels, *sum(self.padding, ()), *self.output_padding)
        per_axis = [self.kernel_size, self.stride, self.padding, self.dilation]
        per_axis += [self.output_padding] if self.transposed else []
        axes = self.ndim <= 3 and all(len(values) == self.ndim for values in per_axis)
        if not (groups and axes and min(counts) >= 0 and min(sizes, default=1) >= 1):
            raise ValueError(f"no convolution has the geometry {self}")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"unknown padding mode {self.padding_mode!r}; wanted {', '.join(PADDING_MODES)}")

    @classmethod
    def of(cls, layer: nn.Module) -> ConvGeometry:
        """Return the geometry of a linear layer, a convolution or a transposed convolution (or its like)."""
        conv: Any = layer
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            return cls(conv.in_features, conv.out_features)
        if not (hasattr(layer, "kernel_size") and hasattr(layer, "transposed")):
            raise ValueError(f"wanted a convolution or a linear layer, got {layer}")
        return cls(
            conv.in_channels,
            conv.out_channels,
            tuple(conv.kernel_size),
            tuple(conv.stride),
            _padding_pairs(conv),
            tuple(conv.dilation),
            conv.padding_mode,
            conv.groups,
            conv.transposed,
            tuple(conv.output_padding) if conv.transposed else (),
        )

    @property
    def ndim(self) -> int:
        """The number of spatial axes, 0 to 3."""
        return len(self.kernel_size)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape ``(out, in, *spatial)`` of the kernel of one group; each group has one of its own."""
        return (self.out_channels // self.groups, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Torch's shape of the weight: ``(out, in / groups, ..)``, transposed ``(in, out / groups, ..)``."""
        out, inward, *spatial = self.kernel_shape
        first = (self.in_channels, out) if self.transposed else (self.out_channels, inward)
        return (*first, *spatial)

    @property
    def num_weights(self) -> int:
        """The number of entries of the weight."""
        return math.prod(self.weight_shape)

    @property
    def depthwise(self) -> bool:
        """Whether each input channel is a group of its own, so that no kernel mixes channels."""
        return self.groups > 1 and self.groups == self.in_channels

    def kernels(self, weight: Tensor) -> Tensor:
        """Return torch's ``weight`` as a stack of kernels ``(groups, out, in, *spatial)``: a view."""
        stack = weight.unflatten(0, (self.groups, -1))
        return stack.transpose(1, 2) if self.transposed else stack

    def weight(self, kernels: Tensor) -> Tensor:
        """Return torch's weight for a stack of kernels: the inverse of :meth:`kernels`."""
        return (kernels.transpose(1, 2) if self.transposed else kernels).flatten(0, 1)

    def output_length(self, length: int, axis: int) -> int:
        """Return how long an axis of ``length`` pixels is after the convolution."""
        span = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        if self.transposed:
            whole = (length - 1) * self.stride[axis] + span
            return whole - sum(self.padding[axis]) + self.output_padding[axis]
        return (length + sum(self.padding[axis]) - span) // self.stride[axis] + 1

    def output_padding_for(self, lengths: Sequence[int], output_size: Sequence[int]) -> tuple[int, ...]:
        """Return the output padding with which inputs of size ``lengths`` become ``output_size``.

        A transposed convolution with a stride can give any of ``stride`` sizes on an axis; others are a
        ``ValueError``.
        """
        found = []
        for axis, (length, wanted) in enumerate(zip(lengths, output_size, strict=True)):
            least = self.output_length(length, axis) - self.output_padding[axis]
            most = least + self.stride[axis] - 1
            if not least <= wanted <= most:
                raise ValueError(
                    f"wanted an output size from {least} to {most} on spatial axis {axis} for an input of "
                    f"{length}, got {wanted}"
                )
            found.append(wanted - least)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ConvGeometry:
        """Return the geometry that :meth:`to_dict` described, also after a trip through JSON."""
        made = dict(fields)
        for name in ("kernel_size", "stride", "dilation", "output_padding"):
            made[name] = tuple(made.get(name, ()))
        made["padding"] = tuple((before, after) for before, after in made["padding"])
        return cls(**made)

    def torch_arguments(self) -> dict[str, Any]:
        """Return the arguments (without ``bias``) that build torch's layer of this geometry.

        Padding that differs before and after an axis is written as ``"same"``, the one way in which torch
        can express it.
        """
        if self.ndim == 0:
            return {"in_features": self.in_channels, "out_features": self.out_channels}
        even = all(before == after for before, after in self.padding)
        arguments: dict[str, Any] = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": tuple(before for before, _ in self.padding) if even else "same",
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }
        return arguments | ({"output_padding": self.output_padding} if self.transposed else {})

    def build_dense(self, *, bias: bool, **factory: Any) -> nn.Module:
        """Return a fresh dense layer of this geometry (``factory``: ``device`` and ``dtype``)."""
        kind = nn.Linear if self.ndim == 0 else (TRANSPOSED if self.transposed else CONVS)[self.ndim - 1]
        return kind(**self.torch_arguments(), bias=bias, **factory)


def _padding_pairs(layer: Any) -> tuple[tuple[int, int], ...]:
    if layer.padding == "valid":
        return ((0, 0),) * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((pad, pad) for pad in layer.padding)
