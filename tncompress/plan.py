"""The plan: for every layer its format, ranks, error and cost, or the reason why it stays dense.

Making a plan changes nothing; it is the dry run. It prints as a table and saves as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tncompress.formats import Fit, Format, make_format
from tncompress.geometry import ConvGeometry
from tncompress.spec import Spec
from tncompress.tables import count, ratio, render

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer. MACs are those of one forward pass on the example inputs, if any.

    ``rel_error`` and ``digest`` (of the weights that the plan was made for) are None where a plan was made
    without weights. ``params_dense`` is what the layer holds before: of one that was compressed already, its
    factors.
    """

    names: tuple[str, ...]
    kind: str
    geometry: ConvGeometry
    format: Format
    ranks: tuple[int, ...]
    rel_error: float | None
    params: int
    params_dense: int
    macs: int | None
    macs_dense: int | None
    digest: str | None

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
        made = {
            "geometry": ConvGeometry.from_dict(fields["geometry"]),
            "format": make_format(fields["format"]),
            "names": tuple(fields["names"]),
            "ranks": tuple(fields["ranks"]),
        }
        return cls(**{**fields, **made})


@dataclass(frozen=True)
class Skip:
    """A layer that stays dense, and why."""

    names: tuple[str, ...]
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
        return cls(**{**fields, "names": tuple(fields["names"]), "shape": tuple(fields["shape"])})


@dataclass(frozen=True)
class Plan:
    """The decisions for every convolution and linear layer of a model, in its order.

    ``print(plan)`` shows a table. ``params_model`` counts all parameters of the dense model.
    """

    layers: tuple[LayerPlan | Skip, ...]
    spec: Spec
    params_model: int
    fits: dict[str, Fit] = field(default_factory=dict, compare=False, repr=False)

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
        return {
            "version": 1,
            "spec": self.spec.to_dict(),
            "params_model": self.params_model,
            "compressed": [layer.to_dict() for layer in self.compressed],
            "skipped": [layer.to_dict() for layer in self.skipped],
            "order": [layer.name for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, fields: Any) -> Plan:
        """Return the plan that :meth:`to_dict` described; a ``ValueError`` where it is none."""
        try:
            found: dict[str, LayerPlan | Skip] = {}
            for entry in fields["compressed"]:
                found[entry["names"][0]] = LayerPlan.from_dict(entry)
            for entry in fields["skipped"]:
                found[entry["names"][0]] = Skip.from_dict(entry)
            layers = tuple(found[name] for name in fields["order"])
            return cls(layers, Spec.parse(fields["spec"]), fields["params_model"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"this is no plan: {type(error).__name__} at {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Return the plan that :meth:`save` wrote."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"plan {path} is not valid JSON: {error}") from None

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(
            title=f"{len(self.compressed)} of {len(self.layers)} layers compressed", title_justify="left"
        )
        for column in ("layer", "kernel", "format", "ranks"):
            table.add_column(column, overflow="fold")
        for column in ("rel. error", "params", "", "MACs", ""):
            table.add_column(column, justify="right")
        for layer in self.layers:
            table.add_row(*_row(layer))
        table.add_section()
        macs, macs_dense = self.macs, self.macs_dense
        cost = (count(macs_dense) + " → " + count(macs), ratio(macs_dense, macs)) if macs_dense else ("", "")
        size = f"{count(self.params_model)} → {count(self.params)}"
        table.add_row("model", "", "", "", "", size, ratio(self.params_model, self.params), *cost)
        return table


def _row(layer: LayerPlan | Skip) -> tuple[str, ...]:
    from rich.markup import escape

    head = escape(", ".join(layer.names)), "x".join(map(str, layer.shape))
    dense_cost = count(layer.macs_dense) if layer.macs_dense is not None else ""
    if isinstance(layer, Skip):
        reason = escape(layer.reason)
        return *head, "dense", f"[italic]{reason}[/italic]", "", count(layer.params_dense), "", dense_cost, ""
    size = f"{count(layer.params_dense)} → {count(layer.params)}"
    cost = ("", "")
    if layer.macs is not None:
        cost = f"{dense_cost} → {count(layer.macs)}", ratio(layer.macs_dense, layer.macs)
    ranks = " ".join(map(str, layer.ranks))
    error = f"{layer.rel_error:.4f}" if layer.rel_error is not None else "no weights"
    fewer = ratio(layer.params_dense, layer.params)
    return *head, escape(str(layer.format)), ranks, error, size, fewer, *cost


def _total(values: Iterable[int | None]) -> int | None:
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)
