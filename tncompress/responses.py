"""How a network's output answers to the truncation of one layer at a time: rows, and what they predict.

Between a layer's own loss and the change of the network's output lies what the rest of the network does
with the error: a global average forgives it, a BatchNorm with a small variance does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tncompress.formats import Format
from tncompress.response_curves import LayerCurves, Point
from tncompress.spec import FormatField, explain
from tncompress.storage import new_file
from tncompress.tables import markdown_table, percent, render
from tncompress.textfiles import read_value

if TYPE_CHECKING:
    from rich.table import Table

_FROM_FILE = ConfigDict(extra="forbid", allow_inf_nan=False)

COLUMNS = ("layer", "format", "params", "ranks", "own loss", "output error²", "KL", "accuracy")


@dataclass(frozen=True)
class Row:
    """What came of truncating ``layer`` alone to ``ratio`` of its parameters.

    ``local_loss`` is the layer's own loss: the relative root mean square error of its output where moments
    were at hand, else the relative error of its kernel. ``error`` is the squared relative change of the
    network's output, ``kl`` the mean KL divergence (in nats) of the changed class probabilities from the
    dense ones, ``accuracy_change`` a difference of fractions; the last two are None where there are none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FROM_FILE

    layer: str
    format: FormatField
    ratio: float
    ranks: tuple[int, ...]
    local_loss: float
    error: float
    kl: float | None
    accuracy_change: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return dict(vars(self)) | {"format": self.format.to_dict(), "ranks": list(self.ranks)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Row:
        """Return the row that :meth:`to_dict` described."""
        return TypeAdapter(cls).validate_python(dict(fields))


@dataclass(frozen=True)
class Unmeasured:
    """What was not measured, and why: a whole layer where ``format`` and ``ratio`` are None."""

    __pydantic_config__: ClassVar[ConfigDict] = _FROM_FILE

    layer: str
    format: FormatField | None
    ratio: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return dict(vars(self)) | {"format": self.format.to_dict() if self.format is not None else None}


@dataclass(frozen=True)
class Sensitivity:
    """The measured rows of a network over ``images`` images, and the predictions that follow from them.

    ``accuracy`` is that of the dense network, where labels were given. ``calibrated`` says whether the rows'
    losses are those of outputs. ``digests`` are the fingerprints of the weights, by layer.
    """

    rows: tuple[Row, ...]
    images: int
    accuracy: float | None = None
    calibrated: bool = False
    unmeasured: tuple[Unmeasured, ...] = ()
    digests: Mapping[str, str] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that :meth:`predict` knows."""
        return tuple(self._curves)

    def predict(self, layer: str, loss: float, format: Format | None = None) -> float:
        """Return the squared relative change of the network's output to expect at a ``loss`` of one layer.

        ``loss`` is what the rows have as ``local_loss``. Of the layer's rows in ``format``, or of all where
        there is none, the squared loss and the change are joined by straight lines in logarithms, neighbours
        that contradict "more loss, more change" at their mean; beyond both ends the change is in proportion
        to the squared loss. A format with fewer rows than others has their curve times a factor. A layer
        without rows is a ``ValueError``.
        """
        if not loss >= 0:
            raise ValueError(f"a loss is a number from 0 on, got {loss!r}")
        curves = self._curves.get(layer)
        if curves is None:
            known = ", ".join(self._curves) or "none"
            raise ValueError(f"the sensitivity of layer {layer!r} was not measured; measured are {known}")
        return curves.of(format)(loss)

    def rank_correlation(self, measured: Sensitivity | None = None) -> float | None:
        """Return the Spearman correlation of predicted and measured changes, over all layers together.

        Each row is predicted from the rows of the other formats: one format is left out at a time. With
        ``measured`` the rows of that sensitivity are predicted from this one, as :meth:`predict` does. None
        where fewer than three rows can be predicted.
        """
        from scipy.stats import spearmanr  # takes longer to import than all else here

        pairs = []
        for format in {row.format: None for row in (measured or self).rows}:
            left = (row for row in self.rows if row.format != format)
            curves = self._curves if measured is not None else _curves_of(left)
            wanted = [row for row in (measured or self).rows if row.format == format and row.layer in curves]
            pairs += [(curves[row.layer].of(format)(row.local_loss), row.error) for row in wanted]
        if len(pairs) < 3:
            return None
        found = float(spearmanr(*zip(*pairs, strict=True)).statistic)
        return found if math.isfinite(found) else None

    @cached_property
    def _curves(self) -> dict[str, LayerCurves]:
        return _curves_of(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the sensitivity as plain values."""
        return {
            "version": 1,
            "images": self.images,
            "accuracy": self.accuracy,
            "calibrated": self.calibrated,
            "rows": [row.to_dict() for row in self.rows],
            "unmeasured": [entry.to_dict() for entry in self.unmeasured],
            "digests": dict(self.digests or {}),
        }

    @classmethod
    def from_dict(cls, fields: Any) -> Sensitivity:
        """Return the sensitivity that :meth:`to_dict` described; a ``ValueError`` where it is none."""
        version = fields.get("version", 1) if isinstance(fields, Mapping) else 1
        if isinstance(version, int) and version > 1:
            raise ValueError(
                f"the sensitivity has version {version}, this release reads 1: upgrade tncompress"
            )
        try:
            read = _SensitivityFile.model_validate(fields)
        except ValidationError as error:
            raise ValueError(f"this is no sensitivity: {explain(error, _SensitivityFile)}") from None
        return cls(read.rows, read.images, read.accuracy, read.calibrated, read.unmeasured, read.digests)

    def save(self, path: str | Path) -> None:
        """Write the sensitivity as JSON."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with new_file(path) as fresh:
            fresh.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Return the sensitivity that :meth:`save` wrote; errors are one line that names the file."""
        return read_value(path, "sensitivity", cls.from_dict)

    def to_markdown(self) -> str:
        """Return the rows as a Markdown table, under a line that says what they are."""
        lines = [f"{self._title()}.", "", markdown_table(COLUMNS, map(_cells, self.rows))]
        if caption := self._caption():
            lines += ["", f"{caption}."]
        return "\n".join(lines) + "\n"

    def _title(self) -> str:
        dense = f", dense accuracy {percent(self.accuracy)}" if self.accuracy is not None else ""
        layers = len({row.layer for row in self.rows})
        return f"{layers} layers, each truncated alone, on {self.images} images{dense}"

    def _caption(self) -> str:
        found = self.rank_correlation()
        if found is None:
            return ""
        words = "Spearman correlation of predicted and measured errors, one format left out at a time"
        return f"{words}: {found:.3f}"

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=self._title(), title_justify="left", caption=self._caption(), caption_justify="left"
        )
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if number > 3 else "left", overflow="fold")
        before = None
        for row in self.rows:
            if before not in (None, row.layer):
                table.add_section()
            first, *rest = _cells(row)
            table.add_row(Text(first if before != row.layer else ""), *map(Text, rest))
            before = row.layer
        table.add_section()
        for entry in self.unmeasured:
            head = Text(entry.layer), Text(str(entry.format or "")), _ratio(entry.ratio)
            table.add_row(*head, Text(entry.reason, style="italic"))
        return table


class _SensitivityFile(BaseModel):
    """What a sensitivity looks like in a file."""

    model_config = _FROM_FILE

    version: Literal[1] = 1
    images: int = Field(ge=1)
    accuracy: float | None
    calibrated: bool
    rows: tuple[Row, ...]
    unmeasured: tuple[Unmeasured, ...]
    digests: dict[str, str]


def _cells(row: Row) -> tuple[str, ...]:
    kl = f"{row.kl:.3g}" if row.kl is not None else "-"
    points = f"{100 * row.accuracy_change:+.2f}" if row.accuracy_change is not None else "-"
    ranks = " ".join(map(str, row.ranks))
    numbers = f"{row.local_loss:.4f}", f"{row.error:.3g}", kl, points
    return row.layer, str(row.format), _ratio(row.ratio), ranks, *numbers


def _ratio(ratio: float | None) -> str:
    return f"{ratio:.4g}" if ratio is not None else ""


def _curves_of(rows: Iterable[Row]) -> dict[str, LayerCurves]:
    points: dict[str, dict[Format, list[Point]]] = {}
    for row in rows:
        points.setdefault(row.layer, {}).setdefault(row.format, []).append((row.local_loss, row.error))
    return {layer: LayerCurves(own) for layer, own in points.items()}
