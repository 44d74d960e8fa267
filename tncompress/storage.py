"""Writing results so that a folder or file is there whole, or not at all, and never in another's place.

Everything is written in a hidden folder beside its place, flushed to the disk, and moved there in one step.
The writer holds a lock on the hidden folder, which the kernel takes back even from a killed process: who
gets the lock knows that the folder is left over, and may put back or remove what lies in it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: leftovers are not removed there
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
_NEW, _OLD = "new", "old"


def cache_folder() -> Path:
    """Return the folder of what can be had again: downloads, and what was measured of the machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tncompress"


@contextmanager
def new_directory(path: str | Path, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh folder that takes the place of ``path`` when the block ends without an error.

    The folder is made at once, so a place that can't be written is known before any work. A ``path`` that
    exists already is refused unless it is empty, or ``overwrite`` is set and it holds the file ``marker``:
    what is not a result of this library is never removed. A process that is killed leaves the old result or
    the new one; what else it leaves is removed by the next one that writes to ``path``.
    """
    path = Path(path).expanduser()
    path = path.resolve() if path.is_symlink() else path
    check_free(path, marker=marker, overwrite=overwrite)
    with _workplace(path, f"the output folder {path}") as place:
        fresh = place / _NEW
        fresh.mkdir()
        yield fresh
        check_free(path, marker=marker, overwrite=overwrite)
        for folder, _, files in os.walk(fresh):
            for file in files:
                _flush(Path(folder, file))
            _flush(Path(folder))
        if not path.exists():
            fresh.rename(path)
        elif not _exchange(fresh, path):
            _replace(path, fresh, place / _OLD)
        _flush(path.parent)


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
    restore(path)
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
    """Yield a path of the same name whose file takes the place of ``path`` when the block ends well."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: choose another name, or overwrite it")
    with _workplace(path, str(path)) as place:
        fresh = place / path.name
        fresh.touch()
        mode = fresh.stat().st_mode
        yield fresh
        fresh.chmod(mode)  # some writers make private files of their own
        _flush(fresh)
        fresh.replace(path)
        _flush(path.parent)


def restore(path: Path) -> None:
    """Put back the folder ``path`` that a process was killed over while it had moved it out of the way."""
    if path.exists():
        return
    for place in _workplaces(path):
        if (place / _OLD).is_dir():
            with _lock(place) as locked, suppress(OSError):
                if locked is not False and not path.exists():
                    (place / _OLD).rename(path)


@contextmanager
def _workplace(path: Path, what: str) -> Iterator[Path]:
    """Yield a hidden, locked folder beside ``path``; remove it, and at a good end those of killed writers."""
    while True:
        place = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.tnc")
        try:
            place.mkdir(parents=True)
        except OSError as error:
            raise type(error)(f"{what} can't be written: {error.strerror or error}") from None
        with _lock(place) as locked:
            if locked is False or not place.exists():  # taken for a leftover before it was locked
                continue
            try:
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)
        break
    for other in _workplaces(path):
        with _lock(other) as locked:
            if locked:
                shutil.rmtree(other, ignore_errors=True)


def _workplaces(path: Path) -> list[Path]:
    """Return the hidden folders beside ``path`` that writers to it made."""
    name = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.tnc")
    try:
        return [other for other in path.parent.iterdir() if name.fullmatch(other.name) and other.is_dir()]
    except OSError:
        return []


@contextmanager
def _lock(folder: Path) -> Iterator[bool | None]:
    """Yield True with the lock on ``folder`` held, False if another holds it, None where there is none."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        locked: bool | None = None
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except OSError as error:
                locked = False if isinstance(error, BlockingIOError) else None
        yield locked
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux); return False where system or file system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _replace(path: Path, fresh: Path, old: Path) -> None:
    """Move ``path`` to ``old``, ``fresh`` to ``path``; if killed in between, see :func:`restore`."""
    try:
        path.rename(old)
        fresh.rename(path)
    except BaseException:
        with suppress(OSError):
            if not path.exists():
                old.rename(path)
        raise


def _flush(path: Path) -> None:
    """Have ``path``, a file or folder, written to the disk; some file systems refuse it for folders."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
