"""Dense models whose kernels are truncated along cuts: the paper's instrument, before any factors are kept.

Source: Singh, Jahromi, Orús, "Tensor network compressibility of convolutional models", arXiv 2403.14379.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tncompress.cuts import Cut, effective_rank
from tncompress.discovery import Layer, find_layers, refuse_wrapped
from tncompress.layers import TNConv
from tncompress.nearby import no_match
from tncompress.plan import Skip
from tncompress.policies import (
    EVBMF,
    Energy,
    Entropy,
    FixedRank,
    ParamsRatio,
    RankFraction,
    RankPolicy,
    RelError,
    make_policy,
)
from tncompress.running import copy_model
from tncompress.selection import check_weight, memory_for
from tncompress.spec import matches_any
from tncompress.storage import new_file
from tncompress.tables import render, watched
from tncompress.unfolded import Unfolded, alternating
from tncompress.vbmf import evbmf_rank

if TYPE_CHECKING:
    from rich.table import Table

Steps = tuple[tuple[Cut, RankPolicy], ...]


@dataclass(frozen=True)
class AchievedCut:
    """The rank across a cut: ``asked`` for, measured on the truncated kernel, and the full one.

    ``rank`` counts singular values above 1e-6 of the largest, and above what rounding to the kernel's dtype
    alone would leave. ``excess`` is the norm above the rank that was asked for, over the dense kernel's:
    0 where the rank holds.
    """

    cut: str
    asked: int
    rank: int
    full: int
    excess: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether the rank that was asked for holds."""
        return self.rank <= self.asked


@dataclass(frozen=True)
class TruncatedLayer:
    """One truncated layer; ``shape`` is the kernel of one of its ``groups``, which have the same ranks."""

    name: str
    shape: tuple[int, ...]
    groups: int
    cuts: tuple[AchievedCut, ...]
    rel_error: float


@dataclass(frozen=True)
class Truncation:
    """A dense model with truncated kernels, and what came of each layer.

    ``rel_error`` is ``sqrt(sum |W - W'|^2 / sum |W|^2)`` over all truncated layers together. It prints as a
    table.
    """

    model: nn.Module
    layers: tuple[TruncatedLayer, ...]
    skipped: tuple[Skip, ...]
    rel_error: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain values."""
        return {
            "version": 1,
            "rel_error": self.rel_error,
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": [skip.to_dict() for skip in self.skipped],
        }

    def save(self, path: str | Path) -> None:
        """Write what came of the layers as JSON; the model's weights are for ``save_weights``."""
        with new_file(path) as fresh:
            fresh.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"{len(self.layers)} layers truncated, relative error {self.rel_error:.4f}"
        table = Table(title=title, title_justify="left")
        for column in ("layer", "kernel", "cut", "rank", "asked", "full", "excess", "rel. error"):
            table.add_column(column, justify="left" if column in ("layer", "cut") else "right")
        for layer in self.layers:
            kernel = "x".join(map(str, layer.shape)) + (f" x{layer.groups}" if layer.groups > 1 else "")
            for number, cut in enumerate(layer.cuts):
                first = (layer.name, kernel, f"{layer.rel_error:.4f}") if not number else ("", "", "")
                excess = f"{cut.excess:.1e}" if cut.excess else ""
                ranks = str(cut.rank), str(cut.asked), str(cut.full), excess
                table.add_row(*first[:2], cut.cut, *ranks, first[2])
        for skip in self.skipped:
            table.add_row(skip.name, "x".join(map(str, skip.shape)), f"dense: {skip.reason}", *[""] * 5)
        return table


