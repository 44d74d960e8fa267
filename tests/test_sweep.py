"""Sweeps: rows are what truncating and measuring gives, each once, and outlive a kill."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from typer.testing import CliRunner

import tncompress as tnc
from tncompress.batchnorm import reestimate_batchnorm_
from tncompress.cli import app
from tncompress.cuts import Cut, spectrum
from tncompress.cutting import AchievedCut, TruncatedLayer
from tncompress.data import load_data
from tncompress.finetune import train_
from tncompress.formats import MPS, SVD, Tucker
from tncompress.retraining import factored_params, on_manifold
from tncompress.rowcache import sole_writer
from tncompress.sweep import sweep
from tncompress.sweep_bench import Bench
from tncompress.sweep_plots import norm_loss_figures, training_figures
from tncompress.sweep_points import FRACTIONS, make_grid
from tncompress.sweep_rows import Sweep


class Small(nn.Module):
    """A stem with one input channel, a 1x1 convolution, one with groups, a BatchNorm, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.point = nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.point(F.relu(self.norm(self.stem(x)))).relu()
        return self.head(self.grouped(x).mean((2, 3)))


class Viewing(Small):
    """It can't run with channels last."""

    def forward(self, x):
        x = self.point(F.relu(self.norm(self.stem(x)))).relu()
        x = self.grouped(x)
        return self.head(x.view(len(x), 6, -1).mean(2))


class Clipped(Small):
    """The same modules, class name and all, in another forward pass."""

    def forward(self, x):
        return super().forward(x).clamp(-0.1, 0.1)


Clipped.__name__ = "Small"

LAYERS = "stem", "point", "grouped"
RETRAIN = {"epochs": 2, "lr": 0.05, "distill": 0.0}


@pytest.fixture
def model():
    return Small().double().train()


@pytest.fixture
def test():
    return batches_of((8, 5))


@pytest.fixture
def images():
    return [x for x, _ in batches_of((7, 4))]


def batches_of(sizes):
    return [(torch.randn(n, 1, 6, 6).double(), torch.randint(4, (n,))) for n in sizes]


@pytest.fixture
def train():
    return batches_of((6, 6, 6))


@pytest.fixture
def units(monkeypatch):
    """The units that are carried out, in their order."""
    done, run = [], Bench.run

    def recorded(self, unit):
        done.append(unit)
        return run(self, unit)

    monkeypatch.setattr(Bench, "run", recorded)
    return done


def figures(model, batches):
    found = tnc.evaluate(model, batches)
    return found.accuracy, found.loss


# --- the rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Small, Viewing])
def test_rows_are_those_of_a_plain_loop(test, images, kind):
    model = kind().double().train()
    found = sweep(model, test, images=images, layers=["each", "last 2"], fractions=(0.7, 0.4))
    assert len(found.rows) == 4 * 7 * 2
    for row in found.rows:
        names = [layer.name for layer in row.layers]
        made = tnc.truncate(model, row.cuts, row.amount, layers=names)
        assert row.layers == made.layers
        assert row.rel_error == made.rel_error
        assert_close((row.before.accuracy, row.before.loss), figures(made.model, test))
        reestimate_batchnorm_(made.model, images)
        assert_close((row.after.accuracy, row.after.loss), figures(made.model, test))
    assert_close((found.before.accuracy, found.before.loss), figures(model, test))
    reestimate_batchnorm_(model, images)
    assert_close((found.after.accuracy, found.after.loss), figures(model, test))
    assert (found.images, found.drift_images) == (13, 11)
    assert len({row.before.loss for row in found.rows}) > 20


def test_figures_after_batchnorm_are_those_by_hand(model, test, images):
    """Mean and unbiased variance of what the convolution puts out, over all images together."""
    (row,) = sweep(model, test, images=images, layers="stem", cuts=["out|rest"], fractions=[0.3]).rows
    by_hand = tnc.truncate(model, "out|rest", tnc.RankFraction(0.3), layers=["stem"]).model
    with torch.no_grad():
        seen = by_hand.stem(torch.cat(images)).transpose(0, 1).flatten(1)
        by_hand.norm.running_mean.copy_(seen.mean(1))
        by_hand.norm.running_var.copy_(seen.var(1))
        logits = by_hand.eval()(torch.cat([x for x, _ in test]))
    labels = torch.cat([y for _, y in test])
    wanted = float((logits.argmax(1) == labels).double().mean()), float(F.cross_entropy(logits, labels))
    assert_close((row.after.accuracy, row.after.loss), wanted)
    assert row.after.loss != row.before.loss


