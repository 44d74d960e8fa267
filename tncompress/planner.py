"""Making a plan: each layer meets the first rule that matches it, or has its share of a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tncompress.budgeting import allot, check_budget, under_budget
from tncompress.calibrate import Calibration, as_calibration
from tncompress.candidates import Candidate
from tncompress.costs import Calls, excess_of_macs, layer_macs, stages_macs
from tncompress.discovery import Layer, digest_of, find_layers, refuse_wrapped
from tncompress.formats import Fit, Format
from tncompress.judge import Judge
from tncompress.layerwise import for_each_layer
from tncompress.metric import Metric
from tncompress.plan import LayerPlan, Plan, Skip
from tncompress.ranks import NoRanks, choose, fit_at
from tncompress.responses import Sensitivity
from tncompress.running import input_shapes
from tncompress.selection import check_weight, describe, kept_dense, memory_for
from tncompress.sensitivity import quick_sensitivity
from tncompress.spec import Rule, Settings, Spec

Decision = tuple[LayerPlan, Fit | None] | Skip


def make_plan(
    model: nn.Module,
    spec: Spec | Mapping[str, Any] | str | Path,
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    sensitivity: Sensitivity | None = None,
    example_inputs: Any = None,
    progress: bool = False,
) -> Plan:
    """Return what ``compress(model, spec)`` would do to each layer, without doing it.

    With ``calibration`` (a :class:`Calibration`, or batches of inputs to make one of) kernels are fitted, and
    ranks chosen, so that the layers' outputs change least on these data. ``example_inputs`` (a tensor, a
    tuple of arguments or a mapping of keyword arguments) is run once to count MACs; a layer that would take
    more of them than the dense one on these inputs then stays dense, too. A pattern that matches no layer,
    ranks that a kernel can't have, and NaN or infinity in a kernel are a ``ValueError`` that names the layer;
    so is a model inside of a wrapper (``torch.compile``, DDP). A model on the meta device can be planned with
    the policies ``fixed``, ``rank_fraction`` and ``params_ratio``: the last then goes by flat spectra, and
    errors are unknown.

    With a budget in the spec, formats and ranks are chosen for all layers together, and the plan's ``budget``
    says how it is kept. What the choice loses is measured by ``sensitivity`` as the change of the network's
    output; without one by the errors of the layers' outputs, or of the kernels, added up. Batches as
    ``calibration`` are also used for a :func:`quick_sensitivity`. A budget on MACs or latency needs
    ``example_inputs``; one that can't be met is a ``ValueError``.

    >>> import tncompress as tnc
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 4, 1))
    >>> plan = tnc.make_plan(model, {"default": {"format": "tucker", "rank": {"fixed": [8, 16]}}})
    >>> [(layer.name, layer.ranks, layer.params) for layer in plan.compressed]
    [('2', (8, 16), 2432)]
    >>> plan.skipped[0].reason
    'the stem (first layer), kept dense by default'
    """
    spec = Spec.parse(spec)
    refuse_wrapped(model)
    if spec.budget is not None:
        check_budget(spec.budget, example_inputs)
    layers = find_layers(model, spec.include)
    moments = as_calibration(calibration, model, include=spec.include, progress=progress)
    batches = None if isinstance(calibration, Calibration) else calibration
    if spec.budget is not None and sensitivity is None and batches is not None:
        sensitivity = quick_sensitivity(
            model,
            batches,
            formats=spec.formats,
            calibration=moments,
            keep_dense=spec.keep_dense,
            include=spec.include,
            progress=progress,
        )
    judge = Judge(moments, sensitivity, layers)
    modules = {layer.name: layer.module for layer in layers}
    calls = input_shapes(model, modules, example_inputs) if example_inputs is not None else {}
    made = _by_rules(layers, spec, judge, calls, progress=progress)
    report = None
    if spec.budget is not None:
        decided = {name: one if isinstance(one, Skip) else one[0] for name, one in made.items()}
        chosen, report = allot(
            model, layers, decided, spec, judge, calls=calls, example_inputs=example_inputs, progress=progress
        )
        fitted = _by_choice(layers, chosen, judge, calls, progress=progress)
        made, report = made | fitted, replace(report, fitted=_fitted_loss(fitted, judge))
    decisions = [(layer.name, made[layer.name]) for layer in layers]
    fits = {name: one[1] for name, one in decisions if isinstance(one, tuple) and one[1] is not None}
    planned = tuple(one if isinstance(one, Skip) else one[0] for _, one in decisions)
    plan = Plan(planned, spec, sum(p.numel() for p in model.parameters()), report, fits)
    return _with_shifts(plan, layers, moments) if moments is not None else plan


def _by_rules(
    layers: list[Layer], spec: Spec, judge: Judge, calls: Mapping[str, Calls], *, progress: bool
) -> dict[str, Decision]:
    """Return what becomes of each layer whose ranks are not left to a budget."""
    kept, made = kept_dense(spec, layers), dict[str, Decision]()
    wanted: dict[str, tuple[Layer, Settings]] = {}
    for layer in layers:
        rule = spec.rule_for(layer.names)
        reason = layer.obstacle or kept.get(layer.name)
        if reason is None and isinstance(rule, Rule) and rule.keep_dense:
            reason = f"kept dense by the rule '{rule.pattern}'"
        if reason is not None:
            made[layer.name] = _skip(layer, reason, calls.get(layer.name))
        elif under_budget(spec, rule):
            check_weight(layer, needed=True)
        else:
            wanted[layer.name] = layer, rule

    def planned(layer: Layer) -> Decision:
        settings = wanted[layer.name][1]
        return _plan_layer(layer, settings, spec, calls.get(layer.name), judge.metric(layer.name))

    asked = [layer for layer, _ in wanted.values()]
    return made | for_each_layer(asked, planned, "planning", at_once=judge.at_once(asked), progress=progress)


def _by_choice(
    layers: Sequence[Layer],
    chosen: Mapping[str, Candidate],
    judge: Judge,
    calls: Mapping[str, Calls],
    *,
    progress: bool,
) -> dict[str, Decision]:
    """Return what becomes of each layer for which a candidate was chosen, with its fit."""

    def carried_out(layer: Layer) -> Decision:
        return _carry_out(layer, chosen[layer.name], calls.get(layer.name), judge.metric(layer.name))

    asked = [layer for layer in layers if layer.name in chosen]
    return for_each_layer(asked, carried_out, "fitting", at_once=judge.at_once(asked), progress=progress)


def _fitted_loss(made: Mapping[str, Decision], judge: Judge) -> float:
    """Return what the fits of these layers lose together, by the judge."""
    done = [one for one in made.values() if not isinstance(one, Skip)]
    return sum((judge.loss(one.name, fit.loss, one.format) for one, fit in done if fit is not None), 0.0)


def with_fits(plan: Plan, layers: Sequence[Layer], calibration: Calibration) -> Plan:
    """Return a plan that was made with calibration and read from a file with its fits made again."""
    found, fits = {layer.name: layer for layer in layers}, dict(plan.fits)
    for planned in plan.compressed:
        layer, metric = found.get(planned.name), calibration.metric(planned.name)
        if planned.name in fits or planned.output_error is None or layer is None or metric is None:
            continue
        weight = layer.weight()
        if layer.geometry == planned.geometry and digest_of(weight) == planned.digest:
            with memory_for(describe(layer.name, weight)):
                fit = fit_at(planned.format, layer.geometry.kernels(weight), planned.ranks, metric)
            if fit is not None:
                fits[planned.name] = fit
    return _with_shifts(replace(plan, fits=fits), layers, calibration)


def _with_shifts(plan: Plan, layers: Sequence[Layer], calibration: Calibration) -> Plan:
    """Return ``plan`` with what keeps the mean output of its fits, and with the calibration's notes."""
    found, shifts = {layer.name: layer for layer in layers}, {}
    for planned in plan.compressed:
        fit = plan.fits.get(planned.name)
        if fit is not None and planned.output_error is not None:
            shape, layer = planned.geometry.kernel_shape, found[planned.name]
            rebuilt = planned.format.to_dense([factor.double() for factor in fit.factors], shape)
            error = layer.geometry.kernels(layer.weight().double()) - rebuilt.reshape(-1, *shape)
            shift = calibration.shift(planned.name, error)
            if shift is not None:
                shifts[planned.name] = shift
    notes = calibration.notes(planned.name for planned in plan.compressed)
    return replace(plan, shifts=shifts, notes=tuple(dict.fromkeys((*plan.notes, *notes))))


