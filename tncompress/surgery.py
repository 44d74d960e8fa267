"""Putting compressed layers into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tncompress.calibrate import Calibration, as_calibration
from tncompress.cost_model import fastest_chain
from tncompress.discovery import Layer, digest_of, find_layers, refuse_wrapped
from tncompress.layers import TNConv
from tncompress.plan import LayerPlan, Plan, Skip
from tncompress.planner import make_plan, with_fits
from tncompress.responses import Sensitivity
from tncompress.running import copy_model, input_shapes
from tncompress.selection import describe, memory_for
from tncompress.spec import Spec
from tncompress.swap import adopt, replace_all_, replace_module_
from tncompress.tables import watched

M = TypeVar("M", bound=nn.Module)


def compress(
    model: M,
    spec: Spec | Plan | Mapping[str, Any] | str | Path,
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    sensitivity: Sensitivity | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
    keep_dense_if_slower: bool = False,
    progress: bool = False,
) -> M:
    """Return a copy of ``model`` whose planned layers are tensor networks.

    ``spec`` is a :class:`Spec`, a mapping with its keys, a path to a file, or a :class:`Plan` that was made
    for this model. With ``calibration`` (a :class:`Calibration`, or batches of inputs to make one of) it is
    the error of the layers' outputs on these data that is kept small, and their means are kept: by their
    biases, or by the running means of the BatchNorms behind them. A budget is then shared out by the change
    of the network's output; see :func:`make_plan`, also for ``sensitivity``. The copy is of the model's own
    class; its plan stays with it as ``tncompress_plan``. With ``inplace`` the model itself is changed, once
    every layer is ready. With ``keep_dense_if_slower`` each layer is timed on inputs like ``example_inputs``,
    as :func:`freeze` would run it, and stays dense where that is no faster; the plan says so. Dtype, device,
    memory format, training mode, ``requires_grad`` and hooks of each layer are kept.

    >>> import tncompress as tnc
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1))
    >>> small = tnc.compress(model, {"default": {"format": "tucker", "rank": {"params_ratio": 0.25}}})
    >>> small(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 4, 4, 4])
    """
    refuse_wrapped(model)
    if keep_dense_if_slower and example_inputs is None:
        raise ValueError("keep_dense_if_slower measures: it wants example_inputs, as the model takes them")
    plan = spec
    if not isinstance(plan, Plan):
        plan = make_plan(
            model,
            plan,
            calibration=calibration,
            sensitivity=sensitivity,
            example_inputs=example_inputs,
            progress=progress,
        )
    elif any(p.output_error is not None and p.name not in plan.fits for p in plan.compressed):
        moments = as_calibration(calibration, model, include=plan.spec.include, progress=progress)
        plan = with_fits(plan, find_layers(model, plan.spec.include), moments) if moments else plan
    target = model if inplace else copy_model(model)
    found = {layer.name: layer for layer in find_layers(target, plan.spec.include)}
    made: dict[str, tuple[LayerPlan, TNConv]] = {}
    for planned in watched(plan.compressed, "compressing", show=progress):
        layer = found.get(planned.name)
        if layer is None or layer.obstacle or layer.names != planned.names:
            why = (
                "there is no such layer" if layer is None else layer.obstacle or f"it is named {layer.names}"
            )
            raise ValueError(f"the plan does not fit this model at layer {planned.name!r}: {why}")
        made[planned.name] = _build(layer, planned, plan)
    if keep_dense_if_slower:
        plan = _without_slower(target, plan, made, example_inputs)
        made = {layer.name: made[layer.name] for layer in plan.compressed}
    means = _shifted_means(target, plan)
    replace_all_(target, {name: new for planned, new in made.values() for name in planned.names})
    for norm, mean in means.items():
        norm.running_mean = mean
    layers = tuple(made[layer.name][0] if layer.name in made else layer for layer in plan.layers)
    cast(Any, target).tncompress_plan = replace(plan, layers=layers, fits={}, shifts={})
    return target


def _without_slower(
    model: nn.Module, plan: Plan, made: Mapping[str, tuple[LayerPlan, TNConv]], example_inputs: Any
) -> Plan:
    """Return ``plan`` with those dense layers skipped that no contraction of their network outruns."""
    modules = {name: model.get_submodule(name) for name in made}
    dense = {name: module for name, module in modules.items() if not isinstance(module, TNConv)}
    skips: dict[str, Skip] = {}
    for name, shapes in input_shapes(model, dense, example_inputs).items():
        planned, layer = made[name]
        if not shapes:
            continue
        way, seconds, best = fastest_chain(layer, sorted(set(shapes)))
        if str(way) == "kernel" or seconds >= best:
            reason = f"no faster as a tensor network (dense {1e3 * best:.3g} ms on the example inputs)"
            params, macs = planned.params_dense, planned.macs_dense
            shape = planned.geometry.weight_shape
            skips[name] = Skip(planned.names, planned.kind, shape, reason, params, macs)
    layers = tuple(skips.get(layer.name, layer) for layer in plan.layers)
    shifts = {name: shift for name, shift in plan.shifts.items() if name not in skips}
    return replace(plan, layers=layers, shifts=shifts)


def _shifted_means(model: nn.Module, plan: Plan) -> dict[nn.Module, Tensor]:
    """Return the running means with which BatchNorms behind fitted layers put out the same mean as before."""
    means = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, (norm_name, shift) in plan.shifts.items():
            if norm_name is not None:
                try:
                    norm: Any = model.get_submodule(norm_name)
                    mean = norm.running_mean
                    means[norm] = mean - shift.to(mean)
                except (AttributeError, RuntimeError, TypeError):
                    why = f"no BatchNorm {norm_name!r} takes its output"
                    raise ValueError(f"the plan does not fit this model at layer {name!r}: {why}") from None
    return means


def _build(layer: Layer, planned: LayerPlan, plan: Plan) -> tuple[LayerPlan, TNConv]:
    """Return the compressed layer that ``planned`` promises, and the plan with the error that came out."""
    weight, geometry = layer.weight(), layer.geometry
    where = describe(planned.name, weight)
    if weight.is_meta:
        raise ValueError(f"{where} is on the meta device: a plan needs no weights, compress does; load them")
    if geometry != planned.geometry:
        raise ValueError(f"the plan was made for {planned.geometry} at {where}, but there it is {geometry}")
    if planned.digest is not None and digest_of(weight) != planned.digest:
        raise ValueError(
            f"the plan was made for other weights of {where}: make a new plan from its spec (plan.spec)"
        )
    fit = plan.fits.get(planned.name)
    if fit is None and planned.output_error is not None:
        raise ValueError(f"{where}: the plan was made with calibration data: give it calibration, too")
    if fit is None:
        with memory_for(where):
            fit = planned.format.fit_groups(geometry.kernels(weight), planned.ranks)
    promised, made = planned.output_error, fit.output_error
    if promised is not None and made is not None and abs(made - promised) > 1e-3 * promised + 1e-6:
        raise ValueError(
            f"{where}: the plan promised an output error of {promised:.4g}, got {made:.4g}: was it made with "
            "other calibration data?"
        )
    promised = planned.rel_error
    if promised is not None and abs(fit.rel_error - promised) > 1e-3 * promised + 1e-6:
        raise ValueError(f"{where}: the plan promised an error of {promised:.4g}, got {fit.rel_error:.4g}")
    with torch.inference_mode(False):  # whose tensors could not be trained later
        factors = [factor.to(weight.device, copy=True) for factor in fit.factors]
        bias = layer.module.bias.detach().clone() if layer.module.bias is not None else None
        norm, shift = plan.shifts.get(planned.name, (None, None))
        if bias is not None and shift is not None and norm is None:
            bias += shift.to(bias)
        new = TNConv(planned.format, geometry, factors, bias, rel_error=fit.rel_error)
    new.factors.requires_grad_(layer.requires_grad)
    if new.bias is not None:
        new.bias.requires_grad_(layer.module.bias.requires_grad)
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if channels_last and weight.is_contiguous(memory_format=channels_last) and not weight.is_contiguous():
        new = new.to(memory_format=channels_last)
    if planned.digest is None:
        planned = replace(planned, rel_error=fit.rel_error, digest=digest_of(weight))
    return planned, adopt(new, layer.module)


def merge(model: M) -> M:
    """Return a copy of ``model`` with the dense layers that its tensor-network layers stand for.

    Training mode, ``requires_grad`` and hooks of each layer are kept. A single :class:`TNConv` and a wrapped
    model are a ``ValueError``.

    >>> import tncompress as tnc
    >>> small = tnc.compress(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), {"keep_dense": []})
    >>> dense, x = tnc.merge(small), torch.randn(1, 8, 9, 9)
    >>> type(small[1]).__name__, type(dense[1]).__name__, torch.allclose(dense(x), small(x), atol=1e-5)
    ('TNConv', 'Conv2d', True)
    """
    if isinstance(model, TNConv):
        raise ValueError("merge wants a model that holds TNConv layers; of a single layer take to_dense()")
    refuse_wrapped(model)
    target = copy_model(model)
    for layer in find_layers(target):
        if isinstance(layer.module, TNConv):
            dense = adopt(layer.module.to_dense(), layer.module)
            for name in layer.names:
                replace_module_(target, name, dense)
    if hasattr(target, "tncompress_plan"):
        del target.tncompress_plan
    return target
