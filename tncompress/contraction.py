"""Ways to apply a tensor-network layer to an input, and what they cost in multiply-accumulates.

The chain runs one small convolution for each stage of the format. Every spatial axis belongs to exactly
one stage, and that stage alone pads, strides and dilates it: the others act on each pixel by itself, and
zero, reflected, replicated and wrapped padding all commute with that. Of a transposed convolution the stages
that own an axis are transposed, too, and crop or pad the output along it. Groups stay apart in every stage.
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
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class ConvCall:
    """The arguments of one convolution: everything but the input, the weight and the bias.

    ``pad`` is padding that the convolution can't do itself, in the order of ``torch.nn.functional.pad``.
    ``output_padding`` is that of a transposed convolution, and None for an ordinary one.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"
    output_padding: tuple[int, ...] | None = None

    @classmethod
    def of(cls, geometry: ConvGeometry, stage: Stage) -> ConvCall:
        """Return the call for a stage that owns some of the spatial axes of ``geometry``."""
        owned = [axis in stage.axes for axis in range(geometry.ndim)]
        stride = tuple(s if own else 1 for s, own in zip(geometry.stride, owned, strict=True))
        dilation = tuple(d if own else 1 for d, own in zip(geometry.dilation, owned, strict=True))
        pairs = [p if own else (0, 0) for p, own in zip(geometry.padding, owned, strict=True)]
        groups = geometry.groups * stage.groups
        before = tuple(pair[0] for pair in pairs)
        if geometry.transposed and stage.axes:
            extra = tuple(p if own else 0 for p, own in zip(geometry.output_padding, owned, strict=True))
            return cls(stride, before, dilation, groups, output_padding=extra)
        if geometry.padding_mode == "zeros" and all(left == right for left, right in pairs):
            return cls(stride, before, dilation, groups)
        pad = sum(reversed(pairs), ()) if any(sum(pair) for pair in pairs) else ()
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        return cls(stride, (0,) * geometry.ndim, dilation, groups, pad, mode)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x`` convolved with ``weight`` (out, in / groups, ...); linear, if there are no axes."""
        ndim = len(self.stride)
        if ndim == 0:
            return F.linear(x, weight, bias)
        if self.output_padding is not None:
            turned = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
            convolve, extra = _TRANSPOSED[ndim], self.output_padding
            return convolve(x, turned, bias, self.stride, self.padding, extra, self.groups, self.dilation)
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        return _CONVOLUTIONS[ndim](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def chain_calls(geometry: ConvGeometry, stages: Sequence[Stage]) -> tuple[ConvCall, ...]:
    """Return the convolution arguments of each stage."""
    return tuple(ConvCall.of(geometry, stage) for stage in stages)


def run_chain(
    x: Tensor,
    stored: Sequence[Tensor],
    stages: Sequence[Stage],
    calls: Sequence[ConvCall],
    bias: Tensor | None,
    *,
    groups: int = 1,
) -> Tensor:
    """Return the layer's output for ``x``, one convolution after another; the last adds the bias.

    ``stored`` holds each factor in the shape :meth:`Stage.stored_shape`.
    """
    last = len(stages) - 1
    for i, (stage, call) in enumerate(zip(stages, calls, strict=True)):
        x = call(x, stage.weight(stored[stage.factor], groups), bias if i == last else None)
    return x


def dense_macs(geometry: ConvGeometry, lengths: Sequence[int], samples: int = 1) -> int:
    """Return the multiply-accumulates of the dense layer on ``samples`` inputs of size ``lengths``."""
    pixels = list(lengths)
    if not geometry.transposed:
        pixels = [geometry.output_length(length, axis) for axis, length in enumerate(lengths)]
    return samples * geometry.num_weights * math.prod(pixels)


def chain_macs(
    geometry: ConvGeometry, stages: Sequence[Stage], lengths: Sequence[int], samples: int = 1
) -> int:
    """Return the multiply-accumulates of the chain on ``samples`` inputs of size ``lengths``."""
    pixels = chain_pixels(geometry, stages, lengths)
    each = (math.prod(stage.shape) * count for stage, count in zip(stages, pixels, strict=True))
    return samples * geometry.groups * sum(each)


def chain_pixels(geometry: ConvGeometry, stages: Sequence[Stage], lengths: Sequence[int]) -> list[int]:
    """Return at how many pixels each stage applies its weight: of its output, or transposed of its input."""
    found, lengths = [], list(lengths)
    for stage in stages:
        grown = list(lengths)
        for axis in stage.axes:
            grown[axis] = geometry.output_length(lengths[axis], axis)
        found.append(math.prod(lengths if geometry.transposed else grown))
        lengths = grown
    return found


def dense_stage(geometry: ConvGeometry) -> Stage:
    """Return the dense layer as a chain of one stage."""
    return Stage(0, geometry.kernel_shape, tuple(range(geometry.ndim)))


def macs_ratio(geometry: ConvGeometry, stages: Sequence[Stage]) -> float:
    """Return chain MACs / dense MACs on an input that is large against the kernel."""
    total, done = 0, 1
    everything = math.prod(geometry.stride)
    for stage in stages:
        step = math.prod(geometry.stride[axis] for axis in stage.axes)
        pixels = done if geometry.transposed else everything // (done * step)
        total += math.prod(stage.shape) * pixels
        done *= step
    return total / math.prod(geometry.kernel_shape)
