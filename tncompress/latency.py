"""The latency of a layer: measured at the shapes of its calls, or from a model of the machine.

The model is a line for each convolution: a start, its products at the machine's speed for large matrices,
and its inputs and outputs at the speed of memory. Output channels count in sixteens, the width of a vector
register. On 2 cores of a Zen 4 in float32 it came within a tenth of the best of 110 ways to run a chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from tncompress.contraction import chain_calls, chain_pixels, run_chain
from tncompress.costs import Calls, samples_and_lengths, stages_now
from tncompress.discovery import Layer
from tncompress.formats import Stage
from tncompress.geometry import ConvGeometry
from tncompress.measure import benchmark_classes, latencies

START, PRODUCTS, MEMORY, DEPTHWISE, WIDTH = 10e-6, 180e9, 60e9, 25e9, 16
"""Of the model: seconds, operations a second, bytes a second (depthwise: for its outputs), channels."""

REPEATS, SECONDS = 3, 0.004
"""How often a chain is measured, and for how long at least each time; the median counts."""


class Clock:
    """Seconds that layers and models take in a forward pass; each kind of chain is looked at once."""

    def __init__(self, source: Literal["measurement", "model"]) -> None:
        self.source = source
        self._known: dict[Any, float] = {}

    def chain(self, layer: Layer, stages: Sequence[Stage], calls: Calls) -> float:
        """Return the seconds of all calls of ``layer`` if it ran as ``stages``."""
        geometry, weight = layer.geometry, layer.weight()
        total = 0.0
        for shape in calls:
            key = geometry, tuple(stages), shape, weight.dtype, weight.device
            if key not in self._known:
                self._known[key] = (
                    modelled(geometry, stages, shape)
                    if self.source == "model"
                    else measured(geometry, stages, shape, dtype=weight.dtype, device=weight.device)
                )
            total += self._known[key]
        return total

    def layer(self, layer: Layer, calls: Calls) -> float:
        """Return the seconds of all calls of ``layer`` as it is."""
        return self.chain(layer, stages_now(layer), calls)

    def model(self, model: nn.Module, example_inputs: Any, layers: float | int) -> float:
        """Return the seconds of the whole model, given those of its ``layers``.

        It is measured, and no less than its layers; from the model of the machine nothing else is known.
        """
        if self.source == "model":
            return layers
        return max(layers, latencies([model], example_inputs, seconds=0.5)[0].median)


def modelled(geometry: ConvGeometry, stages: Sequence[Stage], shape: tuple[int, ...]) -> float:
    """Return the seconds that the model of the machine gives a chain on an input of this shape."""
    samples, lengths = samples_and_lengths(shape, geometry.ndim)
    total = 0.0
    for stage, each in zip(stages, chain_pixels(geometry, stages, lengths), strict=True):
        pixels, groups = samples * each, geometry.groups * stage.groups
        out, into = stage.shape[0] // stage.groups, stage.shape[1]
        seconds = START + 4 * pixels * groups * (into + out) / MEMORY
        if groups > 1 and into == 1:
            seconds += 8 * pixels * groups * out / DEPTHWISE
        else:
            padded = -(-out // WIDTH) * WIDTH
            seconds += 2 * pixels * groups * math.prod(stage.shape[1:]) * padded / PRODUCTS
        total += seconds
    return total


def measured(
    geometry: ConvGeometry,
    stages: Sequence[Stage],
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Return the median seconds of a chain of this kind, with random weights, on an input of this shape."""
    Timer, _ = benchmark_classes()  # noqa: N806
    with torch.inference_mode():
        x = torch.randn(shape, dtype=dtype, device=device)
        sizes = [stage.stored_shape(geometry.groups) for stage in sorted(stages, key=lambda s: s.factor)]
        stored = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
        names = {
            "run": run_chain,
            "x": x,
            "stored": stored,
            "stages": stages,
            "calls": chain_calls(geometry, stages),
            "groups": geometry.groups,
        }
        timer = Timer(
            "run(x, stored, stages, calls, None, groups=groups)",
            globals=names,
            num_threads=torch.get_num_threads(),
        )
        timer.timeit(1)
        return median(timer.blocked_autorange(min_run_time=SECONDS).median for _ in range(REPEATS))
