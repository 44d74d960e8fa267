"""A budget is kept, used up by what loses least, and refused in plain words where it cannot be met."""

import itertools
import json
import re
import warnings

import pytest
import torch
from conftest import GEOMETRIES
from torch import nn
from typer.testing import CliRunner

import tncompress as tnc
from tncompress import layerwise
from tncompress.candidates import FITS, candidates_of, errors_along, ranks_along
from tncompress.cli import app
from tncompress.discovery import find_layers
from tncompress.formats import FORMATS, all_contenders
from tncompress.judge import COPIES, Judge
from tncompress.latency import Clock, modelled
from tncompress.machine import Machine, keep_machine, warn_once
from tncompress.measure import Latency, macs, num_params
from tncompress.plan import Plan
from tncompress.planner import make_plan
from tncompress.ranks import RankPath
from tncompress.threads import with_threads

ALL = [*FORMATS, {"name": "svd", "cut": "out kw|in kh"}]
BUDGETS = [
    {"params": 0.5},
    {"params": 0.2},
    {"macs": 0.3},
    {"bytes": 0.35},
    {"params": 0.3, "macs": 0.3},
    {"params": 0.4, "bytes": 0.35, "macs": 0.5},
]
every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=str)


@pytest.fixture(autouse=True)
def _few_sweeps(quick_cp):
    """No test here asks how good CP is."""


def fade_(layer):
    """Give a layer a kernel whose spectra fall off along every leg, as those of trained ones do."""
    with torch.no_grad():
        for mode, size in enumerate(layer.weight.shape):
            fall = 0.8 ** torch.arange(size, dtype=layer.weight.dtype)
            layer.weight.mul_(fall.reshape([-1 if axis == mode else 1 for axis in range(layer.weight.ndim)]))


def net():
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 20, 3, stride=(2, 1)), nn.ReLU(),
        nn.Conv2d(20, 24, 3, groups=2), nn.Conv2d(24, 24, (1, 5), padding="same", bias=False),
        nn.ConvTranspose2d(24, 16, 4, stride=2), nn.Conv2d(16, 30, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(30, 40), nn.Linear(40, 4),
    )  # fmt: skip
    for layer in model:
        if hasattr(layer, "weight") and layer.weight.ndim > 1:
            fade_(layer)
    return model


X = torch.randn(2, 3, 14, 12)


def spec_of(budget, format="auto", **more):
    return {"default": {"format": format}, "budget": budget} | more


