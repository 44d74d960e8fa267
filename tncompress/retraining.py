"""Training again after truncation: freely, or held on the manifold of kernels of the truncated ranks."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from tncompress.cuts import Cut, legs_of, rel_error, spectrum
from tncompress.cutting import TruncatedLayer
from tncompress.discovery import find_layers
from tncompress.finetune import FinetuneConfig, train_
from tncompress.formats import MPS, SVD, Format, Tucker
from tncompress.formats.chain import ChainFormat
from tncompress.outputs import bytes_of
from tncompress.policies import FixedRank
from tncompress.running import copy_model
from tncompress.spec import Rule, Settings, Spec
from tncompress.surgery import compress
from tncompress.sweep_points import exactly, partition

Ranks = tuple[int, ...]

EXACT = 50
"""How many roundings of its dtype a factored kernel may be from the truncated one, relative to its norm."""


@dataclass(frozen=True)
class Training:
    """What training did, epoch by epoch: mean training losses, and accuracies on the test images after each.

    ``beyond`` is the largest relative norm of a truncated kernel that lies beyond its truncated ranks after
    the training: 0, but for rounding, where it was held on the manifold. ``formats`` are those that held it,
    by layer. Where nothing was trained, or it went wrong, ``reason`` says why.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    losses: tuple[float, ...] = ()
    accuracies: tuple[float, ...] = ()
    beyond: float | None = None
    formats: Mapping[str, str] | None = None
    reason: str | None = None

    @property
    def accuracy(self) -> float | None:
        """The accuracy after the last epoch."""
        return self.accuracies[-1] if self.accuracies else None


def train_again(
    model: nn.Module,
    layers: Sequence[TruncatedLayer],
    loader: Any,
    config: FinetuneConfig,
    test: Iterable[Any],
    *,
    held: bool = False,
) -> Training:
    """Return what comes of training a copy of ``model``, whose kernels ``layers`` describes, freely or held.

    It is trained on a copy of ``loader``, so that every training starts at the same epoch of a loader that
    counts them. A loss that is not finite is told as the ``reason``.
    """
    formats = None
    if held:
        try:
            model = on_manifold(model, layers)
        except ValueError as error:
            return Training(reason=str(error))
        formats = {layer.name: str(model.get_submodule(layer.name).format) for layer in _truncated(layers)}
    else:
        model = copy_model(model)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            epochs = train_(model, fresh(loader), config, val_loader=test)
        except FloatingPointError as error:
            return Training(formats=formats, reason=str(error))
    accuracies = tuple(epoch.accuracy for epoch in epochs if epoch.accuracy is not None)
    return Training(tuple(epoch.loss for epoch in epochs), accuracies, beyond(model, layers), formats)


def fresh(loader: Any) -> Any:
    """Return a loader that gives what ``loader`` would, and leaves it as it is."""
    if isinstance(loader, list | tuple):
        return loader
    try:
        return copy.deepcopy(loader)
    except Exception as error:  # whatever a user's data set raises
        reason = " ".join(str(error).split())
        raise ValueError(f"the train loader can't be copied ({reason}): give a list of batches") from error