def truncate(
    model: nn.Module,
    cuts: str | Cut | Sequence[str | Cut] | Mapping[Any, Any],
    policy: RankPolicy | Mapping[str, Any] | None = None,
    *,
    layers: Sequence[str] = ("*",),
    crossing: Literal["measure", "alternate"] = "measure",
    linear: bool = False,
    progress: bool = False,
) -> Truncation:
    """Return a dense copy of ``model`` whose convolution kernels are truncated along one cut or several.

    ``cuts`` is a cut such as ``"out kw|in kh"``, several of them, which are carried out in that order, each
    with ``policy``, or a mapping from cuts to policies of their own. A policy says the rank across its cut:
    :class:`FixedRank`, :class:`RankFraction` (of the full rank), :class:`RelError` and :class:`Energy` (of
    the whole kernel's norm, for each cut by itself), :class:`ParamsRatio` (of the two factors of a cut),
    :class:`Entropy` or :class:`EVBMF`. ``layers`` are names or patterns, as in a spec; with ``linear`` linear
    layers are truncated, too. The groups of a grouped convolution get the same ranks.

    Cuts that do not cross keep each other's ranks, and their discarded weights add exactly. Of cuts that
    cross (``out kh|in kw`` and ``out kw|in kh``) a later one can raise the rank of an earlier one again:
    ranks are therefore measured on the result, and ``crossing="alternate"`` goes round the cuts until the
    norm above the ranks that were asked for is below 1e-4 of the kernel's, or for a hundred rounds (it falls
    slowly), which costs more norm than one round. Layers that can't be truncated are listed
    with the reason; if none is left, or a pattern matches none, that is a ``ValueError``.

    >>> import tncompress as tnc
    >>> model = tnc.build_model("zoo:cnn4")
    >>> found = tnc.truncate(model, "out|rest", tnc.RankFraction(0.25), layers=["conv2"])
    >>> found.layers[0].cuts
    (AchievedCut(cut='out|rest', asked=16, rank=16, full=64, excess=0.0),)
    """
    refuse_wrapped(model)
    if crossing not in ("measure", "alternate"):
        raise ValueError(f"crossing is 'measure' or 'alternate', got {crossing!r}")
    steps = _steps(cuts, policy)
    target = copy_model(model)
    chosen = _matching(target, layers, linear=linear)
    made: list[tuple[Layer, TruncatedLayer, Tensor]] = []
    skipped, lost, total = [], 0.0, 0.0
    for layer in watched(chosen, "truncating", show=progress):
        reason = _misfit(layer, steps)
        if reason is not None:
            skipped.append(_skip(layer, reason))
            continue
        where = check_weight(layer)
        if layer.weight().is_meta:
            raise ValueError(f"{where} is on the meta device: load its weights")
        with memory_for(where):
            found, weight, squares = _truncated(layer, steps, alternate=crossing == "alternate")
        made.append((layer, found, weight))
        lost, total = lost + found.rel_error**2 * squares, total + squares
    if not made:
        shown = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped[:3])
        raise ValueError(f"there is no layer to truncate ({shown or 'the model has no convolution'})")
    with torch.no_grad():
        for layer, _, weight in made:
            layer.module.weight.copy_(weight)
    error = math.sqrt(lost / total) if total > 0 else 0.0
    return Truncation(target, tuple(found for _, found, _ in made), tuple(skipped), error)


def _steps(cuts: Any, policy: Any) -> Steps:
    """Return the cuts in their order, each with its policy."""
    if isinstance(cuts, Mapping):
        if policy is not None:
            raise ValueError("give a policy for each cut in a mapping, or one for all beside it, not both")
        pairs = list(cuts.items())
    else:
        if policy is None:
            raise ValueError("how far? Give a policy, such as RankFraction(0.25) or RelError(0.2)")
        pairs = [(cut, policy) for cut in ([cuts] if isinstance(cuts, str | Cut) else cuts)]
    if not pairs:
        raise ValueError("wanted at least one cut, such as 'out|rest', got none")
    made = tuple((Cut.of(c), make_policy(p)) for c, p in pairs)
    for cut, asked in made:
        if isinstance(asked, FixedRank) and not isinstance(asked.ranks, int):
            raise ValueError(f"the cut '{cut}' has one rank, got {asked.ranks}: give each cut its own")
    return made


