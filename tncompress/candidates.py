"""What a layer could become under a budget: formats and ranks, each with its loss and its costs.

On the path of ranks of each format (:class:`tncompress.ranks.RankPath`) candidates lie at parameter ratios in
geometric steps. A few of them are fitted, or their fits estimated; the losses of the others are
interpolated. Where bonds have spectra, what is interpolated is the ratio of the squared error to the bound
that the spectra give, which hardly changes along a path; a format of one bond needs no fit at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tncompress.costs import Calls, excess_of_macs, layer_macs, stages_macs, weight_bytes
from tncompress.discovery import Layer
from tncompress.formats import Format
from tncompress.judge import Judge
from tncompress.latency import Clock
from tncompress.ranks import NoRanks, RankPath, Ranks
from tncompress.spec import Settings

RATIOS = np.geomspace(0.95, 0.004, 48).tolist()
"""Parameters of the candidates, over those of the dense kernel, as far as ranks allow; the smallest join."""

GUIDED_FITS, FITS, LARGEST_FIT = 3, 4, 0.6
"""How many fits a path gets, with spectra and without, and at most at which parameter ratio."""

LARGE = 2**19
"""Kernels with more entries get a fit less without spectra, and at most at half that ratio: large ranks of
large kernels cost the most."""

FLOOR = 1e-16
"""A squared relative error that counts as none."""


@dataclass(frozen=True)
class Candidate:
    """A layer in a format at some ranks, or left as it is (no format); what is not counted is None."""

    format: Format | None
    ranks: Ranks
    loss: float
    params: int
    bytes: int
    macs: int | None
    latency: float | None


def candidates_of(
    layer: Layer,
    settings: Settings,
    judge: Judge,
    *,
    calls: Calls | None = None,
    clock: Clock | None = None,
    allow_larger: bool = False,
) -> list[Candidate]:
    """Return what ``layer`` could become: first the layer as it is, then every format at its ranks.

    Without ``allow_larger`` candidates have fewer parameters and MACs than the layer now.
    """
    shape, groups, bytes_each = layer.geometry.kernel_shape, layer.geometry.groups, layer.weight().itemsize
    found = [dense_candidate(layer, calls, clock)]
    for format, ranks, error in _with_errors(layer, settings, judge):
        params = format.num_params(shape, ranks, groups)
        stages = format.stages(shape, ranks)
        if not allow_larger and (params >= layer.params or excess_of_macs(layer, stages, calls)):
            continue
        found.append(
            Candidate(
                format=format,
                ranks=ranks,
                loss=judge.loss(layer.name, error, format),
                params=params,
                bytes=params * bytes_each,
                macs=stages_macs(layer.geometry, stages, calls) if calls is not None else None,
                latency=clock.chain(layer, stages, calls) if clock and calls is not None else None,
            )
        )
    return found


def dense_candidate(layer: Layer, calls: Calls | None, clock: Clock | None) -> Candidate:
    """Return ``layer`` as it is, which loses nothing."""
    return Candidate(
        format=None,
        ranks=(),
        loss=0.0,
        params=layer.params,
        bytes=weight_bytes(layer),
        macs=layer_macs(layer, calls) if calls is not None else None,
        latency=clock.layer(layer, calls) if clock and calls is not None else None,
    )


def _with_errors(layer: Layer, settings: Settings, judge: Judge) -> Iterator[tuple[Format, Ranks, float]]:
    """Yield every format at its ranks with the error there; of formats alike on this kernel, the first."""
    kernels, shape = layer.geometry.kernels(layer.weight()), layer.geometry.kernel_shape
    seen = set()
    for format in settings.formats:
        try:
            format.max_ranks(shape)
        except ValueError:  # the kernel has no such legs
            continue
        network = format.network(shape)
        if network in seen:
            continue
        seen.add(network)
        first = judge.path(layer.name, kernels, settings.model_copy(update={"format": format}))
        for path in first.with_variants():
            ranks = ranks_along(path)
            errors = errors_along(path, ranks)
            yield from zip([format] * len(ranks), ranks, errors, strict=True)


def ranks_along(path: RankPath) -> list[Ranks]:
    """Return the smallest ranks of a path and those that fill :data:`RATIOS`, the smallest first."""
    found = {path[0]}
    for ratio in RATIOS:
        try:
            found.add(path.ranks_within(ratio * path.kernels.numel()))
        except NoRanks:
            break
    return sorted(found, key=path.params)


def errors_along(path: RankPath, ranks: Sequence[Ranks]) -> list[float]:
    """Return the relative error at each of ``ranks``, which grow: it never rises along them."""
    guide = np.array([path.bound(each) if path.tails is not None else 1.0 for each in ranks])
    guide = np.maximum(guide, FLOOR)
    if path.tails_are_errors:
        return np.sqrt(guide).tolist()
    large = path.kernels.numel() > LARGE
    roots = np.sqrt([path.params(each) / path.kernels.numel() for each in ranks])
    top = np.sqrt(LARGEST_FIT / 2 if large else LARGEST_FIT)
    last = max(0, int(np.searchsorted(roots, top, side="right")) - 1)
    fits = FITS - large if path.tails is None else GUIDED_FITS
    spread = np.linspace(np.sqrt(roots[0]), np.sqrt(roots[last]), fits)
    at = np.unique(np.abs(np.sqrt(roots)[:, None] - spread).argmin(0))
    squares = np.maximum(np.square(path.estimates([ranks[i] for i in at])), FLOOR)
    logs = _interpolated(roots, roots[at], np.log(squares / guide[at]), further=path.tails is None)
    return np.sqrt(np.minimum.accumulate(np.exp(logs) * guide)).tolist()


def _interpolated(x: np.ndarray, known: np.ndarray, values: np.ndarray, *, further: bool) -> np.ndarray:
    """Return monotone cubic interpolants of ``values``; beyond the last a constant, or a falling line.

    Over the root of the parameter ratio the logarithm of an error is nearly straight.
    """
    from scipy.interpolate import PchipInterpolator

    if len(known) == 1:
        return np.full_like(x, values[0])
    found = PchipInterpolator(known, values)(np.minimum(x, known[-1]))
    slope = (values[-1] - values[-2]) / (known[-1] - known[-2]) if further else 0.0
    return found + min(slope, 0.0) * np.maximum(x - known[-1], 0.0)
