"""Truncation sweeps: accuracy over norm loss, for sets of layers, cuts and ranks; and training afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tncompress.cutting import TruncatedLayer
from tncompress.discovery import refuse_wrapped
from tncompress.finetune import FinetuneConfig
from tncompress.jobs import Run
from tncompress.measure import device_of
from tncompress.outputs import Images
from tncompress.retraining import Training, factored_params
from tncompress.rowcache import RowCache, sole_writer
from tncompress.sweep_bench import Bench, Unit, layers_from
from tncompress.sweep_points import LeftOut, Point, content, make_grid
from tncompress.sweep_rows import Figures, Sweep, SweepRow
from tncompress.tables import progress_bar
from tncompress.workers import open_workers

HELD = ("dense", "manifold")


def sweep(
    model: nn.Module,
    test_loader: Iterable[Any],
    *,
    layers: Any = "each",
    cuts: Any = "all",
    fractions: Sequence[float] | None = None,
    amounts: Any = (),
    crossing: Literal["measure", "alternate"] = "measure",
    images: Iterable[Any] | None = None,
    retrain: FinetuneConfig | Mapping[str, Any] | None = None,
    train_loader: Any = None,
    held: Sequence[str] = HELD,
    control: bool = True,
    cache: str | Path | None = None,
    workers: int | None = None,
    threads: int | None = None,
    address: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Sweep:
    """Return what truncating the kernels of ``model`` does to its accuracy, over a grid of truncations.

    ``layers`` are ``"each"`` convolution by itself, ``"first 2"``, ``"last 2"`` (in the order of
    registration), ``"all"``, a name or pattern, a tuple of names that are truncated together, or a list of
    these. ``cuts`` are ``"all"``, each by itself, or a sequence whose entries are a cut such as
    ``"out kw|in kh"`` or a tuple of cuts that are carried out one after the other. ``fractions`` of the full
    rank, rounded up, say how far (by default six), and ``amounts`` any other policies that
    :func:`truncate` takes, as ``crossing`` is taken there.

    Every row has the achieved ranks and the norm loss, and accuracy and cross-entropy on the labelled
    ``test_loader``, which is held in memory; with unlabelled ``images``, batches of them, also after
    BatchNorm re-estimation, as the dense network has. Truncations that come to the same kernels are measured
    once, those at full ranks not at all.

    With ``retrain``, a :class:`FinetuneConfig` or a mapping (whose seed is ``seed`` if it has none), and
    ``train_loader`` every truncated network is trained again: ``held`` names ``"dense"``, all weights
    free, and ``"manifold"``, the same kernels in factors of the achieved ranks; ``control`` is the dense
    network trained alike.

    ``cache`` is a file that keeps each result as soon as it is there. It is found again by the content of
    model, images and settings, so that a run that was killed goes on there, and a finished one is
    read; results of another model or other images are not taken. ``workers``, ``threads`` and ``address``
    are those of :func:`tncompress.workers.open_workers`: processes of this machine, or a Ray cluster. Results
    do not depend on them if the number of threads is the same. The model is not touched.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    >>> batches = [(torch.randn(6, 3, 5, 5), torch.arange(6) % 4)]
    >>> found = sweep(model, batches, cuts=["out|rest"], fractions=[0.25, 0.5])
    >>> [(row.label, row.ranks) for row in found.rows]
    [('0', ((2,),)), ('0', ((4,),)), ('2', ((1,),)), ('2', ((2,),))]
    """
    refuse_wrapped(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, where it puts nothing out: load its weights")
    points, left_out = make_grid(model, layers, cuts, fractions, amounts)
    config = _config(retrain, train_loader, seed)
    kinds = _kinds(held) if config is not None else ()
    device = device_of(model)
    drift = Images.gather(images, device) if images is not None else None
    bench = Bench.of(model, Images.gather(test_loader, device), drift, train_loader, config, crossing)
    with sole_writer(cache):
        kept = _Kept(bench, RowCache(cache))
        with open_workers(bench, workers, threads=threads, address=address) as run:
            kept.measure(points, kinds, control and config is not None, run, progress)
    return kept.sweep(points, kinds, control and config is not None, left_out)


def _config(retrain: Any, train_loader: Any, seed: int) -> FinetuneConfig | None:
    if (retrain is None) != (train_loader is None):
        given, missing = ("retrain", "train_loader") if train_loader is None else ("train_loader", "retrain")
        raise ValueError(f"training again takes both retrain and train_loader, got {given} without {missing}")
    if retrain is None:
        return None
    return FinetuneConfig.parse({"seed": seed, **retrain} if isinstance(retrain, Mapping) else retrain)


def _kinds(held: Sequence[str]) -> tuple[Literal["dense", "manifold"], ...]:
    asked = [held] if isinstance(held, str) else list(held)
    if unknown := [kind for kind in asked if kind not in HELD]:
        raise ValueError(f"held names dense, manifold or both, got {unknown[0]!r}")
    return tuple(kind for kind in HELD if kind in asked)  # type: ignore[misc]


@dataclass
class _Kept:
    """The results that there are, in the cache, and the work that is left."""

    bench: Bench
    cache: RowCache
    layers: dict[Point, tuple[TruncatedLayer, ...]] = field(default_factory=dict)

    def measure(
        self, points: Sequence[Point], kinds: Sequence[Any], control: bool, run: Run, progress: bool
    ) -> None:
        """Carry out what no result is there of."""
        ranks = [Unit("ranks", point) for point in points]
        self._fill(ranks, run, progress)
        self.layers = {point: layers_from(self._ranks(point)["layers"]) for point in points}
        units = [Unit("figures", None), *(Unit("figures", point) for point in points)]
        units += [Unit("dense", None)] if control else []
        for kind in kinds:
            units += [Unit(kind, point) for point in points if content(self.layers[point])]
        self._fill(units, run, progress)

    def sweep(
        self, points: Sequence[Point], kinds: Sequence[Any], control: bool, left_out: Sequence[LeftOut]
    ) -> Sweep:
        """Return the rows of all points in their order."""
        dense = self._found(Unit("figures", None))
        if dense["before"] is None:
            raise ValueError("the dense model's output on the test images holds NaN or infinity")
        bench = self.bench
        return Sweep(
            tuple(self._row(point, kinds) for point in points),
            Figures(**dense["before"]),
            _figures(dense["after"]),
            len(bench.test),
            len(bench.drift) if bench.drift is not None else 0,
            bench.digest,
            _training(self._found(Unit("dense", None))) if control else None,
            bench.config.model_dump(mode="json") if bench.config is not None else None,
            tuple(left_out),
        )

    def _row(self, point: Point, kinds: Sequence[Any]) -> SweepRow:
        layers, unit = self.layers[point], Unit("figures", point)
        figures, sizes = self._found(unit), factored_params(layers)
        trained = {}
        for kind in kinds:
            trained[kind] = Training(reason="nothing was truncated: all ranks are full")
            if content(layers):
                trained[kind] = _training(self._found(Unit(kind, point)))
        return SweepRow(
            point.label,
            point.cuts,
            point.amount,
            layers,
            self._ranks(point)["rel_error"],
            sizes[0] / sizes[1] if sizes is not None else None,
            _figures(figures["before"]),
            _figures(figures["after"]),
            self._key(unit),
            trained.get("dense"),
            trained.get("manifold"),
        )

    # --- the cache

    def _fill(self, units: Sequence[Unit], run: Run, progress: bool) -> None:
        missing = {self._key(unit): unit for unit in reversed(units) if not self._is_there(unit)}
        ordered = [unit for unit in units if missing.get(self._key(unit)) is unit]
        with progress_bar(len(ordered), show=progress) as advance:
            for unit, found in run(ordered) if ordered else ():
                self.cache.add(self._key(unit), {"signal": self.bench.signal, "found": found})
                advance(str(unit))

    def _key(self, unit: Unit) -> str:
        return self.bench.key(unit, self.layers.get(unit.point, ()) if unit.point is not None else ())

    def _is_there(self, unit: Unit) -> bool:
        row = self.cache.get(self._key(unit))
        return row is not None and math.isclose(row["signal"], self.bench.signal, rel_tol=1e-3)

    def _found(self, unit: Unit) -> dict[str, Any]:
        row = self.cache.get(self._key(unit))
        assert row is not None
        return row["found"]

    def _ranks(self, point: Point) -> dict[str, Any]:
        return self._found(Unit("ranks", point))


def _figures(found: Mapping[str, float] | None) -> Figures | None:
    return Figures(**found) if found is not None else None


def _training(found: Mapping[str, Any]) -> Training:
    """Return the training that a unit gave, also after a trip through JSON."""
    return Training(
        tuple(found["losses"]), tuple(found["accuracies"]), found["beyond"], found["formats"], found["reason"]
    )
