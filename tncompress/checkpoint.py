"""A training run on disk, so that a killed one goes on where it was: written whole or not at all.

A checkpoint is a folder: ``state.pt`` holds tensors and plain values only, ``checkpoint.json`` says of
which run it is and how far, with the checksum of the other. Each write makes a new folder that takes the
place of the old one in one step. (Accelerate's ``save_state`` writes into the folder that is there, and
pickles.)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tncompress.storage import check_writable, new_directory, restore
from tncompress.textfiles import one_line, read_value

MARKER, STATE, VERSION = "checkpoint.json", "state.pt", 1


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: ``progress``, plain values, and ``state``, which has tensors, too."""

    progress: dict[str, Any]
    state: dict[str, Any]


class Checkpoint:
    """A place for the checkpoints of one run, which ``run`` (plain values) tells from others."""

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(path).expanduser()
        self.run = json.loads(json.dumps(run))

    def read(self) -> Saved | None:
        """Return what was last written; None where nothing was. One of another run is a ``ValueError``."""
        restore(self.path)
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            check_writable(self.path, marker=MARKER)
            return None
        if not (self.path / MARKER).is_file():
            raise FileExistsError(f"{self.path} holds no checkpoint (no {MARKER}): choose another folder")
        fields = read_value(self.path / MARKER, "checkpoint", _checked)
        self._compare(fields["run"])
        file = self.path / STATE
        if not file.is_file() or _checksum(file) != fields["checksum"]:
            raise ValueError(f"the checkpoint {self.path} is damaged: remove it, or put a whole copy there")
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what a hostile pickle raises is open-ended
            raise ValueError(f"the checkpoint {self.path} can't be read: {one_line(error, 200)}") from None
        return Saved(fields["progress"], state)

    def write(self, saved: Saved) -> None:
        """Put a checkpoint in the place of the last one, which stays as it was if this fails."""
        try:
            with new_directory(self.path, marker=MARKER, overwrite=True) as folder:
                torch.save(saved.state, folder / STATE)
                text = {
                    "version": VERSION,
                    "run": self.run,
                    "progress": saved.progress,
                    "checksum": _checksum(folder / STATE),
                }
                (folder / MARKER).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
            reason = one_line(getattr(error, "strerror", None) or error, 200)
            kept = (
                "the one before it is kept" if (self.path / MARKER).is_file() else "there is none before it"
            )
            raise OSError(
                f"a checkpoint can't be written to {self.path} ({reason}); {kept}: "
                "make room, then start the same run again"
            ) from error

    def _compare(self, other: Mapping[str, Any]) -> None:
        for part in self.run:
            mine, theirs = self.run[part], other.get(part)
            if mine == theirs:
                continue
            if isinstance(mine, dict) and isinstance(theirs, dict):
                key = next(key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key))
                differs = f"{part} {key} {theirs.get(key)!r}, now {mine.get(key)!r}"
            else:
                differs = f"another {part}"
            raise ValueError(
                f"the checkpoint {self.path} is of another run ({differs}): run that again, or choose "
                "another folder; nothing was changed"
            )


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in ``folder`` and folders in it, and itself if it held nothing else."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if (path / MARKER).is_file():
            shutil.rmtree(path)
        elif path.is_dir() and not path.is_symlink():
            remove_checkpoints(path)
    with suppress(OSError):
        folder.rmdir()


def _checked(fields: Any) -> dict[str, Any]:
    wanted = {"version": int, "run": dict, "progress": dict, "checksum": str}
    if not isinstance(fields, dict) or any(type(fields.get(k)) is not kind for k, kind in wanted.items()):
        raise ValueError("it is no checkpoint of a training run")
    if fields["version"] != VERSION:
        raise ValueError(f"its version is {fields['version']}, known is {VERSION}")
    return fields


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
