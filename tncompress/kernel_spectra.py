"""The singular spectra of a layer's kernels across every cut, in the plain norm and in that of the output."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tncompress.cuts import Cut, all_cuts, legs_of
from tncompress.formats import SVD
from tncompress.geometry import ConvGeometry
from tncompress.linalg import joint_singular_values
from tncompress.metric import Metric
from tncompress.weighted import whiten

Spectrum = tuple[float, ...]

CONTROLS = ("random", "shuffled")
"""Kernels that training did not make, of the shape of one that it made."""


def short_name(cut: Cut) -> str:
    """Return how a cut is written for short: the larger side is ``rest``.

    >>> [short_name(cut) for cut in all_cuts(4)[3:6]]
    ['kw|rest', 'out in|kh kw', 'out kh|in kw']
    """
    left, right = cut.left, cut.right
    return f"{' '.join(left)}|{'rest' if len(left) < len(right) or len(left) == 1 else ' '.join(right)}"


def sides(shape: tuple[int, ...], cut: Cut) -> tuple[int, int]:
    """Return how many rows and columns the matrix has that ``cut`` makes of a kernel of this shape."""
    left, right = cut.modes(len(shape))
    return math.prod(shape[mode] for mode in left), math.prod(shape[mode] for mode in right)


def control(kind: str, weight: Tensor, geometry: ConvGeometry, seed: int, name: str) -> Tensor:
    """Return a weight like ``weight`` that no training made; the global random numbers are left alone.

    ``random`` is what torch's own class of the layer begins with (uniform within 1 / sqrt(fan in)), drawn on
    the CPU from ``seed`` and the layer's ``name``; ``shuffled`` has the entries of each
    group in a random order.
    """
    word = hashlib.blake2b(f"{seed} {kind} {name}".encode(), digest_size=6).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(word, "big"))
    if kind == "random":
        fresh = torch.empty(geometry.weight_shape)
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        return fresh.to(weight)
    kernels = geometry.kernels(weight).flatten(1)
    orders = torch.rand(kernels.shape, generator=generator, dtype=torch.float64).argsort(1)
    shuffled = kernels.gather(1, orders.to(weight.device))
    return geometry.weight(shuffled.reshape(geometry.groups, *geometry.kernel_shape)).contiguous()


def spectra(kernels: Tensor) -> dict[str, Spectrum]:
    """Return the joint spectrum of a stack of kernels ``(groups, out, in, *spatial)`` across each cut.

    Legs of size 1 make cuts alike: each different matrix is decomposed once.
    """
    shape = tuple(kernels.shape[1:])
    found: dict[str, Spectrum] = {}
    for name, (cut, alike) in _cuts(shape).items():
        if alike in found:
            found[name] = found[alike]
            continue
        found[name] = tuple(joint_singular_values(_matrices(kernels, cut)).tolist())
    return found


def output_spectra(stacks: Mapping[str, Tensor], metric: Metric) -> dict[str, dict[str, Spectrum]]:
    """Return the spectra of stacks of kernels of one shape, by name, in the norm of the layer's output.

    Across out|rest it is exact: a tail is the squared error of the output of the best truncation. Across
    other cuts each side is whitened with its own moments, and the spectrum scaled to the norm of the
    output: exact where the moments are a product over the two sides, an estimate elsewhere. Moments of
    gradients, where the metric has some, are not looked at.
    """
    first = next(iter(stacks.values()))
    shape = tuple(first.shape[1:])
    together = torch.cat([kernels.detach().double() for kernels in stacks.values()], dim=1)
    peak = float(together.abs().amax()) or 1.0
    together = together / peak  # the squares of tiny kernels would be lost
    metric = Metric(metric.patch, metric.whole, metric.channels, metric.window).to(together)
    norms = [float(metric.squared_norm(kernels).sum().sqrt()) for kernels in together.split(shape[0], dim=1)]
    found: dict[str, dict[str, Spectrum]] = {which: {} for which in stacks}
    for name, (cut, alike) in _cuts(shape).items():
        if alike in next(iter(found.values())):
            for own in found.values():
                own[name] = own[alike]
            continue
        parts = _seen_across(cut, shape, together, metric).split(shape[0], dim=1)
        for which, part, norm in zip(stacks, parts, norms, strict=True):
            s = _spectrum_of_output(cut, part, metric)
            total = float(torch.linalg.vector_norm(s))
            scale = peak * norm / total if total > 0 else 0.0
            found[which][name] = tuple((s * scale).tolist())
    return found


def _seen_across(cut: Cut, shape: tuple[int, ...], kernels: Tensor, metric: Metric) -> Tensor:
    """Return ``kernels`` as the cut is to see them: whitened, unless all of the patch is on one side."""
    if 1 in sides(shape, cut) or _splits_off_out(cut, shape):
        return kernels
    return whiten(SVD(str(cut)), kernels, metric)


def _spectrum_of_output(cut: Cut, kernels: Tensor, metric: Metric) -> Tensor:
    shape = tuple(kernels.shape[1:])
    if 1 not in sides(shape, cut) and _splits_off_out(cut, shape):
        most = min(kernels.flatten(2).shape[1:])
        squares = torch.linalg.eigvalsh(metric.gram(kernels)).flip(1)[:, :most]
        return squares.clamp_min(0.0).sum(0).sqrt()
    return joint_singular_values(_matrices(kernels, cut), exact=False)


def _matrices(kernels: Tensor, cut: Cut) -> Tensor:
    """Return the matrix that ``cut`` makes of each of a stack of kernels."""
    left, right = cut.modes(kernels.ndim - 1)
    moved = kernels.permute(0, *(1 + mode for mode in left + right))
    return moved.reshape(len(kernels), sides(tuple(kernels.shape[1:]), cut)[0], -1)


def _splits_off_out(cut: Cut, shape: tuple[int, ...]) -> bool:
    """Say whether ``out`` is alone on its side, legs of size 1 aside."""
    return any(all(mode == 0 or shape[mode] == 1 for mode in side) for side in cut.modes(len(shape)))


def _cuts(shape: tuple[int, ...]) -> dict[str, tuple[Cut, str]]:
    """Return each cut by its short name, with the name of the first that makes the same matrix."""
    names, found = legs_of(len(shape)), {}
    firsts: dict[frozenset[frozenset[str]] | None, str] = {}
    long = {name for name, size in zip(names, shape, strict=True) if size > 1}
    for cut in all_cuts(len(shape)):
        parts = frozenset(cut.left) & long, frozenset(cut.right) & long
        key = frozenset(parts) if all(parts) else None
        name = short_name(cut)
        found[name] = (cut, firsts.setdefault(key, name))
    return found
