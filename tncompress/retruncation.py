"""Compressed layers at smaller ranks: bonds cut in canonical form, and what came of each layer as a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tncompress.canonical import bond_values, cut_bonds
from tncompress.discovery import Layer, find_layers, refuse_wrapped
from tncompress.formats import Fit, Format
from tncompress.formats.base import Ranks, Shape, Stage
from tncompress.gauge import squared_norm, tree_of
from tncompress.layers import TNConv
from tncompress.plan import LayerPlan
from tncompress.policies import RankPolicy, make_policy
from tncompress.ranks import NoRanks, choose
from tncompress.running import copy_model
from tncompress.selection import memory_for
from tncompress.spec import Settings, matches_any
from tncompress.swap import adopt, replace_all_
from tncompress.tables import count, render, watched

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class RetruncatedLayer:
    """What came of one compressed layer; ``rel_error`` is that of its kernel against the one it had before.

    A layer that keeps its ranks says why in ``reason``.
    """

    name: str
    format: str
    ranks_before: tuple[int, ...]
    ranks: tuple[int, ...]
    params_before: int
    params: int
    rel_error: float
    reason: str | None = None


@dataclass(frozen=True)
class Retruncation:
    """A compressed model at smaller ranks, and what came of each of its layers. It prints as a table.

    ``rel_error`` is ``sqrt(sum |W - W'|^2 / sum |W|^2)`` over all compressed layers that were asked for.
    """

    model: nn.Module
    layers: tuple[RetruncatedLayer, ...]
    rel_error: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain values."""
        return {"rel_error": self.rel_error, "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"{len(self.layers)} layers truncated again, relative error {self.rel_error:.4f}"
        table = Table(title=title, title_justify="left")
        for column in ("layer", "format", "ranks", "params", "rel. error", ""):
            table.add_column(column, justify="right" if column in ("params", "rel. error") else "left")
        for layer in self.layers:
            ranks = f"{layer.ranks_before} → {layer.ranks}"
            params = f"{count(layer.params_before)} → {count(layer.params)}"
            table.add_row(
                layer.name, layer.format, ranks, params, f"{layer.rel_error:.4f}", layer.reason or ""
            )
        return table


def retruncate(
    small: nn.Module,
    policy: RankPolicy | Mapping[str, Any],
    *,
    layers: Sequence[str] = ("*",),
    progress: bool = False,
) -> Retruncation:
    """Return a copy of ``small`` whose compressed layers, tuned meanwhile, have smaller ranks.

    ``policy`` is a rank policy such as ``RankFraction(0.5)``, or a mapping from names or patterns to policies
    of their own, the first match counting. ``rank_fraction`` is a part of the present ranks,
    ``params_ratio`` one of the dense kernel's parameters; errors are relative to the present kernel. What a
    layer has it may keep. Formats and all else stay as they are.

    Factors are brought to canonical form, in which the singular values of each bond are those of the kernel,
    and the discarded ones are the error, exactly; no kernel is rebuilt. CP has no canonical form: it is
    fitted again to its own kernel. Both sides of each bond are then even, as after a fit. A pattern that
    matches no compressed layer, and ranks above the present ones, are a ``ValueError``.

    >>> import tncompress as tnc
    >>> small = tnc.compress(tnc.build_model("zoo:cnn4"), {"default": {"rank": {"params_ratio": 0.25}}})
    >>> found = tnc.retruncate(small, {"params_ratio": 0.125})
    >>> sum(layer.params for layer in found.layers) < 0.51 * sum(l.params_before for l in found.layers)
    True
    """
    refuse_wrapped(small)
    target = copy_model(small)
    asked = _policies(policy, layers)
    held = [layer for layer in find_layers(target, ("compressed",)) if isinstance(layer.module, TNConv)]
    chosen = _chosen(held, asked)
    made: dict[str, TNConv] = {}
    rows, lost, total = [], 0.0, 0.0
    for layer, own in watched(chosen, "truncating", show=progress):
        squares = float(squared_norm(layer.module).detach())
        fresh, row = _retruncated(layer, own)
        rows.append(row)
        made |= {name: fresh for name in layer.names if fresh is not None}
        lost, total = lost + row.rel_error**2 * squares, total + squares
    replace_all_(target, made)
    _update_plan(target, rows)
    return Retruncation(target, tuple(rows), math.sqrt(lost / total) if total > 0 else 0.0)


def _policies(policy: Any, layers: Sequence[str]) -> dict[str, RankPolicy]:
    """Return a policy for each pattern, in the order in which they are tried."""
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if isinstance(policy, Mapping) and all(isinstance(own, Mapping | RankPolicy) for own in policy.values()):
        if patterns != ["*"]:
            raise ValueError(
                "give a policy for each layer in a mapping, or layers beside one policy, not both"
            )
        return {pattern: make_policy(own) for pattern, own in policy.items()}
    return dict.fromkeys(patterns, make_policy(policy))


def _chosen(held: Sequence[Layer], asked: Mapping[str, RankPolicy]) -> list[tuple[Layer, RankPolicy]]:
    """Return the compressed layers that the patterns match, each with its policy."""
    if not held:
        raise ValueError("the model holds no compressed layer: there are no ranks to lower")
    for pattern in asked:
        if not any(matches_any(pattern, layer.names) for layer in held):
            names = ", ".join(layer.name for layer in held[:8]) + (", ..." if len(held) > 8 else "")
            raise ValueError(f"the pattern {pattern!r} matches no compressed layer; those are {names}")
    found = []
    for layer in held:
        own = next((policy for pattern, policy in asked.items() if matches_any(pattern, layer.names)), None)
        if own is not None:
            found.append((layer, own))
    return found


def _retruncated(layer: Layer, policy: RankPolicy) -> tuple[TNConv | None, RetruncatedLayer]:
    """Return the layer at smaller ranks, None where it keeps those that it has, and what came of it."""
    old: TNConv = layer.module
    params, where = layer.params, f"layer {layer.name!r} with kernel {old.geometry.weight_shape}"
    stays = RetruncatedLayer(layer.name, str(old.format), old.ranks, old.ranks, params, params, 0.0)
    if layer.obstacle:
        return None, replace(stays, reason=layer.obstacle)
    if old.factors[0].is_meta:
        raise ValueError(f"{where} is on the meta device: load its weights")
    if not all(bool(factor.isfinite().all()) for factor in old.factors):
        raise ValueError(f"{where} holds NaN or infinity: go back to weights from before that")
    shape, groups = old.geometry.kernel_shape, old.geometry.groups
    tensors = [tensor.detach() for tensor in old.tensors()]
    format = _Held(old.format, tuple(tensors), old.ranks, groups)
    try:
        with memory_for(where):
            ranks, fit = choose(format.kernels(shape), Settings(format=format, rank=policy), limit=params)
    except NoRanks as reason:
        return None, replace(stays, reason=str(reason).replace(str(format), str(old.format)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    assert fit is not None
    if ranks == old.ranks:
        return None, replace(stays, reason="the policy asks for no smaller ranks")
    fresh = _like(old, ranks, fit)
    return fresh, replace(
        stays, ranks=ranks, params=sum(t.numel() for t in fit.factors), rel_error=fit.rel_error
    )


def _like(old: TNConv, ranks: Ranks, fit: Fit) -> TNConv:
    """Return a layer with the factors of ``fit`` that is else like ``old``."""
    with torch.inference_mode(False):
        bias = old.bias.detach().clone() if old.bias is not None else None
        new = TNConv(old.format, old.geometry, fit.factors, bias, rel_error=fit.rel_error)
    assert new.ranks == ranks
    new.checkpointing = old.checkpointing
    for mine, theirs in zip(new.parameters(), old.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(old.factors[0].ndim)
    if layout and any(f.is_contiguous(memory_format=layout) and not f.is_contiguous() for f in old.factors):
        new = new.to(memory_format=layout)
    return adopt(new.contract(old.contraction), old)


def _update_plan(model: nn.Module, rows: Sequence[RetruncatedLayer]) -> None:
    """Write the new ranks into the plan that the model carries; MACs are not known any more."""
    plan = getattr(model, "tncompress_plan", None)
    if plan is None:
        return
    lower = {row.name: row for row in rows if row.ranks != row.ranks_before}
    layers = []
    for layer in plan.layers:
        if (row := lower.get(layer.name)) is not None and isinstance(layer, LayerPlan):
            unknown: Any = {"macs": None, "digest": None, "output_error": None}
            layer = replace(layer, ranks=row.ranks, params=row.params, rel_error=row.rel_error, **unknown)
        layers.append(layer)
    cast(Any, model).tncompress_plan = replace(plan, layers=tuple(layers), budget=None)


@dataclass(frozen=True)
class _Held(Format):
    """The format of kernels that are held in factors: its largest ranks are those that the factors have.

    Spectra and fits are of these factors. Only where they are no tree are the kernels looked at.
    """

    inner: Format
    tensors: tuple[Tensor, ...] = field(compare=False)
    ranks: Ranks
    groups: int

    def kernels(self, shape: Shape) -> Tensor:
        """Return the kernels; of a tree only something of their shape, without their entries."""
        if tree_of(self.network(shape)) is not None:
            return self.tensors[0].new_zeros(()).expand(self.groups, *shape)
        return self.inner.to_dense(self.tensors, shape).reshape(self.groups, *shape)

    def network(self, shape: Shape) -> tuple[tuple[str, ...], ...]:
        return self.inner.network(shape)

    def max_ranks(self, shape: Shape) -> Ranks:
        return self.ranks

    def feasible(self, shape: Shape, ranks: Ranks) -> Ranks:
        return self.inner.feasible(shape, ranks) if ranks != self.ranks else ranks

    def stages(self, shape: Shape, ranks: Ranks) -> tuple[Stage, ...]:
        return self.inner.stages(shape, ranks)

    def spectra_of_groups(self, kernels: Tensor) -> tuple[Tensor, ...] | None:
        found = bond_values(self.network(tuple(kernels.shape[1:])), self.tensors, self.groups)
        return tuple(found[f"r{i}"] for i in range(len(self.ranks))) if found is not None else None

    def fit(self, kernel: Tensor, ranks: Ranks) -> Fit:
        return self.fit_groups(kernel[None], ranks)

    def fit_groups(self, kernels: Tensor, ranks: Ranks) -> Fit:
        shape = tuple(kernels.shape[1:])
        if ranks == self.ranks:
            return Fit(self.tensors, 0.0)
        named = {f"r{i}": rank for i, rank in enumerate(ranks)}
        made = cut_bonds(self.network(shape), self.tensors, named, self.groups)
        if made is None:
            return self.inner.fit_groups(kernels, ranks)
        factors, rel_error = made
        dtype = self.tensors[0].dtype
        rounded = tuple(factor.to(dtype).contiguous() for factor in factors)
        if torch.finfo(dtype).eps > 1e-4:  # rounding is part of the error
            kernel, found = (
                self.inner.to_dense([t.double() for t in f], shape) for f in (self.tensors, rounded)
            )
            rel_error = float((found - kernel).norm() / kernel.norm().clamp_min(1e-300))
        return Fit(rounded, rel_error)

    def __str__(self) -> str:
        return str(self.inner)
