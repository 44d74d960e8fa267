"""Measuring how the network's output answers to the truncation of each layer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tncompress.calibrate import Calibration, as_calibration
from tncompress.discovery import Layer, digest_of, digest_of_model, find_layers, refuse_wrapped
from tncompress.formats import SVD, Format, all_contenders, make_format
from tncompress.measure import device_of, macs
from tncompress.outputs import DenseOutputs, Images
from tncompress.policies import ParamsRatio
from tncompress.responses import Row, Sensitivity, Unmeasured
from tncompress.rowcache import RowCache
from tncompress.running import copy_model, runs_channels_last
from tncompress.selection import kept_dense
from tncompress.spec import KEEP_DENSE, Settings, Spec
from tncompress.swap import replace_all_
from tncompress.tables import progress_bar
from tncompress.truncation import Subject, Truncate, chosen, drafted, projected, ratio_of, stands_apart

QUICK_MACS = 2e12
"""What the forward passes of :func:`quick_sensitivity` may take together."""

QUICK_IMAGES = 8, 256
"""The fewest and the most images that it takes by itself."""

QUICK_RATIOS = 0.5, 0.15, 0.05, 0.015
"""Where it looks at each layer: the network's answer to large losses is no multiple of that to small ones."""

QUICK_RATIO = 0.1
"""Where it looks at each format but that of the closed form."""