def _matching(model: nn.Module, patterns: Sequence[str], *, linear: bool) -> list[Layer]:
    """Return the layers that the patterns match; one that matches nothing is a ``ValueError``."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    found = find_layers(model, ("depthwise", "subclasses"))
    found = [layer for layer in found if linear or layer.geometry.ndim > 0]
    for pattern in patterns:
        if found and not any(matches_any(pattern, layer.names) for layer in found):
            raise ValueError(no_match(pattern, [layer.name for layer in found]))
    return [layer for layer in found if any(matches_any(p, layer.names) for p in patterns)]


def _misfit(layer: Layer, steps: Steps) -> str | None:
    """Return why the kernel of ``layer`` can't be truncated in its place, if it can't."""
    if isinstance(layer.module, TNConv):
        return "it is compressed already"
    if layer.obstacle and layer.module._parameters.get("weight") is None:
        return "its weight is made from other parameters (pruned, parametrized, quantized): make it plain"
    if layer.obstacle and not layer.obstacle.startswith("it is the model itself"):
        return layer.obstacle
    for cut, _ in steps:
        try:
            cut.modes(len(layer.geometry.kernel_shape))
        except ValueError as error:
            return str(error)
    return None


def _skip(layer: Layer, reason: str) -> Skip:
    return Skip(layer.names, layer.kind, layer.geometry.weight_shape, reason, layer.params, None)


def _truncated(layer: Layer, steps: Steps, *, alternate: bool) -> tuple[TruncatedLayer, Tensor, float]:
    """Return what came of a layer, its new weight, and its old squared norm."""
    geometry, weight = layer.geometry, layer.weight()
    before = geometry.kernels(weight.double())
    norm = float(before.norm())
    kernels, asked = before, list[int]()
    for cut, policy in steps:
        unfolded = Unfolded.of(kernels, cut)
        asked.append(_rank_by(policy, unfolded, norm))
        kernels = unfolded.truncated(asked[-1])
    if alternate:
        kernels = alternating(kernels, [cut for cut, _ in steps], asked, norm)
    new = geometry.weight(kernels).to(weight.dtype)
    kept = geometry.kernels(new.double())
    achieved = []
    for (cut, _), rank in zip(steps, asked, strict=True):
        unfolded = Unfolded.of(kept, cut)
        found = unfolded.measured_rank(new.dtype)
        excess = math.sqrt(float(unfolded.tails[rank])) / norm if found > rank else 0.0
        achieved.append(AchievedCut(str(cut), rank, found, unfolded.full, excess))
    error = float((kept - before).norm()) / norm if norm > 0 else 0.0
    cuts = tuple(achieved)
    return TruncatedLayer(layer.name, geometry.kernel_shape, geometry.groups, cuts, error), new, norm**2


def _rank_by(policy: RankPolicy, unfolded: Unfolded, norm: float) -> int:
    """Return the rank that ``policy`` asks for, with errors relative to ``norm``."""
    full, (m, n) = unfolded.full, unfolded.sides
    if isinstance(policy, FixedRank):
        assert isinstance(policy.ranks, int)
        return min(policy.ranks, full)
    if isinstance(policy, RankFraction):
        return policy.of(full)
    if isinstance(policy, ParamsRatio):
        return max(1, min(full, int(policy.ratio * m * n / (m + n))))
    if isinstance(policy, Entropy):
        return min(full, math.ceil(policy.factor * effective_rank(unfolded.s)))
    if isinstance(policy, EVBMF):
        found = evbmf_rank(unfolded.s, max(m, n) * len(unfolded.kernels))
        return max(1, math.ceil(policy.share * found + (1 - policy.share) * full))
    if isinstance(policy, RelError | Energy):
        error = policy.error if isinstance(policy, RelError) else math.sqrt(1 - policy.kept)
        return next(r for r in range(1, full + 1) if float(unfolded.tails[r]) <= (error * norm) ** 2)
    raise TypeError(f"unknown rank policy {policy!r}")
