"""Making the cut atlas of a model: every convolution, across every bipartition of its legs.

Source of the question: Singh, Jahromi, Orús, "Tensor network compressibility of convolutional models",
arXiv 2403.14379.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.calibrate import Calibration, as_calibration
from tncompress.cut_atlas import CutAtlas
from tncompress.cut_rows import MEASURES, CutRow
from tncompress.discovery import Layer, find_layers, refuse_wrapped
from tncompress.kernel_spectra import CONTROLS, Spectrum, control, output_spectra, spectra
from tncompress.metric import Metric
from tncompress.plan import Skip
from tncompress.selection import describe, memory_for
from tncompress.spec import Spec
from tncompress.tables import progress_bar
from tncompress.threads import side_by_side

__all__ = ["MEASURES", "CutAtlas", "CutRow", "atlas"]

LOSSES = 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5


def atlas(
    model: nn.Module,
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    controls: Sequence[str] = (),
    include: Collection[str] = (),
    linear: bool = False,
    losses: Sequence[int | float] = LOSSES,
    seed: int = 0,
    progress: bool = False,
) -> CutAtlas:
    """Return the spectra of every convolution of ``model`` across all its cuts, and what follows from them.

    A conv1d, conv2d, conv3d kernel has 3, 7, 15 cuts; with ``linear`` linear layers are there, too, with one.
    A layer with groups has the joint spectrum of all its groups, truncated to one rank. A module under
    several names is one layer. ``include`` is that of the spec (:class:`~tncompress.Spec`); layers
    that ``compress`` leaves alone without it, and kernels without values or with NaN, are in ``skipped``.

    ``controls`` adds rows of kernels that were not trained: ``"random"`` is what torch's own class of the
    layer begins with (uniform within 1 / sqrt(fan in), whatever the model was initialised with), drawn from
    ``seed`` and the layer's name; ``"shuffled"`` has the kernel's own entries in a random order.

    With a ``calibration`` (a :class:`~tncompress.Calibration`, or batches to make one of) there are also rows
    in the metric ``data``. Across out|rest the discarded weight is then the part of the mean square of
    the layer's output that the best truncation loses, exactly. Across other cuts both sides are
    whitened with their own second moments: exact where the moments of the patches are a product over the
    two sides, an estimate elsewhere. Outputs are taken about their mean where a bias can keep it.

    Singular values are right to 1e-7 of the kernel's norm, those of kernels in float64 to rounding. The
    model is not touched, nor are global random numbers.

    >>> found = atlas(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)))
    >>> len(found.rows), found.select(layer="1", cut="out|in kh kw")[0].full
    (14, 8)
    """
    refuse_wrapped(model)
    kinds = _controls(controls)
    checked = tuple(_loss(loss) for loss in losses)
    asked = Spec.parse({"include": tuple(include)}).include
    layers = [x for x in find_layers(model, asked) if linear or _is_convolution(x)]
    reasons = {layer.name: layer.obstacle or _unreadable(layer) for layer in layers}
    readable = [layer for layer in layers if not reasons[layer.name]]
    if not readable:
        raise ValueError(_nothing(layers, reasons))
    moments = as_calibration(calibration, model, include=asked, progress=progress)
    skipped = [_skip(layer, reason) for layer in layers if (reason := reasons[layer.name])]
    subjects = []
    for depth, layer in enumerate(layers, 1):
        if not reasons[layer.name]:
            metric = moments.metric(layer.name) if moments is not None else None
            if moments is not None and metric is None:
                skipped.append(_skip(layer, "no data-weighted rows: the calibration has no moments of it"))
            subjects.append(_Subject(layer, depth, layer.weight(), metric, kinds, seed))
    rows = _all_rows(subjects, show=progress)
    return CutAtlas(rows, tuple(skipped), checked, seed, moments.images if moments is not None else None)


@dataclass(frozen=True)
class _Subject:
    """One layer, and how it is to be looked at."""

    layer: Layer
    depth: int
    weight: Tensor
    metric: Metric | None
    controls: tuple[str, ...]
    seed: int

    @property
    def cost(self) -> float:
        """About how long it takes, in units of their own: eigenvalues go with the third power."""
        out, inward, *window = self.layer.geometry.kernel_shape
        return out * inward * math.prod(window) * float(max(out, inward) * max(window, default=1))

    def rows(self) -> list[CutRow]:
        """Return the rows of this layer."""
        with memory_for(describe(self.layer.name, self.weight)):
            weights = {"trained": self.weight}
            for kind in self.controls:
                weights[kind] = control(kind, self.weight, self.layer.geometry, self.seed, self.layer.name)
            stacks = {kind: self.layer.geometry.kernels(weight) for kind, weight in weights.items()}
            plain = {kind: spectra(kernels) for kind, kernels in stacks.items()}
            found = [row for kind, own in plain.items() for row in self._rows(kind, "norm", own)]
            if self.metric is not None:
                weighted = output_spectra(stacks, self.metric)
                found += [row for kind, own in weighted.items() for row in self._rows(kind, "data", own)]
            return found

    def _rows(self, kind: Any, metric: Any, found: dict[str, Spectrum]) -> list[CutRow]:
        geometry = self.layer.geometry
        shape, groups = geometry.kernel_shape, geometry.groups
        return [
            CutRow(self.layer.name, self.depth, cut, kind, metric, shape, groups, s)
            for cut, s in found.items()
        ]


def _all_rows(subjects: list[_Subject], *, show: bool) -> tuple[CutRow, ...]:
    """Return the rows of all layers, in order; on a CPU several layers at a time, the dearest first."""
    on_cpu = all(subject.weight.device.type == "cpu" for subject in subjects)
    with progress_bar(len(subjects), show=show) as advance, torch.no_grad():
        found = side_by_side(
            _Subject.rows,
            subjects,
            threads=None if on_cpu else 1,
            cost=lambda subject: subject.cost,
            done=lambda subject: advance(subject.layer.name),
        )
    return tuple(row for rows in found for row in rows)


def _is_convolution(layer: Layer) -> bool:
    return layer.geometry.ndim > 0


def _unreadable(layer: Layer) -> str | None:
    weight = layer.weight()
    if weight.is_meta:
        return "its weight is on the meta device: load the weights"
    return None if bool(torch.isfinite(weight).all()) else "its weight holds NaN or infinity"


def _nothing(layers: list[Layer], reasons: dict[str, str | None]) -> str:
    if not layers:
        return "the model has no convolution (linear layers are read with linear=True)"
    first = layers[0]
    more = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
    where = f"layer {first.name!r}" if first.name else "the layer"
    return f"no layer of the model can be read: {where}: {reasons[first.name]}{more}"


def _skip(layer: Layer, reason: str) -> Skip:
    return Skip(layer.names, layer.kind, layer.geometry.weight_shape, reason, layer.params, None)


def _controls(controls: Sequence[str]) -> tuple[str, ...]:
    asked = (controls,) if isinstance(controls, str) else tuple(controls)
    if unknown := [kind for kind in asked if kind not in CONTROLS]:
        raise ValueError(f"unknown control {unknown[0]!r}; the controls are {', '.join(CONTROLS)}")
    return tuple(dict.fromkeys(asked))


def _loss(loss: Any) -> float:
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 < loss < 1:
        raise ValueError(f"a norm loss is a number between 0 and 1, got {loss!r}")
    return float(loss)
