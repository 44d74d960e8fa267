"""What a sweep found: a row for each truncation, as a value that saves, prints and turns into a frame."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tncompress.cutting import TruncatedLayer
from tncompress.policies import PolicyField
from tncompress.retraining import Training
from tncompress.spec import explain
from tncompress.storage import new_file
from tncompress.sweep_points import LeftOut, amount_text, content
from tncompress.tables import markdown_table, percent, render
from tncompress.textfiles import read_value

if TYPE_CHECKING:
    from rich.table import Table

_FROM_FILE = ConfigDict(extra="forbid", allow_inf_nan=False)

COLUMNS = (
    "layers",
    "cuts",
    "amount",
    "ranks",
    "norm loss",
    "params",
    "accuracy",
    "loss",
    "BN: accuracy",
    "BN: loss",
    "dense again",
    "on manifold",
)


@dataclass(frozen=True)
class Figures:
    """Accuracy (a fraction) and mean cross-entropy (in nats) on the test images."""

    __pydantic_config__: ClassVar[ConfigDict] = _FROM_FILE

    accuracy: float
    loss: float


@dataclass(frozen=True)
class SweepRow:
    """What came of one truncation: ``label`` and ``cuts`` as asked, ``layers`` with what was achieved.

    ``rel_error`` is the norm loss of all truncated kernels together; ``params_ratio`` the parameters of their
    factored form over those of the dense kernels, None where no format holds cuts that cross. ``before`` and
    ``after`` are the figures before and after BatchNorm re-estimation, None where that was not asked for
    or the output held NaN or infinity. ``dense`` and ``manifold`` are what training again did. Rows that come
    to the same kernels share a ``unit``, and were measured once.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FROM_FILE

    label: str
    cuts: tuple[str, ...]
    amount: PolicyField
    layers: tuple[TruncatedLayer, ...]
    rel_error: float
    params_ratio: float | None
    before: Figures | None
    after: Figures | None
    unit: str
    dense: Training | None = None
    manifold: Training | None = None

    @property
    def truncated(self) -> bool:
        """Whether any rank is below the full one; where none is, the row is that of the dense network."""
        return bool(content(self.layers))

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """The measured ranks of each layer, one for each cut."""
        return tuple(tuple(cut.rank for cut in layer.cuts) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self) | {"amount": {self.amount.tag: self.amount.to_value()}}


