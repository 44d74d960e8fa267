"""The way of the accuracy from the dense model to the tuned one, as training records and folders have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tncompress.spec import explain
from tncompress.tables import percent
from tncompress.textfiles import one_line, parse_json, read_text

HISTORY = "history.json"
"""Where :func:`tncompress.save` keeps what is recorded, beside the weights."""
COLUMNS = ("", "loss", "accuracy", "dense control", "seconds")

_Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Step:
    """The accuracy after a step, such as ``truncated``; on so many labelled ``images``, where known."""

    name: str
    accuracy: float
    images: int | None = None


@dataclass(frozen=True)
class Point:
    """What is known after an epoch, or before the first; ``place`` counts epochs from the beginning."""

    place: int
    what: str
    accuracy: float | None
    loss: float | None = None
    control: float | None = None
    seconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        """Return the point's line of a table, in the order of :data:`COLUMNS`."""
        loss = f"{self.loss:.4f}" if self.loss is not None else ""
        known = [percent(value) if value is not None else "" for value in (self.accuracy, self.control)]
        return self.what, loss, *known, f"{self.seconds:.1f}" if self.seconds is not None else ""


@dataclass(frozen=True)
class Recovery:
    """How the accuracy went: ``dense`` before, then ``steps``; ``points`` are those of the recovery curve.

    ``config`` holds the settings of the training, if there was any.
    """

    dense: float | None = None
    steps: tuple[Step, ...] = ()
    points: tuple[Point, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.steps or self.points)

    @property
    def has_accuracies(self) -> bool:
        """Whether there is a recovery curve: accuracies after epochs."""
        return sum(point.accuracy is not None for point in self.points) > 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def of(cls, history: Any, steps: Mapping[str, float] | None = None) -> Recovery:
        """Return what a ``History``, a ``Progressive``, or the mapping that either saves, has of it.

        ``steps`` are accuracies before the training by their names, such as ``{"truncated": 0.9}``. A
        ``ValueError`` where it is no record.
        """
        fields = history.to_dict() if hasattr(history, "to_dict") else history or {}
        named = [{"name": name, "accuracy": value} for name, value in (steps or {}).items()]
        try:
            read = _Record.model_validate(fields)
            given = [_StepFile.model_validate(step) for step in named]
        except ValidationError as error:
            raise ValueError(f"this is no training history: {explain(error, _Record)}") from None
        points = tuple(_rounds(read) if read.rounds else _epochs(read))
        known = [Step(**dict(step)) for step in (*given, *read.steps)]
        return cls(read.accuracy_dense, tuple(_steps(known, points)), points, dict(read.config))


def read_recovery(folder: Path) -> Recovery:
    """Return what a folder of :func:`tncompress.save` records; an empty one where it records nothing."""
    return Recovery.of(_read(folder))


def recorded_steps(
    folder: Path, before: tuple[str, float | None], after: tuple[str, float | None], images: int | None
) -> list[dict[str, Any]]:
    """Return the steps that ``folder`` records, or that ``before`` in their place, and then ``after``.

    What was not measured, where the accuracy is None, is no step.
    """
    kept: Sequence[Step] = read_recovery(folder).steps
    named = [before, after] if not kept else [after]
    fresh = (Step(name, accuracy, images) for name, accuracy in named if accuracy is not None)
    return [asdict(step) for step in (*kept, *fresh)]


def _read(folder: Path) -> Any:
    path = folder.expanduser() / HISTORY
    if not path.is_file():
        return {}
    try:
        return parse_json(read_text(path, "history"))
    except ValueError as error:
        raise ValueError(f"history {path} is damaged: {one_line(error)}") from None


def _steps(known: Iterable[Step], points: Sequence[Point]) -> Iterable[Step]:
    """Yield the steps that are recorded, then the last point, if training came after them."""
    seen = [point for point in points if point.accuracy is not None]
    known = list(known) or [Step(point.what, point.accuracy) for point in seen[:1] if point.place == 0]  # type: ignore[arg-type]
    yield from known
    if len(seen) > 1 and not any(step.name == "tuned" for step in known):
        yield Step("tuned", seen[-1].accuracy)  # type: ignore[arg-type]


def _epochs(read: _Record) -> Iterable[Point]:
    """Yield the points of one run: the start, the local epochs, those of the whole with the control."""
    if read.accuracy_start is not None:
        yield Point(0, "before tuning", read.accuracy_start)
    for number, epoch in enumerate(read.local, 1):
        yield Point(number, f"local epoch {number}", epoch.accuracy, epoch.loss, None, epoch.seconds)
    for number, epoch in enumerate(read.epochs, 1):
        control = read.control[number - 1].accuracy if number <= len(read.control) else None
        place = len(read.local) + number
        yield Point(place, f"epoch {number}", epoch.accuracy, epoch.loss, control, epoch.seconds)


def _rounds(read: _Record) -> Iterable[Point]:
    """Yield the points of rounds, in each of which the accuracy falls, is repaired, and rises."""
    place = 0
    for number, part in enumerate(read.rounds, 1):
        for what, accuracy in (("truncated", part.truncated), ("repaired", part.repaired)):
            if accuracy is not None:
                yield Point(place, f"round {number}, {what}", accuracy)
        for kind, epochs in (("local epoch", part.local), ("epoch", part.epochs)):
            for count, epoch in enumerate(epochs, 1):
                place += 1
                words = f"round {number}, {kind} {count}"
                beside = read.control[place - 1].accuracy if place <= len(read.control) else None
                yield Point(place, words, epoch.accuracy, epoch.loss, beside, epoch.seconds)


class _Plain(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _EpochFile(_Plain):
    loss: float
    accuracy: _Fraction | None = None
    seconds: float = 0.0


class _RoundFile(_Plain):
    truncated: _Fraction | None = None
    repaired: _Fraction | None = None
    local: tuple[_EpochFile, ...] = ()
    epochs: tuple[_EpochFile, ...] = ()


class _StepFile(_Plain):
    name: Annotated[str, Field(max_length=80)]
    accuracy: _Fraction
    images: Annotated[int, Field(ge=1)] | None = None


class _Record(_Plain):
    """What ``History.to_dict`` and ``Progressive.to_dict`` write, and what the commands add."""

    config: dict[str, Any] = {}
    accuracy_dense: _Fraction | None = None
    accuracy_start: _Fraction | None = None
    local: tuple[_EpochFile, ...] = ()
    epochs: tuple[_EpochFile, ...] = ()
    control: tuple[_EpochFile, ...] = ()
    rounds: tuple[_RoundFile, ...] = ()
    steps: tuple[_StepFile, ...] = ()
