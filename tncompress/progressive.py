"""Progressive compression: truncate a little, repair, tune, and again, down to the ranks asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tncompress.batches import count_batches
from tncompress.calibrate import Calibration, calibrate
from tncompress.checkpoint import Checkpoint, Saved, remove_checkpoints
from tncompress.discovery import digest_of_model, find_layers
from tncompress.finetune import finetune, launched, train_
from tncompress.formats import Format
from tncompress.formats.base import Ranks, Shape
from tncompress.history import Epoch
from tncompress.layers import TNConv
from tncompress.measure import device_of, evaluate
from tncompress.plan import Plan
from tncompress.planner import make_plan
from tncompress.policies import FixedRank
from tncompress.recipe import KEEPING, FinetuneConfig
from tncompress.repair import repair
from tncompress.retruncation import retruncate
from tncompress.rounds import Progressive, Round
from tncompress.running import copy_model
from tncompress.sensitivity import quick_sensitivity
from tncompress.spec import Rule, Spec
from tncompress.surgery import compress
from tncompress.swap import adopt, replace_module_
from tncompress.sweep_points import exactly


def progressive(
    dense: nn.Module,
    spec: Spec | Plan | Mapping[str, Any] | str | Path,
    train_loader: Iterable[Any],
    config: FinetuneConfig | Mapping[str, Any] | None = None,
    *,
    rounds: int = 3,
    between: FinetuneConfig | Mapping[str, Any] | None = None,
    images: Iterable[Any] | None = None,
    val_loader: Iterable[Any] | None = None,
    control: bool = True,
    example_inputs: Any = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Progressive:
    """Return what comes of compressing ``dense`` to what ``spec`` asks for in several ``rounds``.

    Formats and last ranks are those that :func:`make_plan` chooses, with unlabelled batches of ``images`` as
    its calibration. In every round each layer's parameters are divided by the same factor, between its full
    ranks and its last ones: the first round compresses the dense kernels, those after it cut the bonds of
    the tuned factors (:func:`retruncate`). Each is repaired on ``images``, if there are some, and tuned with
    ``dense`` as its teacher: by ``config`` in the last round, by ``between`` in those before it, which is
    ``config`` for one epoch unless something else is given. The ``control`` is the dense model trained for as
    many epochs as all rounds together.

    With a folder ``checkpoint`` a run that was killed goes on where it was when the same call is made again,
    as with :func:`finetune`; a folder of another run is refused. ``dense`` is not changed.
    """
    if rounds < 1:
        raise ValueError(f"rounds is a number from 1 on, got {rounds}")
    if launched():
        raise ValueError("progressive runs in one process: start it without torchrun or accelerate launch")
    config = FinetuneConfig.parse(config)
    short = {"epochs": 1, "local_epochs": min(config.local_epochs, 1)}
    middle = config.model_copy(update=short) if between is None else FinetuneConfig.parse(between)
    asked = spec if isinstance(spec, Plan) else Spec.parse(spec)
    teacher = copy_model(dense).to(device if device is not None else device_of(dense)).eval()
    run = {
        "model": digest_of_model(teacher),
        "spec": asked.to_dict(),
        "config": config.model_dump(mode="json", exclude=set(KEEPING)),
        "between": middle.model_dump(mode="json", exclude=set(KEEPING)),
        "rounds": {"rounds": rounds},
        "data": {"batches": count_batches(train_loader), "images": images is not None},
    }
    folder = Path(checkpoint).expanduser() if checkpoint is not None else None
    work = _Work(teacher, train_loader, val_loader, images, folder, run, progress)
    if not work.read():
        work.begin(asked, example_inputs)
    while not (work.tuned and len(work.rounds) == rounds):
        if work.tuned:
            work.truncate((len(work.rounds) + 1) / rounds)
        work.tune(config if len(work.rounds) == rounds else middle)
    length = sum(len(each.epochs) for each in work.rounds)
    beside = work.control(config, length) if control and length else ()
    cast(Any, work.model).tncompress_plan = replace(work.plan, fits={}, shifts={})
    return Progressive(work.model, tuple(work.rounds), config, work.accuracy_dense, beside)


def ranks_between(format: Format, shape: Shape, groups: int, last: Ranks, part: float) -> Ranks:
    """Return ranks on the way from the full ones to ``last``, at the same ``part`` of the way for each.

    Factors then hold at most ``dense ** (1 - part) * held ** part`` numbers, with ``held`` those at ``last``,
    which is what part 1 gives.
    """
    full, held = format.max_ranks(shape), format.num_params(shape, last, groups)
    most = (groups * math.prod(shape)) ** (1 - part) * held**part

    def at(place: float) -> Ranks:
        pairs = zip(full, last, strict=True)
        found = tuple(max(low, round(top ** (1 - place) * low**place)) for top, low in pairs)
        return format.feasible(shape, found)

    first, end = 0.0, 1.0
    while end - first > 1e-6:
        middle = (first + end) / 2
        first, end = (
            (first, middle) if format.num_params(shape, at(middle), groups) <= most else (middle, end)
        )
    return at(end) if part < 1 else last


class _Work:
    """The rounds so far, the model after what was done last, and the checkpoint of both.

    ``tuned`` says whether the last round came to its end, or there was none yet.
    """

    def __init__(
        self,
        dense: nn.Module,
        loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        images: Iterable[Any] | None,
        folder: Path | None,
        run: Mapping[str, Any],
        progress: bool,
    ) -> None:
        self.dense, self.model, self.loader, self.val_loader = dense, dense, loader, val_loader
        self.images, self.folder, self.progress = images, folder, progress
        if folder is not None and folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file: choose another checkpoint folder")
        self.place = Checkpoint(folder / "rounds", run) if folder is not None else None
        self.rounds: list[Round] = []
        self.tuned = True
        self.plan: Plan
        self.calibration: Calibration | None = None
        self.accuracy_dense: float | None = None

    def begin(self, spec: Spec | Plan, example_inputs: Any) -> None:
        """Choose formats and last ranks."""
        self.plan = spec if isinstance(spec, Plan) else self._planned(spec, example_inputs)
        if not self.plan.compressed:
            skips = "; ".join(f"{skip.name}: {skip.reason}" for skip in self.plan.skipped[:3])
            raise ValueError(f"the spec compresses no layer ({skips or 'the model has none'})")
        self.accuracy_dense = self._accuracy(self.dense)
        self._write()

    def _planned(self, spec: Spec, example_inputs: Any) -> Plan:
        found, progress = None, self.progress
        if self.images is not None:
            self._calibrate(spec)
            if spec.budget is not None:
                found = quick_sensitivity(
                    self.dense,
                    self.images,
                    formats=spec.formats,
                    calibration=self.calibration,
                    keep_dense=spec.keep_dense,
                    include=spec.include,
                    progress=progress,
                )
        return make_plan(
            self.dense,
            spec,
            calibration=self.calibration,
            sensitivity=found,
            example_inputs=example_inputs,
            progress=progress,
        )

    def _calibrate(self, spec: Spec) -> None:
        if self.images is not None and self.calibration is None:
            self.calibration = calibrate(
                self.dense, self.images, include=spec.include, progress=self.progress
            )

    def truncate(self, part: float) -> None:
        """Begin a round: truncate the model as far as this ``part`` of the way, and repair it."""
        ranks = {}
        for layer in self.plan.compressed:
            shape, groups = layer.geometry.kernel_shape, layer.geometry.groups
            ranks[layer.name] = ranks_between(layer.format, shape, groups, layer.ranks, part)
        if self.rounds:
            policies = {exactly(name): FixedRank(own) for name, own in ranks.items()}
            made = retruncate(self.model, policies, progress=self.progress)
            model, error = made.model, made.rel_error
        else:
            model, error = self._first(ranks)
        truncated, repaired = self._accuracy(model), None
        if self.images is not None:
            model = repair(model, self.dense, self.images, progress=self.progress)
            repaired = self._accuracy(model)
        self.model, self.tuned = model, False
        self.rounds.append(Round(self._params(), error, truncated, repaired))
        self._write()

    def _first(self, ranks: Mapping[str, Ranks]) -> tuple[nn.Module, float]:
        """Return the dense model compressed to these ranks, and the error of all kernels together."""
        self._calibrate(self.plan.spec)
        rules = tuple(
            Rule(pattern=exactly(layer.name), format=layer.format, rank=FixedRank(ranks[layer.name]))
            for layer in self.plan.compressed
        )
        include = self.plan.spec.include
        others = tuple(exactly(own.name) for own in find_layers(self.dense, include) if own.name not in ranks)
        spec = Spec(rules=rules, keep_dense=others, include=include, allow_larger=True)
        model = compress(self.dense, spec, calibration=self.calibration, progress=self.progress)
        lost = total = 0.0
        for layer in find_layers(self.dense, include):
            if layer.name in ranks:
                squares = float(layer.weight().double().square().sum())
                made: Any = model.get_submodule(layer.name)
                lost, total = lost + made.rel_error**2 * squares, total + squares
        return model, math.sqrt(lost / total) if total > 0 else 0.0

    def tune(self, config: FinetuneConfig) -> None:
        """End a round: fine-tune the model."""
        folder = self.folder / f"round-{len(self.rounds)}" if self.folder is not None else None
        history = finetune(
            self.model,
            self.loader,
            config,
            teacher=self.dense,
            val_loader=self.val_loader,
            control=False,
            device=device_of(self.dense),
            progress=self.progress,
            checkpoint=folder,
        )
        self.model, self.tuned = history.model, True
        self.rounds[-1] = replace(self.rounds[-1], epochs=history.epochs, local=history.local)
        self._write()
        if folder is not None:
            remove_checkpoints(folder)

    def control(self, config: FinetuneConfig, epochs: int) -> tuple[Epoch, ...]:
        """Return the epochs of the dense model trained further for so many."""
        alone = config.model_copy(update={"epochs": epochs, "local_epochs": 0, "target_recovery": None})
        return train_(
            copy_model(self.dense),
            self.loader,
            alone,
            val_loader=self.val_loader,
            progress=self.progress,
            label="dense control",
            checkpoint=self.folder / "control" if self.folder is not None else None,
        )

    def _accuracy(self, model: nn.Module) -> float | None:
        return evaluate(model, self.val_loader).accuracy if self.val_loader is not None else None

    def _params(self) -> float:
        dense = sum(layer.geometry.num_weights for layer in self.plan.compressed)
        modules: list[Any] = [self.model.get_submodule(layer.name) for layer in self.plan.compressed]
        return sum(factor.numel() for module in modules for factor in module.factors) / dense

    # --- on disk

    def _write(self) -> None:
        if self.place is None:
            return
        layers = {}
        for layer in self.plan.compressed if self.rounds else ():
            module: Any = self.model.get_submodule(layer.name)
            layers[layer.name] = {"ranks": module.ranks, "rel_error": module.rel_error}
        progress = {
            "plan": self.plan.to_dict(),
            "layers": layers,
            "rounds": [asdict(each) for each in self.rounds],
            "tuned": self.tuned,
            "accuracy_dense": self.accuracy_dense,
        }
        self.place.write(Saved(progress, {"model": self.model.state_dict() if self.rounds else {}}))

    def read(self) -> bool:
        """Go to where the checkpoint was written; say whether there is one."""
        saved = self.place.read() if self.place is not None else None
        if saved is None:
            return False
        found = saved.progress
        self.plan, self.tuned = Plan.from_dict(found["plan"]), found["tuned"]
        self.rounds = [Round.from_dict(each) for each in found["rounds"]]
        self.accuracy_dense = found["accuracy_dense"]
        if self.rounds:
            self.model = self._rebuilt(found["layers"])
            self.model.load_state_dict(saved.state["model"])
        return True

    def _rebuilt(self, layers: Mapping[str, Any]) -> nn.Module:
        """Return a copy of the dense model with compressed layers of these ranks, without their values."""
        model, planned = copy_model(self.dense), {layer.name: layer for layer in self.plan.compressed}
        for layer in find_layers(model, self.plan.spec.include):
            if layer.name not in layers:
                continue
            about, weight, bias = layers[layer.name], layer.weight(), layer.module.bias
            format, geometry = planned[layer.name].format, layer.geometry
            shapes = format.factor_shapes(geometry.kernel_shape, tuple(about["ranks"]), geometry.groups)
            factors = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for shape in shapes]
            own = bias.detach().clone() if bias is not None else None
            new = TNConv(format, geometry, factors, own, rel_error=about["rel_error"])
            new.factors.requires_grad_(layer.requires_grad)
            if new.bias is not None:
                new.bias.requires_grad_(bias.requires_grad)
            for name in layer.names:
                replace_module_(model, name, adopt(new, layer.module))
        return model