def digest_of_loader(loader: Any, seed: int) -> str:
    """Return a fingerprint of all batches of a loader's next pass, in their order."""
    found = hashlib.blake2b(digest_size=16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in fresh(loader):
            for part in batch:
                found.update(f"{part.dtype} {tuple(part.shape)}".encode())
                found.update(bytes_of(part))
    return found.hexdigest()


# --- the manifold -------------------------------------------------------------------------------------------


def on_manifold(model: nn.Module, layers: Sequence[TruncatedLayer]) -> nn.Module:
    """Return a copy of a truncated model that holds the same kernels in factors of the truncated ranks.

    One cut is held as two factors, nested cuts as an MPS or a Tucker network whose other bonds are full. Cuts
    that no format has together are a ``ValueError``.
    """
    rules = []
    for layer in _truncated(layers):
        format, ranks = _holder(layer)
        rules.append(Rule(pattern=exactly(layer.name), format=format, rank=FixedRank(ranks)))
    if not rules:
        raise ValueError("nothing was truncated: all ranks are full")
    held = {rule.pattern for rule in rules}
    others = [exactly(layer.name) for layer in find_layers(model)]
    spec = Spec(
        default=Settings(),
        rules=tuple(rules),
        keep_dense=tuple(name for name in others if name not in held),
        include=("depthwise", "subclasses"),
        allow_larger=True,
    )
    made = compress(model, spec)
    del made.tncompress_plan
    for layer in _truncated(layers):
        wanted: Any = model.get_submodule(layer.name)
        got: Any = made.get_submodule(layer.name)
        kernel = wanted.weight.detach().double()
        gap = float((got.weight.detach().double() - kernel).norm())
        assert gap <= EXACT * torch.finfo(wanted.weight.dtype).eps * float(kernel.norm())
    return made


def factored_params(layers: Iterable[TruncatedLayer]) -> tuple[int, int] | None:
    """Return how many parameters the kernels take on the manifold, and dense; None where no format holds one.

    A kernel whose ranks are all full stays dense.
    """
    held = dense = 0
    for layer in layers:
        size = layer.groups * math.prod(layer.shape)
        dense += size
        if not _bonds(layer):
            held += size
            continue
        try:
            format, ranks = _holder(layer)
        except ValueError:
            return None
        held += format.num_params(layer.shape, ranks, layer.groups)
    return held, dense


def _holder(layer: TruncatedLayer) -> tuple[Format, Ranks]:
    """Return the format with the fewest parameters that has all truncated cuts as bonds, and its ranks."""
    shape, bonds = layer.shape, _bonds(layer)
    found: list[tuple[int, int, Format, Ranks]] = []
    for format in _formats(layer):
        ranks = _ranks_in(format, shape, bonds)
        if ranks is not None:
            found.append((format.num_params(shape, ranks), len(found), format, ranks))
    if not found:
        cuts = ", ".join(f"'{cut.cut}'" for cut in layer.cuts)
        raise ValueError(f"no format holds the cuts {cuts} together: they cross")
    return min(found)[2:]


def _formats(layer: TruncatedLayer) -> list[Format]:
    """Return the formats that may hold the cuts of a layer, the simplest first."""
    names = legs_of(len(layer.shape))
    orders = [" ".join(order) for order in permutations(names)]
    cuts = [cut.cut for cut in layer.cuts if cut.asked < cut.full]
    return [*map(SVD, cuts), Tucker(), Tucker("all"), *map(MPS, orders)]


def _bonds(layer: TruncatedLayer) -> dict[tuple[int, ...], int]:
    """Return the rank of each cut that was truncated, by what it separates."""
    bonds: dict[tuple[int, ...], int] = {}
    for cut in layer.cuts:
        if cut.asked < cut.full:
            where = partition(Cut.parse(cut.cut), layer.shape)
            bonds[where] = min(cut.rank, bonds.get(where, cut.rank))
    return bonds


def _ranks_in(format: Format, shape: Ranks, bonds: Mapping[tuple[int, ...], int]) -> Ranks | None:
    """Return the ranks with which ``format`` holds just these cuts, other bonds full; None if it can't."""
    places = _places(format, shape)
    if not set(bonds) <= set(places):
        return None
    top = format.max_ranks(shape)
    ranks = tuple(max(1, bonds.get(place, full)) for place, full in zip(places, top, strict=True))
    return format.feasible(shape, ranks)


def _places(format: Format, shape: Ranks) -> list[tuple[int, ...]]:
    """Return what each bond of ``format`` separates, in the order of its ranks."""
    if isinstance(format, Tucker):
        sides = [{mode} for mode in format.modes(shape)]
    else:
        assert isinstance(format, ChainFormat)
        groups = format.groups(shape)
        sides = [{mode for group in groups[:k] for mode in group} for k in range(1, len(groups))]
    names = legs_of(len(shape))
    cuts = []
    for side in sides:
        left = tuple(name for mode, name in enumerate(names) if mode in side)
        right = tuple(name for mode, name in enumerate(names) if mode not in side)
        cuts.append(Cut(left, right))
    return [partition(cut, shape) for cut in cuts]


def _truncated(layers: Iterable[TruncatedLayer]) -> list[TruncatedLayer]:
    return [layer for layer in layers if _bonds(layer)]


def beyond(model: nn.Module, layers: Iterable[TruncatedLayer]) -> float | None:
    """Return the largest relative norm of a kernel of ``model`` beyond the ranks that ``layers`` have."""
    found = []
    modules = {layer.name: layer for layer in find_layers(model)}
    for layer in _truncated(layers):
        own = modules[layer.name]
        kernels: Tensor = own.geometry.kernels(own.module.weight.detach())
        for cut in layer.cuts:
            if cut.asked < cut.full:
                spectra = [spectrum(kernel, Cut.parse(cut.cut)) for kernel in kernels]
                joint = torch.stack(spectra).square().sum(0).sqrt()
                found.append(rel_error(joint, cut.rank))
    return max(found, default=None)
