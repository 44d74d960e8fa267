"""What a sweep measures, one unit after another, and by which key each is known."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tncompress.batchnorm import reestimate_batchnorm_
from tncompress.cutting import AchievedCut, TruncatedLayer, Truncation, truncate
from tncompress.discovery import digest_of_model
from tncompress.finetune import FinetuneConfig
from tncompress.measure import evaluate
from tncompress.outputs import Images
from tncompress.retraining import digest_of_loader, train_again
from tncompress.running import copy_model, eval_mode, runs_channels_last
from tncompress.sweep_points import Point, content

_KEYS = 1
"""The version of what the keys of a cache are made from and of what its rows hold."""

Kind = Literal["ranks", "figures", "dense", "manifold"]


@dataclass(frozen=True)
class Unit:
    """One piece of work: the achieved ranks of a point, its figures, or its training.

    Without a point it is of the dense network. ``dense`` trains all weights freely: of no point, that is the
    control.
    """

    kind: Kind
    point: Point | None

    def __str__(self) -> str:
        return f"{self.kind} of {self.point or 'the dense network'}"


@dataclass(frozen=True)
class Bench:
    """A dense model in eval mode, and the images that it is measured and trained on, which no unit changes.

    ``drift`` are the images for BatchNorm statistics. It can be sent to another process.
    """

    model: nn.Module
    test: Images
    drift: Images | None
    train_loader: Any
    config: FinetuneConfig | None
    crossing: Literal["measure", "alternate"]
    channels_last: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        test: Images,
        drift: Images | None,
        train_loader: Any,
        config: FinetuneConfig | None,
        crossing: Literal["measure", "alternate"],
    ) -> Bench:
        """Return the bench; a model that does not put out a number for each class is a ``ValueError``."""
        dense = copy_model(model).eval()
        _check(dense, test)
        if not any(isinstance(m, _BatchNorm) and m.track_running_stats for m in dense.modules()):
            drift = None
        fast = runs_channels_last(dense, test.inputs[0])
        if fast:
            test, drift = _laid(test), _laid(drift) if drift is not None else None
        return cls(dense, test, drift, train_loader, config, crossing, fast)

    # --- the work

    def run(self, unit: Unit) -> dict[str, Any]:
        """Return what one unit gives, as plain values."""
        if unit.point is None:
            model, layers = self.model, tuple[TruncatedLayer, ...]()
        else:
            made = self._truncated(unit.point)
            model, layers = made.model, made.layers
            if unit.kind == "ranks":
                return {"layers": [asdict(layer) for layer in layers], "rel_error": made.rel_error}
        if unit.kind == "figures":
            return self._figures(model)
        assert self.config is not None
        held = unit.kind == "manifold"
        return asdict(train_again(model, layers, self.train_loader, self.config, self._labelled(), held=held))

    def _truncated(self, point: Point) -> Truncation:
        return truncate(self.model, point.cuts, point.amount, layers=point.patterns, crossing=self.crossing)

    def _figures(self, model: nn.Module) -> dict[str, Any]:
        """Return accuracy and loss before and after BatchNorm re-estimation; None where not finite."""
        model = copy_model(model)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        found: dict[str, Any] = {"before": self._evaluated(model), "after": None}
        if self.drift is not None:
            reestimate_batchnorm_(model, self.drift.inputs)
            found["after"] = self._evaluated(model)
        return found

    def _evaluated(self, model: nn.Module) -> dict[str, float] | None:
        with torch.inference_mode():
            found = evaluate(model, self._labelled())
        return {"accuracy": found.accuracy, "loss": found.loss} if math.isfinite(found.loss) else None

    def _labelled(self) -> Iterable[tuple[Tensor, Tensor]]:
        assert self.test.labels is not None
        return list(zip(self.test.inputs, self.test.labels, strict=True))

    # --- the keys

    def key(self, unit: Unit, layers: Sequence[TruncatedLayer] = ()) -> str:
        """Return the key of a unit; ``layers`` are the achieved ranks of its point, if they are known."""
        about: list[Any] = [_KEYS, unit.kind, self._digests["model"]]
        if unit.kind == "ranks":
            assert unit.point is not None
            about += [*unit.point.about(), self._crossing(len(unit.point.cuts))]
        else:
            done = content(layers)
            about += [done, self._crossing(max(map(len, done.values()), default=0)), self._digests["test"]]
            about += [self._digests["drift"]] if unit.kind == "figures" else [self._digests["training"]]
        return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _crossing(self, cuts: int) -> str:
        return self.crossing if cuts > 1 else ""

    @cached_property
    def _digests(self) -> dict[str, Any]:
        found: dict[str, Any] = {"model": digest_of_model(self.model), "test": self.test.digest()}
        found["drift"] = found["training"] = None
        if self.drift is not None:  # layers behind a BatchNorm see what it makes of the batch at hand
            found["drift"] = [self.drift.digest(), [len(x) for x in self.drift.inputs]]
        if self.config is not None:
            seen = digest_of_loader(self.train_loader, self.config.seed)
            found["training"] = [seen, self.config.model_dump(mode="json")]
        return found

    @property
    def digest(self) -> str:
        """The fingerprint of the dense model."""
        return self._digests["model"]

    @cached_property
    def signal(self) -> float:
        """The squared norm of the dense outputs on the first images: rows of changed code have another."""
        return float(_outputs(self.model, self.test.inputs[0]).double().square().sum())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is for keys only."""
        return {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__}


def layers_from(fields: Iterable[Mapping[str, Any]]) -> tuple[TruncatedLayer, ...]:
    """Return the achieved ranks that a unit of the kind ``ranks`` gave, also after a trip through JSON."""
    return tuple(
        TruncatedLayer(
            layer["name"],
            tuple(layer["shape"]),
            layer["groups"],
            tuple(AchievedCut(**cut) for cut in layer["cuts"]),
            layer["rel_error"],
        )
        for layer in fields
    )


def _check(model: nn.Module, test: Images) -> None:
    if test.labels is None:
        raise ValueError("wanted labelled test batches (inputs, labels), got inputs alone")
    x = test.inputs[0]
    try:
        logits = _outputs(model, x)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the model can't be run on batches of shape {tuple(x.shape)}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        came = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"wanted a model that puts out (images, classes), got {came}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the dense model's output on the test images holds NaN or infinity")
    labels = torch.cat(test.labels)
    least, top = int(labels.min()), int(labels.max())
    if least < 0 or top >= logits.shape[1]:
        raise ValueError(f"the model has {logits.shape[1]} classes, got labels from {least} to {top}")


def _outputs(model: nn.Module, x: Tensor) -> Any:
    with eval_mode(model):
        return model(x)


def _laid(images: Images) -> Images:
    """Return the images with channels last, where they have channels."""
    return Images(tuple(x if x.ndim != 4 else _channels_last(x) for x in images.inputs), images.labels)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
