"""Training: of the dense model, and of a compressed one back to the accuracy that truncation took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tncompress.batches import count_batches
from tncompress.checkpoint import Checkpoint
from tncompress.discovery import digest_of_model
from tncompress.engine import accelerated, accuracy_of
from tncompress.history import Epoch, History
from tncompress.local import Crew, train_slices
from tncompress.measure import device_of
from tncompress.objectives import GlobalObjective
from tncompress.randomness import kept_randomness
from tncompress.recipe import KEEPING, FinetuneConfig, make_optimizer, make_schedule, parameter_groups
from tncompress.running import channels_last, copy_model, kept_modes
from tncompress.trainer import Trainer
from tncompress.watching import Position, Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Epoch", "FinetuneConfig", "History", "finetune", "parameter_groups", "train_"]


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
    checkpoint: str | Path | None = None,
    log_dir: str | Path | None = None,
    workers: int | None = None,
    threads: int | None = None,
    address: str | None = None,
) -> History:
    """Return the history of training a copy of ``small``; its ``model`` is the tuned copy, on the CPU or GPU.

    ``teacher``, the dense model, adds distillation, and with ``control`` a copy of it is trained in the
    same way for as many epochs without one (or the epochs of an earlier control are taken over).
    ``val_loader`` gives accuracies and the recovery. The loaders yield ``(inputs, labels)``; local epochs
    need no labels. ``device`` defaults to the model's own; ``small``, ``teacher`` and the global random
    state are not changed.

    With a folder ``checkpoint``, a run that was killed goes on where it was when the same call is made
    again, and ends with the same weights; after its end, the call returns what it returned. A folder of
    another run is refused. ``log_dir`` is where TensorBoard's files go. Started by ``torchrun`` or
    ``accelerate launch``, the processes share each batch, and all return the same. ``workers``, ``threads``
    and ``address`` share out the slices of local epochs: to processes of this machine, or to a Ray cluster,
    as in :func:`tncompress.workers.open_workers`; what is learned is the same, and a run may go on with
    another number of them.

    An empty loader, ``local_epochs`` without a teacher, and a model with nothing to train are a
    ``ValueError``; a loss that is not finite is a ``FloatingPointError``, which leaves the last checkpoint.

    >>> import torch, tncompress as tnc
    >>> dense = tnc.build_model("zoo:cnn4")
    >>> small = tnc.compress(dense, {"default": {"format": "svd", "rank": {"fixed": 8}}})
    >>> batches = [(torch.randn(8, 1, 28, 28), torch.arange(8))]
    >>> history = tnc.finetune(small, batches, {"epochs": 2}, teacher=dense, val_loader=batches)
    >>> len(history.epochs), len(history.control), 0 <= history.accuracy <= 1
    (2, 2, True)
    """
    config, crew = FinetuneConfig.parse(config), Crew(workers, threads, address)
    crew.check(config, launched=launched())
    count_batches(train_loader)
    if config.target_recovery is not None and (teacher is None or val_loader is None):
        raise ValueError("target_recovery needs a teacher and a val_loader, to know what was lost")
    where = device if device is not None else None if launched() else device_of(small)
    with ExitStack() as stack, accelerated(config, where) as accelerator, kept_randomness():
        stages = _Stages(accelerator, train_loader, config, checkpoint)
        tuned = copy_model(small).to(accelerator.device)
        teacher = copy_model(teacher).to(accelerator.device) if teacher is not None else None
        both = [tuned, teacher] if teacher is not None else [tuned]
        stack.enter_context(channels_last(*both, on=config.channels_last))
        start = accuracy_of(accelerator, tuned, val_loader) if val_loader is not None else None
        dense = None
        if val_loader is not None and teacher is not None:
            dense = accuracy_of(accelerator, teacher, val_loader)
        goal = config.target_recovery
        watch = Watch("", val_loader, start, dense, goal, progress, _tracker(accelerator, log_dir))
        local, done = Position(), Position()
        if config.local_epochs:
            local = stages.local(tuned, teacher, replace(watch, label="slices"), crew)
        if config.epochs and not local.reached:
            done = stages.whole(tuned, teacher, "tuned", replace(watch, label="tuning"))
        beside = control if isinstance(control, tuple) else ()
        if control is True and teacher is not None and done.epochs:
            watch = replace(watch, label="dense control", start=None, dense=None, target=None)
            beside = tuple(stages.whole(teacher, None, "control", watch, len(done.epochs)).epochs)
        reached = done.reached or local.reached
    return History(tuned, tuple(done.epochs), config, start, dense, beside, tuple(local.epochs), reached)


def train_(
    model: nn.Module,
    train_loader: Iterable[Any],
    config: FinetuneConfig | Mapping[str, Any] | None = None,
    *,
    teacher: nn.Module | None = None,
    val_loader: Iterable[Any] | None = None,
    progress: bool = False,
    label: str = "training",
    checkpoint: str | Path | None = None,
) -> tuple[Epoch, ...]:
    """Train ``model`` in place, dense or compressed, and return its epochs; it ends in eval mode.

    Dropout follows ``config.seed``, and the global random state is left as it was. A loss that is not
    finite stops with a ``FloatingPointError``. ``checkpoint`` is as in :func:`finetune`.
    """
    config = FinetuneConfig.parse(config)
    if config.local_epochs or not config.epochs:
        raise ValueError("train_ trains the whole model: local_epochs are for finetune")
    if config.target_recovery is not None:
        raise ValueError("train_ knows of no truncation to recover from: target_recovery is for finetune")
    count_batches(train_loader)
    frozen = kept_modes(teacher) if teacher is not None else nullcontext()
    both = [model, teacher] if teacher is not None else [model]
    laid = channels_last(*both, on=config.channels_last)
    with frozen, laid, accelerated(config, device_of(model)) as accelerator, kept_randomness():
        stages = _Stages(accelerator, train_loader, config, checkpoint)
        watch = Watch(label, val_loader, progress=progress)
        return tuple(stages.whole(model, teacher, "trained", watch).epochs)


class _Stages:
    """The parts of a run, one after the other, each with checkpoints in a folder of its own."""

    def __init__(
        self,
        accelerator: Accelerator,
        loader: Iterable[Any],
        config: FinetuneConfig,
        checkpoint: str | Path | None,
    ) -> None:
        self.accelerator, self.loader, self.config = accelerator, loader, config
        self.folder = Path(checkpoint).expanduser() if checkpoint is not None else None
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.folder} is a file: choose another checkpoint folder")
        self.count = count_batches(loader)

    def local(self, model: nn.Module, teacher: nn.Module | None, watch: Watch, crew: Crew) -> Position:
        """Distil slice by slice: Adam at a constant rate, factors and their biases only."""
        if teacher is None:
            raise ValueError("local_epochs need a teacher, whose slices are reproduced")
        checkpoint = self._checkpoint("local", model, teacher)
        return train_slices(
            self.accelerator, model, teacher, self.loader, self.config, watch, checkpoint, crew
        )

    def whole(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        name: str,
        watch: Watch,
        epochs: int | None = None,
    ) -> Position:
        """Train the whole model for the epochs of the config, or the first so many of them."""
        config = self.config
        checkpoint = self._checkpoint(name, model, teacher)
        optimizer = make_optimizer(model, config)
        steps = -(-self.count // config.accumulate) * config.epochs
        schedule = make_schedule(optimizer, config, steps)
        objective = GlobalObjective(model, teacher, config)
        trainer = Trainer(self.accelerator, objective, optimizer, schedule, config, watch)
        return trainer.run(self.loader, epochs or config.epochs, checkpoint)

    def _checkpoint(self, name: str, model: nn.Module, teacher: nn.Module | None) -> Checkpoint | None:
        if self.folder is None:
            return None
        run = {
            "model": digest_of_model(model),
            "teacher": digest_of_model(teacher) if teacher is not None else None,
            "config": self.config.model_dump(mode="json", exclude=set(KEEPING)),
            "data": {"batches": self.count},
        }
        return Checkpoint(self.folder / name, run)


def launched() -> bool:
    """Say whether this is one of several processes that were started to train together."""
    import os

    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _tracker(
    accelerator: Accelerator, log_dir: str | Path | None
) -> Callable[[str, dict[str, float], int], None] | None:
    """Return a function that writes the numbers of a stage at a step for TensorBoard."""
    if log_dir is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "log_dir is for TensorBoard, which is not there: pip install 'tncompress[tensorboard]'"
        ) from None
    folder = Path(log_dir).expanduser()

    def log(stage: str, values: dict[str, float], step: int) -> None:
        if accelerator.is_main_process:
            with SummaryWriter(str(folder)) as writer:  # a file for each: none is open where a run is killed
                for name, value in values.items():
                    writer.add_scalar(f"{stage}/{name}", value, step)

    return log
