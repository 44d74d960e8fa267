"""What a repair brought back, step by step and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tncompress.layer_solver import LayerRepair
from tncompress.running import eval_mode
from tncompress.tables import render

if TYPE_CHECKING:
    from rich.console import Group

MEASURED = 128
"""How many images the model's output is measured on, before and after each step."""


@dataclass(frozen=True)
class StepRepair:
    """How far the model's output is from the dense one's before and after a step, and how long it took.

    Errors are relative, of all outputs together; ``kl`` is the mean KL divergence from the dense model's
    softmax, in nats. None where the output is no tensor (no matrix of logits).
    """

    name: str
    error_before: float | None
    error_after: float | None
    kl_before: float | None
    kl_after: float | None
    seconds: float


@dataclass(frozen=True)
class RepairReport:
    """The steps of a repair in their order and, for least squares, each layer; ``print`` shows tables.

    Steps are measured on the first ``images`` of the calibration images, without labels.
    """

    steps: tuple[StepRepair, ...]
    layers: tuple[LayerRepair, ...]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values that JSON can hold."""
        plain = asdict(self)
        return plain | {"steps": list(plain["steps"]), "layers": list(plain["layers"])}

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        steps = Table(title=f"distance to the dense outputs, {self.images} images", title_justify="left")
        steps.add_column("step")
        for column in ("rel. error", "after", "KL", "after", "seconds"):
            steps.add_column(column, justify="right")
        for step in self.steps:
            figures = (step.error_before, step.error_after, step.kl_before, step.kl_after)
            steps.add_row(step.name, *map(_figure, figures), f"{step.seconds:.1f}")
        layers = Table(title="least squares, layer by layer", title_justify="left")
        layers.add_column("layer", overflow="fold")
        for column in ("images", "output error", "after"):
            layers.add_column(column, justify="right")
        layers.add_column("", overflow="fold")
        for layer in self.layers:
            errors = _figure(layer.error_before), _figure(layer.error_after)
            layers.add_row(layer.name, str(layer.images or "-"), *errors, layer.reason or "")
        return Group(steps, layers) if self.layers else Group(steps)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@dataclass(frozen=True)
class Reading:
    """The relative error and the KL divergence of a model's output; None where they have no meaning."""

    error: float | None = None
    kl: float | None = None


class Gauge:
    """Measures how far a model's output is from the dense one's on the first images."""

    def __init__(self, dense: nn.Module, images: Iterable[Tensor]) -> None:
        self.dense, self.count = dense, 0
        self.inputs: list[Tensor] = []
        for x in images:
            self.inputs.append(x[: MEASURED - self.count])
            self.count += len(self.inputs[-1])
            if self.count >= MEASURED:
                break
        try:
            self.wanted = _outputs(dense, self.inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            shape, why = tuple(self.inputs[0].shape), str(error).partition("\n")[0]
            raise ValueError(f"the dense model does not take calibration inputs {shape}: {why}") from error

    def with_outputs(self, images: Iterable[Tensor]) -> Iterator[tuple[Tensor, Any]]:
        """Yield each batch of ``images``, those measured on and others, with the dense model's output."""
        for place, x in enumerate(images):
            known = place < len(self.inputs) and torch.equal(self.inputs[place], x)
            yield x, self.wanted[place] if known else _outputs(self.dense, [x])[0]

    def read(self, model: nn.Module) -> Reading:
        """Return how far the output of ``model`` is off."""
        if any(not isinstance(y, Tensor) or not y.is_floating_point() for y in self.wanted):
            return Reading()
        missing = total = divergence = 0.0
        for found, wanted in zip(_outputs(model, self.inputs), self.wanted, strict=True):
            found, wanted = found.double(), wanted.double()
            missing += float((found - wanted).square().sum())
            total += float(wanted.square().sum())
            if wanted.ndim == 2:
                wanted, found = wanted.log_softmax(1), found.log_softmax(1)
                divergence += float((wanted.exp() * (wanted - found)).sum())
        logits = all(y.ndim == 2 for y in self.wanted)
        return Reading(
            (missing / total) ** 0.5 if total > 0 else None, divergence / self.count if logits else None
        )


def _outputs(model: nn.Module, inputs: list[Tensor]) -> list[Any]:
    with eval_mode(model):
        return [model(x) for x in inputs]
