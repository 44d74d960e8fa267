"""Measuring a dense and a compressed model side by side, in one run."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

import tncompress
from tncompress.cut_atlas import CutAtlas
from tncompress.history import History
from tncompress.layer_figures import layer_figures
from tncompress.manifest import library_versions
from tncompress.measure import (
    Evaluation,
    Latency,
    bytes_on_disk,
    device_of,
    latencies,
    macs,
    num_params,
    peak_memory,
)
from tncompress.noise import Load, device_name
from tncompress.recovery_record import Recovery
from tncompress.report_table import Figures, Report, milliseconds
from tncompress.rounds import Progressive

__all__ = ["Figures", "Report", "environment", "milliseconds", "report"]


def report(
    dense: nn.Module,
    small: nn.Module,
    *,
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float | Evaluation] | None = None,
    seconds: float = 1.0,
    batches: Iterable[Any] | None = None,
    history: History | Progressive | Recovery | Mapping[str, Any] | None = None,
    steps: Mapping[str, float] | None = None,
    atlas: CutAtlas | None = None,
    source: Mapping[str, Any] | None = None,
) -> Report:
    """Return the figures of ``dense`` and ``small`` on ``example_inputs``, measured in turns in this process.

    ``evaluate`` gives a model's accuracy as a fraction, or what :func:`tncompress.evaluate` returns. Both
    models are on the device of the inputs. The latency takes about ``seconds`` for each model. Errors of the
    layers' outputs are measured on ``batches`` of inputs, or on the example inputs.

    What else is known is told beside it: ``history``, the training (as a value, or as ``history.json`` has
    it); ``steps``, accuracies before it, such as ``{"truncated": 0.90, "repaired": 0.97}``; ``atlas``, that
    of the dense model; ``source``, the arguments of :func:`tncompress.build_model`.
    """
    load = Load()
    with load.watched():
        times = latencies([dense, small], example_inputs, seconds=seconds)
    before, after = (
        _figures(model, latency, example_inputs, evaluate)
        for model, latency in zip((dense, small), times, strict=True)
    )
    plan = getattr(small, "tncompress_plan", None)
    leaves = torch.utils._pytree.tree_leaves(example_inputs)
    return Report(
        dense=before,
        compressed=after,
        plan=plan,
        input_shapes=tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)),
        environment=environment(device_of(dense)),
        layers=layer_figures(dense, small, plan, example_inputs, batches),
        recovery=history if isinstance(history, Recovery) else Recovery.of(history, steps),
        atlas=atlas,
        source=dict(source) if source else None,
        warnings=tuple(load.warnings(max(time.iqr / time.median for time in times))),
    )


def _figures(
    model: nn.Module, latency: Latency, example_inputs: Any, evaluate: Callable[[nn.Module], Any] | None
) -> Figures:
    found = evaluate(model) if evaluate is not None else None
    return Figures(
        accuracy=found.accuracy if isinstance(found, Evaluation) else found,
        params=num_params(model),
        macs=macs(model, example_inputs),
        bytes_on_disk=bytes_on_disk(model),
        latency=latency,
        peak_memory=peak_memory(model, example_inputs),
        images=found.samples if isinstance(found, Evaluation) else None,
    )


def environment(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Return where and with what figures are measured."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **library_versions(),
        "tncompress": tncompress.__version__,  # also run from a checkout
        "torch": torch.__version__,  # with what it was built for
        "system": platform.system(),
    }
