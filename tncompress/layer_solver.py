"""Solving for one layer: from the inputs that a compressed network gives it to the dense outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.least_squares import PairMoments, ridge_for, solve_towards
from tncompress.metric import Metric, add_ridge
from tncompress.patches import CHUNK, patches
from tncompress.weighted import GRADIENT_RIDGE, fit_in_metric

HELD_OUT = 8
"""Every so many images one judges what was solved for on the others."""
PATCHES_PER_INPUT, LEAST_PATCHES = 64, 2**14
"""How many patches are taken for each number in a patch, and in all, where there are more of them."""

Factors = Literal["all", "last"]


@dataclass(frozen=True)
class LayerRepair:
    """What least squares did to a layer: its output's relative error before and after, or why it was left.

    Errors are against the dense layer's outputs, on the inputs that the repaired network gives the layer,
    over all ``images``; None where a layer was left unmeasured for the ``reason``. ``means_matched`` says
    whether the mean output was made the dense one, as far as there is something to do it with.
    """

    name: str
    images: int = 0
    error_before: float | None = None
    error_after: float | None = None
    reason: str | None = None
    means_matched: bool = False


@dataclass(frozen=True)
class Partners:
    """A layer of the compressed model, the dense one whose place it took, and the BatchNorm behind each."""

    name: str
    layer: Any  # TNConv, nn.Linear
    dense: Any
    norm: Any = None
    dense_norm: Any = None

    @property
    def geometry(self) -> ConvGeometry:
        """The geometry that both have."""
        return self.layer.geometry if isinstance(self.layer, TNConv) else ConvGeometry.of(self.layer)

    @property
    def kernels(self) -> Tensor:
        """The kernels ``(groups, out, d)`` that the layer stands for now, in float64."""
        return self.geometry.kernels(self.layer.weight.detach()).flatten(2).double()


@dataclass(frozen=True)
class Solver:
    """How layers are solved for; see :func:`tncompress.repair.repair`.

    ``gradients`` are second moments ``(groups, out, out)`` by the name of a layer, which weigh its outputs.
    """

    factors: Factors = "all"
    bias: bool = True
    batchnorm: bool = True
    ridge: float | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

    def solve(self, pair: Partners, inputs: list[Tensor], outputs: list[Tensor]) -> LayerRepair:
        """Change the layer so that its ``inputs`` give the dense ``outputs``; never for the worse.

        Where outputs are weighed by gradients, it is the weighed error that does not rise.
        """
        images = sum(_images(x, pair.geometry) for x in inputs)
        seen, held = collect(pair.geometry, inputs, outputs)
        whole = PairMoments()
        whole.pool(seen)
        whole.pool(held)
        if not whole.finite:
            return LayerRepair(pair.name, images, reason="its inputs or outputs are not all finite")
        old = pair.kernels
        fixed = None if self._free_means(pair) else _bias_of(pair.layer, old)
        before = whole.relative_error(old, _bias_of(pair.layer, old))
        new, write = self._fitted(pair, seen, fixed)
        judge, weight = held if held.count else seen, self._weight(pair)

        def error(part: PairMoments, fit: PairMoments, kernels: Tensor) -> float:
            return part.squared_error(kernels, _bias(fit, kernels, fixed), weight)

        falls = all(error(*parts, new) < error(*parts, old) for parts in ((judge, seen), (whole, whole)))
        if falls:
            write()
        kept = new if falls else old
        self._write_means(pair, whole.bias(kept), fixed is None)
        after = whole.relative_error(kept, _bias(whole, kept, fixed))
        reason = None if falls else "factors kept: others are no better on images held out"
        return LayerRepair(pair.name, images, before, after, reason, True)

    def _weight(self, pair: Partners) -> Tensor | None:
        gradient = self.gradients.get(pair.name)
        return None if gradient is None else add_ridge(gradient.to(pair.kernels), GRADIENT_RIDGE)

    def match_means(self, pair: Partners, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Make the mean output of the layer that of the dense one, by its bias or the BatchNorm behind it."""
        if not self._free_means(pair):
            return
        total, count = torch.zeros((), dtype=torch.float64), 0
        for x, y in zip(inputs, outputs, strict=True):
            gap = _rows(y - pair.layer(x), pair.geometry).flatten(1, 2)
            total, count = total.to(gap.device) + gap.sum(1, dtype=torch.float64), count + gap.shape[1]
        self._write_means(pair, _bias_of(pair.layer, total) + total / count, True)

    def _free_means(self, pair: Partners) -> bool:
        """Say whether there is something behind the layer's kernel that takes any mean away."""
        own = self.bias and pair.layer.bias is not None
        return own or (pair.norm is not None and (self.bias or self.batchnorm))

    def _write_means(self, pair: Partners, bias: Tensor, free: bool) -> None:
        layer, norm = pair.layer, pair.norm
        own = self.bias and layer.bias is not None
        if free and own:
            layer.bias.copy_(bias.flatten())
        if norm is not None and (self.bias or self.batchnorm):
            shift = 0 if own else _bias_of(layer, bias).flatten() - bias.flatten()
            norm.running_mean.copy_(pair.dense_norm.running_mean + shift)
            norm.running_var.copy_(pair.dense_norm.running_var)

    def _fitted(self, pair: Partners, seen: PairMoments, fixed: Tensor | None) -> tuple[Tensor, Any]:
        """Return new kernels ``(groups, out, d)``, and what writes them into the layer."""
        layer, geometry = pair.layer, pair.geometry
        shape = (geometry.groups, *geometry.kernel_shape)
        dense = geometry.kernels(pair.dense.weight.detach()).flatten(2).double()
        xx, yx = seen.moments(fixed)
        ridge = self.ridge if self.ridge is not None else ridge_for(seen.count, xx.shape[-1])
        target, moments = solve_towards(dense, xx, yx, ridge)
        if not isinstance(layer, TNConv):
            return target, lambda: layer.weight.copy_(geometry.weight(target.reshape(shape)))
        metric = Metric(geometry.kernel_shape[1:], whole=moments, gradient=self.gradients.get(pair.name))
        start = [factor.detach().clone().double() for factor in layer.tensors()]  # not to write into itself
        fine = torch.promote_types(layer.factors[0].dtype, torch.float32)
        fit = fit_in_metric(
            layer.format,
            target.reshape(shape).to(fine),
            layer.ranks,
            metric,
            start=start,
            last_only=self.factors == "last",
        )
        factors = [factor.to(layer.factors[0].dtype) for factor in fit.factors]
        rebuilt = layer.format.to_dense([factor.double() for factor in factors], geometry.kernel_shape)
        new = rebuilt.reshape(shape).flatten(2)

        def write() -> None:
            for held, factor in zip(layer.factors, factors, strict=True):
                held.copy_(factor.reshape(held.shape))
            norm = float(dense.norm())
            layer.rel_error = float((pair.kernels - dense).norm()) / norm if norm > 0 else 0.0

        return new, write