def test_without_images_or_batchnorm_there_are_no_second_figures(model, test, images):
    options = {"layers": "point", "cuts": ["out|rest"], "fractions": [0.5]}
    for found in (sweep(model, test, **options), sweep(no_norm(model), test, images=images, **options)):
        assert found.after is None
        assert found.rows[0].after is None
        assert "BN" not in str(found)


def no_norm(model):
    model.norm = nn.Identity()
    return model


def test_the_model_and_the_random_state_are_left_alone(model, test, images, train):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    options = {"layers": "point", "cuts": ["out|rest"], "fractions": [0.5]}
    sweep(model, test, images=images, retrain=RETRAIN, train_loader=train, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def kernels_of(model):
    return torch.cat([model.get_submodule(name).weight.flatten() for name in LAYERS])


def test_the_same_truncations_are_measured_once_and_shown_for_each(model, test, units):
    """Two points are the same where their kernels are; at full ranks they are the dense network."""
    found = sweep(model, test, layers=["each", "first 1", "all"], fractions=[0.7, 0.4])
    assert [row.label for row in found.rows[:14]] == ["stem"] * 14
    assert len(found.rows) == 5 * 7 * 2
    made = [
        tnc.truncate(model, row.cuts, row.amount, layers=[layer.name for layer in row.layers])
        for row in found.rows
    ]
    vectors = [kernels_of(each.model) for each in made]
    stacked = torch.stack(vectors)
    same = (stacked[:, None] - stacked).norm(dim=2) < 1e-9
    for number, row in enumerate(found.rows):
        alike = [other for other, is_same in zip(found.rows, same[number].tolist(), strict=True) if is_same]
        assert {other.unit for other in alike} == {row.unit}
        assert {other.before for other in alike} == {row.before}
        assert sum(other.unit == row.unit for other in found.rows) == len(alike)
        dense = torch.equal(vectors[number], kernels_of(model))
        assert row.truncated is not dense
        assert dense is (row.before == found.before)
    assert sum(unit.kind == "figures" for unit in units) == found.units + 1
    assert found.units < 0.7 * len(found.rows)
    assert found.of("first 1")[0].before == found.of("stem")[0].before


@pytest.mark.parametrize(
    ("asked", "sets"),
    [
        ("each", {"stem": ("stem",), "point": ("point",), "grouped": ("grouped",)}),
        ("all", {"all": LAYERS}),
        ("first 2", {"first 2": ("stem", "point")}),
        (["last 1", "last 2"], {"last 1": ("grouped",), "last 2": ("point", "grouped")}),
        ("point", {"point": ("point",)}),
        ("*o*", {"*o*": ("point", "grouped")}),
        (("grouped", "stem"), {"grouped+stem": ("stem", "grouped")}),
        ([("stem", "point"), "all"], {"stem+point": ("stem", "point"), "all": LAYERS}),
        (["stem", "point"], {"stem": ("stem",), "point": ("point",)}),
    ],
)
def test_sets_of_layers(model, asked, sets):
    points, left = make_grid(model, asked, ["out|rest"], (0.5,), ())
    assert {point.label: point.layers for point in points} == sets
    assert not left


def test_several_cuts_and_any_policy(model, test):
    found = sweep(
        model,
        test,
        layers="grouped",
        cuts=["out|rest", Cut.parse("in|rest"), ("out|rest", "in|rest"), ("out kh|rest", "out kw|rest")],
        amounts=[tnc.FixedRank(2), {"rel_error": 0.5}],
    )
    assert [row.cuts for row in found.rows[::2]] == [
        ("out|rest",),
        ("in|rest",),
        ("out|rest", "in|rest"),
        ("out kh|rest", "out kw|rest"),
    ]
    assert [row.amount for row in found.rows[:2]] == [tnc.FixedRank(2), tnc.RelError(0.5)]
    assert all(rank == 2 for row in found.rows[:6:2] for rank in row.ranks[0])
    single = SVD("in|rest").num_params((3, 4, 3, 3), (2,), 2) / model.grouped.weight.numel()
    assert found.rows[2].params_ratio == single
    both = Tucker().num_params((3, 4, 3, 3), (2, 2), 2) / model.grouped.weight.numel()
    assert found.rows[4].params_ratio == both
    assert found.rows[6].params_ratio is None
    assert found.rows[6].ranks[0][0] > 2  # the second cut restored it: told as it is


def test_without_fractions_there_are_at_least_six(model):
    points, _ = make_grid(model, "stem", ["out|rest"], None, ())
    assert [point.amount.fraction for point in points] == list(FRACTIONS)
    assert len(set(FRACTIONS)) >= 6


def test_layers_that_cannot_be_truncated_are_named(model, test):
    model.grouped = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3).double()))
    found = sweep(model, test, cuts=["out|rest", "out kd|rest"], fractions=[0.5])
    assert {entry.label for entry in found.left_out} == {"grouped.0"}
    assert "parametrized" in str(found)
    line = nn.Sequential(nn.Unflatten(2, (1, 36)), nn.Flatten(2), nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 1))
    mixed = nn.Sequential(nn.Flatten(2), *line[2:], nn.AdaptiveAvgPool1d(1), nn.Flatten()).double()
    left = sweep(mixed, test, cuts=["kh|out in kw", "out|in kw"], fractions=[0.5]).left_out
    assert {(entry.label, entry.cuts[0]) for entry in left} == {("1", "kh|out in kw"), ("2", "kh|out in kw")}


