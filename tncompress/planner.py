"""Making a plan: each layer meets the first rule that matches it, and its kernel is tried."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.contraction import chain_macs, dense_macs, macs_ratio
from tncompress.discovery import Layer, find_layers, refuse_wrapped
from tncompress.formats import Fit, Stage
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.plan import LayerPlan, Plan, Skip
from tncompress.ranks import NoRanks, choose
from tncompress.running import input_shapes
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
    ``ValueError`` that names the layer; so is a model inside of a wrapper (``torch.compile``, DDP). A model
    on the meta device can be planned with the policies ``fixed`` and ``params_ratio``: ranks are then those
    of flat spectra, and errors unknown.
    """
    spec = Spec.parse(spec)
    refuse_wrapped(model)
    layers = find_layers(model, spec.include)
    kept = _kept_dense(spec, layers)
    modules = {layer.name: layer.module for layer in layers}
    calls = input_shapes(model, modules, example_inputs) if example_inputs is not None else {}
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
                planned, fit = made
                decided.append(planned)
                if fit is not None:
                    fits[layer.name] = fit
                continue
            reason = made
        decided.append(_skip(layer, reason, calls.get(layer.name)))
    return Plan(tuple(decided), spec, sum(p.numel() for p in model.parameters()), fits)


def digest_of(kernel: Tensor) -> str:
    """Return a fingerprint of the kernel's values, by which a plan knows the weights it was made for."""
    raw = kernel.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=16).hexdigest()


def _plan_layer(
    layer: Layer, settings: Settings, spec: Spec, calls: Calls | None
) -> tuple[LayerPlan, Fit | None] | str:
    """Return the plan of one layer with its fit, or the reason why it stays dense."""
    weight, geometry, format = layer.weight(), layer.geometry, settings.one_format
    where = describe(layer.name, weight)
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where} holds NaN or infinity: mend the weights, or keep the layer dense")
    try:
        format.max_ranks(geometry.kernel_shape)
    except ValueError as error:
        return str(error)
    limit = math.inf if spec.allow_larger else layer.params - 1
    try:
        with memory_for(where):
            ranks, fit = choose(geometry.kernels(weight), settings, limit=limit)
    except NoRanks as reason:
        return str(reason)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    stages = format.stages(geometry.kernel_shape, ranks)
    now = layer.module.stages if isinstance(layer.module, TNConv) else None
    more = macs_ratio(geometry, stages) / (macs_ratio(geometry, now) if now else 1)
    if not spec.allow_larger and more >= 1:
        return f"{format} at ranks {ranks} would take {more:.2f}x the {'present' if now else 'dense'} MACs"
    macs = macs_dense = None
    if calls is not None:
        macs, macs_dense = _chain_macs(geometry, stages, calls), _layer_macs(layer, calls)
        if not spec.allow_larger and macs >= macs_dense > 0:
            excess = f"{macs / macs_dense:.2f}x the {'present' if now else 'dense'} MACs"
            return f"{format} at ranks {ranks} would take {excess} on the example inputs"
    planned = LayerPlan(
        names=layer.names,
        kind=layer.kind,
        geometry=geometry,
        format=format,
        ranks=ranks,
        rel_error=fit.rel_error if fit is not None else None,
        params=format.num_params(geometry.kernel_shape, ranks, geometry.groups),
        params_dense=layer.params,
        macs=macs,
        macs_dense=macs_dense,
        digest=digest_of(weight) if fit is not None else None,
    )
    return planned, fit


def describe(name: str, weight: Tensor) -> str:
    """Return how errors speak of a layer."""
    return f"layer {name!r} with kernel {tuple(weight.shape)}"


@contextmanager
def memory_for(where: str) -> Iterator[None]:
    """Turn whatever torch raises where memory is short into a ``MemoryError`` that names the layer."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = "not enough memory", "out of memory", "can't allocate memory"
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        hint = "free memory, move the model to the CPU, or keep the layer dense by a rule"
        raise MemoryError(f"out of memory while decomposing {where}: {hint}") from error


def _skip(layer: Layer, reason: str, calls: Calls | None) -> Skip:
    macs = _layer_macs(layer, calls) if calls is not None else None
    return Skip(layer.names, layer.kind, layer.geometry.weight_shape, reason, layer.params, macs)


def _layer_macs(layer: Layer, calls: Calls) -> int:
    """Return the multiply-accumulates of a layer as it is, dense or compressed, over its calls."""
    geometry = layer.geometry
    if isinstance(layer.module, TNConv):
        return _chain_macs(geometry, layer.module.stages, calls)
    sizes = [_samples_and_lengths(shape, geometry.ndim) for shape in calls]
    return sum(dense_macs(geometry, lengths, samples) for samples, lengths in sizes)


def _chain_macs(geometry: ConvGeometry, stages: Sequence[Stage], calls: Calls) -> int:
    sizes = [_samples_and_lengths(shape, geometry.ndim) for shape in calls]
    return sum(chain_macs(geometry, stages, lengths, samples) for samples, lengths in sizes)


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
