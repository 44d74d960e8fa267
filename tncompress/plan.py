"""The plan: for every layer its format, ranks, error and cost, or the reason why it stays dense.

Making a plan changes nothing; it is the dry run. It prints as a table and saves as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from tncompress.formats import Fit
from tncompress.geometry import ConvGeometry
from tncompress.spec import FormatField, Spec, explain
from tncompress.storage import new_file
from tncompress.tables import count, ratio, render
from tncompress.textfiles import read_value

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_FROM_FILE = ConfigDict(extra="forbid", allow_inf_nan=False)
Names = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer. MACs are those of one forward pass on the example inputs, if any.

    ``rel_error`` and ``digest`` (of the weights that the plan was made for) are None where a plan was made
    without weights, ``output_error``, that of the layer's output, where it was made without calibration.
    ``params_dense`` is what the layer holds before: of one that was compressed already, its factors.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FROM_FILE

    names: Names
    kind: str
    geometry: ConvGeometry
    format: FormatField
    ranks: tuple[int, ...]
    rel_error: float | None
    params: int
    params_dense: int
    macs: int | None
    macs_dense: int | None
    digest: str | None
    output_error: float | None = None

    @property
    def name(self) -> str:
        """The first of the layer's names."""
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense layer's weight."""
        return self.geometry.weight_shape

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        plain = dict(vars(self))
        return plain | {"geometry": self.geometry.to_dict(), "format": self.format.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LayerPlan:
        """Return the layer plan that :meth:`to_dict` described."""
        return TypeAdapter(cls).validate_python(dict(fields))


@dataclass(frozen=True)
class Skip:
    """A layer that stays dense, and why."""

    __pydantic_config__: ClassVar[ConfigDict] = _FROM_FILE

    names: Names
    kind: str
    shape: tuple[int, ...]
    reason: str
    params_dense: int
    macs_dense: int | None

    @property
    def name(self) -> str:
        """The first of the layer's names."""
        return self.names[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Skip:
        """Return the skip that :meth:`to_dict` described."""
        return TypeAdapter(cls).validate_python(dict(fields))


@dataclass(frozen=True)
class BudgetReport:
    """How a plan keeps its budget: for each resource the fraction of the dense model asked for and reached.

    ``loss`` is what the choice was predicted to lose, summed over the layers under the budget; ``fitted`` is
    that sum by the fits that were then made. No choice among the candidates within the budget loses less
    than ``bound``, that of the relaxed problem. ``measure`` says what a loss is: a squared relative ``kernel
    error``, ``layer output`` error or ``network output`` error.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FROM_FILE

    asked: dict[str, float]
    reached: dict[str, float]
    loss: float
    bound: float
    fitted: float | None
    measure: str

    @property
    def gap(self) -> float:
        """How much more than the bound the choice loses."""
        return self.loss - self.bound

    def __str__(self) -> str:
        kept = ", ".join(
            f"{name} {self.reached[name]:.4f} of {most:.4g}" for name, most in self.asked.items()
        )
        fitted = f", {self.fitted:.4g} as fitted" if self.fitted is not None else ""
        return f"budget: {kept}; loss ({self.measure}) {self.loss:.4g}, at least {self.bound:.4g}{fitted}"


@dataclass(frozen=True)
class Plan:
    """The decisions for every convolution and linear layer of a model, in its order.

    ``print(plan)`` shows a table. ``params_model`` counts all parameters of the dense model, ``budget`` says
    how the budget is kept, if the spec has one, and ``notes`` what else is to be known. ``shifts`` keep the
    mean output of a layer after its fit: each is added to its bias, or taken from the running mean of the
    BatchNorm named with it.
    """

    layers: tuple[LayerPlan | Skip, ...]
    spec: Spec
    params_model: int
    budget: BudgetReport | None = None
    fits: dict[str, Fit] = field(default_factory=dict, compare=False, repr=False)
    shifts: dict[str, tuple[str | None, Tensor]] = field(default_factory=dict, compare=False, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def compressed(self) -> tuple[LayerPlan, ...]:
        """The layers that will be compressed."""
        return tuple(layer for layer in self.layers if isinstance(layer, LayerPlan))

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """The layers that stay dense."""
        return tuple(layer for layer in self.layers if isinstance(layer, Skip))

    @property
    def params(self) -> int:
        """How many parameters the whole compressed model has."""
        return self.params_model - sum(layer.params_dense - layer.params for layer in self.compressed)

    @property
    def macs_dense(self) -> int | None:
        """Multiply-accumulates of all listed layers, dense; None without example inputs."""
        return _total(layer.macs_dense for layer in self.layers)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all listed layers after compression; None without example inputs."""
        return _total(
            layer.macs if isinstance(layer, LayerPlan) else layer.macs_dense for layer in self.layers
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values: no weights, no factors."""
        budget = {"budget": dict(vars(self.budget))} if self.budget is not None else {}
        return {
            "version": 1,
            "spec": self.spec.to_dict(),
            "params_model": self.params_model,
            **budget,
            "compressed": [layer.to_dict() for layer in self.compressed],
            "skipped": [layer.to_dict() for layer in self.skipped],
            "order": [layer.name for layer in self.layers],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, fields: Any) -> Plan:
        """Return the plan that :meth:`to_dict` described; a ``ValueError`` where it is none."""
        version = fields.get("version", 1) if isinstance(fields, Mapping) else 1
        if isinstance(version, int) and version > 1:
            raise ValueError(f"the plan has version {version}, this release reads 1: upgrade tncompress")
        try:
            described = _PlanFile.model_validate(fields)
        except ValidationError as error:
            raise ValueError(f"this is no plan: {explain(error, _PlanFile)}") from None
        entries: tuple[LayerPlan | Skip, ...] = (*described.compressed, *described.skipped)
        found = {entry.name: entry for entry in entries}
        if sorted(described.order) != sorted(entry.name for entry in entries) or len(found) < len(entries):
            raise ValueError("this is no plan: its order does not name each of its layers once")
        layers = tuple(found[name] for name in described.order)
        spec, budget = Spec.parse(described.spec), described.budget
        return cls(layers, spec, described.params_model, budget, notes=described.notes)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with new_file(path) as fresh:
            fresh.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Return the plan that :meth:`save` wrote; errors are one line that names the file."""
        return read_value(path, "plan", cls.from_dict)

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        captions = [*([str(self.budget)] if self.budget is not None else []), *self.notes]
        table = Table(
            title=f"{len(self.compressed)} of {len(self.layers)} layers compressed",
            title_justify="left",
            caption=Text("\n".join(captions)) if captions else None,
            caption_justify="left",
        )
        for column in ("layer", "kernel", "format", "ranks"):
            table.add_column(column, overflow="fold")
        outputs = any(layer.output_error is not None for layer in self.compressed)
        errors = ("rel. error", "output error") if outputs else ("rel. error",)
        known = any(layer.macs_dense is not None for layer in self.layers)
        for column in (*errors, "params", "", *(("MACs", "") if known else ())):
            table.add_column(column, justify="right")
        width = len(table.columns)
        for layer in self.layers:
            table.add_row(*_row(layer, outputs=outputs)[:width])
        table.add_section()
        macs, macs_dense = self.macs, self.macs_dense
        cost = (count(macs_dense) + " → " + count(macs), ratio(macs_dense, macs)) if macs_dense else ("", "")
        size = f"{count(self.params_model)} → {count(self.params)}"
        fewer = ratio(self.params_model, self.params)
        table.add_row(*("model", "", "", "", *("" for _ in errors), size, fewer, *cost)[:width])
        return table


class _PlanFile(BaseModel):
    """What a plan looks like in a file."""

    model_config = _FROM_FILE

    version: Literal[1] = 1
    spec: dict[str, Any]
    params_model: int = Field(ge=0)
    budget: BudgetReport | None = None
    compressed: tuple[LayerPlan, ...]
    skipped: tuple[Skip, ...]
    order: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _row(layer: LayerPlan | Skip, *, outputs: bool) -> tuple[str | Text, ...]:
    """Return the cells of a layer; what comes from the model is never read as markup."""
    from rich.text import Text

    head = Text(", ".join(layer.names)), "x".join(map(str, layer.shape))
    dense_cost = count(layer.macs_dense) if layer.macs_dense is not None else ""
    if isinstance(layer, Skip):
        reason = Text(layer.reason, style="italic")
        return *head, "dense", reason, *([""] * (1 + outputs)), count(layer.params_dense), "", dense_cost, ""
    size = f"{count(layer.params_dense)} → {count(layer.params)}"
    cost = ("", "")
    if layer.macs is not None:
        cost = f"{dense_cost} → {count(layer.macs)}", ratio(layer.macs_dense, layer.macs)
    ranks = " ".join(map(str, layer.ranks))
    errors = [f"{layer.rel_error:.4f}" if layer.rel_error is not None else "no weights"]
    if outputs:
        errors.append(f"{layer.output_error:.4f}" if layer.output_error is not None else "-")
    fewer = ratio(layer.params_dense, layer.params)
    return *head, Text(str(layer.format)), ranks, *errors, size, fewer, *cost


def _total(values: Iterable[int | None]) -> int | None:
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)
