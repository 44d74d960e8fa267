"""What fine-tuning did, epoch by epoch, as a value: printed, saved and drawn."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tncompress.measure import recovery
from tncompress.recipe import FinetuneConfig
from tncompress.storage import new_file
from tncompress.tables import percent, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss, accuracy after it (None without a validation loader), wall time.

    ``train_accuracy`` is that on the training batches while they were learned from; a local epoch has none.
    ``rebalanced`` counts how often both sides of the bonds were made even, and the momentum begun anew.
    """

    loss: float
    accuracy: float | None
    seconds: float
    train_accuracy: float | None = None
    rebalanced: int = 0


@dataclass(frozen=True)
class History:
    """What fine-tuning did. ``model`` is the tuned copy, ``control`` the dense model trained as long.

    ``local`` are the epochs of slice-wise distillation, which come before ``epochs``, those of the whole.
    Extra epochs help a dense model too: a recovery means something beside the control only.
    """

    model: nn.Module
    epochs: tuple[Epoch, ...]
    config: FinetuneConfig
    accuracy_start: float | None = None
    accuracy_dense: float | None = None
    control: tuple[Epoch, ...] = field(default=())
    local: tuple[Epoch, ...] = field(default=())
    reached: bool = False

    @property
    def accuracy(self) -> float | None:
        """The accuracy after the last epoch."""
        return (self.epochs or self.local)[-1].accuracy

    @property
    def accuracy_control(self) -> float | None:
        """The accuracy of the dense control after as many epochs."""
        return self.control[-1].accuracy if self.control else None

    @property
    def recovery(self) -> float | None:
        """(accuracy - start) / (dense - start): the part of the lost accuracy that is back."""
        return self.recovery_at(self.accuracy)

    @property
    def recovery_of_control(self) -> float | None:
        """The same against the control in place of the dense model."""
        if self.accuracy is None or self.accuracy_start is None or self.accuracy_control is None:
            return None
        return recovery(self.accuracy, self.accuracy_start, self.accuracy_control)

    def recovery_at(self, accuracy: float | None) -> float | None:
        """Return which part of the lost accuracy is back where the accuracy is ``accuracy``."""
        if accuracy is None or self.accuracy_start is None or self.accuracy_dense is None:
            return None
        return recovery(accuracy, self.accuracy_start, self.accuracy_dense)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row of plain values for each epoch: local, then global, with the control beside it."""
        rows = []
        for stage, epochs in (("local", self.local), ("global", self.epochs)):
            for number, epoch in enumerate(epochs):
                beside = self.control[number] if stage == "global" and number < len(self.control) else None
                row = {"stage": stage, "epoch": number + 1, **asdict(epoch)}
                row["recovery"] = self.recovery_at(epoch.accuracy)
                row["accuracy_control"] = beside.accuracy if beside else None
                rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain values."""
        return {
            "config": self.config.model_dump(mode="json"),
            "accuracy_dense": self.accuracy_dense,
            "accuracy_start": self.accuracy_start,
            "accuracy": self.accuracy,
            "accuracy_control": self.accuracy_control,
            "recovery": self.recovery,
            "recovery_of_control": self.recovery_of_control,
            "reached": self.reached,
            "local": [asdict(epoch) for epoch in self.local],
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "control": [asdict(epoch) for epoch in self.control],
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write everything but the model as ``.json``, or a row for each epoch as ``.csv``."""
        path = Path(path).expanduser()
        if path.suffix not in (".json", ".csv"):
            raise ValueError(f"a history is written as .json or .csv, got {path.name}")
        with new_file(path, overwrite=overwrite) as fresh:
            if path.suffix == ".json":
                fresh.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
                return
            with fresh.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows()[0]))
                writer.writeheader()
                writer.writerows(self.rows())

    def plot(self) -> Figure:
        """Return the recovery curve: accuracy after each epoch beside the dense model and its control.

        Needs matplotlib; ``figure.savefig("curve.png")`` writes it. Without a validation loader it shows
        the loss.
        """
        return recovery_curve(self)

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"accuracy {percent(self.accuracy_start)} → {percent(self.accuracy)}"
        dense = f"dense: {percent(self.accuracy_dense)}"
        if self.recovery is not None:
            dense += f", {percent(self.recovery, 0)} of the loss is back"
        if self.reached:
            dense += ", which was the target: ended early"
        if times := sum(epoch.rebalanced for epoch in self.epochs):
            dense += f"; bonds balanced {times} times, the momentum of factors begun anew each time"
        table = Table(title=title, title_justify="left", caption=dense, caption_justify="left")
        for column in ("epoch", "loss", "accuracy", "seconds", "dense control"):
            table.add_column(column, justify="right")
        for row in self.rows():
            number = f"local {row['epoch']}" if row["stage"] == "local" else str(row["epoch"])
            control = percent(row["accuracy_control"]) if row["accuracy_control"] is not None else ""
            cells = f"{row['loss']:.4f}", percent(row["accuracy"]), f"{row['seconds']:.1f}", control
            table.add_row(number, *cells)
        return table


def recovery_curve(history: History) -> Figure:
    """Return :meth:`History.plot`: a figure that belongs to no window and no global state of matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the recovery curve needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    epochs = [*history.local, *history.epochs]
    axes.set_xlabel("epoch" if not history.local else f"epoch (the first {len(history.local)} local)")
    if history.accuracy is None:
        axes.plot(range(1, len(epochs) + 1), [epoch.loss for epoch in epochs], marker="o")
        axes.set_ylabel("training loss")
        return figure
    _draw(axes, 0, [history.accuracy_start, *(epoch.accuracy for epoch in epochs)], "compressed", "o")
    if history.control:
        own = [history.accuracy_dense, *(epoch.accuracy for epoch in history.control)]
        _draw(axes, len(history.local), own, "dense control", "s")
    if history.accuracy_dense is not None:
        axes.axhline(100 * history.accuracy_dense, color="gray", linestyle="--", label="dense")
    axes.set_xticks(range(len(epochs) + 1))
    axes.set_ylabel("accuracy, %")
    if history.recovery is not None:
        axes.set_title(f"{percent(history.recovery, 0)} of the lost accuracy is back")
    axes.legend()
    return figure


def _draw(axes: Any, first: int, accuracies: Sequence[float | None], label: str, marker: str) -> None:
    points = [(first + i, 100 * value) for i, value in enumerate(accuracies) if value is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=label)
