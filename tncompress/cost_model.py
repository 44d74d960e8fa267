"""Which contraction a layer should run: by the model of the machine, or measured in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from tncompress.contraction import chain_calls, run_chain
from tncompress.costs import Calls
from tncompress.geometry import ConvGeometry
from tncompress.latency import modelled
from tncompress.layers import TNConv
from tncompress.measure import benchmark_classes
from tncompress.running import input_shapes
from tncompress.strategies import Contraction, all_contractions, merged_stages, merged_weights

M = TypeVar("M", bound=nn.Module)

WITHIN, MOST = 1.6, 5
"""Contractions that are measured: those that the model puts within this factor of its best, and how many."""

ROUNDS, SECONDS = 7, 0.02
"""How often each is measured in turns, and for how many seconds in all at least; the least time counts."""


def modelled_contraction(layer: TNConv, calls: Calls) -> Contraction:
    """Return the contraction that takes the least time on inputs of these shapes, by the model."""
    return shortlist(layer, calls, within=1.0, most=1)[0]


def shortlist(layer: TNConv, calls: Calls, *, within: float = WITHIN, most: int = MOST) -> list[Contraction]:
    """Return the contractions that may be the fastest by the model of the machine, its best first."""
    geometry, stages = layer.geometry, layer.stages
    seconds = {
        way: sum(modelled(geometry, merged_stages(stages, way.merged), shape) for shape in calls)
        for way in all_contractions(stages)
    }
    order = sorted(seconds, key=lambda way: seconds[way])
    return [way for way in order[:most] if seconds[way] <= within * seconds[order[0]]]


def measured_contraction(layer: TNConv, calls: Calls) -> Contraction:
    """Return the contraction of the shortlist, the chain or the kernel, that is the fastest here and now."""
    stages = layer.stages
    ways = shortlist(layer, calls)
    ways += [w for w in (Contraction.of("chain", stages), Contraction.of("kernel", stages)) if w not in ways]
    with torch.inference_mode():
        inputs = [_like(layer, shape) for shape in calls]
        runs = [_runner(layer, way, inputs) for way in ways]
    seconds = in_turns(runs)
    return ways[seconds.index(min(seconds))]


def choose_contractions_(
    model: M, example_inputs: Any, *, by: Literal["measurement", "model"] = "measurement"
) -> M:
    """Choose how each :class:`TNConv` of ``model`` runs on inputs like ``example_inputs``, and return it.

    Layers stay what they are and can be trained; see :meth:`TNConv.contract`. By ``"measurement"`` the
    promising ways are timed in turns; by ``"model"`` nothing is run but one forward pass for the shapes.
    """
    if by not in ("measurement", "model"):
        raise ValueError(f"contractions are chosen by 'measurement' or by 'model', got {by!r}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TNConv)}
    choose = measured_contraction if by == "measurement" else modelled_contraction
    chosen: dict[Any, Contraction] = {}
    for name, shapes in input_shapes(model, layers, example_inputs).items():
        layer = layers[name]
        if shapes:
            first = layer.factors[0]
            key = layer.geometry, layer.stages, tuple(shapes), first.dtype, first.device
            if key not in chosen:
                chosen[key] = choose(layer, sorted(set(shapes)))
            layer.contract(chosen[key])
    return model


def in_turns(
    runs: Sequence[Callable[[], Any]], *, seconds: float = SECONDS, rounds: int = ROUNDS
) -> list[float]:
    """Return the least seconds that each of ``runs`` took, measured in turns so that noise hits all alike.

    Noise only ever adds, so that it is the least that tells runs apart on a machine that does other things,
    too. What is slow in the first round by half again is not run any more.
    """
    Timer, _ = benchmark_classes()  # noqa: N806
    threads = torch.get_num_threads()
    timers = [Timer("run()", globals={"run": run}, num_threads=threads) for run in runs]
    with torch.inference_mode():
        least = [_once(timer, 1) for timer in timers]  # warm up
        least = [min(_once(timer, 1) for _ in range(2)) for timer in timers]
        counts = [max(1, int(seconds / rounds / max(time, 1e-7))) for time in least]
        for number in range(rounds):
            for k, timer in enumerate(timers):
                if number < 2 or least[k] < 1.5 * min(least):
                    least[k] = min(least[k], _once(timer, counts[k]))
    return least


def _once(timer: Any, count: int) -> float:
    return float(timer.timeit(count).median)


def _like(layer: TNConv, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a random input of this shape, with the layout of the layer's weights."""
    first = layer.factors[0]
    x = torch.randn(shape, dtype=first.dtype, device=first.device)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    laid_out = last and any(
        f.ndim == x.ndim and f.is_contiguous(memory_format=last) and not f.is_contiguous()
        for f in layer.factors
    )
    return x.to(memory_format=last) if laid_out else x


def _runner(layer: TNConv, way: Contraction, inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    geometry: ConvGeometry = layer.geometry
    stages = merged_stages(layer.stages, way.merged)
    weights = merged_weights(list(layer.factors), layer.stages, way.merged, geometry.groups)
    calls = chain_calls(geometry, stages)

    def run() -> None:
        for x in inputs:
            run_chain(x, weights, stages, calls, layer.bias, groups=geometry.groups)

    return run
