"""What a worker is given: a job that carries out units, and how results and errors are sent back."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from tncompress.textfiles import one_line

Run = Callable[[Sequence[Any]], Iterator[tuple[Any, Any]]]
"""From units to pairs of a unit and its result, in whatever order they come."""


@runtime_checkable
class Job(Protocol):
    """What is done with each unit."""

    def run(self, unit: Any) -> Any:
        """Return the result of one unit."""


def outcome(job: Job, unit: Any) -> tuple[bool, Any]:
    """Return True with the result, or False with an error that can be sent."""
    try:
        return True, job.run(unit)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return False, RuntimeError(f"{type(error).__name__}: {one_line(error)}")
        return False, error


def unpickled(payload: bytes) -> Job:
    """Return the job, or one that says with each unit why there is none."""
    try:
        return pickle.loads(payload)
    except Exception as error:  # above all a module that is not there
        return _Missing(one_line(error))


class _Missing:
    def __init__(self, reason: str) -> None:
        self.reason = reason

    def run(self, unit: Any) -> Any:
        hint = "the modules of the model and its data must be found there, too"
        raise ImportError(f"a worker can't read its job ({self.reason}): {hint}")