def held_bytes(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def taken(model):
    """What a model takes, counted on the model itself."""
    return {"params": num_params(model), "macs": macs(model, X), "bytes": held_bytes(model)}


@every_budget
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_budget_is_kept_and_what_is_reported_is_what_is_there(budget, dtype):
    model = net()
    if dtype == torch.float64:
        model[3].double()  # its bytes count twice
    plan = make_plan(model, spec_of(budget), example_inputs=X) if dtype == torch.float32 else None
    if plan is None:
        return check_bytes_of_mixed(model, budget)
    small = tnc.compress(model, plan)
    before, after = taken(model), taken(small)
    assert plan.budget.asked == budget
    for resource, fraction in budget.items():
        assert after[resource] <= fraction * before[resource]
        assert plan.budget.reached[resource] == pytest.approx(after[resource] / before[resource], rel=1e-9)
    assert max(plan.budget.reached[r] / budget[r] for r in budget) > 0.93  # used up
    assert plan.budget.bound <= plan.budget.loss
    assert (plan.budget.measure, small.tncompress_plan.budget) == ("kernel error", plan.budget)
    fitted = sum(layer.rel_error**2 for layer in plan.compressed)
    assert plan.budget.fitted == pytest.approx(fitted)
    return None


def check_bytes_of_mixed(model, budget):
    if set(budget) & {"macs"}:  # no forward pass through two dtypes
        return
    small = tnc.compress(model, spec_of(budget))
    assert held_bytes(small) <= budget.get("bytes", 1) * held_bytes(model)
    assert num_params(small) <= budget.get("params", 1) * num_params(model)


def test_a_larger_budget_never_loses_more():
    model = net()
    for format, names in itertools.product(("auto", "mps"), (("params",), ("params", "macs"))):
        losses = [
            make_plan(model, spec_of(dict.fromkeys(names, f), format), example_inputs=X).budget.loss
            for f in (0.3, 0.4, 0.6, 1)
        ]
        assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
        assert losses[0] > losses[-1] == 0


@pytest.mark.parametrize("budget", BUDGETS[1:4], ids=str)
def test_all_formats_together_are_at_least_as_good_as_each_alone(budget):
    model = net()
    together = make_plan(model, spec_of(budget), example_inputs=X).budget
    for format in ALL:
        alone = make_plan(model, spec_of(budget, format), example_inputs=X).budget
        assert together.loss <= alone.loss * (1 + 1e-6)
        assert together.fitted <= 1.1 * alone.fitted  # losses between fits are interpolated


def test_a_budget_is_better_than_the_same_ratio_everywhere():
    model = net()
    uniform = make_plan(model, {"default": {"format": "mps", "rank": {"params_ratio": 0.3}}})
    share = uniform.params / uniform.params_model
    plan = make_plan(model, spec_of({"params": share}, "mps"))
    assert plan.params <= uniform.params
    assert plan.budget.fitted < sum(layer.rel_error**2 for layer in uniform.compressed)


def test_what_a_plan_promises_comes_out_of_a_file_too(tmp_path):
    model = net()
    plan = make_plan(model, spec_of({"params": 0.3, "macs": 0.4}), example_inputs=X)
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert (read, read.budget) == (plan, plan.budget)
    one, other = tnc.compress(model, plan), tnc.compress(model, read)
    torch.testing.assert_close(one.eval()(X), other.eval()(X))
    for layer in plan.compressed:
        made = one.get_submodule(layer.name)
        assert (made.format, made.ranks) == (layer.format, layer.ranks)
    assert f"budget: params {plan.budget.reached['params']:.4f} of 0.3" in str(read)
    older = {key: value for key, value in plan.to_dict().items() if key != "budget"}
    assert Plan.from_dict(older).budget is None


def test_rules_keep_their_ranks_and_what_they_take_counts():
    model = net()
    rules = [
        {"pattern": "3", "format": "svd", "rank": {"fixed": 10}},
        {"pattern": "7", "format": "tucker"},
        {"pattern": "8", "keep_dense": True},
    ]
    plan = make_plan(model, spec_of({"params": 0.5}, rules=rules, keep_dense=[]))
    found = {layer.name: layer for layer in plan.layers}
    assert (found["3"].format, found["3"].ranks) == (tnc.SVD(), (10,))
    assert found["7"].format == tnc.Tucker()
    assert found["8"].reason == "kept dense by the rule '8'"
    assert num_params(tnc.compress(model, plan)) <= 0.5 * num_params(model)


def test_bounds_on_ranks_bind():
    model = net()
    settings = {"format": "mps", "min_rank": 4, "max_rank": 12, "round_to": 4}
    plan = make_plan(model, {"default": settings, "budget": {"params": 0.5}})
    assert plan.compressed
    for layer in plan.compressed:
        tops = layer.format.max_ranks(layer.geometry.kernel_shape)
        assert all(
            4 <= r <= 12 and (r % 4 == 0 or r == top) for r, top in zip(layer.ranks, tops, strict=True)
        )


def test_a_layer_that_may_stay_dense_does():
    plan = make_plan(net(), spec_of({"params": 1.0}))
    assert not plan.compressed
    assert {layer.reason for layer in plan.skipped[1:-1]} == {"the budget leaves it dense"}
    assert (plan.budget.loss, plan.budget.fitted) == (0, 0)
    assert plan.budget.bound == pytest.approx(0, abs=1e-12)
    assert plan.budget.reached == {"params": 1.0}


# --- candidates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_candidates_cost_what_the_compressed_layer_costs(kind):
    geometry = GEOMETRIES[kind]
    layer = geometry.layer(torch.float32)
    fade_(layer)
    model, x = nn.Sequential(layer, nn.Identity()), geometry.input(torch.float32)
    (found,) = find_layers(model, ["depthwise"])
    dense, *others = candidates_of(
        found, tnc.Settings(format="auto"), Judge(), calls=[tuple(x.shape)], allow_larger=True
    )
    assert (dense.format, dense.loss, dense.params) == (None, 0, layer.weight.numel())
    assert others
    for candidate in others[:: max(1, len(others) // 4)]:
        made = tnc.TNConv.from_dense(layer, candidate.format, candidate.ranks)
        held = list(made.factors)
        assert candidate.params == sum(f.numel() for f in held)
        assert candidate.bytes == sum(f.nbytes for f in held)
        assert candidate.macs == macs(nn.Sequential(made), x)
    smaller = candidates_of(found, tnc.Settings(format="auto"), Judge(), calls=[tuple(x.shape)])
    assert all(c.params < dense.params and c.macs < dense.macs for c in smaller[1:])


@pytest.mark.parametrize("format", all_contenders(), ids=str)
def test_losses_are_close_to_those_of_real_fits(format):
    layer = nn.Conv2d(24, 32, 3)
    fade_(layer)
    kernels = layer.weight.detach()[None]
    path = RankPath(kernels, tnc.Settings(format=format))
    ranks, fitted = ranks_along(path), []

    estimates = path.estimates
    path.estimates = lambda several: (fitted.extend(several), estimates(several))[1]
    errors = errors_along(path, ranks)
    assert len(fitted) <= FITS
    assert errors == sorted(errors, reverse=True)
    for each, error in list(zip(ranks, errors, strict=True))[::6]:
        true = format.fit_groups(kernels, each).rel_error
        if path.params(each) < 0.5 * kernels.numel():
            assert error == pytest.approx(true, rel=0.25, abs=1e-3)


@pytest.mark.parametrize(
    ("budget", "threads"),
    [
        ({"params": 0.9}, 2),
        ({"latency": 0.9, "latency_from": "model"}, 2),
        ({"latency": 0.9, "latency_from": "measurement"}, 1),
    ],
    ids=str,
)
def test_nothing_runs_beside_a_measurement(budget, threads, monkeypatch):
    monkeypatch.setattr("tncompress.latency.measured", lambda *chain, **_: modelled(*chain))
    monkeypatch.setattr("tncompress.latency.latencies", lambda *_, **__: [Latency(4e-3, 0.0, 1)])
    asked, real = [], layerwise.side_by_side
    monkeypatch.setattr(
        layerwise,
        "side_by_side",
        lambda *a, threads, **k: (asked.append(threads), real(*a, threads=1, **k))[1],
    )
    model = nn.Sequential(*(nn.Conv2d(96, 96, 3, padding=1) for _ in range(4)))
    with with_threads(2):
        make_plan(model, spec_of(budget, "svd"), example_inputs=torch.randn(1, 96, 24, 24))
    assert len(asked) == 3  # by rules, weighed, fitted
    assert asked[1] == threads


@pytest.mark.parametrize(("room", "at_once"), [(3.9, 3), (1000, 1000), (0.5, 1)])
def test_layers_are_planned_at_once_as_far_as_their_moments_leave_memory(room, at_once, monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 9, 3), nn.Conv2d(9, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    layers = find_layers(model)
    assert Judge(None).at_once(layers) is None
    moments = tnc.calibrate(model, [torch.randn(4, 2, 3, 3)])
    largest = 8 * 18 * 19  # of a mean of 18 numbers, and 18 x 18 squares
    monkeypatch.setattr("tncompress.judge.WORKING_MEMORY", int(room * COPIES * largest))
    assert Judge(moments).at_once(layers) == at_once


def test_formats_alike_on_a_kernel_are_tried_once():
    (layer,) = find_layers(nn.Sequential(nn.Conv2d(16, 12, 1), nn.Identity()))
    found = candidates_of(layer, tnc.Settings(format="auto"), Judge())
    assert len({(c.format, c.ranks) for c in found}) == len({c.ranks for c in found}) == len(found)


# --- latency ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model", "measurement"])
def test_a_budget_on_latency_is_kept_by_its_own_clock(source, monkeypatch):
    """Measured times are stood in for by modelled ones: those of a busy machine are no law."""
    monkeypatch.setattr("tncompress.latency.measured", lambda *chain, **_: modelled(*chain))
    monkeypatch.setattr("tncompress.latency.latencies", lambda *_, **__: [Latency(4e-3, 0.0, 1)])
    model = nn.Sequential(*(nn.Conv2d(96, 96, 3, padding=1) for _ in range(4)))
    for layer in model:
        fade_(layer)
    x = torch.randn(1, 96, 24, 24)
    plan = make_plan(model, spec_of({"latency": 0.9, "latency_from": source}, "svd"), example_inputs=x)
    small, clock = tnc.compress(model, plan), Clock("model")
    before, after = (
        sum(clock.layer(layer, [tuple(x.shape)]) for layer in find_layers(each)) for each in (model, small)
    )
    rest = 4e-3 - before if source == "measurement" else 0.0
    assert before < 4e-3
    assert plan.compressed
    assert plan.budget.reached["latency"] <= 0.9
    assert plan.budget.reached["latency"] == pytest.approx((rest + after) / (rest + before))


def test_a_modelled_latency_says_when_no_fit_to_this_machine_is_behind_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (layer,) = find_layers(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Identity()))
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"tncompress bench --calibrate.*'measurement'"):
        assert Clock("model").layer(layer, [(1, 64, 4, 4)]) < 1e-2
    warn_once.cache_clear()
    keep_machine(Machine(start=1.0), "cpu", torch.float32, error=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Clock("model").layer(layer, [(1, 64, 4, 4)]) > 1  # a second to start


def test_layers_weighed_side_by_side_go_by_the_machine_as_it_will_run(monkeypatch, tmp_path):
    """Each is weighed on one core, and will run on all of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = nn.Sequential(*(nn.Conv2d(96, 96, 3, padding=1) for _ in range(4)))
    for layer in model:
        fade_(layer)
    spec, x = spec_of({"latency": 0.9, "latency_from": "model"}, "svd"), torch.randn(1, 96, 24, 24)
    warn_once.cache_clear()
    with with_threads(2), warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_machine(Machine(start=0.01, products=1e12), "cpu", torch.float32, error=0.1)
        with pytest.raises(ValueError, match="latency"):  # two starts are longer than one
            make_plan(model, spec, example_inputs=x)


def test_a_chain_is_measured_at_the_shapes_of_its_calls(monkeypatch):
    monkeypatch.setattr("tncompress.latency.SECONDS", 1e-4)
    (layer,) = find_layers(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Identity()))
    clock = Clock("measurement")
    small, large = clock.layer(layer, [(1, 64, 4, 4)]), clock.layer(layer, [(1, 64, 64, 64)])
    assert 0 < small < large
    assert clock.layer(layer, [(1, 64, 4, 4), (1, 64, 64, 64)]) == small + large  # both are known


def test_the_model_of_the_machine_is_the_one_documented():
    layer = find_layers(nn.Sequential(nn.Conv2d(32, 40, 3, padding=1), nn.Identity()))[0]
    pixels = 2 * 10 * 12
    wanted = 10e-6 + 2 * pixels * 32 * 9 * 48 / 180e9 + 4 * pixels * (32 + 40) / 60e9
    assert Clock("model").layer(layer, [(2, 32, 10, 12)]) == pytest.approx(wanted)
    depthwise = tnc.ConvGeometry.of(nn.Conv2d(32, 32, 3, padding=1, groups=32))
    wanted = 10e-6 + 4 * pixels * 64 / 60e9 + 8 * pixels * 32 / 25e9
    stages = tnc.SVD().stages(depthwise.kernel_shape, (1,))[:1]
    assert modelled(depthwise, stages, (2, 32, 10, 12)) == pytest.approx(wanted)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "inputs", "message"),
    [
        (spec_of({"macs": 0.5}), None, "a budget on macs is kept on example inputs, got none"),
        (spec_of({"params": 1, "latency": 0.5}), None, "a budget on latency is kept on example inputs"),
        (
            spec_of({"params": 0.01}),
            None,
            r"params 0.01 can't be met: .* reached is params 0\.\d+; in the way",
        ),
        (
            spec_of({"params": 0.1}, keep_dense=["7"]),
            None,
            r"the params: 7 0\.\d+ \(stays dense: kept dense by",
        ),
        ({"default": {"format": "auto"}}, None, "format auto is chosen under a budget, got none"),
        (spec_of({}), None, "a budget is on one or more of params, macs, bytes, latency, got none"),
        (spec_of({"params": 0}), None, "budget.params: input should be greater than 0"),
        (spec_of({"params": True}), None, "budget.params: input should be a valid number"),
        (spec_of({"params": 1.5}), None, "budget.params: input should be less than or equal to 1"),
        (spec_of({"flops": 0.5}), None, "unknown key 'budget.flops'; the keys there are params, macs"),
        (spec_of({"params": 0.5}) | {"default": {"rank": {"fixed": 3}}}, None, "got a rank in default, too"),
        (
            spec_of({"params": 0.5}, rules=[{"pattern": "3", "rank": {"fixed": 3}}]),
            None,
            "got auto in the rule",
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_one_clear_line(spec, inputs, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_plan(net(), spec, example_inputs=inputs)
    assert str(caught.value).splitlines() == [str(caught.value)]


def test_how_close_one_can_come_is_true():
    """What an error says can be reached can be reached."""
    for budget in ({"params": 0.01}, {"macs": 0.01}, {"params": 0.01, "macs": 0.2}):
        with pytest.raises(ValueError, match="can't be met") as caught:
            make_plan(net_of_one_seed(), spec_of(budget), example_inputs=X)
        reach = re.search(r"reached is (\w+) ([\d.]+)", str(caught.value))
        asked = {reach[1]: float(reach[2])}
        make_plan(net_of_one_seed(), spec_of(asked), example_inputs=X)
        asked[reach[1]] -= 2e-4
        with pytest.raises(ValueError, match="can't be met"):
            make_plan(net_of_one_seed(), spec_of(asked), example_inputs=X)


def net_of_one_seed():
    torch.manual_seed(1)
    return net()


def test_a_budget_needs_weights():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)))
    with pytest.raises(
        ValueError, match=r"layer '1' .* is on the meta device, and a budget needs its weights"
    ):
        make_plan(model, spec_of({"params": 0.5}))


# --- the command line ---------------------------------------------------------------------------------------


def test_the_commands_take_a_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text("default: {format: tucker}\nbudget: {params: 0.3, macs: 0.5}\n")
    line = "--model zoo:cnn4 --spec spec.yaml"
    planned = CliRunner().invoke(app, f"plan {line} --input 1x28x28 --json".split())
    assert planned.exit_code == 0, planned.output
    reached = json.loads(planned.stdout)["budget"]["reached"]
    assert reached["params"] <= 0.3
    assert reached["macs"] <= 0.5
    made = CliRunner().invoke(app, f"compress {line} --input 1x28x28 --out small".split())
    assert made.exit_code == 0, made.output
    dense = num_params(tnc.build_model("zoo:cnn4"))
    assert num_params(tnc.load("small")) <= 0.3 * dense
