"""Putting compressed layers into a model, and taking them out again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from tncompress.discovery import find_layers
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.plan import LayerPlan, Plan
from tncompress.planner import digest_of, make_plan
from tncompress.spec import Spec
from tncompress.tables import watched

M = TypeVar("M", bound=nn.Module)
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


def compress(
    model: M,
    spec: Spec | Plan | Mapping[str, Any] | str | Path,
    *,
    example_inputs: Any = None,
    inplace: bool = False,
    progress: bool = False,
) -> M:
    """Return a copy of ``model`` whose planned layers are tensor networks.

    ``spec`` is a :class:`Spec`, a mapping with its keys, a path to a file, or a :class:`Plan` that was made
    for this model. The copy is of the model's own class; its plan stays with it as ``tncompress_plan``.
    With ``inplace`` the model itself is changed, once every layer is ready. Dtype, device, memory format,
    training mode, ``requires_grad`` and hooks of each layer are kept.

    >>> import tncompress as tnc
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1))
    >>> small = tnc.compress(model, {"default": {"format": "tucker", "rank": {"params_ratio": 0.25}}})
    >>> small(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 4, 4, 4])
    """
    plan = spec
    if not isinstance(plan, Plan):
        plan = make_plan(model, plan, example_inputs=example_inputs, progress=progress)
    target = model if inplace else copy.deepcopy(model)
    dense = {layer.name: layer for layer in find_layers(target)}
    made: list[tuple[tuple[str, ...], TNConv]] = []
    for planned in watched(plan.compressed, "compressing", show=progress):
        layer = dense.get(planned.name)
        if layer is None or layer.obstacle or layer.names != planned.names:
            why = (
                "there is no such layer" if layer is None else layer.obstacle or f"it is named {layer.names}"
            )
            raise ValueError(f"the plan does not fit this model at layer {planned.name!r}: {why}")
        made.append((planned.names, _build(layer.module, planned, plan)))
    for names, compressed in made:
        for name in names:
            replace_module_(target, name, compressed)
    cast(Any, target).tncompress_plan = Plan(plan.layers, plan.spec, plan.params_model)
    return target


def _build(dense: Any, planned: LayerPlan, plan: Plan) -> TNConv:
    """Return the compressed layer that ``planned`` promises for ``dense``."""
    weight: nn.Parameter = dense.weight
    where = f"layer {planned.name!r} with kernel {tuple(weight.shape)}"
    if tuple(weight.shape) != planned.shape or digest_of(weight) != planned.digest:
        raise ValueError(
            f"the plan was made for other weights of {where}: make a new plan from its spec (plan.spec)"
        )
    if (found := ConvGeometry.of(dense)) != planned.geometry:
        raise ValueError(f"the plan was made for {planned.geometry} at {where}, but there it is {found}")
    fit = plan.fits.get(planned.name) or planned.format.fit(weight.detach(), planned.ranks)
    if abs(fit.rel_error - planned.rel_error) > 1e-3 * planned.rel_error + 1e-6:
        raise ValueError(
            f"{where}: the plan promised an error of {planned.rel_error:.4g}, got {fit.rel_error:.4g}"
        )
    factors = [factor.to(weight.device, copy=True) for factor in fit.factors]
    bias = dense.bias.detach().clone() if dense.bias is not None else None
    layer = TNConv(planned.format, planned.geometry, factors, bias, rel_error=fit.rel_error)
    layer.factors.requires_grad_(weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(dense.bias.requires_grad)
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if channels_last and weight.is_contiguous(memory_format=channels_last) and not weight.is_contiguous():
        layer = layer.to(memory_format=channels_last)
    return adopt(layer, dense)


def adopt(new: L, old: nn.Module) -> L:
    """Return ``new`` with the training mode and the forward and backward hooks of ``old``.

    They share the dictionaries of hooks, so that the handle of a hook still removes it.
    """
    new.train(old.training)
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    return new


def replace_module_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule that ``model`` knows as ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def merge(model: M) -> M:
    """Return a copy of ``model`` with the dense layers that its tensor-network layers stand for.

    Training mode, ``requires_grad`` and hooks of each layer are kept.
    """
    if isinstance(model, TNConv):
        raise ValueError("merge wants a model that holds TNConv layers; of a single layer take to_dense()")
    target = copy.deepcopy(model)
    for layer in find_layers(target):
        if isinstance(layer.module, TNConv):
            dense = adopt(layer.module.to_dense(), layer.module)
            for name in layer.names:
                replace_module_(target, name, dense)
    if hasattr(target, "tncompress_plan"):
        del target.tncompress_plan
    return target