def test_outputs_that_are_not_finite_have_no_figures(model, test):
    """The truncated stem overflows in the exponential that the dense one stays away from."""

    class Steep(Small):
        def forward(self, x):
            return super().forward(x) + (1e4 * (self.stem.weight - self.kept).abs().max()).exp()

    model.__class__ = Steep
    model.register_buffer("kept", model.stem.weight.detach().clone())
    found = sweep(model, test, layers="stem", cuts=["out|rest"], fractions=[0.2, 1.0])
    assert found.rows[0].before is None
    assert found.rows[1].before == found.before
    assert Sweep.from_dict(json.loads(json.dumps(found.to_dict()))) == found


# --- the cache ----------------------------------------------------------------------------------------------


def test_a_second_run_does_no_work_and_a_larger_one_only_what_is_new(model, test, images, units, tmp_path):
    options = {"images": images, "cache": tmp_path / "rows", "cuts": ["out|rest", "kh|rest"]}
    found = sweep(model, test, fractions=[0.5], **options)
    count = len(units)
    assert sweep(model, test, fractions=[0.5], **options) == found
    assert len(units) == count
    whole = sweep(model, test, fractions=[0.5, 0.2], **options)
    fresh = [unit for unit in units[count:] if unit.kind == "figures"]
    assert len(fresh) == whole.units - found.units
    assert all(unit.point.amount == tnc.RankFraction(0.2) for unit in fresh)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [0, 3, 9])
