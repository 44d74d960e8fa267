"""The loop: batches into steps, steps into epochs, with checkpoints in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tncompress.averaging import MovingAverage
from tncompress.batches import count_batches, fingerprint, split_batch
from tncompress.checkpoint import Checkpoint, Saved
from tncompress.engine import JointBatchNorm, accuracy_of, share_of, summed
from tncompress.gauge import balance_, frobenius_gradients
from tncompress.history import Epoch
from tncompress.layers import TNConv
from tncompress.randomness import batches_of, seed_step
from tncompress.recipe import FinetuneConfig
from tncompress.tables import progress_bar, progress_line
from tncompress.watching import Position, Watch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Trainer:
    """One run: ``objective`` holds the model that it trains, and gives the loss of a batch."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Any,
        optimizer: Optimizer,
        schedule: LRScheduler,
        config: FinetuneConfig,
        watch: Watch,
    ) -> None:
        self.accelerator, self.config, self.watch = accelerator, config, watch
        self.model: nn.Module = objective.model
        self.layers = [m for m in self.model.modules() if isinstance(m, TNConv)]
        self.average = MovingAverage(self.model, config.ema) if config.ema is not None else None
        self.parts: Any = accelerator.prepare(objective, optimizer, schedule)
        self.norms = JointBatchNorm(self.model, accelerator)
        self.checkpoint: Checkpoint | None = None
        self.at = Position()
        self._written = time.monotonic()

    def run(self, loader: Iterable[Any], epochs: int, checkpoint: Checkpoint | None = None) -> Position:
        """Train for ``epochs`` epochs, or on from what ``checkpoint`` holds; return the end.

        The model ends in eval mode, with its moving average where there is one.
        """
        self.checkpoint = checkpoint
        count = count_batches(loader)
        if checkpoint is not None:
            self._resume(checkpoint)
        begun = self.at.epoch * count + self.at.step
        show = self.watch.progress and self.accelerator.is_main_process
        with ExitStack() as stack:
            stack.enter_context(self.norms)
            advance = stack.enter_context(progress_bar(epochs * count - begun, show=show))
            if not self.at.begun:
                self.at.begun = True
                if self.config.balance:
                    self._balance()
                self._write()
            while self.at.epoch < epochs and not self.at.finished:
                self._epoch(loader, count, epochs, advance)
        if self.average is not None:
            self.average.swap_in()
        self.model.eval()
        if self.accelerator.num_processes > 1:
            self.accelerator.free_memory()  # of the wrapper, which answers to gradients of the model
        return self.at

    def _epoch(self, loader: Iterable[Any], count: int, epochs: int, advance: Callable[[str], None]) -> None:
        objective, at = self.parts[0], self.at
        objective.train()
        spent, started = at.seconds, time.perf_counter()
        for number, (x, y) in enumerate(self._batches(loader, count)):
            if number < at.step:
                if number == at.step - 1 and fingerprint(x, y) != at.batch:
                    raise ValueError(
                        f"batch {at.step} of epoch {at.epoch + 1} is not the one after which the checkpoint "
                        "was written: give the same data in the same order, or another checkpoint folder"
                    )
                continue
            self._step(x, y, number, count)
            at.step, at.seconds = number + 1, spent + time.perf_counter() - started
            advance(self.watch.words(at, epochs, at.loss / at.seen))
            if self._due():
                at.batch = fingerprint(x, y)
                self._write()
        if at.step < count:
            raise ValueError(f"wanted {count} batches, as the loader's length says, got {at.step}")
        self._end_epoch(epochs, spent, started)

    def _end_epoch(self, epochs: int, spent: float, started: float) -> None:
        at, watch = self.at, self.watch
        accuracy = self._accuracy(watch.val_loader) if watch.val_loader is not None else None
        seconds = spent + time.perf_counter() - started
        training = at.right / at.seen if at.right >= 0 else None
        at.epochs.append(Epoch(at.loss / at.seen, accuracy, seconds, training, at.rebalanced))
        at.epoch, at.step, at.batch = at.epoch + 1, 0, None
        at.loss, at.right, at.seen, at.seconds, at.rebalanced = 0.0, 0.0, 0, 0.0, 0
        back = watch.recovery(accuracy)
        at.reached = back is not None and watch.target is not None and back >= watch.target
        at.finished = at.reached or at.epoch == epochs
        if watch.log is not None:
            told = {"loss": at.epochs[-1].loss, "accuracy": accuracy, "recovery": back}
            watch.log(watch.label, {k: value for k, value in told.items() if value is not None}, at.updates)
        progress_line(watch.epoch_line(at, epochs), show=watch.progress and self.accelerator.is_main_process)
        self._write()

    def _accuracy(self, val_loader: Iterable[Any]) -> float:
        """Return the accuracy of what the run would return if it ended now."""
        if self.average is not None:
            self.average.swap_in()
        found = accuracy_of(self.accelerator, self.model, val_loader)
        if self.average is not None:
            self.average.swap_out()
        return found

    def _batches(self, loader: Iterable[Any], count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for number, batch in enumerate(batches_of(loader, self.config.seed, self.at.epoch)):
            if number == count:
                raise ValueError(f"wanted {count} batches, as the loader's length says, got more")
            yield split_batch(batch)

    def _step(self, x: Tensor, y: Tensor | None, number: int, count: int) -> None:
        accelerator, config, at = self.accelerator, self.config, self.at
        objective, optimizer, schedule = self.parts
        (own_x, own_y), weight = share_of(accelerator, x, y)
        self.norms.copies = 1 if len(x) >= accelerator.num_processes else accelerator.num_processes
        first = number // config.accumulate * config.accumulate
        group = min(config.accumulate, count - first)
        accelerator.sync_gradients = number - first + 1 == group
        seed_step(config.seed, at.epoch * count + number, accelerator.process_index)
        device = accelerator.device
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(objective):
            loss, right = objective(own_x.to(device), own_y.to(device) if own_y is not None else None)
            accelerator.backward(loss * (weight * config.accumulate / group))
        self._count(loss, right, weight, x)
        if accelerator.sync_gradients:
            self._update(optimizer)
            schedule.step()
            optimizer.zero_grad()
            at.updates += 1
            if self.average is not None:
                self.average.update()
            if config.rebalance_every and at.updates % config.rebalance_every == 0:
                self._balance()

    def _count(self, loss: Tensor, right: Tensor | None, weight: float, x: Tensor) -> None:
        """Add the batch to the sums of the epoch; a loss that is not finite ends the run."""
        at, world = self.at, self.accelerator.num_processes
        share = 1.0 if len(x) >= world else 1 / world  # of a batch that every process has whole
        answers = float(right) if right is not None else 0.0
        mean, answers = summed(self.accelerator, loss.item() * weight / world, answers * share)
        if not math.isfinite(mean):
            self._stop(f"the loss became {mean} in epoch {at.epoch + 1}")
        at.loss, at.seen = at.loss + mean * len(x), at.seen + len(x)
        at.right = at.right + answers if right is not None else -1.0

    def _update(self, optimizer: Any) -> None:
        """Make one step of the optimizer on the gradients that have come together."""
        config = self.config
        if config.clip_norm is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            self.accelerator.clip_grad_norm_(trained, config.clip_norm)
        elif config.frobenius_decay:
            self.accelerator.unscale_gradients()
        if config.frobenius_decay:
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            for factor, gradient in frobenius_gradients(self.layers):
                if config.optimizer == "adamw":  # apart from the gradient, as AdamW decays weights
                    factor.data.sub_(gradient, alpha=rates.get(id(factor), 0.0) * config.frobenius_decay)
                elif factor.grad is not None:
                    factor.grad.add_(gradient, alpha=config.frobenius_decay)
        optimizer.step()

    def _balance(self) -> None:
        """Make both sides of each bond even; what the optimizer knew of the factors is of another gauge."""
        for factor in balance_(self.model):
            if self.accelerator.num_processes > 1:
                torch.distributed.broadcast(factor.data, 0)
            self.parts[1].state.pop(factor, None)
        if self.at.updates:
            self.at.rebalanced += 1
        if self.average is not None:
            self.average.restart()

    def _due(self) -> bool:
        """Say whether a checkpoint is due within an epoch, between two steps of the optimizer."""
        if self.checkpoint is None or not self.accelerator.sync_gradients:
            return False
        if (every := self.config.checkpoint_every) is not None:
            return self.at.updates % every == 0
        late = time.monotonic() - self._written > self.config.checkpoint_seconds
        return bool(summed(self.accelerator, float(late))[0])

    def _write(self) -> None:
        """Write a checkpoint of the present state, if that is finite."""
        if self.checkpoint is None:
            return
        _, optimizer, schedule = self.parts
        own = self.model.state_dict()
        if any(
            isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in own.values()
        ):
            self._stop(f"the weights became infinite or NaN in epoch {self.at.epoch + 1}")
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "model": own,
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "average": self.average.state_dict() if self.average is not None else None,
            }
            self.checkpoint.write(Saved(asdict(self.at), state))
        self._written = time.monotonic()

    def _stop(self, what: str) -> None:
        rate = self.config.lr
        hint = f"try a learning rate below {rate}" + ("" if self.config.clip_norm else ", or a clip_norm")
        if self.config.mixed_precision == "fp16":
            hint += ", or bf16"
        if self.checkpoint is not None:
            hint += (
                f", in another checkpoint folder; the last good checkpoint is kept in {self.checkpoint.path}"
            )
        raise FloatingPointError(f"{self.watch.label}: {what}: {hint}")

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Go to where the checkpoint was written, if there is one; the first process reads it for all."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [checkpoint.read()]
            except Exception as error:  # raised below, by all processes alike
                found = [error]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(found, 0)
        (saved,) = found
        if isinstance(saved, Exception):
            raise saved
        if saved is None:
            return
        _, optimizer, schedule = self.parts
        self.model.load_state_dict(saved.state["model"])
        optimizer.load_state_dict(saved.state["optimizer"])
        schedule.load_state_dict(saved.state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(saved.state["average"])
        self.at = Position.from_dict(saved.progress)