def _bias_of(layer: Any, like: Tensor) -> Tensor:
    """Return the bias of ``layer`` (zeros, where it has none) as ``(groups, out)`` in float64."""
    if layer.bias is None:
        return like.new_zeros(like.shape[:2], dtype=torch.float64)
    return layer.bias.detach().double().reshape(like.shape[:2])


def _bias(moments: PairMoments, kernels: Tensor, fixed: Tensor | None) -> Tensor:
    return moments.bias(kernels) if fixed is None else fixed


def collect(
    geometry: ConvGeometry, inputs: Iterable[Tensor], outputs: Iterable[Tensor]
) -> tuple[PairMoments, PairMoments]:
    """Return the moments of patches and outputs: of the images to solve on, and of those held out.

    Where there are many pixels, each image gives some of them, every one others.
    """
    inputs, outputs = list(inputs), list(outputs)
    number, d = sum(_images(x, geometry) for x in inputs), math.prod(geometry.kernel_shape[1:])
    each = math.ceil(max(PATCHES_PER_INPUT * d, LEAST_PATCHES) / max(number, 1))
    parts = PairMoments(), PairMoments()
    first = 0
    for x, y in zip(inputs, outputs, strict=True):
        for seen, rows in _patches_of_images(geometry, x, y):
            images, pixels = seen.shape[1:3]
            place = torch.arange(first, first + images, device=seen.device)
            if each < pixels:
                chosen = _pixels(place, pixels, each)[None, :, :, None]
                seen, rows = seen.take_along_dim(chosen, 2), rows.take_along_dim(chosen, 2)
            held = place % HELD_OUT == HELD_OUT - 1
            for part, mask in zip(parts, (~held, held), strict=True):
                part.add(seen[:, mask].flatten(1, 2), rows[:, mask].flatten(1, 2))
            first += images
    return parts


def _pixels(images: Tensor, pixels: int, each: int) -> Tensor:
    """Return ``(images, each)`` pixels: a random order is gone through again and again."""
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(0), device="cpu")
    steps = torch.arange(each, device=images.device)
    return order.to(images.device)[(images[:, None] * each + steps) % pixels]


def _patches_of_images(geometry: ConvGeometry, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield patches ``(groups, images, pixels, d)`` and outputs, shaped likewise, in pieces."""
    if x.ndim == geometry.ndim + 1:
        x, y = x[None], y[None]
    rows = _rows(y, geometry)
    d = math.prod(geometry.kernel_shape[1:])
    step = max(1, CHUNK // (geometry.groups * rows.shape[2] * d))
    for some, part in zip(x.split(step), rows.split(step, 1), strict=True):
        yield patches(some, geometry).reshape(geometry.groups, len(some), -1, d), part


def _rows(y: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return outputs as ``(groups, images, pixels, out)``."""
    channel = y.ndim - 1 - geometry.ndim
    y = y.movedim(channel, -1) if y.ndim > geometry.ndim + 1 else y.movedim(channel, -1)[None]
    return y.reshape(len(y), -1, geometry.groups, y.shape[-1] // geometry.groups).permute(2, 0, 1, 3)


def _images(x: Tensor, geometry: ConvGeometry) -> int:
    return len(x) if x.ndim > geometry.ndim + 1 else 1
