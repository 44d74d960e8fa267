"""Copying a model, and running it on example inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

LAYOUT_IMAGES = 2
"""On how many images a model is tried in another layout."""


def copy_model(model: M) -> M:
    """Return a deep copy of ``model``, also where it keeps computed tensors (torch's old weight norm)."""
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    try:
        with torch.inference_mode(False):  # whose tensors could not be trained later
            return copy.deepcopy(model, computed)
    except Exception as error:  # whatever the attributes of a user's class raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(model).__name__} can't be copied ({reason}): mend that, or compress it with inplace=True"
        ) from error


def input_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a layer that was called with these arguments."""
    return args[0] if args else kwargs["input"]


def at_least_float(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 where it is of half precision, in which sums lose too much."""
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Return ``model`` called on a tensor, a tuple of arguments or a mapping of keyword arguments.

    What it raises then says on inputs of which shapes it was run.
    """
    try:
        if isinstance(example_inputs, Mapping):
            return model(**example_inputs)
        if isinstance(example_inputs, tuple | list):
            return model(*example_inputs)
        return model(example_inputs)
    except Exception as error:
        error.add_note(f"while {type(model).__name__} was run on {_told(example_inputs)}")
        raise


def _told(example_inputs: Any) -> str:
    """Return how errors speak of example inputs.

    >>> _told((torch.zeros(1, 3, 8, 8), 5))
    'torch.float32 (1, 3, 8, 8), int'
    """
    parts = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    parts = list(parts) if isinstance(example_inputs, Mapping | tuple | list) else [parts]
    told = [f"{p.dtype} {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in parts]
    return ", ".join(told)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` back into its own mode, training or not, when the block ends."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in eval mode without gradients, and every module back into its own mode afterwards."""
    with kept_modes(model), torch.no_grad():
        yield model.eval()


@contextmanager
def channels_last(*models: nn.Module, on: bool = True) -> Iterator[None]:
    """Have kernels of four axes in ``models`` laid out channels last while the block runs, where ``on``.

    Their values then go back to the memory that they came from, in its layout: whatever shares it sees them.
    """
    held = [p for model in models for p in (*model.parameters(), *model.buffers()) if on and p.ndim == 4]
    own = [p.data for p in held]
    for p in held:
        p.data = p.data.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for p, memory in zip(held, own, strict=True):
            p.data = memory.copy_(p.data)


def runs_channels_last(model: nn.Module, x: Tensor) -> bool:
    """Say whether the model gives the same outputs with channels last, which is faster on a CPU."""
    fixed = any(p.is_inference() for p in (*model.parameters(), *model.buffers()))
    if x.ndim != 4 or x.device.type != "cpu" or fixed:
        return False
    few = x[:LAYOUT_IMAGES]
    other = copy_model(model).to(memory_format=torch.channels_last)
    with eval_mode(other), eval_mode(model):
        try:
            got, wanted = other(few.contiguous(memory_format=torch.channels_last)), model(few)
        except (RuntimeError, TypeError, ValueError):  # a view across channels; inputs of another kind
            return False
    if not isinstance(got, Tensor) or not wanted.is_floating_point():
        return False
    scale = float(wanted.double().abs().max())
    gap = float((got.double() - wanted.double()).abs().max())
    return gap <= 1e3 * torch.finfo(wanted.dtype).eps * scale


def input_shapes(
    model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any
) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of the inputs that each of ``layers`` gets in one forward pass, a call each."""
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in layers}
    handles = []
    for name, layer in layers.items():

        def record(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            shapes[name].append(tuple(input_of_call(args, kwargs).shape))

        handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
    try:
        with eval_mode(model):
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def inputs_of(batches: Iterable[Any], model: nn.Module) -> Iterator[Tensor]:
    """Yield the input of each batch on the model's device; no batch at all is a ``ValueError``."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = False
    for batch in batches:
        found = True
        if isinstance(batch, Mapping):
            batch = next(iter(batch.values()))
        elif isinstance(batch, tuple | list):
            batch = batch[0]
        if not isinstance(batch, Tensor):
            came = type(batch).__name__
            raise ValueError(f"wanted batches that are tensors, or begin with one, got {came}")
        yield batch.to(device)
    if not found:
        raise ValueError("wanted at least one batch of inputs, got none (a generator that was used up?)")
