"""Small words for numbers and tables, the same in the console, the plan and the report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

_T = TypeVar("_T")


def count(number: int | float | None) -> str:
    """Return a count with three digits and a unit.

    >>> count(36_864), count(912), count(None)
    ('36.9 k', '912', '-')
    """
    if number is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def ratio(before: int | float | None, after: int | float | None) -> str:
    """Return how many times smaller ``after`` is than ``before``.

    >>> ratio(8, 2), ratio(2, 8)
    ('4.00x', '0.25x')
    """
    if not before or not after:
        return "-"
    return f"{before / after:.2f}x"


def change(before: int | float, after: int | float, less: str, more: str) -> str:
    """Return by which factor ``after`` differs from ``before``, with the word for its direction.

    >>> change(8, 2, "faster", "slower"), change(2, 8, "faster", "slower")
    ('4.00x faster', '4.00x slower')
    """
    return f"{ratio(before, after)} {less}" if after <= before else f"{ratio(after, before)} {more}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """Return a fraction as a percentage, "-" for None.

    >>> percent(0.91234), percent(None)
    ('91.23 %', '-')
    """
    return f"{100 * fraction:.{digits}f} %" if fraction is not None else "-"


def render(renderable: Any, width: int = 140) -> str:
    """Return a rich renderable as plain text; tables that would not fit become lists."""
    from rich.console import Console

    from tncompress.narrow import fitted

    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(fitted(renderable))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is aligned left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def watched(items: Sequence[_T], what: str, *, show: bool) -> Iterable[_T]:
    """Return ``items``; if standard error is a terminal, a bar there shows how far they are gone through."""
    if not show or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=what, console=Console(stderr=True), transient=True)


def progress_line(words: str, *, show: bool) -> None:
    """Write a line where there is no terminal for a bar: what a log shows of work that takes long."""
    if show and not sys.stderr.isatty():
        print(words, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(total: int, *, show: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that advances a progress bar, on a terminal, by one and changes its words."""
    if not show or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda words: bar.update(task, advance=1, description=words)
