"""The table of layers of an HTML report, which sorts by each of its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tncompress.layer_figures import LayerFigures
from tncompress.report_table import Report
from tncompress.tables import count, ratio


@dataclass(frozen=True)
class Column:
    """A column: its name, what it says, and whether it holds words, which are sorted as such."""

    name: str
    hint: str
    words: bool = False


@dataclass(frozen=True)
class Cell:
    """What a field shows, by what it is sorted (by its text, where that is None), style, link, and a note."""

    text: str
    value: float | int | str | None = None
    kind: str = ""
    link: str = ""
    note: str = ""


COLUMNS = (
    Column("layer", "name in the model", words=True),
    Column("#", "place in the model"),
    Column("kernel", "shape of the dense weight, sorted by its numbers"),
    Column("format, or why dense", "how the kernel is held; leads to its diagram", words=True),
    Column("ranks", "dimensions of the bonds, sorted by their sum"),
    Column("kernel error planned", "relative error of the kernel when it was truncated"),
    Column("kernel error now", "relative error of the kernel now, after repair and training"),
    Column("output error planned", "relative error of the layer's output by the plan"),
    Column("output error now", "relative error of the layer's output, measured now"),
    Column("params before", "numbers of the dense kernel"),
    Column("params now", "numbers of the factors"),
    Column("fewer params", "how many times fewer"),
    Column("MACs before", "multiply-accumulates of the dense layer"),
    Column("MACs now", "multiply-accumulates of the layer now"),
    Column("fewer MACs", "how many times fewer"),
)


def columns_and_lines(
    layers: Sequence[LayerFigures], links: Mapping[str, str]
) -> tuple[list[Column], list[list[Cell]]]:
    """Return the columns that some layer has an entry for, and the cells of each layer."""
    lines = [_cells(place, layer, links.get(layer.name, "")) for place, layer in enumerate(layers, 1)]
    shown = [i for i in range(len(COLUMNS)) if any(line[i].text for line in lines)]
    return [COLUMNS[i] for i in shown], [[line[i] for i in shown] for line in lines]


def layer_words(report: Report) -> str:
    """Return how many layers are compressed."""
    held = sum(layer.format is not None for layer in report.layers)
    return f"{held} of {len(report.layers)} layers are held as tensor networks."


def _cells(place: int, layer: LayerFigures, link: str) -> list[Cell]:
    kernel = Cell("×".join(map(str, layer.shape)), layer.params_dense)
    head = [Cell(", ".join(layer.names)), Cell(str(place), place), kernel]
    if layer.format is None:
        cost = _costs(layer.params_dense, None), _costs(layer.macs_dense, None)
        return [
            *head,
            Cell("dense", "dense", "words", note=layer.reason or ""),
            *[Cell("")] * 5,
            *cost[0],
            *cost[1],
        ]
    errors = (layer.planned_error, layer.kernel_error, layer.planned_output_error, layer.output_error)
    return [
        *head,
        Cell(str(layer.format), kind="words", link=link),
        Cell(" ".join(map(str, layer.ranks)), sum(layer.ranks)),
        *(Cell(f"{error:.4f}" if error is not None else "", error) for error in errors),
        *_costs(layer.params_dense, layer.params),
        *_costs(layer.macs_dense, layer.macs),
    ]


def _costs(before: int | None, after: int | None) -> list[Cell]:
    """Return a cost before and after, and how many times less that is; empty where it is not known."""
    found: list[Any] = [before, after]
    cells = [Cell(count(value) if value is not None else "", value) for value in found]
    fewer = before / after if before and after else None
    return [*cells, Cell(ratio(before, after) if fewer else "", fewer)]
