"""Writing results so that a folder or file is there whole, or not at all, and never in another's place."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_directory(path: str | Path, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh folder beside ``path`` that takes its place when the block ends without an error.

    The folder is made at once, so a place that can't be written is known before any work. A ``path`` that
    exists already is refused unless it is empty, or ``overwrite`` is set and it holds the file ``marker``:
    what is not a result of this library is never removed.
    """
    path = Path(path).expanduser()
    check_free(path, marker=marker, overwrite=overwrite)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"the output folder {path} can't be written: {reason}") from None
    try:
        yield fresh
        check_free(path, marker=marker, overwrite=overwrite)
        if path.exists():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            path.rename(old)
            fresh.rename(path)
            shutil.rmtree(old)
        else:
            fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_writable(path: str | Path, *, marker: str, overwrite: bool = False) -> None:
    """Raise now what :func:`new_directory` would raise, before long work begins; leave nothing behind."""
    path = Path(path).expanduser()
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        with new_directory(path, marker=marker, overwrite=overwrite):
            raise _OnlyLooking
    except _OnlyLooking:
        pass
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


class _OnlyLooking(Exception):  # noqa: N818 - no error: it ends a trial before anything is kept
    pass


def check_free(path: Path, *, marker: str, overwrite: bool) -> None:
    """Raise ``FileExistsError`` where ``path`` holds something that must not be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file: choose another output folder")
    if not any(path.iterdir()):
        return
    if not (path / marker).is_file():
        raise FileExistsError(f"{path} holds other files (no {marker}): choose another output folder")
    if not overwrite:
        raise FileExistsError(f"{path} already holds a result: choose another output folder, or overwrite it")


@contextmanager
def new_file(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a path beside ``path`` whose file takes its place when the block ends without an error."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: choose another name, or overwrite it")
    fresh = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.touch()
    except OSError as error:
        raise type(error)(f"{path} can't be written: {error.strerror or error}") from None
    mode = fresh.stat().st_mode
    try:
        yield fresh
        fresh.chmod(mode)  # some writers make private files of their own
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
