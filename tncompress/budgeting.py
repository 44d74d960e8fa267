"""Sharing out a budget: which candidate every layer gets, and what to say where there is no way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from tncompress.candidates import Candidate, candidates_of, dense_candidate
from tncompress.costs import Calls, model_bytes
from tncompress.discovery import Layer
from tncompress.judge import Judge
from tncompress.knapsack import Infeasible, Solution, solve
from tncompress.latency import Clock
from tncompress.layerwise import for_each_layer
from tncompress.plan import BudgetReport, LayerPlan, Skip
from tncompress.spec import Budget, Settings, Spec

SHOWN = 3
"""How many of the layers that stand in the way of a budget an error names."""


@dataclass(frozen=True)
class Share:
    """What one layer, or the rest of the model, takes of each resource, and why no less."""

    name: str
    why: str
    costs: tuple[int | float, ...]


def allot(
    model: nn.Module,
    layers: Sequence[Layer],
    decided: Mapping[str, LayerPlan | Skip],
    spec: Spec,
    judge: Judge,
    *,
    calls: Mapping[str, Calls],
    example_inputs: Any = None,
    progress: bool = False,
) -> tuple[dict[str, Candidate], BudgetReport]:
    """Return what becomes of each layer that is not in ``decided``, and how the budget of ``spec`` is kept.

    The losses of the layers sum up to the least that there is among their candidates. A budget that can't
    be kept is a ``ValueError`` that says how close one can come, and which layers stand in the way.
    """
    budget = spec.budget
    assert budget is not None
    asked = budget.asked
    clock = Clock(budget.latency_from) if "latency" in asked else None
    open_layers = [layer for layer in layers if layer.name not in decided]

    def weighed(layer: Layer) -> list[Candidate]:
        return candidates_of(
            layer,
            spec.rule_for(layer.names),
            judge,
            calls=calls.get(layer.name),
            clock=clock,
            allow_larger=spec.allow_larger,
        )

    alone = clock is not None and clock.source == "measurement"  # nothing else may run while it measures
    at_once = 1 if alone else judge.at_once(open_layers)
    offers = for_each_layer(open_layers, weighed, "weighing", at_once=at_once, progress=progress)
    now = {layer.name: dense_candidate(layer, calls.get(layer.name), clock) for layer in layers}
    dense = _dense_totals(model, now.values(), asked, clock, example_inputs)
    limits = np.array([fraction * total for fraction, total in zip(asked.values(), dense, strict=True)])
    fixed = [
        _share(layer, decided[layer.name], asked, calls, clock) for layer in layers if layer.name in decided
    ]
    held = [sum(values) for values in zip(*(_costs(one, asked) for one in now.values()), strict=True)]
    rest = tuple(total - part for total, part in zip(dense, held, strict=True))
    fixed.append(Share("", "the rest of the model", rest))
    made = _solve(list(offers.values()), fixed, asked, limits)
    if isinstance(made, Infeasible):
        raise ValueError(_no_way(made, offers, fixed, asked, dense))
    chosen = {name: offers[name][pick] for (name, pick) in zip(offers, made.choice, strict=False)}
    spent = {name: cost / total for name, cost, total in zip(asked, made.costs, dense, strict=True)}
    return chosen, BudgetReport(asked, spent, made.loss, made.bound, None, judge.measure)


def _solve(
    offers: Sequence[Sequence[Candidate]],
    fixed: Iterable[Share],
    asked: Mapping[str, float],
    limits: np.ndarray,
) -> Solution | Infeasible:
    """Return the choice of the knapsack, in which all that is fixed is one more layer, the last."""
    losses = [np.array([candidate.loss for candidate in each]) for each in offers]
    costs = [np.array([_costs(candidate, asked) for candidate in each], float) for each in offers]
    total = np.sum([share.costs for share in fixed], axis=0, dtype=float)
    return solve([*losses, np.zeros(1)], [*costs, np.maximum(total, 0.0)[None]], limits)


def _costs(candidate: Candidate, asked: Iterable[str]) -> tuple[int | float, ...]:
    return tuple(getattr(candidate, resource) for resource in asked)


def _dense_totals(
    model: nn.Module,
    layers: Iterable[Candidate],
    asked: Iterable[str],
    clock: Clock | None,
    example_inputs: Any,
) -> list[int | float]:
    """Return what the whole model takes now of each resource that is asked for."""
    layers, totals = list(layers), list[int | float]()
    for resource in asked:
        if resource == "params":
            totals.append(sum(p.numel() for p in model.parameters()))
        elif resource == "bytes":
            totals.append(model_bytes(model))
        else:
            total = sum(getattr(one, resource) for one in layers)
            if resource == "latency" and clock:
                total = clock.model(model, example_inputs, total)
            if not total:
                raise ValueError(
                    f"a budget on {resource} needs layers that the example inputs reach, got none"
                )
            totals.append(total)
    return totals


def _share(
    layer: Layer,
    decision: LayerPlan | Skip,
    asked: Iterable[str],
    calls: Mapping[str, Calls],
    clock: Clock | None,
) -> Share:
    """Return what a layer takes that is not under the budget."""
    reached = calls.get(layer.name)
    if isinstance(decision, Skip):
        why = f"stays dense: {decision.reason}"
        return Share(layer.name, why, _costs(dense_candidate(layer, reached, clock), asked))
    format, ranks = decision.format, decision.ranks
    stages = format.stages(layer.geometry.kernel_shape, ranks)
    latency = clock.chain(layer, stages, reached) if clock and reached is not None else None
    size = decision.params * layer.weight().itemsize
    taken = Candidate(format, ranks, 0.0, decision.params, size, decision.macs, latency)
    return Share(layer.name, f"{format} at ranks {ranks} by its rule", _costs(taken, asked))


def _no_way(
    verdict: Infeasible,
    offers: Mapping[str, Sequence[Candidate]],
    fixed: Sequence[Share],
    asked: Mapping[str, float],
    dense: Sequence[int | float],
) -> str:
    """Return in one line how close a budget can be come to, what stands in the way, and what to try."""
    wanted = " and ".join(f"{name} {fraction:.4g}" for name, fraction in asked.items())
    alone = [low / total for low, total in zip(verdict.smallest, dense, strict=True)]
    over = [i for i, (low, most) in enumerate(zip(alone, asked.values(), strict=True)) if low > most]
    if over:
        reach = " and ".join(f"{list(asked)[i]} {_rounded_up(alone[i])}" for i in over)
        near = f"the least that can be reached is {reach}"
    else:
        closest = zip(asked, verdict.closest, dense, strict=True)
        near = "each by itself can, but together the closest is " + " and ".join(
            f"{name} {_rounded_up(cost / total)}" for name, cost, total in closest
        )
    worst = over[0] if over else int(np.argmax(np.array(verdict.closest) / dense / list(asked.values())))
    smallest = [
        Share(name, _why_no_less(each), _costs(min(each, key=lambda c: _costs(c, asked)[worst]), asked))
        for name, each in offers.items()
    ]
    largest = sorted([*fixed, *smallest], key=lambda share: -share.costs[worst])[:SHOWN]
    parts = [
        f"{share.name or share.why} {share.costs[worst] / dense[worst]:.4f}"
        + (f" ({share.why})" if share.name else "")
        for share in largest
    ]
    return (
        f"the budget {wanted} can't be met: {near}; in the way, by their part of the {list(asked)[worst]}: "
        f"{'; '.join(parts)}. Ask for more, keep fewer layers dense (keep_dense, include), lower min_rank "
        "or round_to, or let all formats compete (format auto) where they do not yet"
    )


def _why_no_less(offers: Sequence[Candidate]) -> str:
    return "at its smallest ranks" if len(offers) > 1 else "no format makes it smaller"


def _rounded_up(fraction: float) -> str:
    """Return a fraction with four digits that, asked for, can be met."""
    return f"{np.ceil(fraction * 1e4) / 1e4:.4f}"


def check_budget(budget: Budget, example_inputs: Any) -> None:
    """Raise a ``ValueError`` where a budget is on what only a forward pass can tell, and there is none."""
    for resource in ("macs", "latency"):
        if resource in budget.asked and example_inputs is None:
            raise ValueError(
                f"a budget on {resource} is kept on example inputs, got none: pass example_inputs (on the "
                "command line --input or --data)"
            )


def under_budget(spec: Spec, rule: Settings) -> bool:
    """Say whether the ranks of a layer with this rule are left to the budget."""
    return spec.budget is not None and "rank" not in rule.model_fields_set
