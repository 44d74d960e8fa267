"""Figures of a model: accuracy, size, cost, speed, memory. Each is measured, none is estimated."""

from __future__ import annotations

import math
import statistics
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tncompress.batches import split_batch
from tncompress.running import call_model, copy_model, eval_mode
from tncompress.timing import samples_in_turns
from tncompress.weights import save_weights


@dataclass(frozen=True)
class Evaluation:
    """Top-1 ``accuracy`` (a fraction) and mean cross-entropy ``loss`` over ``samples`` labelled images."""

    accuracy: float
    loss: float
    samples: int


def evaluate(model: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Return the accuracy and loss of ``model`` on the ``(inputs, labels)`` batches of ``loader``.

    ``accuracy`` is top-1, a fraction from 0 to 1, ``loss`` the mean cross-entropy in nats, ``samples`` their
    number. The model maps inputs to logits ``(samples, classes)``; it is run in eval mode on its own device.
    A batch may be a mapping, too, whose first two items are inputs and labels.
    No batch at all is a ``ValueError``.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.eye(2))
    >>> evaluate(model, [(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1]))]).accuracy
    0.5
    """
    device = device_of(model)
    correct, loss, samples = 0, 0.0, 0
    with eval_mode(model):
        for batch in loader:
            x, y = split_batch(batch)
            if y is None:
                raise ValueError("wanted batches (inputs, labels) to evaluate on, got inputs without labels")
            logits, y = model(x.to(device)).float(), y.to(device)
            correct += int((logits.argmax(1) == y).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            samples += len(y)
    if samples == 0:
        raise ValueError("wanted labelled batches to evaluate on, got none")
    return Evaluation(correct / samples, loss / samples, samples)


def accuracy_interval(accuracy: float, samples: int) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % interval of an accuracy measured on so many samples.

    It is what the choice of the test images leaves open, not what another seed of the training would change.

    >>> [round(end, 3) for end in accuracy_interval(0.9, 100)]
    [0.826, 0.945]
    """
    z = 1.959964
    middle = (accuracy + z * z / (2 * samples)) / (1 + z * z / samples)
    spread = accuracy * (1 - accuracy) / samples + z * z / (4 * samples * samples)
    half = z * math.sqrt(spread) / (1 + z * z / samples)
    return max(0.0, middle - half), min(1.0, middle + half)


def recovery(accuracy: float, truncated: float, dense: float) -> float | None:
    """Return which part of the accuracy lost by truncation is back; None where nothing was lost.

    >>> recovery(0.9, truncated=0.5, dense=0.9)
    1.0
    """
    return (accuracy - truncated) / (dense - truncated) if dense > truncated else None


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter (the CPU if it has none)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def num_params(model: nn.Module) -> int:
    """Return the number of parameters, each shared one counted once."""
    return sum(p.numel() for p in model.parameters())


def bytes_on_disk(model: nn.Module) -> int:
    """Return the size of the file that ``save_weights`` writes: safetensors, shared tensors written once."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_weights(model, path)
        return path.stat().st_size


def macs(model: nn.Module, example_inputs: Any) -> int:
    """Return the multiply-accumulates of one forward pass, counted as its products and convolutions run."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton along, where that is installed

    counter = FlopCounterMode(display=False)
    with eval_mode(model), counter:
        call_model(model, example_inputs)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass: the median over ``runs`` samples and their interquartile range."""

    median: float
    iqr: float
    runs: int


def latencies(models: Sequence[nn.Module], example_inputs: Any, *, seconds: float = 1.0) -> list[Latency]:
    """Return the latency of each model on ``example_inputs``, measured in turns so that drift hits all alike.

    About ``seconds`` are spent on each model, in ten rounds.
    """
    modes = [eval_mode(model) for model in models]
    for mode in modes:
        mode.__enter__()
    try:
        with torch.inference_mode():
            found = samples_in_turns(
                [partial(call_model, model, example_inputs) for model in models], seconds=seconds
            )
    finally:
        for mode in reversed(modes):
            mode.__exit__(None, None, None)
    return [_latency(samples) for samples in found]


def _latency(samples: Sequence[float]) -> Latency:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Latency(median, high - low, len(samples))


def peak_memory(model: nn.Module, example_inputs: Any) -> int:
    """Return the peak bytes of tensors alive in a forward pass: parameters, buffers, inputs, activations.

    On CUDA this is the allocator's own figure; on the CPU tensor storage is followed op by op, which leaves
    out what a kernel takes for itself while it runs.
    """
    device = device_of(model)
    if device.type == "cuda":
        with eval_mode(model):
            torch.cuda.reset_peak_memory_stats(device)
            call_model(model, example_inputs)
            torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    held = [*model.parameters(), *model.buffers(), *tree_leaves(example_inputs)]
    tracker = _StorageTracker(tensor for tensor in held if isinstance(tensor, Tensor))
    with eval_mode(model), tracker:
        call_model(model, example_inputs)
    return tracker.peak


def activation_bytes(model: nn.Module, example_inputs: Any) -> int:
    """Return the bytes that autograd keeps between a forward pass in training and its backward pass.

    They are those of the storages saved for gradients, each counted once: inputs and intermediate results,
    not parameters and buffers, which are there anyway. The pass is made by a copy of the model, in training
    mode, so that statistics and modes stay what they are.

    >>> chain = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1))
    >>> activation_bytes(chain, torch.randn(1, 4, 10, 10)) == 4 * (4 + 8) * 100
    True
    """
    copied = copy_model(model).train()
    held = {t.untyped_storage()._cdata for t in [*copied.parameters(), *copied.buffers()]}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in held:
            saved.setdefault(key, tensor)  # held, so that no other storage takes its place
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call_model(copied, example_inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class _StorageTracker(TorchDispatchMode):
    """Follows the bytes of all storages that the ops under it leave alive."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = self.now = 0
        for tensor in held:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result


def peak_training_memory(model: nn.Module, inputs: Any, labels: Tensor) -> int:
    """Return the peak bytes of tensors alive in a training step, as :func:`peak_memory` counts them.

    The step is the forward pass in training mode, cross-entropy, and the backward pass of a copy of the
    model, without what an optimizer keeps.
    """
    trained = copy_model(model).train()
    device = device_of(trained)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        F.cross_entropy(call_model(trained, inputs), labels).backward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    held = [*trained.parameters(), *trained.buffers(), *tree_leaves(inputs), labels]
    tracker = _StorageTracker(tensor for tensor in held if isinstance(tensor, Tensor))
    with tracker:
        F.cross_entropy(call_model(trained, inputs), labels).backward()
    return tracker.peak
