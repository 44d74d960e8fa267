"""The report as a value: the figures of two models and of their layers, and how they are put in words."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tncompress.cut_atlas import CutAtlas
from tncompress.layer_figures import COLUMNS, LayerFigures
from tncompress.measure import Latency, accuracy_interval
from tncompress.plan import Plan
from tncompress.recovery_record import COLUMNS as CURVE_COLUMNS
from tncompress.recovery_record import Recovery
from tncompress.storage import new_file
from tncompress.tables import change, count, markdown_table, percent, render

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

LAYERS = "layers: errors by the plan, and those measured now"


@dataclass(frozen=True)
class Figures:
    """What was measured of one model; ``accuracy`` is a fraction, or None where it was not measured.

    ``images`` is on how many labelled images, where that is known. Latency and peak memory are those of a
    forward pass on the example inputs, MACs and size on disk are counts.
    """

    accuracy: float | None
    params: int
    macs: int
    bytes_on_disk: int
    latency: Latency
    peak_memory: int
    images: int | None = None


@dataclass(frozen=True)
class Report:
    """Figures of the dense and the compressed model, the plan between them, and where they were measured.

    ``layers`` has every layer; ``recovery`` the way of the accuracy, as far as it is recorded, ``atlas`` the
    spectra of the dense model, if they were asked for; ``source`` how the dense model is built; ``warnings``
    speak against the latencies. It prints as tables; :meth:`to_json`, :meth:`to_markdown` and
    :meth:`to_html` are its other forms.
    """

    dense: Figures
    compressed: Figures
    plan: Plan | None
    input_shapes: tuple[tuple[int, ...], ...]
    environment: dict[str, str | int]
    layers: tuple[LayerFigures, ...] = ()
    recovery: Recovery = field(default_factory=Recovery)
    atlas: CutAtlas | None = None
    source: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return what the report shows: a name, the dense figure, the compressed one, their ratio.

        Figures that were sampled come with their spread; counts have none.
        """
        dense, small = self.dense, self.compressed
        rows = []
        if dense.accuracy is not None and small.accuracy is not None:
            points = f"{100 * (small.accuracy - dense.accuracy):+.2f} points"
            name = "accuracy" if dense.images is None else f"accuracy on {dense.images:,} images (95 %)"
            rows.append((name, _accuracy(dense), _accuracy(small), points))
        for name, unit, a, b in (
            ("parameters", "", dense.params, small.params),
            ("MACs", "", dense.macs, small.macs),
            ("size on disk", "B", dense.bytes_on_disk, small.bytes_on_disk),
            ("peak memory", "B", dense.peak_memory, small.peak_memory),
        ):
            rows.append((name, with_unit(a, unit), with_unit(b, unit), change(a, b, "less", "more")))
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
            "layers": [layer.to_dict() for layer in self.layers],
            "recovery": self.recovery.to_dict(),
            "atlas": self.atlas.to_dict() if self.atlas else None,
            "source": self.source,
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_markdown(self) -> str:
        """Return the report as Markdown: the figures, every layer, the recovery, spectra, the spec."""
        parts = [markdown_table(("", "dense", "compressed", ""), self.rows())]
        parts += [f"Warning: {words}." for words in self.warnings]
        if self.layers:
            parts += [f"{LAYERS}.", markdown_table(*self.layer_table())]
        if self.recovery.steps:
            parts.append(f"{self.way()}.")
        if self.recovery.points:
            parts += ["Recovery.", markdown_table(CURVE_COLUMNS, [p.cells() for p in self.recovery.points])]
        if self.atlas is not None:
            parts.append(self.atlas.to_markdown().strip())
        if self.plan is not None:
            parts.append(f"```yaml\n{self.spec_text()}```")
        parts.append(f"{self.where()}.")
        return "\n\n".join(parts) + "\n"

    def to_html(self, title: str = "Compression report") -> str:
        """Return one self-contained page, with figures to explore, that needs no network.

        Where there is a recovery curve or an atlas to draw it needs plotly; an ``ImportError`` says so.
        """
        from tncompress.html_report import page

        return page(self, title)

    def save_html(
        self, path: str | Path, title: str = "Compression report", *, overwrite: bool = True
    ) -> None:
        """Write :meth:`to_html` to a file."""
        with new_file(path, overwrite=overwrite) as fresh:
            fresh.write_text(self.to_html(title), encoding="utf-8")

    def layer_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return header and lines of the table of layers, without the columns that all layers leave empty."""
        lines = [layer.cells() for layer in self.layers]
        shown = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines)]
        return tuple(COLUMNS[i] for i in shown), [tuple(line[i] for i in shown) for line in lines]

    def way(self) -> str:
        """Return in words how the accuracy went; empty where that is not known."""
        dense = self.recovery.dense if self.dense.accuracy is None else self.dense.accuracy
        steps = [("dense", dense), *((step.name, step.accuracy) for step in self.recovery.steps)]
        if self.compressed.accuracy not in (None, steps[-1][1]):
            steps.append(("now", self.compressed.accuracy))
        words = " → ".join(f"{name} {percent(known)}" for name, known in steps if known is not None)
        return f"Accuracy: {words}" if self.recovery.steps else ""

    def spec_text(self) -> str:
        """Return the spec as YAML; empty where the plan is not known."""
        return yaml.safe_dump(self.plan.spec.to_dict(), sort_keys=False) if self.plan else ""

    def where(self) -> str:
        """Return in words where and on what the figures were measured."""
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        return f"Measured on an input of {shapes}; " + ", ".join(
            f"{name} {value}" for name, value in self.environment.items()
        )

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        parts: list[Any] = [
            _table(
                f"dense and compressed, on an input of {shapes}", ("", "dense", "compressed", ""), self.rows()
            )
        ]
        parts += [Text(f"warning: {words}") for words in self.warnings]
        if self.layers:
            parts.append(
                _table(LAYERS, *self.layer_table(), words=("kernel", "format", "ranks", "why dense"))
            )
        if self.recovery.points:
            rows = [point.cells() for point in self.recovery.points]
            parts.append(_table("recovery", CURVE_COLUMNS, rows))
        parts += [Text(self.way())] if self.recovery.steps else []
        parts += [self.atlas] if self.atlas is not None else []
        if self.plan is not None:
            parts += [Text("spec", style="italic"), Text(self.spec_text().rstrip())]
        return Group(*parts, Text(self.where()))


def milliseconds(latency: Latency) -> str:
    """Return a latency as "median ± half the interquartile range" in milliseconds."""
    return f"{1e3 * latency.median:.3g} ± {1e3 * latency.iqr / 2:.2g} ms"


def with_unit(number: int, unit: str) -> str:
    """Return a count with its unit: ``36.9 kB``, ``912 B``."""
    text = count(number)
    return text + (unit if " " in text else f" {unit}") if unit else text


def _accuracy(figures: Figures) -> str:
    if figures.images is None or figures.accuracy is None:
        return percent(figures.accuracy)
    low, high = accuracy_interval(figures.accuracy, figures.images)
    return f"{percent(figures.accuracy)} ({100 * low:.1f} to {100 * high:.1f})"


def _table(
    title: str, header: Iterable[str], rows: Iterable[Iterable[str]], words: Collection[str] = ()
) -> Table:
    """Return a table for the console; what comes from the model is never read as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(header):
        left = number == 0 or column in words
        table.add_column(column, justify="left" if left else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
