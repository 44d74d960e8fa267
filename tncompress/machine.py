"""The model of a machine, by which contractions are compared without running them, and where it is kept.

A line for each convolution: a start, its products at the machine's speed, and its inputs and outputs at the
speed of memory. Output channels count in whole widths, such as that of a vector register. The constants of
a machine are fitted by :func:`tncompress.calibrate_machine`; until then those of a Zen 4 with two threads in
float32 stand in, with which the model came within a tenth of the best of 110 ways to run a chain.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tncompress.noise import device_name
from tncompress.spec import explain
from tncompress.storage import cache_folder, new_file
from tncompress.textfiles import read_value

VERSION = 1

_Speed = Annotated[float, Field(gt=0, le=1e20, allow_inf_nan=False)]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Terms:
    """What the seconds of a convolution depend on: numbers ``moved`` and ``written``, and its products.

    ``rows`` is the number of products and additions for each output channel of a group, over all groups.
    """

    moved: int
    written: int
    rows: int
    out: int
    is_depthwise: bool

    def operations(self, width: int) -> int:
        """Return the operations, with output channels in whole widths."""
        return self.rows * -(-self.out // width) * width


@dataclass(frozen=True)
class Machine:
    """Constants: seconds, operations and bytes a second (``depthwise``: for their outputs), channels, bytes.

    ``start`` is what each call takes whatever its size; ``width`` the number of channels that are computed
    at once; ``itemsize`` the bytes of a number.

    >>> slow = Machine(start=1e-3, products=1e9, memory=1e9, depthwise=1e9, width=1)
    >>> round(slow.seconds(terms(pixels=10, groups=1, into=5, out=7, window=9)), 8)      # mostly the start
    0.00100678
    """

    start: float = 10e-6
    products: float = 180e9
    memory: float = 60e9
    depthwise: float = 25e9
    width: int = 16
    itemsize: int = 4

    def seconds(self, terms: Terms) -> float:
        """Return the seconds of a convolution with these terms."""
        steps = self.start + terms.moved * self.itemsize / self.memory
        if terms.is_depthwise:
            return steps + 2 * terms.written * self.itemsize / self.depthwise
        return steps + terms.operations(self.width) / self.products


def terms(*, pixels: int, groups: int, into: int, out: int, window: int) -> Terms:
    """Return the terms of a convolution: of each group ``into`` and ``out`` channels, a window's entries."""
    both = pixels * groups
    return Terms(both * (into + out), both * out, 2 * both * into * window, out, groups > 1 and into == 1)


class _Entry(BaseModel):
    """One machine in the file, with what it is of and how well it fits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    threads: Annotated[int, Field(ge=1)]
    dtype: str
    start: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    products: _Speed
    memory: _Speed
    depthwise: _Speed
    width: Annotated[int, Field(ge=1, le=4096)]
    itemsize: Annotated[int, Field(ge=1, le=16)]
    error: _Error
    torch: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.device, self.threads, self.dtype

    @property
    def machine(self) -> Machine:
        names = Machine.__dataclass_fields__
        return Machine(**{name: getattr(self, name) for name in names})


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    machines: tuple[_Entry, ...]


def machines_file() -> Path:
    """Return where fitted machines are kept: ``machines.json`` in the user's folder of caches."""
    return cache_folder() / "machines.json"


def machine_for(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Return the machine that was fitted to this device, dtype and number of threads, or the built-in one.

    A file that can't be read is told of in a warning, and does not stop anything.
    """
    return fitted_machine(device, dtype) or Machine()


def fitted_machine(
    device: torch.device | str, dtype: torch.dtype, threads: int | None = None
) -> Machine | None:
    """Return the machine that was fitted to this device, dtype and number of threads, if one was.

    Without ``threads`` they are those of torch in the thread that asks.
    """
    path = machines_file()
    try:
        state = path.stat()
    except OSError:
        return None
    try:
        known = _read(path, state.st_mtime_ns, state.st_size)
    except (ValueError, OSError) as error:
        warn_once(f"{error}; the built-in cost model is used: fit it again by tncompress bench --calibrate")
        return None
    found = known.get(_key(device, dtype, threads))
    return found.machine if found is not None else None


def keep_machine(machine: Machine, device: torch.device | str, dtype: torch.dtype, error: float) -> Path:
    """Write a fitted machine into the file, in the place of an older one of its kind, and return the path."""
    path = machines_file()
    name, threads, kind = _key(device, dtype)
    entry = _Entry(
        device=name, threads=threads, dtype=kind, error=error, torch=str(torch.__version__), **asdict(machine)
    )
    known = read_machines(path) if path.exists() else {}
    with new_file(path) as fresh:
        entries = [each.model_dump() for each in ({**known, entry.key: entry}).values()]
        fresh.write_text(json.dumps({"version": VERSION, "machines": entries}, indent=1) + "\n")
    return path


def read_machines(path: Path) -> dict[tuple[str, int, str], _Entry]:
    """Return the machines in a file by device, threads and dtype; errors are one line."""

    def make(fields: Any) -> dict[tuple[str, int, str], _Entry]:
        version = fields.get("version") if isinstance(fields, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise ValueError(f"version {version} is of a newer tncompress, this one reads {VERSION}")
        try:
            entries = _File.model_validate(fields).machines
        except ValidationError as error:
            inside = len(error.errors()[0]["loc"]) > 2
            words = explain(error, _Entry if inside else _File)
            raise ValueError(f"{words}; remove the file to begin anew") from None
        return {entry.key: entry for entry in entries}

    return read_value(path, "cost model", make)


def _key(device: torch.device | str, dtype: torch.dtype, threads: int | None = None) -> tuple[str, int, str]:
    return _name(str(device)), threads or torch.get_num_threads(), str(dtype).removeprefix("torch.")


@lru_cache(maxsize=16)
def _name(device: str) -> str:
    return device_name(device)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int, size: int) -> dict[tuple[str, int, str], _Entry]:
    return read_machines(path)


@lru_cache(maxsize=16)
def warn_once(words: str) -> None:
    """Warn with these words, once in a process."""
    warnings.warn(words, stacklevel=3)
