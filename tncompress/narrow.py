"""Tables for terminals of any width: as tables where they fit, else as lists, so that no figure is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

NARROWEST = 24
"""To how many letters a column of words may be folded; columns of figures are never."""


def fitted(value: Any) -> Any:
    """Return a renderable like ``value`` in which every table shows all its figures at any width.

    Columns on the right hold figures, which are not wrapped; the others hold words, which are folded.
    """
    while hasattr(value, "__rich__"):
        value = value.__rich__()
    if isinstance(value, Group):
        return Group(*map(fitted, value.renderables))
    return Fitted(value) if isinstance(value, Table) else value


class Fitted:
    """A table that becomes a list, a few lines for each row, where it would have to cut its figures."""

    def __init__(self, table: Table) -> None:
        self.table = table
        for column in table.columns:
            figures = column.justify == "right"
            column.no_wrap = figures
            column.overflow = "crop" if figures else "fold"  # "ignore" would not be aligned

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        least, most = self._widths(console, options)
        room = options.max_width - 1 - sum(3 + width for width in least)
        if room < 0:
            yield from self._listed(console, options.max_width)
            return
        wanted = sorted((b - a, place) for place, (a, b) in enumerate(zip(least, most, strict=True)))
        for number, (more, place) in enumerate(wanted):
            given = min(more, room // (len(wanted) - number))
            self.table.columns[place].width = least[place] + given
            room -= given
        yield self.table

    def _widths(self, console: Console, options: ConsoleOptions) -> tuple[list[int], list[int]]:
        """Return the least width of each column, that of whole figures or words, and that of whole cells."""
        roomy, found = options.update(max_width=10_000), []
        for column in self.table.columns:
            cells = [_text(console, cell) for cell in (column.header, *column.cells)]
            sizes = [Measurement.get(console, roomy, cell) for cell in cells]
            whole = max(size.maximum for size in sizes)
            words = min(max(size.minimum for size in sizes), NARROWEST)
            found.append((whole if column.no_wrap else words, whole))
        return [least for least, _ in found], [most for _, most in found]

    def _listed(self, console: Console, width: int) -> Iterator[Text]:
        """Yield the title, each row as its first cell and the other figures below it, and the caption."""
        if self.table.title:
            yield Text.assemble(_text(console, self.table.title), style="italic")
        headers = [_text(console, column.header).plain for column in self.table.columns]
        columns = [list(column.cells) for column in self.table.columns]
        for row in zip(*columns, strict=True):
            first, *cells = (_text(console, cell) for cell in row)
            yield Text(f"{headers[0]} " if headers[0] else "", overflow="fold").append_text(first)
            for line in _filled(_items(headers[1:], cells), width - 2):
                yield from (Text("  ").append_text(part) for part in line.wrap(console, width - 2))
        if self.table.caption:
            yield _text(console, self.table.caption)


def _items(headers: list[str], cells: list[Text]) -> list[Text]:
    """Return ``header cell`` for each cell that is not empty; one without a header joins the one before."""
    items: list[Text] = []
    for header, cell in zip(headers, cells, strict=True):
        if not cell.plain:
            continue
        if header or not items:
            items.append(Text(f"{header} " if header else "", overflow="fold").append_text(cell))
        else:
            items[-1] = items[-1].append("  ").append_text(cell)
    return items


def _filled(items: list[Text], width: int) -> Iterator[Text]:
    """Yield lines with as many items as there is room for; a longer one has lines of its own."""
    line: Text | None = None
    for item in items:
        if line is not None and line.cell_len + 3 + item.cell_len <= width:
            line = line.append(" · ").append_text(item)
            continue
        if line is not None:
            yield line
        line = item.copy()
    if line is not None:
        yield line


def _text(console: Console, cell: Any) -> Text:
    """Return a cell as text; a string is read as the table reads it, as markup."""
    return console.render_str(cell, highlight=False) if isinstance(cell, str) else cell
