"""A file of measured rows, a line each, that outlives a killed run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: there nothing tells of another writer
    fcntl = None  # type: ignore[assignment]

from tncompress.textfiles import one_line, parse_json, read_text

_START = '{"key": "'


class RowCache:
    """Rows by key, read from ``path`` and appended to it as soon as they are there; in memory without a path.

    A last line that a killed process left unfinished is cut off; any other line that is none of a cache is a
    ``ValueError``, so that no other file is ever written to.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path).expanduser() if path is not None else None
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        text = read_text(path, "cache")
        *lines, rest = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_json(line)
                self.rows[entry["key"]] = entry["row"]
            except (ValueError, TypeError, KeyError):
                shown = f"its line {number} is {one_line(line, 40)!r}"
                raise ValueError(f"{path} is no cache of measured rows: {shown}") from None
        if rest and not (rest.startswith(_START) or _START.startswith(rest)):
            raise ValueError(f"{path} is no cache of measured rows: it ends in {one_line(rest, 40)!r}")
        if rest:
            os.truncate(path, len("".join(f"{line}\n" for line in lines).encode()))

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the row that was kept under ``key``."""
        return self.rows.get(key)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row, on the disk at once."""
        self.rows[key] = row
        if self.path is None:
            return
        line = json.dumps({"key": key, "row": row}, allow_nan=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise type(error)(f"the cache {self.path} can't be written: {error.strerror or error}") from None


@contextmanager
def sole_writer(path: str | Path | None) -> Iterator[None]:
    """Be the only writer of the cache ``path`` for the length of the block, if there is a path.

    Another process that is at it is a ``BlockingIOError``. The kernel takes the lock back from a process that
    is killed. File systems that know no locks are written to without one.
    """
    if path is None:
        yield
        return
    path = Path(path).expanduser()
    try:
        file = path.open("ab")
    except OSError as error:
        raise type(error)(f"the cache {path} can't be written: {error.strerror or error}") from None
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"another run is writing to the cache {path}: wait for its end"
                ) from None
            except OSError:
                pass
        yield
