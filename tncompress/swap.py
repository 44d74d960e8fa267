"""Putting layers in the place of others: names, hooks and modes are kept, and all are replaced or none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from tncompress.discovery import NORM_HOOKS

L = TypeVar("L", bound=nn.Module)

_HOOKS = (
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def adopt(new: L, old: nn.Module) -> L:
    """Return ``new`` with the training mode and the forward and backward hooks of ``old``.

    They share the dictionaries of hooks, so that the handle of a hook still removes it. Those of torch's old
    weight norm and spectral norm, which made the weight, are left behind.
    """
    new.train(old.training)
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    kept = {key: h for key, h in old._forward_pre_hooks.items() if not isinstance(h, NORM_HOOKS)}
    if len(kept) < len(old._forward_pre_hooks):
        new._forward_pre_hooks = OrderedDict(kept)
    return new


def replace_all_(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each of ``layers`` in the place of the submodule of that name: all of them, or none."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_module_(model, name, layer)
    except BaseException:
        for name, layer in before.items():
            replace_module_(model, name, layer)
        raise


def replace_module_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule that ``model`` knows as ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