def test_an_interrupted_run_goes_on_where_it_was(model, test, tmp_path, monkeypatch, error, after):
    whole = sweep(model, test, fractions=[0.5])
    done, run = [], Bench.run

    def limited(self, unit):
        if len(done) == after:
            raise error
        done.append(unit)
        return run(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "run", limited)
        with pytest.raises(error):
            sweep(model, test, fractions=[0.5], cache=tmp_path / "rows")
    assert len((tmp_path / "rows").read_text().splitlines()) == after
    assert sweep(model, test, fractions=[0.5], cache=tmp_path / "rows") == whole
    keys = [json.loads(line)["key"] for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(set(keys)) == len(keys)


def changed(what, model, test, images, train):
    options = {}
    if what == "a weight elsewhere":
        model.head.weight.data[0, 0] += 1e-9
    elif what == "a buffer":
        model.norm.running_mean += 1e-9
    elif what == "a buffer that is not saved":
        model.register_buffer("extra", torch.ones(1), persistent=False)
    elif what == "the code":
        model.__class__ = Clipped
    elif what == "a test image":
        test[1][0][0, 0, 0, 0] += 1e-9
    elif what == "a label":
        test[0][1][0] = (test[0][1][0] + 1) % 4
    elif what == "an image":
        images[0][0, 0, 0, 0] += 1e-9
    elif what == "the batches of images":
        images[:] = [torch.cat(images)]
    elif what == "crossing":
        options = {"crossing": "alternate"}
    return options


@pytest.mark.parametrize(
    "what",
    [
        "a weight elsewhere",
        "a buffer",
        "a buffer that is not saved",
        "the code",
        "a test image",
        "a label",
        "an image",
        "the batches of images",
        "crossing",
    ],
)
def test_results_of_something_else_are_never_taken(model, test, images, train, units, tmp_path, what):
    given = {"images": images, "fractions": [0.4], "layers": "grouped"}
    given["cuts"] = [("out kh|rest", "out kw|rest")]
    sweep(model, test, cache=tmp_path / "rows", **given)
    options = changed(what, model, test, images, train)
    fresh = sweep(model, test, **given, **options)
    units.clear()
    assert sweep(model, test, cache=tmp_path / "rows", **given, **options) == fresh
    assert {unit.point is None for unit in units if unit.kind == "figures"} >= {False}


@pytest.mark.parametrize("what", ["a train image", "the order", "the seed", "the epochs", "nothing"])
def test_trainings_on_something_else_are_never_taken(model, test, train, units, tmp_path, what):
    options = {"layers": "point", "cuts": ["out|rest"], "fractions": [0.4], "cache": tmp_path / "rows"}
    sweep(model, test, retrain=RETRAIN, train_loader=train, **options)
    units.clear()
    settings = dict(RETRAIN)
    if what == "a train image":
        train[1][0][0, 0, 0, 0] += 1e-9
    elif what == "the order":
        train[:] = train[::-1]
    elif what == "the seed":
        settings["seed"] = 1
    elif what == "the epochs":
        settings["epochs"] = 1
    sweep(model, test, retrain=settings, train_loader=train, **options)
    assert [unit.kind for unit in units] == ([] if what == "nothing" else ["dense", "dense", "manifold"])


def test_a_second_writer_is_refused(model, test, tmp_path):
    message = r"another run is writing to the cache .*rows: wait for its end"
    with sole_writer(tmp_path / "rows"), pytest.raises(BlockingIOError, match=message):
        sweep(model, test, cache=tmp_path / "rows")
    (tmp_path / "notes").write_text("mine\n")
    with pytest.raises(ValueError, match="notes is no cache of measured rows"):
        sweep(model, test, cache=tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine\n"
    with pytest.raises(FileNotFoundError, match=r"the cache .*rows can't be written"):
        sweep(model, test, cache=tmp_path / "absent" / "rows")


SCRIPT = """
import sys, torch
import tncompress as tnc
from tncompress.sweep import sweep

def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tnc.build_model("zoo:cnn4", num_classes=4, in_channels=1)
    test = [(torch.randn(64, 1, 16, 16), torch.arange(64) % 4)]
    options = {"images": [torch.randn(64, 1, 16, 16)], "layers": ["conv1", "conv2"]}
    sweep(model, test, cache=sys.argv[1], workers=int(sys.argv[2]), **options).save(sys.argv[3])

if __name__ == "__main__":
    main()
"""


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start_sweep(folder, workers):
    (folder / "run.py").write_text(SCRIPT)
    names = [sys.executable, "run.py", "rows", str(workers), "out.json"]
    path = str(Path(tnc.__file__).parents[1])
    return subprocess.Popen(
        names, cwd=folder, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_sweep_resumes_and_measures_nothing_twice(tmp_path, workers):
    """kill -9 between ranks and figures, then between figures; the workers of the killed process end, too."""
    for wanted in (20, 95) if workers == 1 else (95,):
        process = start_sweep(tmp_path, workers)
        while lines_of(tmp_path / "rows") < wanted:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= (workers if workers > 1 else 0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        gone_by = time.monotonic() + 20
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < gone_by
            time.sleep(0.05)
        assert not (tmp_path / "out.json").exists()
    process = start_sweep(tmp_path, workers)
    assert process.wait() == 0, process.stderr.read()
    keys = [json.loads(line)["key"] for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(set(keys)) == len(keys)
    found = Sweep.load(tmp_path / "out.json")
    assert len(keys) == len(found.rows) + found.units + 1
    if workers > 1:
        return
    (tmp_path / "rows").unlink()
    (tmp_path / "out.json").rename(tmp_path / "resumed.json")
    process = start_sweep(tmp_path, 1)
    assert process.wait() == 0, process.stderr.read()
    assert Sweep.load(tmp_path / "out.json") == found


@pytest.mark.slow
def test_several_processes_find_what_one_finds(test, images, train, tmp_path):
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(20, 4)
    ).double()
    options = {"images": images, "fractions": [0.5, 0.2], "retrain": RETRAIN, "train_loader": train}
    one = sweep(model, test, **options)
    two = sweep(model, test, workers=2, threads=1, cache=tmp_path / "rows", **options)
    assert one == two
    assert any(row.manifold.accuracies for row in one.rows)


# --- training again -----------------------------------------------------------------------------------------


def test_the_control_is_the_dense_network_trained_alike(model, test, train):
    options = {"layers": "grouped", "cuts": ["in|rest"], "fractions": [0.5]}
    found = sweep(model, test, retrain=RETRAIN, train_loader=train, **options)
    model.eval()
    epochs = train_(model, train, RETRAIN | {"seed": 0}, val_loader=test)
    assert_close(found.control.losses, tuple(epoch.loss for epoch in epochs))
    assert found.control.accuracies == tuple(epoch.accuracy for epoch in epochs)
    (row,) = found.rows
    assert row.dense.accuracies != ()
    assert row.dense != found.control
    none = sweep(model, test, retrain=RETRAIN, train_loader=train, held=(), control=False, **options)
    assert none.control is None
    assert none.rows[0].dense is None
    assert none.rows[0].manifold is None


def test_every_training_starts_at_the_same_epoch_of_its_loader(test):
    """The loader counts its epochs, and shuffles and augments by that count."""
    data = load_data("digits")
    loader = data.train_loader(512, seed=3)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, 4), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.LazyLinear(10)
    )
    x, y = next(iter(data.test_loader(64)))
    model(x)
    options = {"layers": "2", "cuts": ["out|rest", "in|rest"], "fractions": [0.5]}
    found = sweep(model, [(x, y)], retrain=RETRAIN, train_loader=loader, **options)
    for row in found.rows:
        again = tnc.truncate(model, row.cuts, row.amount, layers=["2"]).model
        epochs = train_(again, data.train_loader(512, seed=3), RETRAIN | {"seed": 0})
        assert_close(row.dense.losses, tuple(epoch.loss for epoch in epochs))
    assert loader.sampler.epoch == -1


CUTS = {
    "out": ("out|rest",),
    "separable": ("out kw|in kh",),
    "twice": ("out|rest", "out|rest"),
    "tucker": ("out|rest", "in|rest"),
    "tucker-all": ("out|rest", "in|rest", "kh|rest"),
    "mps": ("in|rest", "in kh|rest", "out|rest"),
    "mps-mixed": ("out kw|rest", "kw|rest"),
}


def beyond(kernel, cut):
    s = spectrum(kernel, Cut.parse(cut.cut))
    return float(s[cut.rank :].norm() / s.norm())


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_manifold_holds_the_same_kernels_at_the_start_and_their_ranks_after(
    cuts, layer, dtype, train, test
):
    model = Small().to(dtype)
    batches = [(x.to(dtype), y) for x, y in train]
    made = tnc.truncate(model, cuts, tnc.RankFraction(0.6), layers=[layer])
    asked = [cut for cut in made.layers[0].cuts if cut.asked < cut.full]
    if not asked:
        with pytest.raises(ValueError, match="nothing was truncated"):
            on_manifold(made.model, made.layers)
        return
    held = on_manifold(made.model, made.layers)
    start = made.model.get_submodule(layer).weight
    assert_close(held.get_submodule(layer).weight, start, rtol=1e-5, atol=1e-6)
    x = batches[0][0]
    assert_close(held.eval()(x), made.model.eval()(x), rtol=1e-4, atol=1e-5)
    free = made.model
    train_(held, batches, RETRAIN)
    train_(free, batches, RETRAIN)
    geometry = held.get_submodule(layer).geometry
    trained = geometry.kernels(held.get_submodule(layer).weight.detach())
    assert (trained - geometry.kernels(start.detach())).abs().max() > 1e-4
    free_kernels = geometry.kernels(free.get_submodule(layer).weight.detach())
    small = 1e-6 if dtype == torch.float32 else 1e-12
    for cut in asked:
        for kernel, other in zip(trained, free_kernels, strict=True):
            assert float(spectrum(kernel, Cut.parse(cut.cut))[cut.rank :].norm()) < small * float(
                kernel.norm()
            )
            assert float(spectrum(other, Cut.parse(cut.cut))[cut.rank :].norm()) > 1e-4 * float(other.norm())


def test_rows_say_how_far_training_left_the_manifold(model, test, train):
    options = {"cuts": ["out|rest", ("out kh|rest", "out kw|rest")], "fractions": [0.5], "layers": "grouped"}
    rows = sweep(model, test, retrain=RETRAIN, train_loader=train, **options).rows
    assert rows[0].manifold.beyond < 1e-12 < 1e-5 < rows[0].dense.beyond < 1
    assert rows[0].manifold.formats == {"grouped": "svd"}
    reason = "no format holds the cuts 'out kh|rest', 'out kw|rest' together: they cross"
    assert rows[1].manifold.reason == reason
    assert rows[1].dense.accuracies
    again = sweep(model, test, retrain=RETRAIN | {"lr": 1e30}, train_loader=train, **options)
    assert "the loss became" in again.rows[0].dense.reason
    assert "not trained again" in str(again)
    assert Sweep.from_dict(json.loads(json.dumps(again.to_dict()))) == again
    full = sweep(model, test, retrain=RETRAIN, train_loader=train, cuts=["out|rest"], fractions=[1.0])
    assert {row.manifold.reason for row in full.rows} == {"nothing was truncated: all ranks are full"}


def layer_of(shape, *cuts):
    achieved = tuple(AchievedCut(cut, rank, rank, 10**6) for cut, rank in cuts)
    return TruncatedLayer("x", shape, 1, achieved, 0.1)


@pytest.mark.parametrize(
    ("cuts", "format", "ranks"),
    [
        ([("kh|rest", 2)], SVD("kh|rest"), (2,)),
        ([("out|rest", 4), ("in|rest", 3)], Tucker(), (3, 4)),
        ([("out|rest", 4), ("in|rest", 3), ("kw|rest", 2)], Tucker("all"), (3, 3, 2, 4)),
        ([("in|rest", 3), ("in kh|rest", 5), ("out|rest", 4)], MPS("in kh kw out"), (3, 5, 4)),
        ([("out kh|in kw", 2), ("out kw|in kh", 2)], None, None),
    ],
)
def test_factors_are_counted_in_the_format_that_holds_all_cuts(cuts, format, ranks):
    shape = (8, 6, 3, 3)
    found = factored_params([layer_of(shape, *cuts), layer_of((2, 2, 1, 1))])
    assert found == ((format.num_params(shape, ranks) + 4, 436) if format is not None else None)


# --- forms of the result ------------------------------------------------------------------------------------


@pytest.fixture
def whole(model, test, images, train):
    model.grouped.register_parameter("odd", nn.Parameter(torch.ones(1)))
    options = {
        "layers": ["each", "first 2"],
        "cuts": ["out|rest", ("out|rest", "in|rest")],
        "fractions": [0.5, 0.3],
    }
    return sweep(model, test, images=images, retrain=RETRAIN, train_loader=train, **options)


def test_a_sweep_survives_a_file_and_shows_all(whole, tmp_path):
    whole.save(tmp_path / "s.json")
    assert Sweep.load(tmp_path / "s.json") == whole
    for text in (str(whole), whole.to_markdown().replace("\\|", "|")):
        assert all(word in text for word in ("stem", "first 2", "out|rest", "dense control", "BN"))
        assert "it holds 'odd' beside weight and bias" in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.rows[0].rel_error = 0.0


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_a_frame_has_a_line_for_each_row(whole, kind):
    frame = whole.to_frame(kind)
    assert frame.shape[0] == len(whole.rows)
    assert list(frame["accuracy"]) == [row.before.accuracy for row in whole.rows]
    assert frame["accuracy_manifold"][0] == whole.rows[0].manifold.accuracy
    assert list(frame["amount"]) == [row.amount.fraction for row in whole.rows]


def test_a_frame_of_another_library_is_refused(model, test, unchecked):
    found = sweep(model, test, layers="stem", cuts=["kh|rest"], fractions=[0.5])
    with pytest.raises(ValueError, match="a frame is of pandas or polars, got 'xarray'"):
        found.to_frame("xarray")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 3}, "this is no sweep: rows"),
        ({"version": 2}, "version 2, this release reads 1: upgrade"),
        ({"odd": 1}, "unknown key 'odd'"),
        (None, "is not valid JSON"),
    ],
)
def test_files_that_hold_none_are_one_line(model, test, tmp_path, change, message):
    fields = sweep(model, test, layers="stem", cuts=["kh|rest"], fractions=[0.5]).to_dict()
    text = json.dumps(fields | change) if change is not None else "{"
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Sweep.load(tmp_path / "s.json")
    assert str(caught.value).startswith(f"sweep {tmp_path}")
    assert "\n" not in str(caught.value)


