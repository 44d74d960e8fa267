"""What a convolution does besides its kernel: stride, padding, dilation, groups."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

LINEAR_AND_CONVS: dict[type[nn.Module], int] = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
"""The layer classes that can be compressed, with their number of spatial dimensions."""


@dataclass(frozen=True)
class ConvGeometry:
    """The geometry of a convolution over ``ndim`` spatial axes; a linear layer has none.

    ``padding`` holds one ``(before, after)`` pair of pixels for each axis, so that ``"same"`` with an even
    kernel has a place; ``padding_mode`` is torch's (``zeros``, ``reflect``, ``replicate``, ``circular``).
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, layer: nn.Module) -> ConvGeometry:
        """Return the geometry of an ungrouped ``nn.Conv1d``, ``Conv2d``, ``Conv3d`` or ``nn.Linear``."""
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features, layer.out_features)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or layer.groups != 1:
            raise ValueError(f"wanted an ungrouped convolution or a linear layer, got {layer}")
        return cls.shape_of(layer)

    @classmethod
    def shape_of(cls, layer: Any) -> ConvGeometry:
        """Return the geometry of a convolution as if it had one group."""
        return cls(
            layer.in_channels,
            layer.out_channels,
            tuple(layer.kernel_size),
            tuple(layer.stride),
            _padding_pairs(layer),
            tuple(layer.dilation),
            layer.padding_mode,
        )

    @property
    def ndim(self) -> int:
        """The number of spatial axes, 0 to 3."""
        return len(self.kernel_size)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape ``(out, in, *spatial)`` of the dense kernel."""
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def output_length(self, length: int, axis: int) -> int:
        """Return how long an axis of ``length`` pixels is after the convolution."""
        span = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (length + sum(self.padding[axis]) - span) // self.stride[axis] + 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ConvGeometry:
        """Return the geometry that :meth:`to_dict` described, also after a trip through JSON."""
        made = dict(fields)
        for name in ("kernel_size", "stride", "dilation"):
            made[name] = tuple(made[name])
        made["padding"] = tuple((before, after) for before, after in made["padding"])
        return cls(**made)

    def build_dense(self, *, bias: bool, **factory: Any) -> nn.Module:
        """Return a fresh dense layer of this geometry (``factory``: ``device`` and ``dtype``).

        Padding that differs before and after an axis is written as ``"same"``, the one way in which torch
        can express it.
        """
        if self.ndim == 0:
            return nn.Linear(self.in_channels, self.out_channels, bias=bias, **factory)
        conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[self.ndim]
        even = all(before == after for before, after in self.padding)
        padding: Any = tuple(before for before, _ in self.padding) if even else "same"
        return conv(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            bias=bias,
            padding_mode=self.padding_mode,
            **factory,
        )


def _padding_pairs(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    if layer.padding == "valid":
        return ((0, 0),) * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((pad, pad) for pad in layer.padding)  # type: ignore[misc]