@dataclass(frozen=True)
class Sweep:
    """The rows of a sweep, beside the dense network's figures ``before`` and ``after`` re-estimation.

    ``control`` is the dense network trained for as many epochs as the truncated ones, by ``config``. The
    figures are on ``images`` test images, BatchNorm statistics on ``drift_images``. ``left_out`` says what
    has no row, and why; ``digest`` is the fingerprint of the dense model.
    """

    rows: tuple[SweepRow, ...]
    before: Figures
    after: Figures | None
    images: int
    drift_images: int
    digest: str
    control: Training | None = None
    config: Mapping[str, Any] | None = None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The sets of layers, in their order."""
        return tuple(dict.fromkeys(row.label for row in self.rows))

    @property
    def units(self) -> int:
        """How many different truncations there are."""
        return len({row.unit for row in self.rows if row.truncated})

    def of(self, label: str, cuts: str | Sequence[str] | None = None) -> tuple[SweepRow, ...]:
        """Return the rows of one set of layers, of one cut (or a sequence of cuts) if it is given."""
        wanted = (cuts,) if isinstance(cuts, str) else tuple(cuts) if cuts is not None else None
        return tuple(row for row in self.rows if row.label == label and wanted in (None, row.cuts))

    # --- files

    def to_dict(self) -> dict[str, Any]:
        """Return the sweep as plain values."""
        return {"version": 1} | asdict(self) | {"rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def from_dict(cls, fields: Any) -> Sweep:
        """Return the sweep that :meth:`to_dict` described; a ``ValueError`` where it is none."""
        version = fields.get("version", 1) if isinstance(fields, Mapping) else 1
        if isinstance(version, int) and version > 1:
            raise ValueError(f"the sweep has version {version}, this release reads 1: upgrade tncompress")
        try:
            read = _SweepFile.model_validate(fields)
        except ValidationError as error:
            raise ValueError(f"this is no sweep: {explain(error, _SweepFile)}") from None
        return cls(**{name: getattr(read, name) for name in _SweepFile.model_fields if name != "version"})

    def save(self, path: str | Path) -> None:
        """Write the sweep as JSON."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with new_file(path) as fresh:
            fresh.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Return the sweep that :meth:`save` wrote; errors are one line that names the file."""
        return read_value(path, "sweep", cls.from_dict)

    # --- tables

    def to_frame(self, kind: Literal["pandas", "polars"] = "pandas") -> Any:
        """Return a data frame with a line for each row; what was not measured is missing there."""
        if kind not in ("pandas", "polars"):
            raise ValueError(f"a frame is of pandas or polars, got {kind!r}")
        try:
            library = __import__(kind)
        except ImportError:
            raise ImportError(f"to_frame({kind!r}) needs {kind}: pip install {kind}") from None
        lines = [_flat(row) for row in self.rows]
        columns = {name: [line[name] for line in lines] for name in (lines[0] if lines else ())}
        return library.DataFrame(columns)

    def to_markdown(self) -> str:
        """Return the rows as a Markdown table, under lines that say what they are."""
        shown = self._columns()
        table = markdown_table(
            [COLUMNS[i] for i in shown], ([cells[i] for i in shown] for cells in map(_cells, self.rows))
        )
        lines = [f"{self._title()}.", "", *(f"{line}.  " for line in self._references()), "", table]
        if self.left_out:
            lines += ["", *(f"- {_left_out(entry)}" for entry in self.left_out)]
        return "\n".join(lines) + "\n"

    def _title(self) -> str:
        layers = len({layer.name for row in self.rows for layer in row.layers})
        return (
            f"{len(self.rows)} truncations of {layers} layer{'s' * (layers != 1)}, {self.units} of them "
            f"different, on {self.images} images"
        )

    def _references(self) -> Iterator[str]:
        """Yield what the rows are to be compared with."""
        yield f"dense: accuracy {percent(self.before.accuracy)}, loss {self.before.loss:.4f}"
        if self.after is not None:
            yield (
                f"dense, BatchNorm (BN) from {self.drift_images} images: accuracy "
                f"{percent(self.after.accuracy)}, loss {self.after.loss:.4f}"
            )
        if self.control is not None:
            epochs = len(self.control.accuracies)
            found = self.control.reason or percent(self.control.accuracy)
            yield f"dense control, trained for {epochs} epochs: {found}"
        trained = [found for row in self.rows for found in (row.dense, row.manifold) if found is not None]
        for reason in dict.fromkeys(found.reason for found in trained if found.reason):
            yield f"not trained again: {reason}"

    def _columns(self) -> list[int]:
        """Return which of the columns have something to show."""
        shown = dict.fromkeys((8, 9), self.after is not None)
        shown |= {10: any(row.dense for row in self.rows), 11: any(row.manifold for row in self.rows)}
        return [i for i in range(len(COLUMNS)) if shown.get(i, True)]

    def __str__(self) -> str:
        return render(self, 160)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        left = (f"left out: {_left_out(entry)}" for entry in self.left_out)
        caption = "\n".join([*self._references(), *left])
        table = Table(title=self._title(), title_justify="left", caption=caption, caption_justify="left")
        shown = self._columns()
        for i in shown:
            table.add_column(COLUMNS[i], justify="right" if i > 3 else "left", overflow="fold")
        before: Any = None
        for row in self.rows:
            if before is not None and (row.label, row.cuts) != before:
                table.add_section()
            cells = _cells(row)
            first = cells[:2] if (row.label, row.cuts) != before else ("", "")
            table.add_row(*(Text((*first, *cells[2:])[i]) for i in shown))
            before = (row.label, row.cuts)
        return table


class _SweepFile(BaseModel):
    """What a sweep looks like in a file."""

    model_config = _FROM_FILE

    version: Literal[1] = 1
    rows: tuple[SweepRow, ...]
    before: Figures
    after: Figures | None
    images: int = Field(ge=1)
    drift_images: int = Field(ge=0)
    digest: str
    control: Training | None
    config: dict[str, Any] | None
    left_out: tuple[LeftOut, ...]


def _cells(row: SweepRow) -> tuple[str, ...]:
    ranks = "; ".join(" ".join(f"{cut.rank}/{cut.full}" for cut in layer.cuts) for layer in row.layers)
    figures = [cell for found in (row.before, row.after) for cell in _figures(found)]
    again = (_trained(row.dense), _trained(row.manifold))
    params = percent(row.params_ratio, 1)
    head = row.label, ", ".join(row.cuts), amount_text(row.amount), ranks
    return *head, f"{row.rel_error:.4f}", params, *figures, *again


def _figures(found: Figures | None) -> tuple[str, str]:
    return (percent(found.accuracy), f"{found.loss:.4f}") if found is not None else ("-", "-")


def _trained(found: Training | None) -> str:
    return percent(found.accuracy) if found is not None else "-"


def _left_out(entry: LeftOut) -> str:
    cuts = f", {', '.join(entry.cuts)}" if entry.cuts else ""
    return f"{entry.label}{cuts}: {entry.reason}"


def _flat(row: SweepRow) -> dict[str, Any]:
    """Return a row as one line of a frame."""
    line: dict[str, Any] = {
        "layers": row.label,
        "cuts": ", ".join(row.cuts),
        "policy": row.amount.tag,
        "amount": float(row.amount.to_value()),
        "rank": row.ranks[0][0] if len(row.layers) == len(row.cuts) == 1 else None,
        "full_rank": row.layers[0].cuts[0].full if len(row.layers) == len(row.cuts) == 1 else None,
        "ranks": "; ".join(" ".join(map(str, ranks)) for ranks in row.ranks),
        "rel_error": row.rel_error,
        "params_ratio": row.params_ratio,
    }
    for name, found in (("", row.before), ("_batchnorm", row.after)):
        line[f"accuracy{name}"] = found.accuracy if found is not None else None
        line[f"loss{name}"] = found.loss if found is not None else None
    for name, trained in (("dense", row.dense), ("manifold", row.manifold)):
        line[f"accuracy_{name}"] = trained.accuracy if trained is not None else None
    return line | {"unit": row.unit}
