"""Slice-wise distillation as a run: in this process, or its slices shared out to workers.

Slices know nothing of each other, so that workers may train some each. They do so for one epoch at a time
and send back what they learned: accuracies, checkpoints and the end of the run are then those of one
process, and a run goes on with any number of workers.

What slices put out for the teacher's inputs tells BatchNorm layers behind them nothing of the network's own:
their statistics are taken again at the end, and for every accuracy on the way.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tncompress.batches import split_batch
from tncompress.batchnorm import reestimate_batchnorm_
from tncompress.checkpoint import Checkpoint
from tncompress.engine import accelerated
from tncompress.jobs import Run
from tncompress.randomness import batches_of, kept_randomness
from tncompress.recipe import FinetuneConfig
from tncompress.running import copy_model
from tncompress.slices import SliceDistillation, find_slices
from tncompress.trainer import Trainer
from tncompress.watching import Position, Watch
from tncompress.workers import open_workers, threads_of

if TYPE_CHECKING:
    from accelerate import Accelerator


STATISTICS = 1024
"""From how many images, or a few more, BatchNorm's statistics are taken."""


@dataclass(frozen=True)
class Crew:
    """Who trains the slices: this process, or workers as :func:`tncompress.workers.open_workers` has them."""

    workers: int | None = None
    threads: int | None = None
    address: str | None = None

    @property
    def asked(self) -> bool:
        """Whether any of it was asked for."""
        return (self.workers, self.threads, self.address) != (None, None, None)

    @property
    def alone(self) -> bool:
        """Whether this process does the work."""
        return self.address is None and (self.workers or 1) == 1

    def check_loader(self, loader: Any) -> None:
        """Raise a ``ValueError`` for a loader whose own processes a worker process can't start."""
        if (own := getattr(loader, "num_workers", 0)) and self.address is None:
            raise ValueError(
                f"the loader has num_workers={own}, and worker processes can't start processes of their own: "
                "take num_workers=0, or workers=1"
            )

    def check(self, config: FinetuneConfig, *, launched: bool) -> None:
        """Raise a ``ValueError`` where there is nothing for workers to do, or they can't."""
        for name, value in (("workers", self.workers), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is a number from 1 on, got {value}")
        if self.asked and not config.local_epochs:
            raise ValueError(
                "workers, threads and address share out the slices of local_epochs, got none of those: "
                "the whole network is trained by several processes with torchrun"
            )
        if self.asked and launched:
            raise ValueError(
                "got workers in one of several processes that were started together: leave one of the two out"
            )


def train_slices(
    accelerator: Accelerator,
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    config: FinetuneConfig,
    watch: Watch,
    checkpoint: Checkpoint | None,
    crew: Crew,
) -> Position:
    """Distil ``model`` in place, slice by slice, for the local epochs of ``config``; return the end."""
    names, kept = find_slices(model, config.slices), _of_slices(config)
    with ExitStack() as stack:
        parts = stack.enter_context(_local(model, teacher, names, config.local_lr))
        if crew.alone:
            stack.enter_context(threads_of(crew.threads))
            return _Slices(accelerator, *parts, kept, watch).run(loader, config.local_epochs, checkpoint)
        crew.check_loader(loader)

        def opened() -> Run:  # once there is something to do
            sent = copy_model(model).cpu(), copy_model(teacher).cpu()
            job = SliceJob(*sent, loader, kept, accelerator.device.type)
            team = open_workers(job, crew.workers, threads=crew.threads, address=crew.address)
            return stack.enter_context(team)

        shared = _SharedSlices(accelerator, *parts, kept, watch)
        shared.names, shared.opened = names, opened
        return shared.run(loader, config.local_epochs, checkpoint)


class _Slices(Trainer):
    """The run of slices in this process, whose model has BatchNorm statistics of its own at the end."""

    loader: Iterable[Any] = ()

    def run(self, loader: Iterable[Any], epochs: int, checkpoint: Checkpoint | None = None) -> Position:
        """Train as :meth:`Trainer.run` does; BatchNorm's statistics are taken again before the last write."""
        self.loader = loader
        return super().run(loader, epochs, checkpoint)

    def _accuracy(self, val_loader: Iterable[Any]) -> float:
        """Return the accuracy with statistics taken again; training goes on with the old ones."""
        before = {name: value.clone() for name, value in self.model.named_buffers()}
        try:
            self._take_statistics()
            return super()._accuracy(val_loader)
        finally:
            for name, value in self.model.named_buffers():
                value.copy_(before[name])

    def _write(self) -> None:
        if self.at.finished:
            self._take_statistics()
        super()._write()

    def _take_statistics(self) -> None:
        reestimate_batchnorm_(self.model, self._first_images())

    def _first_images(self) -> Iterator[Tensor]:
        seen = 0
        for batch in batches_of(self.loader, self.config.seed, 0):
            x, _ = split_batch(batch)
            yield x
            seen += len(x)
            if seen >= STATISTICS:
                return


def _of_slices(config: FinetuneConfig) -> FinetuneConfig:
    """Return the config that slices are trained by: Adam at a constant rate, and no more."""
    plain = {"clip_norm": None, "frobenius_decay": 0.0, "ema": None, "rebalance_every": None}
    return config.model_copy(update={"lr": config.local_lr, **plain})


@contextmanager
def _local(
    model: nn.Module, teacher: nn.Module, names: Sequence[str], lr: float
) -> Iterator[tuple[SliceDistillation, torch.optim.Optimizer, LambdaLR]]:
    """Yield objective, optimizer and schedule of slices; only their factors have gradients meanwhile."""
    objective = SliceDistillation(model, teacher, names)
    trained = objective.trained()
    if not trained:
        raise ValueError("no factor in the slices requires a gradient: nothing can be trained")
    own = {id(parameter) for parameter in trained}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    optimizer = torch.optim.Adam(trained, lr=lr)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield objective, optimizer, LambdaLR(optimizer, lambda _: 1.0)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


# --- shared out ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Slices that one worker trains until the end of an epoch, from where ``position`` says.

    ``state`` holds their factors and what the optimizer knows of them, as bytes.
    """

    number: int
    names: tuple[str, ...]
    position: dict[str, Any]
    state: bytes

    def __str__(self) -> str:
        return f"slices {', '.join(self.names)} in epoch {self.position['epoch'] + 1}"


@dataclass(frozen=True)
class SliceJob:
    """Compressed model and teacher, on the CPU, and the data; ``device`` is the kind that is computed on."""

    model: nn.Module
    teacher: nn.Module
    loader: Any
    config: FinetuneConfig
    device: str

    def run(self, share: Share) -> dict[str, Any]:
        """Return the mean loss of a share over its epoch and its new state, or why it was stopped."""
        device = torch.device(self.device)
        if device.type == "cuda":
            device = torch.device("cuda", share.number % torch.cuda.device_count())
        with accelerated(self.config, device) as accelerator, kept_randomness():
            model, teacher = copy_model(self.model).to(device), copy_model(self.teacher).to(device)
            with _local(model, teacher, share.names, self.config.lr) as (objective, optimizer, schedule):
                trainer = _OneEpoch(accelerator, objective, optimizer, schedule, self.config, Watch("slices"))
                trainer.at = Position.from_dict(share.position)
                _put(trainer, share.state)
                try:
                    end = trainer.run(self.loader, trainer.at.epoch + 1)
                except _Stopped as stopped:
                    return {"stopped": str(stopped)}
                return {"loss": end.epochs[-1].loss, "updates": end.updates, "state": _state_of(trainer)}


class _Stopped(Exception):  # noqa: N818 - told by the parent, which knows of the checkpoint
    pass


class _OneEpoch(Trainer):
    """The run of a worker, who has no checkpoint to speak of."""

    def _stop(self, what: str) -> None:
        raise _Stopped(what)


def _state_of(trainer: Trainer, names: Sequence[str] | None = None) -> bytes:
    """Return the factors of slices, by default all of them, with what the optimizer knows of them."""
    held = {}
    for name, parameter in _trained(trainer.model, names).items():
        known = trainer.parts[1].state.get(parameter, {})
        held[name] = parameter.detach().cpu(), {key: value.cpu() for key, value in known.items()}
    buffer = io.BytesIO()
    torch.save({"held": held, "scaler": _scaler(trainer)}, buffer)
    return buffer.getvalue()


def _put(trainer: Trainer, state: bytes) -> None:
    """Take what :func:`_state_of` gave."""
    found = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
    parameters = dict(trainer.model.named_parameters())
    for name, (value, known) in found["held"].items():
        parameter = parameters[name]
        parameter.data.copy_(value)
        if known:
            moved = {key: t.to(parameter.device) if t.ndim else t for key, t in known.items()}
            trainer.parts[1].state[parameter] = moved
    if found["scaler"]:
        trainer.accelerator.scaler.load_state_dict(found["scaler"])


def _scaler(trainer: Trainer) -> dict[str, Any] | None:
    scaler = trainer.accelerator.scaler
    return scaler.state_dict() if scaler is not None else None


def _trained(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained in the slices ``names``, by their names in the model."""
    parts = [model] if names is None else [model.get_submodule(name) for name in names]
    inside = {id(p) for part in parts for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in inside}


class _SharedSlices(_Slices):
    """The run whose slices workers train, an epoch at a time; all else is as where one process does."""

    names: Sequence[str]
    opened: Callable[[], Run]
    workers: Any = None

    def _epoch(self, loader: Iterable[Any], count: int, epochs: int, advance: Callable[[str], None]) -> None:
        at = self.at
        spent, started, left = at.seconds, time.perf_counter(), count - at.step
        if self.workers is None:
            self.workers = self.opened()
        number = min(len(self.names), self.workers.count)
        groups = [tuple(self.names[first::number]) for first in range(number)]  # early and late ones for each
        shares = [self._share(first, names) for first, names in enumerate(groups)]
        at.loss, at.seen, at.right = 0.0, 1, -1.0
        for done, (_, found) in enumerate(self.workers(shares)):
            if "stopped" in found:
                self._stop(found["stopped"])
            _put(self, found["state"])
            at.loss, at.updates = at.loss + found["loss"], found["updates"]
            for _ in range(left * done // number, left * (done + 1) // number):
                advance(self.watch.words(at, epochs, at.loss))
        at.step = count
        self._end_epoch(epochs, spent, started)

    def _share(self, number: int, names: tuple[str, ...]) -> Share:
        """Return a share; what the epoch lost so far, where it was begun already, is the first one's."""
        position = asdict(replace(self.at, loss=0.0 if number else self.at.loss, epochs=[]))
        return Share(number, names, position, _state_of(self, names))
