"""Which contraction a layer should run: by the model of the machine, or measured in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tncompress.contraction import chain_calls, run_chain
from tncompress.costs import Calls
from tncompress.geometry import ConvGeometry
from tncompress.latency import modelled
from tncompress.layers import TNConv
from tncompress.machine import machine_for
from tncompress.prepacked import FrozenChain, FrozenConv, Way, own_weights
from tncompress.running import input_shapes
from tncompress.strategies import Contraction, all_contractions, merged_stages, merged_weights
from tncompress.timing import samples_in_turns

M = TypeVar("M", bound=nn.Module)

WITHIN, MOST = 1.6, 5
"""Contractions that are measured: those that the model puts within this factor of its best, and how many."""

ROUNDS, SECONDS, HOPELESS = 7, 0.02, 1.5
"""How often each is measured in turns, and for how many seconds in all about, and what is given up."""


def modelled_contraction(layer: TNConv, calls: Calls) -> Contraction:
    """Return the contraction that takes the least time on inputs of these shapes, by the model."""
    return shortlist(layer, calls, within=1.0, most=1)[0]


def shortlist(
    layer: TNConv,
    calls: Calls,
    *,
    within: float = WITHIN,
    most: int = MOST,
    dtype: torch.dtype | None = None,
) -> list[Contraction]:
    """Return the contractions that may be the fastest by the model of the machine, its best first."""
    geometry, stages, first = layer.geometry, layer.stages, layer.factors[0]
    machine = machine_for(first.device, dtype or first.dtype)
    seconds = {
        way: sum(modelled(geometry, merged_stages(stages, way.merged), shape, machine) for shape in calls)
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


Packing = dict[Any, Way]
"""For a kind of convolution and of input, the way in which it is the fastest."""


def choose_packing_(model: nn.Module, run: Callable[[], Any], known: Packing | None = None) -> None:
    """Make each frozen convolution of ``model`` run in its fastest way, as ``run`` calls them.

    The backend's own call takes some 25 us longer to begin than torch's, which small convolutions do not win
    back; a product of matrices begins sooner than a convolution. Each kind is measured once, and ``known``
    remembers it.
    """
    known = {} if known is None else known
    convolutions = [m for m in model.modules() if isinstance(m, FrozenConv) and len(m.ways) > 1]
    seen: dict[FrozenConv, tuple[tuple[int, ...], torch.dtype, bool]] = {}

    def listen(convolution: FrozenConv) -> Callable[..., Tensor]:
        def runs(x: Tensor, other: Tensor | None, may: bool) -> Tensor:
            if may and convolution.takes(x, other):
                seen.setdefault(convolution, (tuple(x.shape), x.dtype, other is not None))
            return FrozenConv.run(convolution, x, other, may)

        return runs

    for convolution in convolutions:
        convolution.__dict__["run"] = listen(convolution)
    try:
        run()
    finally:
        for convolution in convolutions:
            del convolution.__dict__["run"]
    for convolution, (shape, dtype, added) in seen.items():
        key = tuple(convolution.weight.shape), convolution.call, convolution.activation, shape, dtype, added
        if key not in known:
            known[key] = _fastest_way(convolution, shape, dtype, added=added)
        convolution.way = known[key]


def _fastest_way(convolution: FrozenConv, shape: tuple[int, ...], dtype: torch.dtype, *, added: bool) -> Way:
    x = torch.randn(shape, dtype=dtype)
    x = _channels_last(x) if convolution.call.stride else x
    ways = convolution.ways
    variants = [copy.copy(convolution) for _ in ways]
    for variant, way in zip(variants, ways, strict=True):
        variant.way = way
    with torch.inference_mode():
        other = torch.randn_like(convolution.run(x, None, True)) if added else None
        seconds = in_turns([partial(each.run, x, other, True) for each in variants])
    return ways[seconds.index(min(seconds))]


def fastest_chain(
    layer: TNConv, calls: Calls, *, dtype: torch.dtype | None = None, packing: Packing | None = None
) -> tuple[Contraction, float, float]:
    """Return the contraction with which a frozen layer is the fastest, its seconds, and the dense ones."""
    dense = Contraction.of("kernel", layer.stages)
    dtype = dtype or layer.factors[0].dtype
    ways = list(dict.fromkeys([*shortlist(layer, calls, dtype=dtype), dense]))
    with torch.inference_mode(False), torch.no_grad():
        inputs = [
            _channels_last(torch.randn(shape, dtype=dtype, device=layer.factors[0].device)) for shape in calls
        ]
        chains = [_frozen_layer(layer, way, dtype) for way in ways]
    with torch.inference_mode():
        for chain in chains:
            choose_packing_(chain, partial(_run_all, chain, inputs), packing)
    seconds = in_turns([partial(_run_all, chain, inputs) for chain in chains])
    best = seconds.index(min(seconds))
    return ways[best], seconds[best], seconds[ways.index(dense)]


def choose_contractions_(
    model: M, example_inputs: Any, *, by: Literal["measurement", "model"] = "measurement"
) -> M:
    """Choose how each :class:`TNConv` of ``model`` runs on inputs like ``example_inputs``, and return it.

    Layers stay what they are and can be trained; see :meth:`TNConv.contract`. By ``"measurement"`` the
    promising ways are timed in turns; by ``"model"`` nothing is run but one forward pass for the shapes.

    >>> import tncompress as tnc
    >>> small = tnc.compress(tnc.build_model("zoo:cnn4"), {"default": {"rank": {"fixed": 8}}})
    >>> small = tnc.choose_contractions_(small, torch.randn(1, 1, 28, 28), by="model")
    >>> small.conv3.contraction in tnc.strategies.all_contractions(small.conv3.stages)
    True
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
    runs: Sequence[Callable[[], Any]],
    *,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    hopeless: float = HOPELESS,
) -> list[float]:
    """Return the least seconds that each of ``runs`` took, measured in turns so that noise hits all alike.

    Noise only ever adds, so that it is the least that tells runs apart on a machine that does other things,
    too. With one thread, and no GPU, it is that thread's own time that counts, which goes on only while it
    runs. What is ``hopeless`` times slower than the fastest after two rounds is not run any more.
    """
    single = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    with torch.inference_mode():
        found = samples_in_turns(
            runs,
            seconds=seconds,
            rounds=rounds,
            hopeless=hopeless,
            clock=time.thread_time if single else None,
        )
    return [min(samples) for samples in found]


