"""Repair without labels: what unlabelled images alone bring back after truncation."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tncompress.batchnorm import reestimate_batchnorm_
from tncompress.discovery import find_layers
from tncompress.front_to_back import partners, solve_front_to_back, solve_last
from tncompress.layer_solver import LayerRepair, Solver
from tncompress.layers import TNConv
from tncompress.measure import macs
from tncompress.moments import Calibration
from tncompress.repair_report import Gauge, RepairReport, StepRepair
from tncompress.running import (
    channels_last,
    copy_model,
    eval_mode,
    input_of_call,
    inputs_of,
    runs_channels_last,
)

__all__ = ["RepairReport", "correct_bias_", "reestimate_batchnorm_", "repair"]

M = TypeVar("M", bound=nn.Module)

GIGABYTE = 2**30

PASS_MACS, FEWEST = 2e12, 64
"""What the dense model may take in one pass over the images, and how many images are used all the same."""


def repair(
    small: M,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    bias: bool = True,
    batchnorm: bool = True,
    least_squares: Literal["all", "last", False] = "all",
    classifier: bool = True,
    ridge: float | None = None,
    calibration: Calibration | None = None,
    memory_limit: int = 4 * GIGABYTE,
    progress: bool = False,
) -> M:
    """Return a copy of ``small`` repaired on ``batches`` of inputs, with a ``tncompress_repair`` report.

    ``dense`` is the model that ``small`` was made from. ``batches`` is gone through once for each step, so
    it must be a loader or a list, not a generator; a batch is a tensor, or a tuple or mapping whose first
    item is the input. Labels are never looked at. Where the dense model takes many multiply-accumulates, only
    the first images are used (``PASS_MACS``; about 490 of 224 pixels with ResNet-50). The steps, each of
    which can be switched off:

    1. ``least_squares``: each compressed layer in turn is solved for the dense layer's outputs on the inputs
       that the layers repaired before it give: ``"all"`` factors, or the ``"last"``, the one with the leg
       ``out``. ``ridge``, over the mean square of the inputs, pulls towards the dense kernel; by default it
       follows :func:`tncompress.least_squares.ridge_for`. Factors that are no better on every
       eighth image, which the solution did not see, are not taken. As many images are used as fit
       into ``memory_limit`` bytes. With a ``calibration`` that was made with ``gradients``, outputs are
       weighed by these: what the network's loss feels of a layer's error is made small (the metric of
       K-FAC, Martens and Grosse 2015; for the last factor alone it is no other). The rest of it is not used.
    2. ``bias``: mean outputs are made those of the dense layers; part of the first step, where that is
       made for a layer, and done on the dense model's inputs where it is not.
    3. ``batchnorm``: BatchNorm statistics are taken again (:func:`reestimate_batchnorm_`).
    4. ``classifier``: the last linear layer is solved for the dense model's outputs likewise.

    Images that hold NaN or infinity, or that the model does not take, a ``dense`` without the layers of
    ``small``, and a ``calibration`` without gradients or of other weights are a ``ValueError``. Neither
    model is changed; on a CPU both are laid out channels last meanwhile, where they give the same outputs so.

    >>> import tncompress as tnc
    >>> dense = tnc.build_model("zoo:cnn4").eval()
    >>> small = tnc.compress(dense, {"default": {"format": "svd", "rank": {"fixed": 8}}})
    >>> repaired = tnc.repair(small, dense, [torch.randn(16, 1, 28, 28)], least_squares="last")
    >>> [step.name for step in repaired.tncompress_repair.steps]
    ['least squares', 'BatchNorm', 'classifier']
    """
    if least_squares not in ("all", "last", False):
        raise ValueError(f"least_squares is 'all', 'last' or False, got {least_squares!r}")
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge is a number from 0 on, got {ridge}")
    repaired = copy_model(small)
    names = [layer.name for layer in find_layers(repaired) if isinstance(layer.module, TNConv)]
    if not names and any(isinstance(module, TNConv) for module in dense.modules()):
        raise ValueError("repair(small, dense, batches): the compressed model comes first, got them swapped")
    gradients = _gradients(calibration, dense)
    pairs = partners(repaired, dense, names)
    images = _Images(batches, repaired).affordable(dense)
    first = next(iter(images))
    fast = runs_channels_last(dense, first) and runs_channels_last(repaired, first)
    layers: list[LayerRepair] = []
    with channels_last(dense, repaired, on=fast):
        book = _Book(repaired, Gauge(dense, images))
        if least_squares:
            solver = Solver(least_squares, bias, batchnorm, ridge, gradients)
            with book.step("least squares"):
                layers = solve_front_to_back(
                    repaired, dense, pairs, images, solver, memory_limit=memory_limit, progress=progress
                )
        rest = [name for name in names if name not in {layer.name for layer in layers if layer.means_matched}]
        if bias and rest:
            with book.step("bias"):
                correct_bias_(repaired, dense, images, names=rest)
        if batchnorm:
            with book.step("BatchNorm"):
                reestimate_batchnorm_(repaired, images)
        if classifier:
            with book.step("classifier"):
                last = solve_last(repaired, book.gauge, images, Solver("all", bias, False, ridge))
                layers += [last] if last is not None else []
    report = RepairReport(tuple(book.steps), tuple(layers), book.gauge.count)
    repaired.tncompress_repair = report  # type: ignore[assignment]
    return repaired


def _gradients(calibration: Calibration | None, dense: nn.Module) -> dict[str, Tensor]:
    if calibration is None:
        return {}
    calibration.check(find_layers(dense))
    found = {name: m.gradient for name, m in calibration.layers.items() if m.gradient is not None}
    if not found:
        raise ValueError(
            "repair takes the moments of gradients from a calibration, and this one has none: "
            'calibrate(..., gradients="teacher")'
        )
    return found


class _Images:
    """The inputs in ``batches``, each time from the start; ones that are not finite are an error."""

    def __init__(self, batches: Iterable[Any], model: nn.Module, most: int | None = None) -> None:
        self.batches, self.model, self.most = batches, model, most

    def affordable(self, dense: nn.Module) -> _Images:
        """Return as many of them as ``dense`` takes within ``PASS_MACS``, and ``FEWEST`` at least."""
        first = next(iter(self))
        try:
            each = macs(dense, first) / len(first)
        except (RuntimeError, TypeError, ValueError):  # what the dense model does not take is said later
            return self
        return _Images(self.batches, self.model, max(FEWEST, int(PASS_MACS / max(each, 1))))

    def __iter__(self) -> Iterator[Tensor]:
        left = math.inf if self.most is None else self.most
        for number, x in enumerate(inputs_of(self.batches, self.model)):
            if x.is_floating_point() and not bool(x.isfinite().all()):
                raise ValueError(f"batch {number} of the calibration inputs holds NaN or infinite values")
            if not len(x):
                continue
            yield x if len(x) <= left else x[: int(left)]
            left -= len(x)
            if left <= 0:
                break


class _Book:
    """Times each step and measures the model before and after it."""

    def __init__(self, model: nn.Module, gauge: Gauge) -> None:
        self.model, self.gauge = model, gauge
        self.steps: list[StepRepair] = []
        self._now = gauge.read(model)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Write down what the block did."""
        before, started = self._now, time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._now = self.gauge.read(self.model)
        self.steps.append(StepRepair(name, before.error, self._now.error, before.kl, self._now.kl, seconds))


