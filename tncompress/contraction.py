"""Ways to apply a tensor-network layer to an input, and what they cost in multiply-accumulates.

The chain runs one small convolution for each stage of the format. Every spatial axis belongs to exactly
one stage, and that stage alone pads, strides and dilates it: the others act on each pixel by itself, and
zero, reflected, replicated and wrapped padding all commute with that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from tncompress.formats.base import Stage
from tncompress.geometry import ConvGeometry

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class ConvCall:
    """The arguments of one convolution: everything but the input, the weight and the bias.

    ``pad`` is padding that the convolution can't do itself, in the order of ``torch.nn.functional.pad``.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"

    @classmethod
    def of(cls, geometry: ConvGeometry, axes: Sequence[int], groups: int = 1) -> ConvCall:
        """Return the call for a stage that owns the spatial ``axes`` of ``geometry``."""
        owned = [axis in axes for axis in range(geometry.ndim)]
        stride = tuple(s if own else 1 for s, own in zip(geometry.stride, owned, strict=True))
        dilation = tuple(d if own else 1 for d, own in zip(geometry.dilation, owned, strict=True))
        pairs = [p if own else (0, 0) for p, own in zip(geometry.padding, owned, strict=True)]
        if geometry.padding_mode == "zeros" and all(before == after for before, after in pairs):
            return cls(stride, tuple(before for before, _ in pairs), dilation, groups)
        pad = sum(reversed(pairs), ()) if any(sum(pair) for pair in pairs) else ()
        mode = _PAD_MODES[geometry.padding_mode]
        return cls(stride, (0,) * geometry.ndim, dilation, groups, pad, mode)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution of ``x`` with ``weight``; with no spatial axes, the linear map."""
        ndim = len(self.stride)
        if ndim == 0:
            return F.linear(x, weight, bias)
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        convolve = _CONVOLUTIONS[ndim]
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def chain_calls(geometry: ConvGeometry, stages: Sequence[Stage]) -> tuple[ConvCall, ...]:
    """Return the convolution arguments of each stage."""
    return tuple(ConvCall.of(geometry, stage.axes, stage.groups) for stage in stages)


def run_chain(
    x: Tensor,
    factors: Sequence[Tensor],
    stages: Sequence[Stage],
    calls: Sequence[ConvCall],
    bias: Tensor | None,
) -> Tensor:
    """Return the layer's output for ``x``, one convolution after another; the last adds the bias."""
    last = len(stages) - 1
    for i, (stage, call) in enumerate(zip(stages, calls, strict=True)):
        x = call(x, stage.weight(factors), bias if i == last else None)
    return x


def dense_macs(geometry: ConvGeometry, lengths: Sequence[int], samples: int = 1) -> int:
    """Return the multiply-accumulates of the dense layer on ``samples`` inputs of size ``lengths``."""
    outputs = [geometry.output_length(length, axis) for axis, length in enumerate(lengths)]
    return samples * math.prod(geometry.kernel_shape) * math.prod(outputs)


def chain_macs(
    geometry: ConvGeometry, stages: Sequence[Stage], lengths: Sequence[int], samples: int = 1
) -> int:
    """Return the multiply-accumulates of the chain on ``samples`` inputs of size ``lengths``."""
    total, lengths = 0, list(lengths)
    for stage in stages:
        for axis in stage.axes:
            lengths[axis] = geometry.output_length(lengths[axis], axis)
        total += samples * math.prod(stage.shape) * math.prod(lengths)
    return total


def macs_ratio(geometry: ConvGeometry, stages: Sequence[Stage]) -> float:
    """Return chain MACs / dense MACs on an input that is large against the kernel."""
    pending, total = list(geometry.stride), 0
    for stage in stages:
        for axis in stage.axes:
            pending[axis] = 1
        total += math.prod(stage.shape) * math.prod(pending)
    return total / math.prod(geometry.kernel_shape)