def _like(layer: TNConv, shape: tuple[int, ...]) -> Tensor:
    """Return a random input of this shape, with the layout of the layer's weights."""
    first = layer.factors[0]
    x = torch.randn(shape, dtype=first.dtype, device=first.device)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    laid_out = last and any(
        f.ndim == x.ndim and f.is_contiguous(memory_format=last) and not f.is_contiguous()
        for f in layer.factors
    )
    return x.to(memory_format=last) if laid_out else x


def _runner(layer: TNConv, way: Contraction, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    geometry: ConvGeometry = layer.geometry
    stages = merged_stages(layer.stages, way.merged)
    weights = merged_weights(list(layer.factors), layer.stages, way.merged, geometry.groups)
    calls = chain_calls(geometry, stages)

    def run() -> None:
        for x in inputs:
            run_chain(x, weights, stages, calls, layer.bias, groups=geometry.groups)

    return run


def _frozen_layer(layer: TNConv, way: Contraction, dtype: torch.dtype) -> FrozenChain:
    weights, stages = own_weights(layer, way), merged_stages(layer.stages, way.merged)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return FrozenChain(layer.geometry, stages, [w.to(dtype) for w in weights], bias)


def _run_all(chain: FrozenChain, inputs: Sequence[Tensor]) -> None:
    for x in inputs:
        chain(x)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
