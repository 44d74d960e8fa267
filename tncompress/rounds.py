"""What progressive compression did, round by round, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from tncompress.history import Epoch
from tncompress.measure import recovery
from tncompress.recipe import FinetuneConfig
from tncompress.tables import percent, render

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Round:
    """One round: parameters of the compressed layers over dense ones, accuracies on the way, and its epochs.

    ``rel_error`` is that of all kernels together against those before the truncation. Accuracies are None
    without a validation loader, ``repaired`` also without images to repair on.
    """

    params: float
    rel_error: float
    truncated: float | None
    repaired: float | None
    epochs: tuple[Epoch, ...] = ()
    local: tuple[Epoch, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """The accuracy after the last epoch of the round."""
        return (self.epochs or self.local)[-1].accuracy

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Round:
        """Return the round that ``asdict`` described."""
        epochs = {key: tuple(Epoch(**epoch) for epoch in fields[key]) for key in ("epochs", "local")}
        return cls(**{**fields, **epochs})


@dataclass(frozen=True)
class Progressive:
    """What came of the rounds: the ``model`` after the last, and the dense ``control`` trained as long.

    It prints as a table.
    """

    model: nn.Module
    rounds: tuple[Round, ...]
    config: FinetuneConfig
    accuracy_dense: float | None = None
    control: tuple[Epoch, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """The accuracy after the last epoch of the last round."""
        return self.rounds[-1].accuracy

    @property
    def recovery(self) -> float | None:
        """The part that is back of the accuracy that the last truncation took."""
        lost = self.rounds[-1].truncated
        if self.accuracy is None or lost is None or self.accuracy_dense is None:
            return None
        return recovery(self.accuracy, lost, self.accuracy_dense)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain values."""
        return {
            "config": self.config.model_dump(mode="json"),
            "accuracy_dense": self.accuracy_dense,
            "accuracy": self.accuracy,
            "recovery": self.recovery,
            "rounds": [asdict(each) for each in self.rounds],
            "control": [asdict(epoch) for epoch in self.control],
        }

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        caption = f"dense: {percent(self.accuracy_dense)}"
        if self.control:
            caption += f", trained for {len(self.control)} epochs more: {percent(self.control[-1].accuracy)}"
        table = Table(title=f"{len(self.rounds)} rounds, accuracy {percent(self.accuracy)}", caption=caption)
        for column in ("round", "params", "rel. error", "truncated", "repaired", "epochs", "tuned"):
            table.add_column(column, justify="right")
        for number, each in enumerate(self.rounds, 1):
            accuracies = percent(each.truncated), percent(each.repaired)
            epochs = str(len(each.local) + len(each.epochs))
            size = f"{1 / each.params:.2f}x fewer", f"{each.rel_error:.4f}"
            table.add_row(str(number), *size, *accuracies, epochs, percent(each.accuracy))
        return table
