"""Solving the layers of a compressed network one after another, on the inputs that it really gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.geometry import ConvGeometry
from tncompress.layer_solver import LayerRepair, Partners, Solver
from tncompress.layers import TNConv
from tncompress.lockstep import in_lockstep
from tncompress.probe import Probe, probe
from tncompress.repair_report import Gauge
from tncompress.running import eval_mode, input_of_call
from tncompress.tables import progress_bar

MATRICES = 8
"""How many matrices of the size of the moments are alive at once while a layer is solved for."""
JOINED = 32
"""Batches of fewer images are joined up to so many."""


def partners(small: nn.Module, dense: nn.Module, names: Iterable[str]) -> dict[str, Partners]:
    """Return the named layers of ``small`` with their partners; a ``ValueError`` where ``dense`` has none."""
    found = {}
    for name in names:
        try:
            partner: Any = dense.get_submodule(name)
            geometry = partner.geometry if isinstance(partner, TNConv) else ConvGeometry.of(partner)
        except (AttributeError, ValueError):
            raise ValueError(
                f"small was not made from dense: that has no layer {name!r} to compare with"
            ) from None
        pair = Partners(name, small.get_submodule(name), partner)
        if geometry != pair.geometry:
            raise ValueError(f"small was not made from dense: layer {name!r} is {geometry} there")
        found[name] = pair
    return found


def solve_front_to_back(
    small: nn.Module,
    dense: nn.Module,
    pairs: Mapping[str, Partners],
    images: Iterable[Tensor],
    solver: Solver,
    *,
    memory_limit: int,
    progress: bool = False,
) -> list[LayerRepair]:
    """Solve the layers ``pairs`` of ``small`` in place, in the order in which they are called.

    As many of ``images`` are used as fit into ``memory_limit`` bytes by the activations of the first batch.
    """
    first = next(iter(images))
    seen, of_dense = (
        probe(model, {name: getattr(pair, side) for name, pair in pairs.items()}, first)
        for model, side in ((small, "layer"), (dense, "dense"))
    )
    done = {name: LayerRepair(name, reason=why) for name in pairs if (why := _obstacle(name, seen, of_dense))}
    todo = {name: _with_norm(small, dense, pairs[name], seen) for name in seen.calls if name not in done}
    sizes = {name: _bytes_of(pair.geometry) for name, pair in todo.items()}
    small_enough = [size for size in sizes.values() if size <= memory_limit / 2]
    left = memory_limit - max(small_enough, default=0)
    room = int(left / max(1, (seen.activations + of_dense.activations) / len(first)))
    if room < 1:
        raise ValueError(f"memory_limit={memory_limit} does not hold the activations of one image; raise it")
    with progress_bar(len(todo), show=progress) as tick:

        def visit(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
            pair = todo[name]
            if sizes[name] <= memory_limit / 2:
                done[name] = solver.solve(pair, inputs, outputs)
            else:
                solver.match_means(pair, inputs, outputs)
                why = f"its moments take {sizes[name] / 1e9:.1f} GB, too much for the memory limit"
                done[name] = LayerRepair(name, reason=why, means_matched=True)
            tick(name)

        layers = {name: (pair.layer, pair.dense) for name, pair in todo.items()}
        in_lockstep(small, dense, layers, _joined(_first_images(images, room)), visit)
    missed = {name: LayerRepair(name, reason="no batch reaches it in both models") for name in pairs}
    return [(missed | done)[name] for name in (*todo, *(name for name in pairs if name not in todo))]


def solve_last(
    small: nn.Module, gauge: Gauge, images: Iterable[Tensor], solver: Solver
) -> LayerRepair | None:
    """Solve the linear layer that gives the output of ``small`` in place; None where there is none."""
    linear = {name: module for name, module in small.named_modules() if _is_linear(module)}
    last = probe(small, linear, next(iter(images)))
    if last.last is None or last.calls[last.last] != 1:
        return None
    (pair,) = partners(small, gauge.dense, [last.last]).values()
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    with recorded(pair.layer, inputs), eval_mode(small):
        for x, output in gauge.with_outputs(images):
            small(x)
            outputs.append(output)
    with torch.no_grad():
        return solver.solve(pair, inputs, outputs)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or (isinstance(module, TNConv) and module.geometry.ndim == 0)


@contextmanager
def recorded(layer: nn.Module, inputs: list[Tensor]) -> Iterator[None]:
    """Add to ``inputs`` those of each call of ``layer``."""

    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(input_of_call(args, kwargs))

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _obstacle(name: str, small: Probe, dense: Probe) -> str | None:
    """Return why a layer can't be solved for, if so."""
    for probed, where in ((small, "the model"), (dense, "the dense model")):
        calls = probed.calls.get(name, 0)
        if calls != 1:
            return f"{where} never calls it" if not calls else f"{where} calls it {calls} times in a pass"
    return None


def _with_norm(small: nn.Module, dense: nn.Module, pair: Partners, seen: Probe) -> Partners:
    """Return ``pair`` with the BatchNorm that takes its output, if both models have it."""
    name = seen.norms.get(pair.name)
    if name is None:
        return pair
    try:
        dense_norm: Any = dense.get_submodule(name)
    except AttributeError:
        return pair
    norm: Any = small.get_submodule(name)
    if (
        getattr(dense_norm, "running_mean", None) is None
        or len(norm.running_mean) != pair.geometry.out_channels
    ):
        return pair
    return replace(pair, norm=norm, dense_norm=dense_norm)


def _bytes_of(geometry: ConvGeometry) -> int:
    d = math.prod(geometry.kernel_shape[1:])
    return MATRICES * geometry.groups * d * d * 8


def _first_images(images: Iterable[Tensor], room: int) -> Iterator[Tensor]:
    """Yield batches until ``room`` images are reached, the last one cut short."""
    for x in images:
        yield x[:room]
        room -= len(x)
        if room <= 0:
            return


def _joined(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the same images with small batches of one shape joined, since each batch takes two threads."""
    held: list[Tensor] = []
    for x in images:
        alike = held and (held[0].shape[1:], held[0].dtype) == (x.shape[1:], x.dtype)
        if held and not (alike and sum(map(len, held)) + len(x) <= JOINED):
            yield torch.cat(held)
            held = []
        held.append(x)
    if held:
        yield torch.cat(held)
