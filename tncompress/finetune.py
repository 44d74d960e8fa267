"""Training: of the dense model, and of a compressed one back to the accuracy that truncation took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from tncompress.layers import TNConv
from tncompress.measure import device_of, evaluate, recovery
from tncompress.running import copy_model, kept_modes
from tncompress.spec import explain
from tncompress.tables import percent, progress_bar, render

if TYPE_CHECKING:
    from rich.table import Table


class FinetuneConfig(BaseModel):
    """How to train: SGD with Nesterov momentum, a linear warm-up, then a cosine to zero.

    The loss is cross-entropy, plus ``distill`` times the KL divergence to the teacher's softened outputs
    (Hinton et al. 2015) where there is a teacher. Weight decay leaves factors, biases and BatchNorm alone:
    on factors it would penalise a gauge, not the kernel. ``mixed_precision`` ``auto`` is bf16 on CUDA
    devices that have it, and off elsewhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(3, ge=1)
    lr: float = Field(0.02, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    distill: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    clip_norm: float | None = Field(5.0, gt=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    seed: int = 0

    @classmethod
    def parse(cls, value: FinetuneConfig | Mapping[str, Any] | None) -> FinetuneConfig:
        """Return the config that ``value`` is or describes; None is the default."""
        if isinstance(value, FinetuneConfig):
            return value
        try:
            return cls.model_validate(dict(value or {}))
        except ValidationError as error:
            raise ValueError(f"config: {explain(error, cls)}") from None


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss, accuracy after it (None without a validation loader), wall time."""

    loss: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class History:
    """What fine-tuning did. ``model`` is the tuned copy, ``control`` the dense model trained as long.

    Extra epochs help a dense model too: a recovery means something beside the control only.
    """

    model: nn.Module
    epochs: tuple[Epoch, ...]
    config: FinetuneConfig
    accuracy_start: float | None = None
    accuracy_dense: float | None = None
    control: tuple[Epoch, ...] = field(default=())

    @property
    def accuracy(self) -> float | None:
        """The accuracy after the last epoch."""
        return self.epochs[-1].accuracy

    @property
    def accuracy_control(self) -> float | None:
        """The accuracy of the dense control after as many epochs."""
        return self.control[-1].accuracy if self.control else None

    @property
    def recovery(self) -> float | None:
        """(accuracy - start) / (dense - start): the part of the lost accuracy that is back."""
        return self._recovery(self.accuracy_dense)

    @property
    def recovery_of_control(self) -> float | None:
        """The same against the control in place of the dense model."""
        return self._recovery(self.accuracy_control)

    def _recovery(self, reference: float | None) -> float | None:
        if self.accuracy is None or self.accuracy_start is None or reference is None:
            return None
        return recovery(self.accuracy, self.accuracy_start, reference)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain values."""
        return {
            "config": self.config.model_dump(),
            "accuracy_dense": self.accuracy_dense,
            "accuracy_start": self.accuracy_start,
            "accuracy": self.accuracy,
            "accuracy_control": self.accuracy_control,
            "recovery": self.recovery,
            "recovery_of_control": self.recovery_of_control,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "control": [asdict(epoch) for epoch in self.control],
        }

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"accuracy {percent(self.accuracy_start)} → {percent(self.accuracy)}"
        dense = f"dense: {percent(self.accuracy_dense)}"
        if self.recovery is not None:
            dense += f", {percent(self.recovery, 0)} of the loss is back"
        table = Table(title=title, title_justify="left", caption=dense, caption_justify="left")
        for column in ("epoch", "loss", "accuracy", "seconds", "dense control"):
            table.add_column(column, justify="right")
        for i, epoch in enumerate(self.epochs):
            control = percent(self.control[i].accuracy) if i < len(self.control) else ""
            cells = f"{epoch.loss:.4f}", percent(epoch.accuracy), f"{epoch.seconds:.1f}", control
            table.add_row(str(i + 1), *cells)
        return table


def finetune(
    small: nn.Module,
    train_loader: Iterable[Any],
    config: FinetuneConfig | Mapping[str, Any] | None = None,
    *,
    teacher: nn.Module | None = None,
    val_loader: Iterable[Any] | None = None,
    control: bool | tuple[Epoch, ...] = True,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> History:
    """Return the history of training a copy of ``small``; its ``model`` is the tuned copy, on the CPU or GPU.

    ``teacher``, the dense model, adds distillation, and with ``control`` a copy of it is trained in the same
    way for as many epochs without one (or the epochs of an earlier control are taken over). ``val_loader``
    gives accuracies and the recovery. The loaders yield ``(inputs, labels)``. ``device`` defaults to the
    model's own; ``small``, ``teacher`` and the global random state are not changed.
    """
    config = FinetuneConfig.parse(config)
    device = torch.device(device) if device is not None else device_of(small)
    tuned = copy_model(small).to(device)
    teacher = copy_model(teacher).to(device) if teacher is not None else None
    with torch.random.fork_rng():  # a DataLoader draws from the global generator at each pass
        start = evaluate(tuned, val_loader).accuracy if val_loader is not None else None
        both = val_loader is not None and teacher is not None
        dense = evaluate(teacher, val_loader).accuracy if both else None  # type: ignore[arg-type]
    epochs = train_(tuned, train_loader, config, teacher=teacher, val_loader=val_loader, progress=progress)
    controls = control if isinstance(control, tuple) else ()
    if control is True and teacher is not None:
        label = "dense control"
        controls = train_(
            teacher, train_loader, config, val_loader=val_loader, progress=progress, label=label
        )
    return History(tuned, epochs, config, start, dense, controls)


def train_(
    model: nn.Module,
    train_loader: Iterable[Any],
    config: FinetuneConfig | Mapping[str, Any] | None = None,
    *,
    teacher: nn.Module | None = None,
    val_loader: Iterable[Any] | None = None,
    progress: bool = False,
    label: str = "training",
) -> tuple[Epoch, ...]:
    """Train ``model`` in place, dense or compressed, and return its epochs; it ends in eval mode.

    Dropout follows ``config.seed``, and the global random state is left as it was. A loss that is not
    finite stops with a ``FloatingPointError``.
    """
    config = FinetuneConfig.parse(config)
    steps = _batches(train_loader) * config.epochs
    epochs = []
    frozen = kept_modes(teacher) if teacher is not None else nullcontext()
    with frozen, torch.random.fork_rng(), progress_bar(steps, show=progress) as advance:
        trainer = _Trainer(model, teacher, config, steps)
        torch.manual_seed(config.seed)
        for number in range(1, config.epochs + 1):
            model.train()
            started, total, seen = time.perf_counter(), 0.0, 0
            for x, y in train_loader:
                loss = trainer.step(x, y)
                if not math.isfinite(loss):
                    hint = f"try a learning rate below {config.lr}"
                    raise FloatingPointError(f"{label}: the loss became {loss} in epoch {number}: {hint}")
                total, seen = total + loss * len(y), seen + len(y)
                advance(f"{label} {number}/{config.epochs}, loss {total / seen:.3f}")
            accuracy = evaluate(model, val_loader).accuracy if val_loader is not None else None
            epochs.append(Epoch(total / seen, accuracy, time.perf_counter() - started))
    model.eval()
    return tuple(epochs)


class _Trainer:
    """A model with its optimizer, schedule and precision; :meth:`step` learns from one batch."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, config: FinetuneConfig, steps: int
    ) -> None:
        self.model, self.config, self.device = model, config, device_of(model)
        self.teacher = teacher.eval() if teacher is not None else None
        self.optimizer = torch.optim.SGD(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, _warmup_cosine(steps, config.warmup)
        )
        self.autocast, self.scaler = _precision(self.device, config)

    def step(self, x: Tensor, y: Tensor) -> float:
        x, y = x.to(self.device), y.to(self.device)
        with self.autocast:
            loss = self.loss(x, y)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return loss.item()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(x).float()
        loss = F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)
        if self.teacher is None or not self.config.distill:
            return loss
        with torch.no_grad():
            target = self.teacher(x).float()
        t = self.config.temperature
        soft = F.kl_div(
            F.log_softmax(logits / t, 1), F.log_softmax(target / t, 1), reduction="batchmean", log_target=True
        )
        return loss + self.config.distill * t * t * soft


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: those that decay (dense weights), and the others."""
    factors = {id(f) for m in model.modules() if isinstance(m, TNConv) for f in m.factors}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 and id(parameter) not in factors
            (decayed if plain else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Return the factor on the learning rate at each step: linear up to 1, then a cosine down to 0."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return factor


def _precision(
    device: torch.device, config: FinetuneConfig
) -> tuple[AbstractContextManager[Any], torch.amp.GradScaler]:
    chosen = config.mixed_precision
    if chosen == "auto":
        chosen = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(chosen)
    scaler = torch.amp.GradScaler(device.type, enabled=chosen == "fp16")
    return (torch.autocast(device.type, dtype) if dtype else nullcontext()), scaler


def _batches(loader: Iterable[Any]) -> int:
    try:
        count = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"wanted a loader with a length, such as a DataLoader, got {type(loader).__name__}"
        ) from None
    if count == 0:
        raise ValueError("wanted labelled batches to train on, got an empty loader")
    return count
