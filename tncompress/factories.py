"""Functions in a Python file of the user's, called by ``PATH/FILE.py:NAME``."""

import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from torch import nn


def split_factory(source: str) -> tuple[Path, str] | None:
    """Return file and name of ``PATH/FILE.py:NAME``, or None where ``source`` is nothing of the kind.

    >>> split_factory("nets/mine.py:tiny"), split_factory("digits")
    ((PosixPath('nets/mine.py'), 'tiny'), None)
    """
    place, _, name = source.rpartition(":")
    return (Path(place).expanduser(), name) if place.endswith(".py") and name else None


def call_factory(path: Path, name: str, kind: str, **given: Any) -> Any:
    """Return what the function ``name`` in the file ``path`` returns for those of ``given`` that it takes.

    The file is run once, as a module with a private name, and again when its text has changed. ``kind`` is
    what is wanted of it ("model"), for messages. Raises ``FileNotFoundError`` for a file that is not there,
    ``ValueError`` for a name that is not in it; what the file itself raises goes through, with a note.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} file {path}")
    module = _run_file(path, kind)
    factory = getattr(module, name, None)
    if not _is_factory(factory):
        own = [key for key, value in vars(module).items() if _is_factory(value) and not key.startswith("_")]
        here = [key for key in own if getattr(vars(module)[key], "__module__", None) == module.__name__]
        raise ValueError(f"{path} has no factory {name!r}: its callables are {', '.join(here) or 'none'}")
    try:
        return factory(**{key: value for key, value in given.items() if _takes(factory, key)})
    except Exception as error:
        error.add_note(f"while building the {kind} {path}:{name}")
        raise


def _run_file(path: Path, kind: str) -> ModuleType:
    """Return the file as a module; its name is private, and is kept for pickle and torch.compile to find."""
    text = path.read_bytes()
    name = f"_tncompress_model_{hashlib.sha256(bytes(path.resolve()) + text).hexdigest()[:16]}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        module.__file__ = str(path)
        try:
            exec(compile(text, str(path), "exec"), module.__dict__)
        except BaseException as error:
            del sys.modules[name]
            error.add_note(f"while importing the {kind} file {path}{_beside(path, error)}")
            raise
    return sys.modules[name]


def _beside(path: Path, error: BaseException) -> str:
    """Return what to try where the file imports a neighbour, which Python does not look for there."""
    wanted = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    folder = path.resolve().parent
    if wanted and ((folder / f"{wanted}.py").is_file() or (folder / wanted).is_dir()):
        return f": {wanted} is in the same folder, which Python searches if PYTHONPATH={folder} is set"
    return ""


def _is_factory(value: object) -> TypeGuard[Callable[..., Any]]:
    return callable(value) and not isinstance(value, nn.Module)


def _takes(factory: Callable, parameter: str) -> bool:
    try:
        accepted = inspect.signature(factory).parameters.values()
    except ValueError:  # some builtins tell nothing about themselves
        return False
    return any(
        p.kind is p.VAR_KEYWORD
        or (p.name == parameter and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        for p in accepted
    )
