"""What a layer costs, as it is and as a chain: multiply-accumulates over its calls, and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from tncompress.contraction import chain_macs, dense_stage, macs_ratio
from tncompress.discovery import Layer
from tncompress.formats import Stage
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv

Calls = Sequence[tuple[int, ...]]
"""The shapes of the inputs that a layer gets in one forward pass."""


def stages_now(layer: Layer) -> tuple[Stage, ...]:
    """Return the chain that a layer runs as it is, dense or compressed."""
    return layer.module.stages if isinstance(layer.module, TNConv) else (dense_stage(layer.geometry),)


def layer_macs(layer: Layer, calls: Calls) -> int:
    """Return the multiply-accumulates of a layer as it is, dense or compressed, over its calls."""
    return stages_macs(layer.geometry, stages_now(layer), calls)


def stages_macs(geometry: ConvGeometry, stages: Sequence[Stage], calls: Calls) -> int:
    """Return the multiply-accumulates of a chain over the calls of its layer."""
    sizes = [samples_and_lengths(shape, geometry.ndim) for shape in calls]
    return sum(chain_macs(geometry, stages, lengths, samples) for samples, lengths in sizes)


def samples_and_lengths(shape: tuple[int, ...], ndim: int) -> tuple[int, tuple[int, ...]]:
    """Return the number of samples and the spatial size of an input, batched or not."""
    if ndim == 0:
        return math.prod(shape[:-1]), ()
    return (shape[0] if len(shape) == ndim + 2 else 1), shape[len(shape) - ndim :]


def excess_of_macs(layer: Layer, stages: Sequence[Stage], calls: Calls | None) -> str | None:
    """Return in words how a chain takes no fewer multiply-accumulates than the layer now, or None."""
    geometry, compressed = layer.geometry, isinstance(layer.module, TNConv)
    kind = "present" if compressed else "dense"
    more = macs_ratio(geometry, stages) / (macs_ratio(geometry, layer.module.stages) if compressed else 1)
    if more >= 1:
        return f"would take {more:.2f}x the {kind} MACs"
    if calls is not None:
        macs, now = stages_macs(geometry, stages, calls), layer_macs(layer, calls)
        if macs >= now > 0:
            return f"would take {macs / now:.2f}x the {kind} MACs on the example inputs"
    return None


def weight_bytes(layer: Layer) -> int:
    """Return the bytes of what a layer's weight takes now, as :attr:`Layer.params` counts it."""
    held = [p for name, p in layer.module.named_parameters() if name != "bias"]
    return sum(p.numel() * p.element_size() for p in held) or layer.weight().nbytes


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, each shared one counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