def _plan_layer(
    layer: Layer, settings: Settings, spec: Spec, calls: Calls | None, metric: Metric | None
) -> Decision:
    """Return the plan of one layer by its own policy, with its fit; or why it stays dense."""
    weight, geometry, format = layer.weight(), layer.geometry, settings.one_format
    where = check_weight(layer)
    try:
        format.max_ranks(geometry.kernel_shape)
    except ValueError as error:
        return _skip(layer, str(error), calls)
    limit = math.inf if spec.allow_larger else layer.params - 1
    try:
        with memory_for(where):
            ranks, fit = choose(geometry.kernels(weight), settings, limit=limit, metric=metric)
    except NoRanks as reason:
        return _skip(layer, str(reason), calls)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    stages = format.stages(geometry.kernel_shape, ranks)
    if not spec.allow_larger and (excess := excess_of_macs(layer, stages, calls)):
        return _skip(layer, f"{format} at ranks {ranks} {excess}", calls)
    return _layer_plan(layer, format, ranks, fit, calls), fit


def _carry_out(layer: Layer, chosen: Candidate, calls: Calls | None, metric: Metric | None) -> Decision:
    """Return the plan of one layer under a budget, with the fit of what was chosen for it."""
    if chosen.format is None:
        return _skip(layer, "the budget leaves it dense", calls)
    weight = layer.weight()
    with memory_for(describe(layer.name, weight)):
        fit = fit_at(chosen.format, layer.geometry.kernels(weight), chosen.ranks, metric)
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
        output_error=fit.output_error if fit is not None else None,
    )


def _skip(layer: Layer, reason: str, calls: Calls | None) -> Skip:
    macs = layer_macs(layer, calls) if calls is not None else None
    return Skip(layer.names, layer.kind, layer.geometry.weight_shape, reason, layer.params, macs)
