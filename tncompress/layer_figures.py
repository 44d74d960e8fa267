"""The layers of a compressed model beside those of the dense one: format, ranks, errors, costs, reasons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.costs import layer_macs
from tncompress.discovery import Layer, find_layers
from tncompress.formats import Format
from tncompress.layers import TNConv
from tncompress.plan import LayerPlan, Plan, Skip
from tncompress.running import call_model, eval_mode, input_shapes, inputs_of
from tncompress.tables import count, ratio

COLUMNS: tuple[str, ...] = (
    "layer",
    "kernel",
    "format",
    "ranks",
    "kernel error",
    "now",
    "output error",
    "now",
)
COLUMNS += ("params", "", "MACs", "", "why dense")
"""Of a table of layers. Errors are those that the plan has, and beside them those measured now."""
_UNKNOWN = "not recorded: the model came without its plan"


@dataclass(frozen=True)
class LayerFigures:
    """What became of one layer, as the plan has it and as it was measured in the two models.

    ``params`` and ``macs`` are those of its weight now, ``*_dense`` those of the dense layer; MACs are of one
    forward pass on the example inputs, None where that does not reach the layer. ``planned_error`` is the
    relative error of the kernel by the plan, ``kernel_error`` that of the kernel now: repair and training
    move it away from the dense one on purpose. ``planned_output_error`` and ``output_error`` are those of the
    layer's output about the mean of each channel, on the calibration images and on the example inputs.
    ``reason`` says why a layer is dense; of such a layer ``format`` is None.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    groups: int
    format: Format | None
    ranks: tuple[int, ...]
    params: int
    params_dense: int
    macs: int | None = None
    macs_dense: int | None = None
    planned_error: float | None = None
    kernel_error: float | None = None
    planned_output_error: float | None = None
    output_error: float | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        """The first of the layer's names."""
        return self.names[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return vars(self) | {"format": self.format.to_dict() if self.format is not None else None}

    def cells(self) -> tuple[str, ...]:
        """Return the layer's line of a table, in the order of :data:`COLUMNS`."""
        head = ", ".join(self.names), "x".join(map(str, self.shape))
        if self.format is None:
            before = count(self.params_dense), "", _macs(self.macs_dense), ""
            return *head, "dense", "", "", "", "", "", *before, self.reason or ""
        fields = self.planned_error, self.kernel_error, self.planned_output_error, self.output_error
        errors = [f"{error:.4f}" if error is not None else "" for error in fields]
        size = f"{count(self.params_dense)} → {count(self.params)}", ratio(self.params_dense, self.params)
        cost: tuple[str, ...] = ("", "")
        if self.macs is not None:
            cost = f"{_macs(self.macs_dense)} → {count(self.macs)}", ratio(self.macs_dense, self.macs)
        return *head, str(self.format), " ".join(map(str, self.ranks)), *errors, *size, *cost, ""


def _macs(number: int | None) -> str:
    return count(number) if number is not None else ""


def layer_figures(
    dense: nn.Module,
    small: nn.Module,
    plan: Plan | None,
    example_inputs: Any,
    batches: Iterable[Any] | None = None,
) -> tuple[LayerFigures, ...]:
    """Return the figures of every convolution and linear layer of ``dense``, in its order.

    Output errors are measured on ``batches``, as the model takes them, or on the example inputs: each
    compressed layer gets what the dense one is given.
    """
    layers = find_layers(dense)
    there = dict(small.named_modules(remove_duplicate=False))
    pairs = {layer.name: there.get(layer.name) for layer in layers}
    held = {name: module for name, module in pairs.items() if isinstance(module, TNConv)}
    modules = {layer.name: layer.module for layer in layers}
    calls = input_shapes(dense, modules, example_inputs)
    matched = {name: (modules[name], layer) for name, layer in held.items()}
    outputs = _output_errors(dense, matched, example_inputs, batches)
    planned = {entry.name: entry for entry in plan.layers} if plan is not None else {}
    return tuple(
        _figures(layer, held.get(layer.name), planned.get(layer.name), calls[layer.name], outputs)
        for layer in layers
    )


def _figures(
    layer: Layer,
    held: TNConv | None,
    planned: LayerPlan | Skip | None,
    calls: Sequence[tuple[int, ...]],
    outputs: Mapping[str, float | None],
) -> LayerFigures:
    geometry = layer.geometry
    macs = layer_macs(layer, calls) if calls else None
    common: dict[str, Any] = {
        "names": layer.names,
        "kind": layer.kind,
        "shape": geometry.weight_shape,
        "kernel_shape": geometry.kernel_shape,
        "groups": geometry.groups,
        "params_dense": layer.params,
        "macs_dense": macs,
    }
    if held is None:
        known = planned.reason if isinstance(planned, Skip) else layer.obstacle
        return LayerFigures(
            **common, format=None, ranks=(), params=layer.params, macs=macs, reason=known or _UNKNOWN
        )
    now = Layer(layer.names, held, None)
    entry = planned if isinstance(planned, LayerPlan) else None
    return LayerFigures(
        **common,
        format=held.format,
        ranks=tuple(held.ranks),
        params=now.params,
        macs=layer_macs(now, calls) if calls else None,
        planned_error=entry.rel_error if entry is not None else held.rel_error,
        kernel_error=_kernel_error(layer.weight(), held.weight.detach()),
        planned_output_error=entry.output_error if entry is not None else None,
        output_error=outputs.get(layer.name),
    )


def _kernel_error(wanted: Tensor, found: Tensor) -> float | None:
    norm = float(wanted.double().norm())
    return float((wanted.double() - found.double()).norm()) / norm if norm > 0 else None


def _output_errors(
    dense: nn.Module,
    pairs: Mapping[str, tuple[nn.Module, TNConv]],
    example_inputs: Any,
    batches: Iterable[Any] | None,
) -> dict[str, float | None]:
    """Return how far the output of each compressed layer is from that of the dense one on its inputs."""
    sums = {name: _Spread() for name in pairs}
    handles = []
    for name, (module, layer) in pairs.items():

        def compare(
            _: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name, layer: TNConv = layer
        ) -> None:
            sums[name].add(output, layer.forward(*args, **kwargs), layer.geometry.ndim)

        handles.append(module.register_forward_hook(compare, with_kwargs=True))
    try:
        with eval_mode(dense):
            if batches is None:
                call_model(dense, example_inputs)
            else:
                for x in inputs_of(batches, dense):
                    dense(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: spread.error() for name, spread in sums.items()}


class _Spread:
    """Sums over outputs ``(..., channels, *spatial)``: how much they vary, and their differences."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None

    def add(self, wanted: Tensor, found: Tensor, ndim: int) -> None:
        """Take in outputs of the dense layer and of the compressed one."""
        axis = wanted.ndim - ndim - 1
        rows = [t.double().movedim(axis, 0).flatten(1) for t in (wanted, wanted.double() - found.double())]
        fresh = torch.stack([part for row in rows for part in (row.sum(1), row.square().sum(1))])
        self.sums = fresh if self.sums is None else self.sums + fresh
        self.count += rows[0].shape[1]

    def error(self) -> float | None:
        """Return the norm of the differences over that of the outputs, each about its channel's mean."""
        if self.sums is None:
            return None
        total, squares, missed, missed_squares = self.sums
        varied = float((squares - total.square() / self.count).sum())
        lost = float((missed_squares - missed.square() / self.count).sum())
        return math.sqrt(max(lost, 0.0) / varied) if varied > 1e-12 * float(squares.sum()) else None
