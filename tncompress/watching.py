"""How far a training run is, and what is told of it while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tncompress.history import Epoch
from tncompress.measure import recovery
from tncompress.tables import percent


@dataclass(frozen=True)
class Watch:
    """What is looked at while a run goes on: accuracies, the recovery between them, and who is told."""

    label: str = "training"
    val_loader: Iterable[Any] | None = None
    start: float | None = None
    dense: float | None = None
    target: float | None = None
    progress: bool = False
    log: Callable[[str, dict[str, float], int], None] | None = None

    def recovery(self, accuracy: float | None) -> float | None:
        """Return which part of the lost accuracy is back, where that can be told."""
        if accuracy is None or self.start is None or self.dense is None:
            return None
        return recovery(accuracy, self.start, self.dense)

    def words(self, position: Position, epochs: int, loss: float) -> str:
        """Return the words of the progress bar."""
        accuracy = position.epochs[-1].accuracy if position.epochs else self.start
        shown = f"{self.label} {position.epoch + 1}/{epochs}, loss {loss:.3f}"
        if accuracy is not None:
            shown += f", accuracy {percent(accuracy)}"
        if (back := self.recovery(accuracy)) is not None:
            shown += f", recovery {percent(back, 0)}"
        return shown

    def epoch_line(self, position: Position, epochs: int) -> str:
        """Return the words of an epoch that has ended."""
        last = position.epochs[-1]
        shown = f"{self.label} epoch {position.epoch} of {epochs}: loss {last.loss:.3f}"
        if last.accuracy is not None:
            shown += f", accuracy {percent(last.accuracy)}"
        if (back := self.recovery(last.accuracy)) is not None:
            shown += f", recovery {percent(back, 0)}"
        return f"{shown}, {last.seconds:.0f} s"


@dataclass
class Position:
    """How far a run is, and the sums of the epoch that it is in; all of it can be written as JSON."""

    epoch: int = 0
    step: int = 0  # batches of the epoch that are done
    updates: int = 0  # steps of the optimizer since the start
    loss: float = 0.0
    right: float = 0.0
    seen: int = 0
    seconds: float = 0.0
    rebalanced: int = 0
    begun: bool = False  # bonds are balanced where that was asked for
    batch: str | None = None  # fingerprint of the last one, by which a changed loader is found out
    finished: bool = False
    reached: bool = False
    epochs: list[Epoch] = field(default_factory=list)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Position:
        """Return the position that ``asdict`` described."""
        return cls(**{**fields, "epochs": [Epoch(**epoch) for epoch in fields["epochs"]]})
