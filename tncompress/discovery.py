"""The layers of a model: which there are, under which names, and which of them can be compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from tncompress.geometry import LINEAR_AND_CONVS
from tncompress.layers import TNConv

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FAMILY: tuple[type[nn.Module], ...] = (*LINEAR_AND_CONVS, *_TRANSPOSED, TNConv)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a model, with every name that it has there, first name first."""

    names: tuple[str, ...]
    module: Any  # nn.Conv2d and its like, nn.Linear, TNConv
    obstacle: str | None

    @property
    def name(self) -> str:
        """The first of its names, in the order of registration."""
        return self.names[0]

    @property
    def kind(self) -> str:
        """The class name, such as ``Conv2d``."""
        return type(self.module).__name__


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the convolutions and linear layers of ``model`` in the order of registration.

    A module under several names is one layer. ``obstacle`` says why a layer can't be compressed, or is None.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _FAMILY):
            names.setdefault(module, []).append(name)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return [
        Layer(tuple(found), module, _obstacle(module, found[0], owners)) for module, found in names.items()
    ]


def _obstacle(module: nn.Module, name: str, owners: dict[int, list[str]]) -> str | None:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(
            f"layer {name!r} is lazy and has no weights yet: run the model once before compressing it"
        )
    if isinstance(module, TNConv):
        return "already compressed"
    if not name:
        return "it is the model itself: put it in an nn.Sequential"
    if isinstance(module, _TRANSPOSED):
        return "transposed convolutions are not handled yet"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: remove the parametrization first"
    if type(module) not in LINEAR_AND_CONVS:
        return "a subclass of a torch layer, whose own behaviour would be lost"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no plain parameter (weight_norm, pruning?): remove that first"
    held = [*module._parameters, *module._buffers, *module._modules]
    if extra := [key for key in held if key not in ("weight", "bias")]:
        return f"it holds {extra[0]!r} beside weight and bias, which would be lost"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, and would be lost"
    groups = getattr(module, "groups", 1)
    if groups > 1:
        kind = "depthwise" if groups == module.in_channels else "grouped"
        return f"{kind} convolutions (groups={groups}) are not handled yet"
    if not weight.is_floating_point():
        return f"its weight has dtype {weight.dtype}"
    for own, parameter in module._parameters.items():
        if others := [owner for owner in owners.get(id(parameter), []) if owner != name]:
            return f"its {own} is shared with {others[0]!r}"
    return None


def input_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a layer that was called with these arguments."""
    return args[0] if args else kwargs["input"]


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Return ``model`` called on a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in eval mode without gradients, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes.items():
            module.training = training


def input_shapes(
    model: nn.Module, layers: list[Layer], example_inputs: Any
) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of the inputs that each layer (by name) gets in one forward pass, a call each."""
    shapes: dict[str, list[tuple[int, ...]]] = {layer.name: [] for layer in layers}
    handles = []
    for layer in layers:

        def record(_: nn.Module, args: Any, kwargs: Any, name: str = layer.name) -> None:
            shapes[name].append(tuple(input_of_call(args, kwargs).shape))

        handles.append(layer.module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        with eval_mode(model):
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
