"""What a bench measured, as a value: timings, what could not be measured, and what speaks against them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tncompress.storage import new_file
from tncompress.tables import markdown_table, ratio, render

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS: tuple[str, ...] = ("batch", "model", "way", "median", "quartiles", "samples/s")
COLUMNS += ("to dense", "to best dense", "difference")
"""Of the table. The last three: how many times faster than dense run in the same way, and in its fastest way;
how far the outputs are from those of the same model run eagerly."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward pass of ``model`` run in one ``way`` on ``batch`` samples.

    ``median`` and the quartiles ``low`` and ``high`` are over ``runs`` blocks of calls. ``made`` says what
    a frozen model became (:attr:`Frozen.way`). ``rel_error`` is how far the outputs are from those of the
    same model run eagerly, relative to their norm.
    """

    model: str
    way: str
    batch: int
    median: float
    low: float
    high: float
    runs: int
    rel_error: float
    made: str = ""

    @property
    def spread(self) -> float:
        """How far the quartiles lie apart, relative to the median."""
        return (self.high - self.low) / self.median if self.median > 0 else 0.0


@dataclass(frozen=True)
class Unmeasured:
    """A way that could not be run, and why."""

    model: str
    way: str
    batch: int
    reason: str


@dataclass(frozen=True)
class Bench:
    """What :func:`tncompress.bench` measured; it prints as a table.

    ``environment`` says where (device, threads, versions), ``settings`` holds the environment variables that
    matter for speed (None: not set), ``load_before`` and ``others`` what else the machine did
    (:class:`tncompress.noise.Load`). ``warnings`` speak against the figures; ``hints`` could better them.
    """

    timings: tuple[Timing, ...]
    unmeasured: tuple[Unmeasured, ...]
    reference: str
    input_shapes: tuple[tuple[int, ...], ...]
    environment: dict[str, str | int]
    settings: dict[str, str | None]
    load_before: float | None = None
    others: float | None = None
    warnings: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    def select(
        self, *, model: str | None = None, way: str | None = None, batch: int | None = None
    ) -> tuple[Timing, ...]:
        """Return the timings of this model, way and batch size; None: of all."""
        wanted = {"model": model, "way": way, "batch": batch}
        asked = {name: value for name, value in wanted.items() if value is not None}
        return tuple(t for t in self.timings if all(getattr(t, name) == v for name, v in asked.items()))

    def speedup(self, timing: Timing, *, same_way: bool = False) -> float | None:
        """Return how many times faster than the reference model this is, on as many samples.

        The reference runs in the fastest of its ways, or in the same one; None where it was not measured.
        """
        way = timing.way if same_way else None
        found = self.select(model=self.reference, way=way, batch=timing.batch)
        return min(t.median for t in found) / timing.median if found else None

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, in the order of :data:`COLUMNS`."""
        rows: list[tuple[str, ...]] = []
        for t in self.timings:
            same, best = self.speedup(t, same_way=True), self.speedup(t)
            rows.append(
                (
                    str(t.batch),
                    t.model,
                    t.way + (f" ({t.made})" if t.made else ""),
                    _seconds(t.median),
                    f"{_seconds(t.low)} to {_seconds(t.high)}",
                    f"{t.batch / t.median:.4g}",
                    ratio(same, 1) if t.model != self.reference else "",
                    ratio(best, 1),
                    f"{t.rel_error:.0e}" if t.way != "eager" else "",
                )
            )
        return rows

    def remarks(self) -> list[str]:
        """Return what stands under the table: what was not measured, warnings, hints."""
        lines = [f"not measured: {u.model}, {u.way}, batch {u.batch}: {u.reason}" for u in self.unmeasured]
        lines += [f"warning: {words}" for words in self.warnings]
        lines += [f"hint: {words}" for words in self.hints]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, with the speed-ups: seconds, counts, ratios."""
        plain = {name: value for name, value in vars(self).items() if name not in ("timings", "unmeasured")}
        timings = [
            asdict(t)
            | {
                "spread": t.spread,
                "faster_than_reference_same_way": self.speedup(t, same_way=True),
                "faster_than_best_reference": self.speedup(t),
            }
            for t in self.timings
        ]
        return {"timings": timings, "unmeasured": [asdict(u) for u in self.unmeasured], **plain}

    def to_json(self) -> str:
        """Return the bench as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def to_markdown(self) -> str:
        """Return the bench as Markdown: the table, the remarks, where it was measured."""
        parts = [markdown_table(COLUMNS, self.rows()), "\n".join(f"- {line}" for line in self.remarks())]
        where = {**self.environment, **{name: value or "unset" for name, value in self.settings.items()}}
        parts.append("Measured on " + ", ".join(f"{name} {value}" for name, value in where.items()) + ".")
        return "\n\n".join(part for part in parts if part) + "\n"

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the bench to a new file, ``.json`` or ``.md``."""
        path = Path(path)
        if path.suffix not in (".json", ".md"):
            raise ValueError(f"a bench is saved in a file that ends in .json or .md, got {path.name}")
        with new_file(path, overwrite=overwrite) as fresh:
            fresh.write_text(self.to_json() if path.suffix == ".json" else self.to_markdown())

    def __str__(self) -> str:
        return "\n".join([render(self), *self.remarks()])

    def __rich__(self) -> Table:
        from rich.table import Table

        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        where = f"{self.environment['device']}, {self.environment['threads']} thread(s)"
        table = Table(title=f"a forward pass on samples of {shapes}; {where}", title_justify="left")
        for column in COLUMNS[:3]:
            table.add_column(column)
        for column in COLUMNS[3:]:
            table.add_column(column, justify="right")
        for row in self.rows():
            table.add_row(*row)
        return table


def _seconds(value: float) -> str:
    return f"{1e6 * value:.3g} us" if value < 1e-3 else f"{1e3 * value:.4g} ms"
