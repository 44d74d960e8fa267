"""Making a plan: each layer meets the first rule that matches it, and its kernel is tried."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.budgeting import allot, check_budget, under_budget
from tncompress.candidates import Candidate, Judge
from tncompress.costs import Calls, excess_of_macs, layer_macs, stages_macs
from tncompress.discovery import Layer, find_layers, refuse_wrapped
from tncompress.formats import Fit, Format
from tncompress.plan import LayerPlan, Plan, Skip
from tncompress.ranks import NoRanks, choose
from tncompress.running import input_shapes
from tncompress.spec import KEEP_DENSE, Rule, Settings, Spec, matches_any
from tncompress.tables import watched


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

    With a budget in the spec, formats and ranks are chosen for all layers together, and the plan's ``budget``
    says how it is kept. One on MACs or latency needs ``example_inputs``; one that can't be met is a
    ``ValueError``.
    """
    spec = Spec.parse(spec)
    refuse_wrapped(model)
    if spec.budget is not None:
        check_budget(spec.budget, example_inputs)
    layers = find_layers(model, spec.include)
    kept = _kept_dense(spec, layers)
    modules = {layer.name: layer.module for layer in layers}
    calls = input_shapes(model, modules, example_inputs) if example_inputs is not None else {}
    made: dict[str, tuple[LayerPlan, Fit | None] | Skip] = {}
    for layer in watched(layers, "planning", show=progress):
        rule = spec.rule_for(layer.names)
        reason = layer.obstacle or kept.get(layer.name)
        if reason is None and isinstance(rule, Rule) and rule.keep_dense:
            reason = f"kept dense by the rule '{rule.pattern}'"
        if reason is not None:
            made[layer.name] = _skip(layer, reason, calls.get(layer.name))
        elif under_budget(spec, rule):
            _check_weight(layer, needed=True)
        else:
            made[layer.name] = _plan_layer(layer, rule, spec, calls.get(layer.name))
    report = None
    if spec.budget is not None:
        judge = Judge()
        decided = {name: one if isinstance(one, Skip) else one[0] for name, one in made.items()}
        chosen, report = allot(
            model, layers, decided, spec, judge, calls=calls, example_inputs=example_inputs, progress=progress
        )
        open_layers = [layer for layer in layers if layer.name in chosen]
        for layer in watched(open_layers, "fitting", show=progress):
            made[layer.name] = _carry_out(layer, chosen[layer.name], judge, calls.get(layer.name))
        errors = {name: one[1].loss for name in chosen if isinstance(one := made[name], tuple) and one[1]}
        report = replace(report, fitted=sum((judge.loss(name, error) for name, error in errors.items()), 0.0))
    decisions = [(layer.name, made[layer.name]) for layer in layers]
    fits = {name: one[1] for name, one in decisions if isinstance(one, tuple) and one[1] is not None}
    planned = tuple(one if isinstance(one, Skip) else one[0] for _, one in decisions)
    return Plan(planned, spec, sum(p.numel() for p in model.parameters()), report, fits)


def digest_of(kernel: Tensor) -> str:
    """Return a fingerprint of the kernel's values, by which a plan knows the weights it was made for."""
    raw = kernel.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=16).hexdigest()


def _plan_layer(
    layer: Layer, settings: Settings, spec: Spec, calls: Calls | None
) -> tuple[LayerPlan, Fit | None] | Skip:
    """Return the plan of one layer by its own policy, with its fit; or why it stays dense."""
    weight, geometry, format = layer.weight(), layer.geometry, settings.one_format
    where = _check_weight(layer)
    try:
        format.max_ranks(geometry.kernel_shape)
    except ValueError as error:
        return _skip(layer, str(error), calls)
    limit = math.inf if spec.allow_larger else layer.params - 1
    try:
        with memory_for(where):
            ranks, fit = choose(geometry.kernels(weight), settings, limit=limit)
    except NoRanks as reason:
        return _skip(layer, str(reason), calls)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    stages = format.stages(geometry.kernel_shape, ranks)
    if not spec.allow_larger and (excess := excess_of_macs(layer, stages, calls)):
        return _skip(layer, f"{format} at ranks {ranks} {excess}", calls)
    return _layer_plan(layer, format, ranks, fit, calls), fit


def _carry_out(
    layer: Layer, chosen: Candidate, judge: Judge, calls: Calls | None
) -> tuple[LayerPlan, Fit | None] | Skip:
    """Return the plan of one layer under a budget, with the fit of what was chosen for it."""
    if chosen.format is None:
        return _skip(layer, "the budget leaves it dense", calls)
    with memory_for(describe(layer.name, layer.weight())):
        fit = judge.fit(layer.name, layer.geometry.kernels(layer.weight()), chosen.format, chosen.ranks)
    return _layer_plan(layer, chosen.format, chosen.ranks, fit, calls), fit


def _layer_plan(
    layer: Layer, format: Format, ranks: tuple[int, ...], fit: Fit | None, calls: Calls | None
) -> LayerPlan:
    geometry = layer.geometry
    stages = format.stages(geometry.kernel_shape, ranks)
    return LayerPlan(
        names=layer.names,
        kind=layer.kind,
        geometry=geometry,
        format=format,
        ranks=ranks,
        rel_error=fit.rel_error if fit is not None else None,
        params=format.num_params(geometry.kernel_shape, ranks, geometry.groups),
        params_dense=layer.params,
        macs=stages_macs(geometry, stages, calls) if calls is not None else None,
        macs_dense=layer_macs(layer, calls) if calls is not None else None,
        digest=digest_of(layer.weight()) if fit is not None else None,
    )


def _check_weight(layer: Layer, *, needed: bool = False) -> str:
    """Return how errors speak of the layer; raise one for NaN, infinity, and lack of what is ``needed``."""
    weight = layer.weight()
    where = describe(layer.name, weight)
    if weight.is_meta and needed:
        raise ValueError(f"{where} is on the meta device, and a budget needs its weights: load them")
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where} holds NaN or infinity: mend the weights, or keep the layer dense")
    return where


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
    macs = layer_macs(layer, calls) if calls is not None else None
    return Skip(layer.names, layer.kind, layer.geometry.weight_shape, reason, layer.params, macs)


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
