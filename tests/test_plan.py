"""The plan promises what compressing then does, and says why a layer stays dense."""

import json
import re

import pytest
import torch
from conftest import choose
from torch import nn
from torch.nn.utils import parametrizations

import tncompress as tnc
from tncompress.measure import macs, num_params
from tncompress.plan import LayerPlan, Plan, Skip
from tncompress.planner import make_plan
from tncompress.policies import Energy, FixedRank, ParamsRatio, RelError
from tncompress.ranks import NoRanks
from tncompress.spec import Settings
from tncompress.threads import with_threads

ALL = {"keep_dense": []}
FORMATS = {
    "svd": tnc.SVD(),
    "separable": tnc.SVD("out kw|in kh"),
    "mps": tnc.MPS(),
    "mixed": tnc.MPS("kh in kw out"),
    "tucker": tnc.Tucker(),
    "tucker-all": tnc.Tucker("all"),
    "cp": tnc.CP(),
    "merged": tnc.CP(merged=True),
}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=(2, 1)), nn.ReLU(),
        nn.Conv2d(16, 16, (1, 5), padding="same", bias=False), nn.Conv2d(16, 24, 1, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 12), nn.Linear(12, 4),
    )  # fmt: skip


def kernel_of(seed=0, decay=0.8, shape=(12, 10, 3, 3)):
    """A kernel whose spectra fall off, as those of trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(shape, generator=generator, dtype=torch.float64)
    for mode, size in enumerate(shape):
        rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        kernel = torch.tensordot(kernel, rotation * decay ** torch.arange(size), dims=([mode], [0])).movedim(
            -1, mode
        )
    return kernel


@every_format
@pytest.mark.usefixtures("quick_cp")
def test_parameters_and_macs_are_those_of_the_compressed_model(format):
    model, x = net(), torch.randn(2, 3, 12, 10)
    spec = {
        "default": {"format": format, "rank": {"params_ratio": 0.6}},
        "keep_dense": [],
        "allow_larger": True,
    }
    plan = make_plan(model, spec, example_inputs=x)
    small = tnc.compress(model, plan)
    assert len(plan.compressed) >= 4
    assert (plan.params_model, plan.params) == (num_params(model), num_params(small))
    assert (plan.macs_dense, plan.macs) == (macs(model, x), macs(small, x))
    for layer in plan.compressed:
        dense, made = model.get_submodule(layer.name), small.get_submodule(layer.name)
        assert layer.params == sum(f.numel() for f in made.factors) <= 0.6 * layer.params_dense
        measured = (made.weight - dense.weight).norm() / dense.weight.norm()
        assert layer.rel_error == pytest.approx(measured.item(), rel=1e-4, abs=1e-6)


@every_format
@pytest.mark.parametrize("error", [0.5, 0.2, 0.05])
@pytest.mark.usefixtures("quick_cp")
def test_rel_error_and_energy_are_kept_and_not_overdone(format, error):
    kernel = kernel_of()
    ranks, fit = choose(kernel, Settings(format=format, rank=RelError(error)), allow_larger=True)
    measured = (format.to_dense(fit.factors, tuple(kernel.shape)) - kernel).norm() / kernel.norm()
    assert measured.item() == pytest.approx(fit.rel_error, rel=1e-5)
    assert fit.rel_error <= error
    assert choose(kernel, Settings(format=format, rank=Energy(1 - error**2)), allow_larger=True)[0] == ranks
    if len(ranks) == 1 and ranks[0] > 1:
        assert format.fit(kernel, (ranks[0] - 1,)).rel_error > error


@every_format
@pytest.mark.parametrize("ratio", [0.8, 0.4, 0.2])
@pytest.mark.usefixtures("quick_cp")
def test_params_ratio_is_kept_and_nearly_used_up(format, ratio):
    kernel = kernel_of(shape=(32, 24, 3, 3))
    ranks, fit = choose(kernel, Settings(format=format, rank=ParamsRatio(ratio)))
    params = format.num_params(tuple(kernel.shape), ranks)
    assert params == sum(f.numel() for f in fit.factors)
    assert 0.85 * ratio <= params / kernel.numel() <= ratio


def test_more_parameters_never_mean_a_larger_error():
    kernel = kernel_of(shape=(24, 16, 3, 3))
    for format in FORMATS.values():
        fits = [
            choose(kernel, Settings(format=format, rank=ParamsRatio(r)))[1] for r in (0.15, 0.3, 0.5, 0.8)
        ]
        errors = [fit.rel_error for fit in fits]
        assert errors == sorted(errors, reverse=True), format


def test_bonds_are_not_starved():
    """Tucker on all legs starts at ranks that no single bond can leave; channels are filled evenly."""
    kernel = torch.randn(32, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    ranks, _ = choose(kernel, Settings(format=tnc.Tucker("all"), rank=ParamsRatio(0.25)))
    assert min(ranks[0], ranks[-1]) >= 8
    ranks, _ = choose(kernel, Settings(format=tnc.Tucker(), rank=ParamsRatio(0.25)))
    assert abs(ranks[0] - ranks[1]) <= 3


@pytest.mark.usefixtures("quick_cp")
def test_round_to_and_min_rank_bind():
    kernel = kernel_of(shape=(32, 24, 3, 3))
    for format in FORMATS.values():
        top = format.max_ranks((32, 24, 3, 3))
        ranks, _ = choose(kernel, Settings(format=format, rank=RelError(0.3), round_to=4), allow_larger=True)
        assert all(rank % 4 == 0 or rank == full for rank, full in zip(ranks, top, strict=True)), format
        ranks, _ = choose(kernel, Settings(format=format, rank=RelError(0.99), min_rank=5), allow_larger=True)
        assert all(rank >= min(5, full) for rank, full in zip(ranks, top, strict=True)), format


def test_fixed_ranks_are_taken_as_they_are_or_recorded_clipped():
    kernel = kernel_of()
    assert choose(kernel, Settings(format=tnc.Tucker(), rank=FixedRank((4, 5))))[0] == (4, 5)
    assert choose(kernel, Settings(format=tnc.MPS(), rank=FixedRank(2)))[0] == (2, 2, 2)
    ranks, fit = choose(kernel, Settings(format=tnc.MPS(), rank=FixedRank((2, 30, 9))), allow_larger=True)
    assert ranks == (2, 6, 9)
    assert tnc.MPS().factor_shapes(tuple(kernel.shape), ranks) == tuple(tuple(f.shape) for f in fit.factors)


@pytest.mark.parametrize("ranks", [(10, 13), (11, 3), (2, 2, 2)])
def test_ranks_that_a_kernel_cannot_have(ranks):
    model = nn.Sequential(nn.Conv2d(10, 12, 3))
    spec = {"default": {"format": "tucker", "rank": {"fixed": ranks}}} | ALL
    wanted = r"layer '0' with kernel \(12, 10, 3, 3\): tucker .* takes 2 rank\(s\) of at most \(10, 12\), got"
    with pytest.raises(ValueError, match=wanted):
        make_plan(model, spec)


def test_what_would_not_be_smaller_stays_dense():
    kernel = torch.randn(12, 10, 3, 3)
    with pytest.raises(NoRanks, match=r"would hold 1,\d+ parameters, now 1,080"):
        choose(kernel, Settings(format=tnc.Tucker(), rank=FixedRank((10, 12))))
    with pytest.raises(NoRanks, match=r"no fewer parameters than now for a relative error of 0\.01"):
        choose(kernel, Settings(format=tnc.Tucker(), rank=RelError(0.01)))
    with pytest.raises(NoRanks, match=r"the smallest ranks \(1,\) of svd hold 102 parameters, allowed 54"):
        choose(kernel, Settings(format=tnc.SVD(), rank=ParamsRatio(0.05)))
    plan = make_plan(nn.Sequential(nn.Conv2d(10, 12, 3)), {"default": {"rank": {"rel_error": 0.01}}} | ALL)
    assert [type(layer) for layer in plan.layers] == [Skip]
    assert plan.params == plan.params_model


def test_more_macs_than_dense_stay_dense():
    """A 1x1 stage before a large stride runs on every pixel: fewer parameters, more work."""
    model = nn.Sequential(nn.Conv2d(32, 32, 4, stride=4))
    spec = {"default": {"format": {"name": "svd", "cut": "in|rest"}, "rank": {"params_ratio": 0.7}}} | ALL
    (layer,) = make_plan(model, spec).layers
    assert "x the dense MACs" in layer.reason
    (layer,) = make_plan(model, spec | {"allow_larger": True}).layers
    assert isinstance(layer, LayerPlan)


def test_more_macs_than_dense_on_the_example_stay_dense():
    """On an input no larger than the kernel the dense layer runs once, a 1x1 stage on every pixel."""
    model = nn.Sequential(nn.Conv2d(16, 16, 5))
    spec = {"default": {"rank": {"params_ratio": 0.5}}} | ALL
    small, large = torch.randn(1, 16, 5, 5), torch.randn(1, 16, 32, 32)
    (layer,) = make_plan(model, spec, example_inputs=small).layers
    assert "x the dense MACs on the example inputs" in layer.reason
    for plan in (
        make_plan(model, spec, example_inputs=large),
        make_plan(model, spec | {"allow_larger": True}, example_inputs=small),
        make_plan(model, spec),
    ):
        assert isinstance(plan.layers[0], LayerPlan)


def test_macs_of_layers_that_stay_dense_are_counted_too():
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, groups=4, padding="same", dilation=2),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        Sub(8, 6, (1, 3)),
        nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2),
        tnc.TNConv.from_dense(nn.Conv2d(8, 4, 3), tnc.SVD(), (2,)),
        nn.Flatten(2),
        nn.Conv1d(4, 3, 2),
        nn.Linear(90, 5),
    )
    x = torch.randn(2, 6, 14, 11)
    plan = make_plan(model, {"keep_dense": ["*"]}, example_inputs=x)
    assert plan.compressed == ()
    assert plan.macs == plan.macs_dense == macs(model, x)


def test_an_input_needs_no_batch():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 8, (1, 3)))
    spec = {"default": {"format": "svd", "rank": {"fixed": 2}}} | ALL
    x = torch.randn(8, 9, 12)
    plan = make_plan(model, spec, example_inputs=x)
    assert len(plan.compressed) == 2
    assert (plan.macs_dense, plan.macs) == (macs(model, x), macs(tnc.compress(model, plan), x))
    assert plan.macs == make_plan(model, spec, example_inputs=x[None]).macs


def test_a_layer_that_never_runs_costs_nothing():
    model = net()
    model.unused = nn.Conv2d(8, 8, 3)
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    spec = {"default": {"rank": {"params_ratio": 0.5}}} | ALL
    plan = make_plan(model, spec, example_inputs=torch.randn(1, 3, 12, 10))
    assert (plan.layers[-1].macs_dense, plan.layers[-1].macs) == (0, 0)


class Sub(nn.Conv2d):
    pass


def tied():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = model[0].weight
    return model


def tied_bias():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].bias = model[0].bias
    return model


def with_extra():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model[0].register_buffer("mask", torch.ones(8))
    return model


def with_own_forward():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model[0].forward = lambda x: x
    return model


def old_weight_norm():
    layer = nn.Conv2d(8, 8, 3)
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(layer))


OBSTACLES = {
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), "depthwise: no channels to cut"),
    "subclass": (lambda: nn.Sequential(Sub(8, 8, 3)), "subclass"),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))),
        "its weight is parametrized",
    ),
    "weight_norm": (old_weight_norm, "its weight is parametrized"),
    "tied": (tied, "its weight is shared with '1'"),
    "tied bias": (tied_bias, "its bias is shared with '1'"),
    "extra": (with_extra, "it holds 'mask' beside weight and bias"),
    "forward": (with_own_forward, "its forward was replaced on the instance"),
    "alone": (lambda: nn.Conv2d(8, 8, 3), "it is the model itself"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "subclass"),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_cannot_be_compressed_is_listed_with_its_reason(kind):
    make, reason = OBSTACLES[kind]
    model = make()
    plan = make_plan(model, ALL)
    assert plan.compressed == ()
    assert plan.skipped
    assert re.search(reason, plan.skipped[0].reason)
    assert tnc.compress(model, ALL, inplace=True) is model
    assert not any(isinstance(module, tnc.TNConv) for module in model.modules())


def test_stem_classifier_rules_and_patterns_keep_layers_dense():
    spec = {
        "default": {"format": "svd", "rank": {"fixed": 1}},
        "rules": [{"pattern": "3", "keep_dense": True}, {"pattern": "re:^5$", "format": "cp"}],
        "keep_dense": ["stem", "classifier", "[79]"],
    }
    plan = make_plan(net(), spec)
    reasons = {layer.name: layer.reason for layer in plan.skipped}
    assert reasons == {
        "0": "the stem (first layer), kept dense by default",
        "3": "kept dense by the rule '3'",
        "9": "kept dense by keep_dense: '[79]'",
        "10": "the classifier (last layer), kept dense by default",
    }
    assert {layer.name: layer.format.name for layer in plan.compressed} == {"5": "cp", "6": "svd"}
    everything = make_plan(net(), {"default": {"format": "svd", "rank": {"fixed": 1}}} | ALL)
    assert len(everything.compressed) == 6


def test_the_first_matching_rule_wins():
    rules = [
        {"pattern": "3", "format": "cp"},
        {"pattern": "*", "format": "tucker"},
        {"pattern": "3", "format": "svd"},
    ]
    plan = make_plan(net(), {"default": {"rank": {"params_ratio": 0.5}}, "rules": rules})
    assert {layer.name: layer.format.name for layer in plan.compressed}["3"] == "cp"


@pytest.mark.parametrize(
    "spec",
    [
        {"rules": [{"pattern": "nothing.*"}]},
        {"rules": [{"pattern": "re:nothing"}]},
        {"keep_dense": ["nothing.*"]},
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(spec):
    with pytest.raises(ValueError, match=r"nothing.*' matches no layer; the layers are 0, 3, 5, 6, 9, 10"):
        make_plan(net(), spec)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(value):
    model = net()
    model[5].weight.data[1, 2, 0, 3] = value
    with pytest.raises(ValueError, match=r"layer '5' with kernel \(16, 16, 1, 5\) holds NaN or infinity"):
        make_plan(model, {})


def test_meta_and_lazy_models_are_told_what_they_lack():
    with pytest.raises(ValueError, match=r"layer '3' .* is on the meta device"):
        tnc.compress(net().to("meta"), {})
    with pytest.raises(ValueError, match="layer '0' is lazy and has no weights yet"):
        make_plan(nn.Sequential(nn.LazyConv2d(3, 3), nn.Conv2d(3, 3, 1)), {})


def test_planning_changes_nothing():
    model, x = net().train(), torch.randn(2, 3, 12, 10)
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    make_plan(model, {}, example_inputs=x)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (model.training, model[1].training) == (True, False)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_example_inputs_are_a_tensor_a_tuple_or_a_mapping():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x, scale=1.0):
            return self.body(x * scale)

    model, x = Two(), torch.randn(1, 3, 12, 10)
    plans = [make_plan(model, {}, example_inputs=e) for e in (x, (x, 2.0), {"x": x, "scale": 3.0})]
    assert plans[0].macs is not None
    assert len({plan.macs for plan in plans}) == 1
    assert make_plan(model, {}).macs is None


def test_a_layer_that_is_called_twice_costs_twice():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(1, 8, 6, 6)
    spec = {"default": {"format": "svd", "rank": {"fixed": 2}}} | ALL
    once = make_plan(nn.Sequential(conv), spec, example_inputs=x)
    twice = make_plan(nn.Sequential(conv, conv), spec, example_inputs=x)
    assert (twice.macs, twice.macs_dense) == (2 * once.macs, 2 * once.macs_dense)
    assert twice.params == once.params
    assert twice.layers[0].names == ("0", "1")


def test_a_plan_survives_json():
    spec = {"default": {"format": {"name": "mps", "order": "kh in kw out"}, "rank": {"params_ratio": 0.5}}}
    plan = make_plan(net(), spec, example_inputs=torch.randn(1, 3, 12, 10))
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert str(again) == str(plan)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"compressed": [{}], "skipped": [], "order": []}', "3"])
def test_what_is_no_plan_is_told_in_one_line(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"no plan|not valid JSON") as caught:
        Plan.load(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


def test_the_table_shows_every_layer():
    plan = make_plan(
        net(), {"default": {"rank": {"params_ratio": 0.5}}}, example_inputs=torch.randn(1, 3, 12, 10)
    )
    lines = str(plan).splitlines()
    assert f"{len(plan.compressed)} of 6 layers compressed" in lines[0]
    for layer in plan.layers:
        row = next(line for line in lines if line.startswith(f"│ {layer.name} "))
        assert "x".join(map(str, layer.shape)) in row
        assert (f"{layer.rel_error:.4f}" if isinstance(layer, LayerPlan) else "dense") in row


def test_without_example_inputs_the_table_has_no_column_of_macs():
    blind, seen = (str(make_plan(net(), {}, example_inputs=x)) for x in (None, torch.randn(1, 3, 12, 10)))
    assert ("MACs" in blind, "MACs" in seen) == (False, True)
    assert {line.count("│") for line in blind.splitlines() if line.startswith("│")} == {8}


def test_a_name_is_no_markup():
    model = nn.Sequential()
    model.add_module("[red]x[/red]", nn.Conv2d(3, 3, 1))
    assert "[red]x[/red]" in str(make_plan(model, {}))


def test_a_single_rank_serves_layers_of_every_size():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 20, 3), nn.Conv2d(20, 4, 3), nn.Linear(4, 90))
    plan = make_plan(model, {"default": {"format": "tucker", "rank": {"fixed": 12}}} | ALL)
    ranks = {layer.name: layer.ranks for layer in plan.compressed}
    assert ranks == {"0": (3, 12), "1": (12, 12), "2": (12, 4)}
    assert "ranks (4,) would hold 376 parameters, now 360" in plan.layers[3].reason


@pytest.mark.parametrize("asked", [{"rank": {"rel_error": 0.5}}, {"budget": {"params": 0.4}}], ids=str)
@pytest.mark.parametrize("format", ["svd", "tucker", "mps"])
def test_layers_that_are_planned_side_by_side_are_those_planned_in_turn(format, asked):
    model = tnc.build_model("zoo:cnn4")
    rank = {"rank": asked["rank"]} if "rank" in asked else {}
    spec = {name: value for name, value in asked.items() if name == "budget"}
    spec |= {"default": {"format": format, **rank}}
    plans = []
    for threads in (1, 2):
        with with_threads(threads):
            plans.append(tnc.make_plan(model, spec))
    first, second = plans
    assert [p.name for p in first.layers] == [p.name for p in second.layers]
    assert [p.ranks for p in first.compressed] == [p.ranks for p in second.compressed]
    for planned in first.compressed:
        kernels = [
            planned.format.to_dense(plan.fits[planned.name].factors, planned.geometry.kernel_shape)
            for plan in plans
        ]
        assert (kernels[0] - kernels[1]).norm() <= 1e-3 * kernels[0].norm()
