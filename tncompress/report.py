"""The report: a dense and a compressed model side by side, measured in one run."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tncompress.measure import Latency, bytes_on_disk, latencies, macs, num_params, peak_memory
from tncompress.plan import LayerPlan, Plan
from tncompress.tables import change, count, markdown_table, percent, ratio, render

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Figures:
    """What was measured of one model; ``accuracy`` is a fraction, or None where it was not measured."""

    accuracy: float | None
    params: int
    macs: int
    bytes_on_disk: int
    latency: Latency
    peak_memory: int


@dataclass(frozen=True)
class Report:
    """Figures of the dense and the compressed model, the plan between them, and where they were measured.

    It prints as a table; :meth:`to_json` and :meth:`to_markdown` are its other forms.
    """

    dense: Figures
    compressed: Figures
    plan: Plan | None
    input_shapes: tuple[tuple[int, ...], ...]
    environment: dict[str, str | int]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return what the report shows: a name, the dense figure, the compressed one, their ratio."""
        dense, small = self.dense, self.compressed
        rows = []
        if dense.accuracy is not None and small.accuracy is not None:
            points = f"{100 * (small.accuracy - dense.accuracy):+.2f} points"
            rows.append(("accuracy", percent(dense.accuracy), percent(small.accuracy), points))
        for name, unit, a, b in (
            ("parameters", "", dense.params, small.params),
            ("MACs", "", dense.macs, small.macs),
            ("size on disk", "B", dense.bytes_on_disk, small.bytes_on_disk),
            ("peak memory", "B", dense.peak_memory, small.peak_memory),
        ):
            rows.append((name, _with_unit(a, unit), _with_unit(b, unit), change(a, b, "less", "more")))
        times = milliseconds(dense.latency), milliseconds(small.latency)
        rows.append(
            (
                "latency (median ± IQR/2)",
                *times,
                change(dense.latency.median, small.latency.median, "faster", "slower"),
            )
        )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values: counts, bytes, seconds, fractions."""
        return {
            "dense": asdict(self.dense),
            "compressed": asdict(self.compressed),
            "plan": self.plan.to_dict() if self.plan else None,
            "input_shapes": self.input_shapes,
            "environment": self.environment,
        }

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_markdown(self) -> str:
        """Return the report as Markdown: the figures, then every layer."""
        parts = [markdown_table(("", "dense", "compressed", ""), self.rows())]
        if self.plan is not None:
            header = ("layer", "format", "ranks", "rel. error", "parameters", "")
            parts.append(markdown_table(header, [_layer_row(layer) for layer in self.plan.layers]))
        parts.append("Measured on " + ", ".join(f"{k} {v}" for k, v in self.environment.items()) + ".")
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        table = Table(title=f"dense and compressed, on an input of {shapes}", title_justify="left")
        table.add_column("")
        for column in ("dense", "compressed", ""):
            table.add_column(column, justify="right")
        for row in self.rows():
            table.add_row(*row)
        return table


def report(
    dense: nn.Module,
    small: nn.Module,
    *,
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float] | None = None,
    seconds: float = 1.0,
) -> Report:
    """Return the figures of ``dense`` and ``small`` on ``example_inputs``, measured in turns in this process.

    ``evaluate`` gives a model's accuracy as a fraction. Both models are on the device of the inputs. The
    latency takes about ``seconds`` for each model.
    """
    times = latencies([dense, small], example_inputs, seconds=seconds)
    before, after = (
        Figures(
            accuracy=evaluate(model) if evaluate is not None else None,
            params=num_params(model),
            macs=macs(model, example_inputs),
            bytes_on_disk=bytes_on_disk(model),
            latency=latency,
            peak_memory=peak_memory(model, example_inputs),
        )
        for model, latency in zip((dense, small), times, strict=True)
    )
    leaves = torch.utils._pytree.tree_leaves(example_inputs)
    shapes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
    return Report(before, after, getattr(small, "tncompress_plan", None), shapes, environment())


def environment() -> dict[str, str | int]:
    """Return where and with what figures are measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def milliseconds(latency: Latency) -> str:
    """Return a latency as "median ± half the interquartile range" in milliseconds."""
    return f"{1e3 * latency.median:.3g} ± {1e3 * latency.iqr / 2:.2g} ms"


def _with_unit(number: int, unit: str) -> str:
    text = count(number)
    return text + (unit if " " in text else f" {unit}") if unit else text


def _layer_row(layer: Any) -> tuple[str, ...]:
    if isinstance(layer, LayerPlan):
        error, fewer = f"{layer.rel_error:.4f}", ratio(layer.params_dense, layer.params)
        size = f"{count(layer.params_dense)} → {count(layer.params)}"
        return layer.name, str(layer.format), " ".join(map(str, layer.ranks)), error, size, fewer
    return layer.name, "dense", layer.reason, "", count(layer.params_dense), ""
