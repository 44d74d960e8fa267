"""Making a plan: each layer meets the first rule that matches it, and its kernel is tried."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.contraction import chain_macs, dense_macs, macs_ratio
from tncompress.discovery import Layer, find_layers, input_shapes
from tncompress.formats import Fit
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.plan import LayerPlan, Plan, Skip
from tncompress.ranks import NoRanks, choose
from tncompress.spec import KEEP_DENSE, Rule, Settings, Spec, matches_any
from tncompress.tables import watched

Calls = Sequence[tuple[int, ...]]


def make_plan(
    model: nn.Module,
    spec: Spec | Mapping[str, Any] | str | Path,
    *,
    example_inputs: Any = None,
    progress: bool = False,
) -> Plan:
    """Return what ``compress(model, spec)`` would do to each layer, without doing it.

    ``example_inputs`` (a tensor, a tuple of arguments or a mapping of keyword arguments) is run once to
    count MACs; a layer that would take more of them than the dense one on these inputs then stays dense, too.
    A pattern that matches no layer, ranks that a kernel can't have, and NaN or infinity in a kernel are a
    ``ValueError`` that names the layer.
    """
    spec = Spec.parse(spec)
    layers = find_layers(model)
    kept = _kept_dense(spec, layers)
    calls = input_shapes(model, layers, example_inputs) if example_inputs is not None else {}
    decided: list[LayerPlan | Skip] = []
    fits: dict[str, Fit] = {}
    for layer in watched(layers, "planning", show=progress):
        rule = spec.rule_for(layer.names)
        reason = layer.obstacle or kept.get(layer.name)
        if reason is None and isinstance(rule, Rule) and rule.keep_dense:
            reason = f"kept dense by the rule '{rule.pattern}'"
        if reason is None:
            made = _plan_layer(layer, rule, spec, calls.get(layer.name))
            if isinstance(made, tuple):
                decided.append(made[0])
                fits[layer.name] = made[1]
                continue
            reason = made
        decided.append(_skip(layer, reason, calls.get(layer.name)))
    return Plan(tuple(decided), spec, sum(p.numel() for p in model.parameters()), fits)


def digest_of(kernel: Tensor) -> str:
    """Return a fingerprint of the kernel's values, by which a plan knows the weights it was made for."""
    raw = kernel.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=16).hexdigest()


def _plan_layer(
    layer: Layer, settings: Settings, spec: Spec, calls: Calls | None
) -> tuple[LayerPlan, Fit] | str:
    """Return the plan of one layer with its fit, or the reason why it stays dense."""
    kernel: Tensor = layer.module.weight.detach()
    where = f"layer {layer.name!r} with kernel {tuple(kernel.shape)}"
    if kernel.is_meta:
        raise ValueError(f"{where} is on the meta device: load the weights before planning")
    if not bool(torch.isfinite(kernel).all()):
        raise ValueError(f"{where} holds NaN or infinity: mend the weights, or keep the layer dense")
    geometry, format = ConvGeometry.of(layer.module), settings.format
    try:
        format.max_ranks(geometry.kernel_shape)
    except ValueError as error:
        return str(error)
    try:
        ranks, fit = choose(kernel, settings, allow_larger=spec.allow_larger)
    except NoRanks as reason:
        return str(reason)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    stages = format.stages(geometry.kernel_shape, ranks)
    if not spec.allow_larger and macs_ratio(geometry, stages) >= 1:
        return f"{format} at ranks {ranks} would take {macs_ratio(geometry, stages):.2f}x the dense MACs"
    macs = macs_dense = None
    if calls is not None:
        sizes = [_samples_and_lengths(shape, geometry.ndim) for shape in calls]
        macs = sum(chain_macs(geometry, stages, lengths, samples) for samples, lengths in sizes)
        macs_dense = _layer_macs(layer.module, calls)
        if not spec.allow_larger and macs >= macs_dense > 0:
            excess = f"{macs / macs_dense:.2f}x the dense MACs"
            return f"{format} at ranks {ranks} would take {excess} on the example inputs"
    planned = LayerPlan(
        names=layer.names,
        kind=layer.kind,
        geometry=geometry,
        format=format,
        ranks=ranks,
        rel_error=fit.rel_error,
        params=sum(factor.numel() for factor in fit.factors),
        params_dense=kernel.numel(),
        macs=macs,
        macs_dense=macs_dense,
        digest=digest_of(kernel),
    )
    return planned, fit


def _skip(layer: Layer, reason: str, calls: Calls | None) -> Skip:
    module = layer.module
    if isinstance(module, TNConv):
        shape, params = module.geometry.kernel_shape, sum(factor.numel() for factor in module.factors)
    else:
        shape = tuple(module.weight.shape)
        params = math.prod(shape)
    macs = _layer_macs(module, calls) if calls is not None else None
    return Skip(layer.names, layer.kind, shape, reason, params, macs)


def _layer_macs(module: Any, calls: Calls) -> int:
    """Return the multiply-accumulates of a layer, dense or compressed, over its calls."""
    if isinstance(module, TNConv):
        sizes = [_samples_and_lengths(shape, module.geometry.ndim) for shape in calls]
        return sum(chain_macs(module.geometry, module.stages, lengths, samples) for samples, lengths in sizes)
    weight = module.weight.numel()
    if isinstance(module, nn.Linear):
        return sum(weight * math.prod(shape[:-1]) for shape in calls)
    ndim = len(module.kernel_size)
    sizes = [_samples_and_lengths(shape, ndim) for shape in calls]
    if getattr(module, "transposed", False):
        return sum(samples * weight * math.prod(lengths) for samples, lengths in sizes)
    geometry = ConvGeometry.shape_of(module)
    per_group = [dense_macs(geometry, lengths, samples) for samples, lengths in sizes]
    return sum(per_group) // module.groups


def _samples_and_lengths(shape: tuple[int, ...], ndim: int) -> tuple[int, tuple[int, ...]]:
    """Return the number of samples and the spatial size of an input, batched or not."""
    if ndim == 0:
        return math.prod(shape[:-1]), ()
    return (shape[0] if len(shape) == ndim + 2 else 1), shape[len(shape) - ndim :]


def _kept_dense(spec: Spec, layers: list[Layer]) -> dict[str, str]:
    """Return why layers are kept dense by the spec, by name; check that every pattern matches something."""
    names = [name for layer in layers for name in layer.names]
    patterns = [rule.pattern for rule in spec.rules] + [p for p in spec.keep_dense if p not in KEEP_DENSE]
    for pattern in patterns:
        if not matches_any(pattern, names):
            shown = ", ".join(names[:8]) + (f", ... ({len(names) - 8} more)" if len(names) > 8 else "")
            raise ValueError(f"the pattern {pattern!r} matches no layer; the layers are {shown or 'none'}")
    kept = {}
    for layer in layers:
        for pattern in spec.keep_dense:
            if pattern not in KEEP_DENSE and matches_any(pattern, layer.names):
                kept[layer.name] = f"kept dense by keep_dense: '{pattern}'"
    for word, layer in zip(KEEP_DENSE, (layers[0], layers[-1]) if layers else (), strict=False):
        if word in spec.keep_dense:
            end = "first" if word == "stem" else "last"
            kept.setdefault(layer.name, f"the {word} ({end} layer), kept dense by default")
    return kept