def test_figures_draw_every_row(whole, tmp_path):
    """A panel for each set of layers, before and after; a line for each cut, through all of its points."""
    loaded = "matplotlib.pyplot" in sys.modules
    (figure,) = norm_loss_figures(whole)
    panels = figure.axes
    assert [axis.get_title() for axis in panels[:3]] == list(whole.labels)
    for axis, label in zip(panels, whole.labels, strict=False):
        drawn = {tuple(point) for line in axis.get_lines()[1:] for point in line.get_xydata().tolist()}
        assert drawn == {(row.rel_error, 100 * row.before.accuracy) for row in whole.of(label)}
    trained = training_figures(whole)
    assert sum(axis.axison for figure in trained for axis in figure.axes) == whole.units
    lines = trained[0].axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [3, 3, 3]
    figure.savefig(tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 10_000
    assert ("matplotlib.pyplot" in sys.modules) is loaded


# --- misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "first 9"}, "the model has 3 layers to truncate, got layers='first 9'"),
        ({"layers": "convx"}, "no layer that can be truncated is called 'convx'; these can: stem, point"),
        ({"layers": []}, "wanted layers to truncate, such as 'each' or 'last 2', got none"),
        ({"layers": [3]}, "layers are 'each', 'all', 'first 2'.*, got 3"),
        ({"cuts": []}, "wanted 'all' or cuts such as 'out|rest', got none"),
        ({"cuts": "out"}, "a cut is written 'legs|legs'"),
        ({"cuts": ["kd|rest"]}, "no cut fits any of the layers: the cut 'kd|rest' leaves one side"),
        ({"fractions": []}, "wanted at least one fraction of the full rank"),
        ({"fractions": [1.5]}, "rank_fraction is a number above 0 and at most 1, got 1.5"),
        ({"amounts": [{"rank": 3}]}, "unknown rank policy 'rank'"),
        ({"retrain": RETRAIN}, "takes both retrain and train_loader, got retrain without train_loader"),
        ({"train_loader": []}, "got train_loader without retrain"),
        ({"retrain": {"epoch": 3}, "train_loader": []}, "config: unknown key 'epoch'"),
        ({"retrain": RETRAIN, "train_loader": [], "held": ["free"]}, "held names dense, manifold or both"),
        ({"workers": 0}, "workers is a number from 1 on, got 0"),
        ({"threads": 0}, "threads is a number from 1 on, got 0"),
        ({"images": []}, "wanted at least one batch of inputs, got none"),
        ({"crossing": "go"}, "crossing is 'measure' or 'alternate', got 'go'"),
    ],
)
def test_misuse_is_one_line(model, test, unchecked, options, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as caught:
        sweep(model, test, **options)
    assert "\n" not in str(caught.value)


def test_models_and_images_that_do_not_fit_are_one_line(model, test):
    unlabelled = [x for x, _ in test]
    with pytest.raises(ValueError, match="wanted labelled test batches"):
        sweep(model, unlabelled)
    with pytest.raises(ValueError, match=r"can't be run on batches of shape \(2, 3, 6, 6\)"):
        sweep(model, [(torch.randn(2, 3, 6, 6).double(), torch.zeros(2).long())])
    with pytest.raises(ValueError, match="the model has 4 classes, got labels from 0 to 7"):
        sweep(model, [(unlabelled[0], torch.arange(8))])
    with pytest.raises(ValueError, match=r"puts out \(images, classes\), got shape \(8, 6, 6, 6\)"):
        sweep(nn.Sequential(model.stem), test)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        sweep(model, [(unlabelled[0] * math.nan, test[0][1])])
    with pytest.raises(ValueError, match="no convolution that can be truncated"):
        sweep(nn.Sequential(nn.Flatten(), nn.Linear(36, 4).double()), test)
    with pytest.raises(ValueError, match="meta device"):
        sweep(Small().to("meta"), test)


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(FACTORY)
    line = "sweep --model tiny.py:tiny --data digits --layers 3 --fractions 0.5 --test-images 32 --images 16"

    def run(*more):
        return CliRunner().invoke(app, [*line.split(), "--out", "found", *more])

    return run


def test_the_command_writes_a_folder_and_goes_on_in_it(command, tmp_path, units):
    result = command("--cuts", "out|rest, kh|rest + kw|rest")
    assert result.exit_code == 0, result.output
    assert "kh|rest, kw|rest" in result.stdout
    assert "no --weights" in result.stderr
    names = {"arguments.json", "rows.jsonl", "sweep.json", "norm-loss.png"}
    assert {path.name for path in (tmp_path / "found").iterdir()} == names
    found = Sweep.load(tmp_path / "found" / "sweep.json")
    assert len(found.rows) == 2
    differing = command("--cuts", "all")
    assert differing.exit_code == 1
    assert differing.stderr.startswith(
        "error: found holds a sweep with cuts='out|rest, kh|rest + kw|rest', got 'all'"
    )
    assert differing.stderr.count("\n") == 1
    replaced = command("--cuts", "all", "--overwrite", "--json")
    assert replaced.exit_code == 0, replaced.output
    assert len(Sweep.from_dict(json.loads(replaced.stdout)).rows) == 7


FACTORY = """
from torch import nn

def tiny(num_classes=10, in_channels=1):
    first = nn.Conv2d(in_channels, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(4, 4, 3, stride=3), nn.Flatten(), nn.Linear(16, num_classes))
"""


def test_the_same_command_does_no_work_twice(tmp_path, monkeypatch, units):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(FACTORY)
    tnc.save_weights(tnc.build_model("tiny.py:tiny"), "w.safetensors")
    (tmp_path / "c.json").write_text('{"lr": 0.01, "distill": 0.0}')
    line = "sweep --model tiny.py:tiny --weights w.safetensors --data digits --layers 0+3 --cuts kh|rest"
    line += " --fractions 0.3 --test-images 32 --images 16 --retrain-epochs 1 --config c.json --out found"
    for _ in range(2):
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == 0, result.output
        assert (tmp_path / "found" / "training.png").exists()
        assert [unit.kind for unit in units] == ["ranks", "figures", "figures", "dense", "dense", "manifold"]
    found = Sweep.load(tmp_path / "found" / "sweep.json")
    assert found.labels == ("0+3",)
    assert found.config["lr"] == 0.01
    assert found.rows[0].manifold.formats == {"0": "svd(kh|rest)", "3": "svd(kh|rest)"}


def test_the_command_refuses_in_one_line(command, tmp_path, monkeypatch):
    assert command("--fractions", "half").stderr == (
        "error: --fractions are numbers with commas between them, got 'half'\n"
    )
    assert "no layer that can be truncated is called 'convx'" in command("--layers", "convx").stderr
    assert command("--cuts", "kh|rest").exit_code == 0  # what failed before it had begun is in nobody's way
    assert "--config is for training again" in command("--config", "c.yaml").stderr
    (tmp_path / "found" / "sweep.json").write_text("mine")
    (tmp_path / "found" / "arguments.json").unlink()
    assert "found holds other files (no arguments.json)" in command().stderr
    assert (tmp_path / "found" / "sweep.json").read_text() == "mine"


def test_an_interrupted_command_says_how_it_goes_on(command, monkeypatch):
    done, run = [], Bench.run

    def limited(self, unit):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(unit)
        return run(self, unit)

    monkeypatch.setattr(Bench, "run", limited)
    result = command()
    assert result.exit_code == 130
    assert (
        "interrupted; 5 results are kept in found/rows.jsonl, and the same command goes on" in result.stderr
    )
