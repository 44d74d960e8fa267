"""Where a training runs: device, precision and processes, by Hugging Face Accelerate, and no trace left.

Accelerate keeps its settings in dictionaries that all its objects in a process share: a second precision is
refused there, and a library that makes an ``Accelerator`` changes that of its user. Here they are put aside
for the length of a training, and put back.
"""

from __future__ import annotations

import atexit
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tncompress.measure import device_of
from tncompress.noise import device_name, has_bf16
from tncompress.randomness import batches_of
from tncompress.recipe import FinetuneConfig
from tncompress.running import at_least_float, eval_mode

if TYPE_CHECKING:
    from accelerate import Accelerator

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_one_at_a_time = threading.RLock()


@contextmanager
def accelerated(config: FinetuneConfig, device: torch.device | str | None) -> Iterator[Accelerator]:
    """Yield an ``Accelerator`` of these settings; Accelerate's shared state is put back when the block ends.

    Started by ``torchrun`` or ``accelerate launch``, the processes work together, each on a device of the
    kind of ``device``; None is a GPU for each process where there are some. The process group that this
    starts stays until the process ends.
    """
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import GradientAccumulationPlugin

    wanted = torch.device(device) if device is not None else None
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    with _one_at_a_time:
        before = [dict(state) for state in states]
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        try:
            for state in states:
                state.clear()
            on_cpu = wanted.type == "cpu" if wanted is not None else not torch.cuda.is_available()
            process = PartialState(cpu=on_cpu)
            if process.num_processes == 1 and wanted is not None:
                process.device = wanted
            elif process.num_processes > 1 and not grouped:
                atexit.register(_end_group)
            yield Accelerator(
                cpu=on_cpu,
                mixed_precision=_precision(config, process.device),
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=config.accumulate, sync_with_dataloader=False
                ),
                dataloader_config=DataLoaderConfiguration(split_batches=True),
            )
        finally:
            for state, own in zip(states, before, strict=True):
                state.clear()
                state.update(own)


def _end_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _precision(config: FinetuneConfig, device: torch.device) -> str:
    chosen = config.mixed_precision
    if chosen == "auto":
        return "bf16" if device.type == "cuda" and has_bf16(device) else "no"
    if chosen == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU, got the CPU: try bf16, or no")
    if chosen == "bf16" and not has_bf16(device):
        warnings.warn(
            f"mixed_precision bf16 on {device_name(device)}, which does not compute in it: steps may take "
            "many times longer than with mixed_precision no",
            UserWarning,
            stacklevel=2,
        )
    return chosen


def share_of(accelerator: Accelerator, *tensors: Tensor | None) -> tuple[list[Any], float]:
    """Return this process's part of a batch, and by what the mean over it counts in the mean over all.

    Processes take consecutive parts of about equal size. A batch of fewer images than processes is given
    whole to each.
    """
    count, world = len(next(t for t in tensors if t is not None)), accelerator.num_processes
    if count < world:
        return list(tensors), 1.0
    bounds = [count * rank // world for rank in range(world + 1)]
    first, last = bounds[accelerator.process_index], bounds[accelerator.process_index + 1]
    return [t[first:last] if t is not None else None for t in tensors], (last - first) * world / count


def summed(accelerator: Accelerator, *values: float) -> list[float]:
    """Return the sums of ``values`` over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def accuracy_of(accelerator: Accelerator, model: nn.Module, loader: Iterable[Any]) -> float:
    """Return the accuracy of ``model``, each process measuring its own batches of ``loader``."""
    device = device_of(model)
    correct = samples = 0
    with eval_mode(model):
        batches = batches_of(loader, 0, 0)  # the same ones in all processes
        for x, y in islice(batches, accelerator.process_index, None, accelerator.num_processes):
            correct += int((model(x.to(device)).argmax(1) == y.to(device)).sum())
            samples += len(y)
    correct_all, samples_all = summed(accelerator, float(correct), float(samples))
    if not samples_all:
        raise ValueError("wanted labelled batches to evaluate on, got none")
    return correct_all / samples_all


class JointBatchNorm:
    """Has each BatchNorm of a model normalise over the images of all processes, as it would in one.

    (torch's ``SyncBatchNorm`` is for GPUs only, and another class, which would have to be taken back.)
    ``copies`` says how many processes have the same images.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        many = accelerator.num_processes > 1
        self.norms = [m for m in model.modules() if many and _plain_batchnorm(m)]
        self.copies = 1

    def __enter__(self) -> JointBatchNorm:
        for norm in self.norms:
            norm.forward = partial(self._forward, norm)
        return self

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            del norm.forward

    def _forward(self, norm: Any, x: Tensor) -> Tensor:
        if not norm.training and norm.running_mean is not None:
            return type(norm).forward(norm, x)
        values = at_least_float(x)
        over, ones = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        count = _SumOfAll.apply(values.new_tensor(values.numel() / values.shape[1]))
        mean = _SumOfAll.apply(values.sum(over)) / count
        centred = values - mean.reshape(ones)
        variance = _SumOfAll.apply(centred.square().sum(over)) / count
        if norm.training and norm.track_running_stats:
            self._track(norm, mean.detach(), variance.detach(), float(count) / self.copies)
        result = centred * (variance + norm.eps).rsqrt().reshape(ones)
        if norm.affine:
            result = result * norm.weight.reshape(ones) + norm.bias.reshape(ones)
        return result.to(x.dtype)

    def _track(self, norm: Any, mean: Tensor, variance: Tensor, count: float) -> None:
        norm.num_batches_tracked += 1
        part = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), part)
        unbiased = variance * (count / (count - 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), part)


def _plain_batchnorm(module: nn.Module) -> bool:
    return type(module) in _BATCHNORMS and "forward" not in vars(module)


class _SumOfAll(torch.autograd.Function):
    """The sum of a tensor over all processes, and in the backward pass of its gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total
