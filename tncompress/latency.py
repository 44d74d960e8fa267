"""The latency of a layer: measured at the shapes of its calls, or from a model of the machine.

The model is that of :mod:`tncompress.machine`, fitted to this device where that was done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from tncompress.contraction import chain_calls, chain_pixels, run_chain
from tncompress.costs import Calls, samples_and_lengths, stages_now
from tncompress.discovery import Layer
from tncompress.formats import Stage
from tncompress.geometry import ConvGeometry
from tncompress.machine import Machine, fitted_machine, terms, warn_once
from tncompress.measure import latencies
from tncompress.timing import samples_in_turns

REPEATS, SECONDS = 3, 0.004
"""How often a chain is measured, and for about how long each time; the median counts."""


class Clock:
    """Seconds that layers and models take in a forward pass; each kind of chain is looked at once.

    From the model they are those of as many threads as torch has where the clock is made: layers are weighed
    in threads that have one core each.
    """

    def __init__(self, source: Literal["measurement", "model"]) -> None:
        self.source, self._threads = source, torch.get_num_threads()
        self._known: dict[Any, float] = {}

    def chain(self, layer: Layer, stages: Sequence[Stage], calls: Calls) -> float:
        """Return the seconds of all calls of ``layer`` if it ran as ``stages``."""
        geometry, weight = layer.geometry, layer.weight()
        total = 0.0
        for shape in calls:
            key = geometry, tuple(stages), shape, weight.dtype, weight.device
            if key not in self._known:
                self._known[key] = (
                    modelled(geometry, stages, shape, _machine(weight, self._threads))
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


def _machine(weight: torch.Tensor, threads: int) -> Machine:
    """Return the machine that was fitted to where ``weight`` is; without one, warn that another stands in."""
    found = fitted_machine(weight.device, weight.dtype, threads)
    if found is None:
        warn_once(
            "latency_from 'model': no speeds were fitted to this machine, those of another stand in and may "
            "be far off; run tncompress bench --calibrate once, or take latency_from 'measurement'"
        )
    return found or Machine()


def modelled(
    geometry: ConvGeometry, stages: Sequence[Stage], shape: tuple[int, ...], machine: Machine | None = None
) -> float:
    """Return the seconds that the model of the machine gives a chain on an input of this shape."""
    samples, lengths = samples_and_lengths(shape, geometry.ndim)
    total, machine = 0.0, machine or Machine()
    for stage, each in zip(stages, chain_pixels(geometry, stages, lengths), strict=True):
        into, *window = stage.shape[1:]
        total += machine.seconds(
            terms(
                pixels=samples * each,
                groups=geometry.groups * stage.groups,
                into=into,
                out=stage.shape[0] // stage.groups,
                window=math.prod(window),
            )
        )
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
    with torch.inference_mode():
        x = torch.randn(shape, dtype=dtype, device=device)
        sizes = [stage.stored_shape(geometry.groups) for stage in sorted(stages, key=lambda s: s.factor)]
        stored = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
        calls = chain_calls(geometry, stages)
        run = partial(run_chain, x, stored, stages, calls, None, groups=geometry.groups)
        return median(*samples_in_turns([run], seconds=REPEATS * SECONDS, rounds=REPEATS))
