"""A budget that goes by data: what its losses measure, and that all of it is kept."""

import copy
import json

import pytest
import torch
from test_budget import ALL, net, spec_of
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

import tncompress as tnc
from tncompress.cli import app
from tncompress.plan import Plan
from tncompress.running import eval_mode


@pytest.fixture(autouse=True)
def _few_sweeps(quick_cp):
    """No test here asks how good CP is."""


def images(count=48):
    """Smooth images, so that the moments of patches are far from a multiple of the identity."""
    coarse = torch.randn(count, 3, 4, 4)
    return list(nn.functional.interpolate(coarse, size=(14, 12), mode="bilinear").split(16))


def outputs(model, xs):
    with eval_mode(model), torch.no_grad():
        return torch.cat([model(x) for x in xs])


@pytest.mark.parametrize("budget", [{"params": 0.4}, {"params": 0.5, "macs": 0.5}], ids=str)
def test_losses_are_of_layer_outputs_or_of_the_network_and_kept_by_the_fits(budget):
    model, xs = net(), images()
    moments = tnc.calibrate(model, xs)
    found = tnc.quick_sensitivity(model, xs, calibration=moments)
    x = xs[0][:2]
    by_layers = tnc.make_plan(model, spec_of(budget), calibration=moments, example_inputs=x)
    by_network = tnc.make_plan(
        model, spec_of(budget), calibration=moments, sensitivity=found, example_inputs=x
    )
    at_once = tnc.make_plan(model, spec_of(budget), calibration=xs, example_inputs=x)
    assert (by_layers.budget.measure, by_network.budget.measure) == ("layer output", "network output")
    assert at_once.budget == by_network.budget
    for plan in (by_layers, by_network):
        assert all(plan.budget.reached[name] <= most for name, most in budget.items())
    assert_close(by_layers.budget.fitted, sum(layer.output_error**2 for layer in by_layers.compressed))
    predicted = [
        found.predict(layer.name, layer.output_error, layer.format) for layer in by_network.compressed
    ]
    assert_close(by_network.budget.fitted, sum(predicted))


def test_all_formats_together_are_at_least_as_good_as_each_alone():
    model, xs = net(), images()
    moments = tnc.calibrate(model, xs)
    options = {"calibration": moments, "sensitivity": tnc.quick_sensitivity(model, xs, calibration=moments)}
    together = tnc.make_plan(model, spec_of({"params": 0.4}), **options).budget
    for format in ALL:
        alone = tnc.make_plan(model, spec_of({"params": 0.4}, format), **options).budget
        assert together.loss <= alone.loss + 1e-12


def test_data_bring_the_outputs_nearer_at_the_same_size():
    torch.manual_seed(3)
    model, xs = net(), images(96)
    dense = outputs(model, xs)
    gaps = {}
    for name, calibration in (("blind", None), ("aware", xs)):
        small = tnc.compress(model, spec_of({"params": 0.4}), calibration=calibration)
        gaps[name] = float((outputs(small, xs) - dense).norm())
    assert gaps["aware"] < gaps["blind"]


def test_layers_that_no_data_reach_are_named_and_judged_by_their_kernels():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.idle = net(), nn.Conv2d(16, 16, 3)

        def forward(self, x):
            return self.body(x)

    model, xs = Idle(), images()
    plan = tnc.make_plan(model, spec_of({"params": 0.4}) | {"keep_dense": ["stem"]}, calibration=xs)
    assert any("plain truncation" in note and "idle" in note for note in plan.notes)
    idle = next(layer for layer in plan.compressed if layer.name == "idle")
    assert idle.output_error is None


def test_a_plan_from_a_file_gives_the_same_model():
    model, xs = net(), images()
    moments = tnc.calibrate(model, xs)
    plan = tnc.make_plan(model, spec_of({"params": 0.4}), calibration=moments)
    read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    first, second = tnc.compress(model, plan), tnc.compress(model, read, calibration=moments)
    assert_close(outputs(second, xs), outputs(first, xs), atol=1e-5, rtol=1e-4)


def test_a_sensitivity_of_something_else_is_refused():
    model, xs = net(), images()
    moments = tnc.calibrate(model, xs)
    aware = tnc.quick_sensitivity(model, xs, calibration=moments)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[5].weight.mul_(1.1)
    with pytest.raises(ValueError, match="measured with calibration, the plan is made without"):
        tnc.make_plan(model, spec_of({"params": 0.4}), sensitivity=aware)
    with pytest.raises(ValueError, match="measured without calibration, the plan is made with"):
        tnc.make_plan(
            model, spec_of({"params": 0.4}), calibration=moments, sensitivity=tnc.quick_sensitivity(model, xs)
        )
    blind = tnc.quick_sensitivity(other, xs)
    with pytest.raises(ValueError, match=r"sensitivity is of other weights of layer '5'"):
        tnc.make_plan(model, spec_of({"params": 0.4}), sensitivity=blind)


def test_gradients_weigh_what_a_plan_truncates():
    """The two-sided option: the same sizes, other factors, and less change of what the loss sees."""
    model, xs = net(), images(96)
    spec = {"default": {"format": "svd", "rank": {"params_ratio": 0.3}}}
    plain = tnc.calibrate(model, xs)
    sided = tnc.calibrate(model, xs, gradients="teacher", gradient_batches=6)
    one, two = (tnc.make_plan(model, spec, calibration=moments) for moments in (plain, sided))
    assert [layer.ranks for layer in one.compressed] == [layer.ranks for layer in two.compressed]
    assert all(
        b.output_error >= a.output_error - 1e-9 for a, b in zip(one.compressed, two.compressed, strict=True)
    )
    dense = outputs(model, xs)
    gaps = [float((outputs(tnc.compress(model, plan), xs) - dense).norm()) for plan in (one, two)]
    assert gaps[1] < gaps[0]


@pytest.mark.slow
def test_the_commands_take_data_and_a_sensitivity(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("default: {format: auto}\nbudget: {params: 0.3}\n")
    model = ["--model", "zoo:cnn4", "--data", "digits"]
    run = CliRunner().invoke
    made = run(app, ["plan", *model, "--spec", str(spec), "--calibrate", "32", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["budget"]["measure"] == "network output"
    moments, found = str(tmp_path / "m.safetensors"), str(tmp_path / "s.json")
    torch.manual_seed(0)
    tnc.save_weights(tnc.build_model("zoo:cnn4", num_classes=10, in_channels=1), tmp_path / "w.safetensors")
    model += ["--weights", str(tmp_path / "w.safetensors")]
    assert run(app, ["calibrate", *model, "--images", "32", "--out", moments]).exit_code == 0
    measured = ["--images", "32", "--formats", "svd", "--calibration", moments, "--out", found]
    assert run(app, ["sensitivity", *model, *measured]).exit_code == 0
    asked = ["--spec", str(spec), "--calibration", moments, "--sensitivity", found]
    done = run(app, ["compress", *model, *asked, "--out", str(tmp_path / "small")])
    assert done.exit_code == 0, done.output
    assert "network output" in done.stdout
    refused = run(app, ["plan", *model, "--spec", str(spec), "--sensitivity", found])
    assert refused.exit_code == 1
    assert "measured with calibration" in refused.stderr