_KEYS = 2
"""The version of what the keys of a cache are made from and of what its rows hold."""


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    formats: Sequence[Any] = ("svd", "tucker", "mps", "cp"),
    ratios: Sequence[int | float] = (0.5, 0.25, 0.125),
    calibration: Calibration | Iterable[Any] | None = None,
    keep_dense: Sequence[str] = KEEP_DENSE,
    include: Collection[str] = (),
    cache: str | Path | None = None,
    images: int | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Return how far the network's output changes when each layer alone is truncated, by format and ratio.

    The change is the squared relative error ``sum |y' - y|^2 / sum |y - mean(y)|^2`` of the outputs on
    ``batches``, at most ``images`` of them, centred over the images: what is the same in every output, such
    as a constant offset of the logits, is no signal. For outputs ``(images, classes)`` it is also the mean KL
    divergence of softmax(y') from softmax(y), and the change of accuracy where batches carry labels.

    ``formats`` are names, formats, or mappings with options; ``ratios`` are parameters, truncated / dense;
    ``keep_dense`` and ``include`` are those of a :class:`Spec`. With ``calibration`` (a
    :class:`Calibration`, or batches to make one of) layers are truncated as ``compress`` does it then, and
    losses are those of their outputs. ``cache`` is a file
    that keeps each row as soon as it is measured: a run that was killed goes on there, and rows of another
    model, other images or another calibration are not taken. The model is not touched. No images at all are
    a ``ValueError``.

    >>> import torch, tncompress as tnc
    >>> model, images = tnc.build_model("zoo:cnn4").eval(), [torch.randn(8, 1, 28, 28)]
    >>> found = tnc.sensitivity(model, images, formats=["svd"], ratios=[0.5, 0.1])
    >>> found.layers, found.predict("conv3", 0.2) <= found.predict("conv3", 0.4)
    (('conv2', 'conv3', 'conv4'), True)
    """
    return _measured(
        model,
        Images.gather(batches, device_of(model), images),
        [(settings, chosen) for settings in _settings(formats, ratios)],
        calibration=calibration,
        keep_dense=keep_dense,
        include=include,
        cache=cache,
        progress=progress,
    )


def quick_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    formats: Sequence[Any] | None = None,
    calibration: Calibration | Iterable[Any] | None = None,
    ratios: Sequence[int | float] = QUICK_RATIOS,
    keep_dense: Sequence[str] = KEEP_DENSE,
    include: Collection[str] = (),
    cache: str | Path | None = None,
    images: int | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Return a sensitivity that is cheap enough for every budget: closed forms and drafts, few images.

    Kernels are cut ``out|rest`` at few ``ratios``, which tells the curve of each layer. Each of ``formats``
    (all that compete under ``format: auto``) is measured at one ratio: by what factor its errors change
    the output more or less than that. Without ``images`` as many are taken, 256 at most and 8 at least, as
    keep the forward passes of all layers within some minutes on two cores.
    """
    held = Images.gather(batches, device_of(model), images or QUICK_IMAGES[1])
    named = all_contenders() if formats is None else formats
    others = _settings(named, (QUICK_RATIO,)) if named else []
    tasks = [(settings, projected) for settings in _settings((SVD(),), ratios)]
    tasks += [(settings, drafted) for settings in others if settings.one_format != SVD()]
    if images is None:
        asked = Spec.parse({"keep_dense": tuple(keep_dense), "include": tuple(include)})
        layers = _layers(model, asked)[0]
        apart = [stands_apart(o.one_format, x.geometry.kernel_shape) for x in layers for o in others]
        passes = 1 + len(layers) * len(ratios) + sum(apart)
        least, most = QUICK_IMAGES
        affordable = int(QUICK_MACS / (passes * max(macs(model, held.inputs[0][:1]), 1)))
        held = held.first(min(most, max(least, affordable)))
    return _measured(
        model,
        held,
        tasks,
        calibration=calibration,
        keep_dense=keep_dense,
        include=include,
        cache=cache,
        progress=progress,
    )


def _measured(
    model: nn.Module,
    images: Images,
    tasks: Sequence[tuple[Settings, Truncate]],
    *,
    calibration: Calibration | Iterable[Any] | None,
    keep_dense: Sequence[str],
    include: Collection[str],
    cache: str | Path | None,
    progress: bool,
) -> Sensitivity:
    """Return what truncating each layer does to the output on ``images``."""
    asked = Spec.parse({"keep_dense": tuple(keep_dense), "include": tuple(include)})
    refuse_wrapped(model)
    _refuse_meta(model)
    target = copy_model(model)
    moments = as_calibration(calibration, target, include=asked.include, progress=progress)
    if runs_channels_last(target, images.inputs[0]):
        target = target.to(memory_format=torch.channels_last)
    layers, unmeasured = _layers(target, asked)
    known = [layer.module for layer in find_layers(target, asked.include) if layer.obstacle is None]
    run = _Run(target, DenseOutputs(target, images, known), RowCache(cache))
    rows: list[Row] = []
    with progress_bar(len(layers) * len(tasks), show=progress) as advance:
        for layer in layers:
            subject = Subject.of(layer, moments)
            for setting, truncate in tasks:
                found = run.row(subject, setting, truncate)
                (rows if isinstance(found, Row) else unmeasured).append(found)  # type: ignore[arg-type]
                advance(f"{layer.name} {setting.one_format} {ratio_of(setting):g}")
    digests = {layer.name: digest_of(layer.weight()) for layer in layers}
    accuracy = run.dense.accuracy
    return Sensitivity(tuple(rows), len(images), accuracy, moments is not None, tuple(unmeasured), digests)


def _settings(formats: Sequence[Any], ratios: Sequence[int | float]) -> list[Settings]:
    """Return what is measured of each layer, format by format."""
    formats = [formats] if isinstance(formats, str | Mapping | Format) else formats
    made = list(dict.fromkeys(make_format(format) for format in formats))
    policies = list(dict.fromkeys(ParamsRatio(ratio) for ratio in ratios))
    if not made or not policies:
        raise ValueError("wanted at least one format and one ratio to measure, got none")
    return [Settings(format=format, rank=policy) for format in made for policy in policies]


def _layers(model: nn.Module, asked: Spec) -> tuple[list[Layer], list[Unmeasured]]:
    """Return the layers of ``model`` that a spec would compress, and the others with the reason."""
    layers = find_layers(model, asked.include)
    kept = kept_dense(asked, layers)
    reasons = {layer.name: layer.obstacle or kept.get(layer.name) for layer in layers}
    left = [Unmeasured(name, None, None, reason) for name, reason in reasons.items() if reason]
    return [layer for layer in layers if not reasons[layer.name]], left


def _refuse_meta(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, where it puts nothing out: load its weights")


@dataclass
class _Run:
    """One measurement after another, each on the copy ``model``, which is dense again after each."""

    model: nn.Module
    dense: DenseOutputs
    cache: RowCache

    def __post_init__(self) -> None:
        self._what = [_KEYS, digest_of_model(self.model), self.dense.images.digest()]

    def row(self, subject: Subject, settings: Settings, truncate: Truncate) -> Row | Unmeasured:
        """Return the row of one truncation, from the cache if it is there, or why there is none."""
        layer, format, ratio = subject.layer, settings.one_format, ratio_of(settings)
        about = json.dumps([*self._what, truncate.__name__, *subject.about, format.to_dict(), ratio])
        key = hashlib.blake2b(about.encode(), digest_size=16).hexdigest()
        kept = self.cache.get(key)
        if kept is not None and math.isclose(kept["signal"], self.dense.signal, rel_tol=1e-3):
            return Row.from_dict(kept["row"])
        found = truncate(subject, settings)
        if isinstance(found, str):
            return Unmeasured(layer.name, format, ratio, found)
        ranks, fit = found
        with _replaced(self.model, layer, subject.built(format, fit)):
            change = self.dense.change(self.model, layer.module)
        if change is None:
            return Unmeasured(layer.name, format, ratio, "the network's output held NaN or infinity")
        gained = None
        if change.accuracy is not None and self.dense.accuracy is not None:
            gained = change.accuracy - self.dense.accuracy
        made = Row(layer.name, format, ratio, ranks, fit.loss, change.error, change.kl, gained)
        self.cache.add(key, {"signal": self.dense.signal, "row": made.to_dict()})
        return made


@contextmanager
def _replaced(model: nn.Module, layer: Layer, new: nn.Module) -> Iterator[None]:
    """Put ``new`` in the place of ``layer`` for the length of the block."""
    replace_all_(model, dict.fromkeys(layer.names, new))
    try:
        yield
    finally:
        replace_all_(model, dict.fromkeys(layer.names, layer.module))