def correct_bias_(
    small: nn.Module, dense: nn.Module, batches: Iterable[Any], *, names: Collection[str] | None = None
) -> None:
    """Add to each compressed layer's bias what makes its mean output that of the dense layer: (W - W') E[x].

    Both layers are given the dense model's input. Layers without a bias are passed over: a BatchNorm
    follows them as a rule, and takes the mean away again. ``names`` are those to correct, all by default.
    """
    pairs = [
        (layer.module, dense.get_submodule(layer.name))
        for layer in find_layers(small)
        if isinstance(layer.module, TNConv) and layer.module.bias is not None
        if names is None or layer.name in names
    ]
    if not pairs:
        return
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}
    with eval_mode(small), eval_mode(dense), _hooked(pairs, sums, counts):
        for x in inputs_of(batches, dense):
            dense(x)
    with torch.no_grad():
        for layer, total in sums.items():
            bias: Any = layer.bias
            bias += (total / counts[layer]).to(bias.dtype)


@contextmanager
def _hooked(
    pairs: list[tuple[TNConv, nn.Module]], sums: dict[nn.Module, Tensor], counts: dict[nn.Module, int]
) -> Iterator[None]:
    """Sum up, at each call of a dense layer, how far its compressed partner is off in each channel."""
    handles = []
    for layer, partner in pairs:

        def add(_: nn.Module, args: Any, kwargs: Any, output: Tensor, layer: TNConv = layer) -> None:
            gap = (output - layer(input_of_call(args, kwargs))).double()
            channel = gap.ndim - 1 - layer.geometry.ndim
            gap = gap.movedim(channel, -1).flatten(0, -2)
            sums[layer] = sums.get(layer, 0) + gap.sum(0)
            counts[layer] = counts.get(layer, 0) + len(gap)

        handles.append(partner.register_forward_hook(add, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
