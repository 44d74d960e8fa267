"""A model as one graph of torch operations (``torch.export``), which runs without its Python code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from tncompress.discovery import refuse_wrapped
from tncompress.running import call_model, eval_mode
from tncompress.storage import new_file
from tncompress.textfiles import one_line

FIRST_SPATIAL = 2
"""The first axis of an image behind batch and channels."""


def export_program(
    model: nn.Module,
    example_inputs: Any,
    *,
    path: str | Path | None = None,
    dynamic_size: bool = False,
    tolerance: float = 1e-5,
    overwrite: bool = True,
) -> ExportedProgram:
    """Return ``model`` as an exported program in eval mode, that takes batches of any size.

    ``example_inputs`` is a tensor, a tuple of arguments or a mapping of keyword arguments; the first axis of
    every tensor in them is the batch. With ``dynamic_size`` the axes behind the channels are free, too:
    images of any size. The program is run on a batch (and size) that it was not traced with; outputs
    that differ from the model's by more than ``tolerance``, relative to the largest, are a ``ValueError``,
    as is a model that needs some axis as it is. With a ``path`` it is also written there, for
    ``torch.export.load``.

    >>> import tncompress as tnc
    >>> small = tnc.compress(nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3)), {"keep_dense": []})
    >>> program = export_program(small, torch.randn(1, 4, 9))
    >>> program.module()(torch.randn(5, 4, 9)).shape
    torch.Size([5, 8, 5])
    """
    refuse_wrapped(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    leaves = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError("wanted example inputs that hold tensors with a batch axis")
    traced = pytree.tree_map_only(Tensor, lambda x: _resized(x.to(device), 2, 0), example_inputs)
    other = pytree.tree_map_only(
        Tensor, lambda x: _resized(x.to(device), 3, 2 if dynamic_size else 0), example_inputs
    )
    with eval_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = _traced(model, traced, dynamic_size)
            run = program.module()
            errors = [relative_error(call_model(run, x), call_model(model, x)) for x in (traced, other)]
        except Exception as error:  # of any kind: from torch's tracer, or a guard
            free = "batch and image size" if dynamic_size else "batch"
            hint = (
                "try without dynamic_size" if dynamic_size else "does its forward depend on the batch size?"
            )
            raise ValueError(
                f"torch can't export {type(model).__name__} with a free {free} ({one_line(error)}): {hint}"
            ) from error
    if not max(errors) <= tolerance:
        raise ValueError(
            f"the exported program's output is off by {max(errors):.2g}, wanted at most {tolerance:.2g}"
        )
    if path is not None:
        with new_file(path, overwrite=overwrite) as fresh, fresh.open("wb") as file:
            torch.export.save(program, file)
    return program


def _traced(model: nn.Module, inputs: Any, dynamic_size: bool) -> ExportedProgram:
    args, kwargs = _as_call(inputs)
    batch = Dim("batch", min=1)

    def axes(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        free = range(FIRST_SPATIAL, value.ndim) if dynamic_size else range(0)
        return {0: batch} | dict.fromkeys(free, Dim.DYNAMIC)

    shapes = pytree.tree_map(axes, (args, kwargs))
    wanted = (*shapes[0], *shapes[1].values())
    return torch.export.export(model, args, kwargs, dynamic_shapes=wanted)


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments and the keyword arguments that :func:`call_model` would pass."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _resized(x: Tensor, batch: int, more: int) -> Tensor:
    """Return ``x`` repeated to a ``batch``, its images grown by ``more`` pixels each way."""
    x = x[[i % len(x) for i in range(batch)]]
    for axis in range(FIRST_SPATIAL, x.ndim) if more else ():
        places = torch.arange(x.shape[axis] + more, device=x.device) % x.shape[axis]
        x = x.index_select(axis, places)
    return x


def relative_error(got: Any, wanted: Any) -> float:
    """Return the largest difference between two outputs, over the largest value; nested ones by parts."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(wanted), strict=True)
    errors = [0.0]
    for a, b in pairs:
        if isinstance(b, Tensor):
            if a.shape != b.shape:
                return float("inf")
            if b.numel():
                a, b = a.detach().double(), b.detach().double()
                errors.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)))
    return max(errors)
