"""One layer truncated by itself: as compression does it, or in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.calibrate import Calibration
from tncompress.discovery import Layer, digest_of
from tncompress.formats import SVD, Fit, Format
from tncompress.layers import TNConv
from tncompress.metric import Metric
from tncompress.policies import ParamsRatio
from tncompress.ranks import NoRanks, RankPath, choose
from tncompress.selection import check_weight, describe, memory_for
from tncompress.spec import Settings
from tncompress.swap import adopt


@dataclass(frozen=True)
class Subject:
    """A layer, its weight, and the metric of its patches, if there is a calibration that reached it."""

    layer: Layer
    weight: Tensor
    calibration: Calibration | None
    metric: Metric | None

    @classmethod
    def of(cls, layer: Layer, calibration: Calibration | None) -> Subject:
        """Return the layer with its metric; NaN or infinity in its weight is a ``ValueError``."""
        weight = layer.weight()
        check_weight(layer)
        metric = calibration.metric(layer.name) if calibration is not None else None
        return cls(layer, weight, calibration, metric)

    @property
    def kernels(self) -> Tensor:
        """The weight as a stack of kernels ``(groups, out, in, *spatial)``."""
        return self.layer.geometry.kernels(self.weight)

    @cached_property
    def about(self) -> list[Any]:
        """The name of the layer, and fingerprints of its weight and its moments."""
        known = []
        if self.calibration is not None and self.metric is not None:
            mean = self.calibration.layers[self.layer.name].mean
            held = (mean, self.metric.whole, self.metric.channels, self.metric.window)
            kept = self.calibration.keeps_mean(self.layer.name)
            known = [kept, *(digest_of(matrix) if matrix is not None else "" for matrix in held)]
        return [self.layer.name, digest_of(self.weight), *known]

    @cached_property
    def responses(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(groups, out)``, rising, and eigenvectors of W C W', in float64; needs a metric."""
        assert self.metric is not None
        kernels = self.kernels.double()
        metric = self.metric.to(kernels.device, torch.float64)
        values, vectors = torch.linalg.eigh(metric.gram(kernels))
        return values.clamp_min(0), vectors

    def built(self, format: Format, fit: Fit) -> TNConv:
        """Return the truncated layer; its bias keeps the mean output where the calibration says that it can.

        That is the same as moving the mean of a BatchNorm behind it.
        """
        layer = self.layer
        bias = layer.module.bias.detach().clone() if layer.module.bias is not None else None
        new = TNConv(format, layer.geometry, fit.factors, bias, rel_error=fit.rel_error)
        if self.calibration is not None:
            lost = self.kernels.double() - layer.geometry.kernels(new.weight.detach()).double()
            kept = self.calibration.shift(layer.name, lost)
            if kept is not None:
                shift = kept[1].to(self.weight)
                new.bias = nn.Parameter(shift if bias is None else bias + shift)
        return adopt(new, layer.module)


Truncate = Callable[[Subject, Settings], tuple[tuple[int, ...], Fit] | str]
"""Returns the ranks and the fit for a layer, or the reason why there are none."""


def ratio_of(settings: Settings) -> float:
    """Return the ratio of parameters that is asked for."""
    assert isinstance(settings.rank, ParamsRatio)
    return settings.rank.ratio


def chosen(subject: Subject, settings: Settings) -> tuple[tuple[int, ...], Fit] | str:
    """Return the ranks and the fit that a plan would choose, or the reason why there are none."""
    layer, where = subject.layer, describe(subject.layer.name, subject.weight)
    try:
        settings.one_format.max_ranks(layer.geometry.kernel_shape)
    except ValueError as error:
        return str(error)
    try:
        with memory_for(where):
            ranks, fit = choose(subject.kernels, settings, limit=layer.params - 1, metric=subject.metric)
    except NoRanks as reason:
        return str(reason)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    assert fit is not None  # only the meta device has none
    return ranks, fit


def projected(subject: Subject, settings: Settings) -> tuple[tuple[int, ...], Fit] | str:
    """Return the cut ``out|rest`` as :func:`chosen` does, but in closed form where there is a metric.

    With U the leading eigenvectors of W C W', the kernel U U' W has the least output error of its rank, and
    its squared error is the sum of the other eigenvalues (response PCA, Zhang et al. 2016). Nothing has
    the size of C but C itself, so this costs little beside one forward pass.
    """
    if subject.metric is None:
        return chosen(subject, settings)
    kernels = subject.kernels.double()
    groups, out, *patch = kernels.shape
    flat = kernels.flatten(2)
    one = groups * (out + flat.shape[2])
    allowed = min(subject.layer.params - 1, ratio_of(settings) * kernels.numel())
    rank = min(int(allowed / one), out, flat.shape[2])
    if rank < 1:
        return f"{settings.one_format} at rank 1 holds {one:,} parameters, allowed {int(allowed):,}"
    values, vectors = subject.responses
    leading = vectors[..., -rank:]
    inner = leading.mT @ flat
    lost, total = float(values[:, : out - rank].sum()), float(values.sum())
    rel_error = float((flat - leading @ inner).norm() / flat.norm().clamp_min(1e-300))
    factors = (inner.unflatten(2, patch), leading)  # in the order of the chain
    cast = tuple((f if groups > 1 else f[0]).to(subject.weight.dtype).contiguous() for f in factors)
    return (rank,), Fit(cast, rel_error, (lost / total) ** 0.5 if total > 0 else 0.0)


def stands_apart(format: Format, shape: tuple[int, ...]) -> bool:
    """Say whether ``format`` is another network than the cut ``out|rest`` on kernels of this shape."""
    try:
        return format.network(shape) != SVD().network(shape)
    except ValueError:  # the kernel has no such legs
        return False


def drafted(subject: Subject, settings: Settings) -> tuple[tuple[int, ...], Fit] | str:
    """Return the ranks that :func:`chosen` finds with a fit made in less time, or why there is none.

    There is none where the format does not stand apart from what :func:`projected` measures.
    """
    layer, format = subject.layer, settings.one_format
    if not stands_apart(format, layer.geometry.kernel_shape):
        return f"{format} is no network of its own on this kernel"
    allowed = min(layer.params - 1, ratio_of(settings) * subject.weight.numel())
    try:
        with memory_for(describe(layer.name, subject.weight)):
            path = RankPath(subject.kernels, settings, subject.metric)
            ranks = path.ranks_within(allowed)
            return ranks, path.draft(ranks)
    except NoRanks as reason:
        return str(reason)
