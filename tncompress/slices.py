"""Slices of a network: parts of a compressed model and of the dense one that stand at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tncompress.layers import TNConv
from tncompress.running import at_least_float
from tncompress.spec import matches_any

Slices = Literal["layer", "block"] | Sequence[str]


def find_slices(model: nn.Module, slices: Slices = "layer") -> list[str]:
    """Return the names of the slices of a compressed model, none of which lies in another.

    ``layer`` is each compressed layer; ``block`` the smallest module, short of the model itself, that
    holds more than one of them, and by itself a layer that no such module holds. Otherwise the modules
    that the names or patterns match. A pattern without a match, slices without factors and slices in
    slices are a ``ValueError``.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, TNConv)]
    if not layers:
        raise ValueError("the model holds no compressed layer: there are no slices to distil")
    if slices == "layer":
        return layers
    if slices == "block":
        return _blocks(layers)
    inside = tuple(f"{layer}." for layer in layers)
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    for pattern in slices:
        if not any(matches_any(pattern, [name]) for name in names):
            raise ValueError(f"slices: {pattern!r} matches no module; they are {_some(names)}")
    found = [name for name in names if any(matches_any(pattern, [name]) for pattern in slices)]
    for name in found:
        if not any(_holds(name, layer) for layer in layers):
            raise ValueError(f"slices: {name!r} holds no compressed layer; those are {_some(layers)}")
        if inner := next((other for other in found if other != name and _holds(name, other)), None):
            raise ValueError(f"slices: {inner!r} lies in {name!r}, which is a slice, too: name one of them")
    return found


def _blocks(layers: list[str]) -> list[str]:
    def around(layer: str) -> str:
        parts = layer.split(".")
        for size in range(len(parts) - 1, 0, -1):
            name = ".".join(parts[:size])
            if sum(_holds(name, other) for other in layers) > 1:
                return name
        return layer

    found = dict.fromkeys(around(layer) for layer in layers)
    nested = {name for name in found for other in found if other != name and _holds(name, other)}
    return list(dict.fromkeys(layer if around(layer) in nested else around(layer) for layer in layers))


def _holds(name: str, other: str) -> bool:
    return other == name or other.startswith(f"{name}.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


class SliceDistillation(nn.Module):
    """The mean squared error of each slice's output, summed, where slices get the teacher's inputs.

    No slice sees what another does, so that each learns as it would alone; one pass of the teacher serves
    all. Both models are in eval mode: what is matched is what runs. Labels are not used.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)
        self._teacher = (teacher,)  # in a tuple: not a part of this module
        for name in names:
            try:
                teacher.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"the teacher has no module {name!r}, which is a slice of the model"
                ) from None

    def train(self, mode: bool = True) -> SliceDistillation:
        """Keep both models in eval mode."""
        self.training = mode
        self.model.eval()
        self._teacher[0].eval()
        return self

    def trained(self) -> list[nn.Parameter]:
        """Return factors and biases of the compressed layers in the slices, each once."""
        layers = [m for name in self.names for m in self.model.get_submodule(name).modules()]
        found = {id(p): p for m in layers if isinstance(m, TNConv) for p in m.parameters()}
        return [p for p in found.values() if p.requires_grad]

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the loss of a batch, and no count of right answers."""
        (teacher,) = self._teacher
        calls: list[tuple[str, Any, Any, Any]] = []
        handles = []
        for name in self.names:

            def keep(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                calls.append((name, args, kwargs, output))

            handles.append(teacher.get_submodule(name).register_forward_hook(keep, with_kwargs=True))
        try:
            with torch.no_grad():
                teacher(x)
        finally:
            for handle in handles:
                handle.remove()
        if missed := [name for name in self.names if all(name != call[0] for call in calls)]:
            raise ValueError(
                f"slice {missed[0]!r} is never called in a forward pass of the teacher: leave it out"
            )
        losses = []
        for name, args, kwargs, output in calls:
            losses.append(_distance(self.model.get_submodule(name)(*args, **kwargs), output, name))
        return torch.stack(losses).sum(), None


def _distance(ours: Any, theirs: Any, name: str) -> Tensor:
    pairs = list(zip(tensors_in(ours), tensors_in(theirs), strict=False))
    if not pairs or any(mine.shape != wanted.shape for mine, wanted in pairs):
        raise ValueError(
            f"slice {name!r} puts out {[tuple(t.shape) for t in tensors_in(ours)]}, the teacher's "
            f"{[tuple(t.shape) for t in tensors_in(theirs)]}: slices need the teacher that the model is from"
        )
    return torch.stack(
        [F.mse_loss(at_least_float(mine), at_least_float(wanted)) for mine, wanted in pairs]
    ).sum()


def tensors_in(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a module put out."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
