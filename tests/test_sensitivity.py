"""Sensitivity: rows are what compressing one layer does, outlive a kill, and predictions follow them."""

import dataclasses
import functools
import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from typer.testing import CliRunner

import tncompress as tnc
from tncompress.cli import app
from tncompress.discovery import find_layers
from tncompress.outputs import DenseOutputs, Images
from tncompress.replay import Replay
from tncompress.response_curves import fit_curve
from tncompress.responses import Row, Sensitivity
from tncompress.sensitivity import quick_sensitivity
from tncompress.truncation import Subject, chosen, projected

NAMES = ("svd", "tucker", "mps", "cp")
every_name = pytest.mark.parametrize("name", NAMES)


class Branching(nn.Module):
    """A stem, a residual block, two branches that meet, a layer that is used twice, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 12, 3, stride=2), nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.twice = nn.Conv2d(12, 12, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norm(self.block(x)))
        x = self.twice(F.relu(self.twice(self.left(x) + self.right(x))))
        return self.head(self.drop(x).mean((2, 3)))


class Many(Branching):
    """Two layers, and an output that is no plain tensor."""

    def forward(self, x):
        return {"maps": self.stem(x), "rest": [self.left(self.stem(x)), 3]}


class Clipped(Branching):
    """The same modules, class name and all, in another forward pass."""

    def forward(self, x):
        return super().forward(x).relu()


Clipped.__name__ = "Branching"

LAYERS = ["block", "left", "right", "twice"]


@pytest.fixture
def model():
    return Branching().double().train()


@pytest.fixture
def batches():
    return [(torch.randn(n, 2, 7, 7).double(), torch.randint(5, (n,))) for n in (6, 3)]


def measured(model, batches, **options):
    return tnc.sensitivity(model, batches, **{"formats": ("svd",), "ratios": (0.5,)} | options)


def obvious(model, small, batches):
    """Error, KL and change of accuracy of a whole compressed model, in plain words."""
    x, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    with torch.no_grad():
        y, other = model.eval()(x), small.eval()(x)
    p, q = y.softmax(1), other.softmax(1)
    error = (other - y).square().sum() / (y - y.mean(0)).square().sum()
    kl = (p * (p.log() - q.log())).sum(1).mean()
    hits = [(out.argmax(1) == labels).double().mean() for out in (y, other)]
    return float(error), float(kl), float(hits[1] - hits[0])


@every_name
def test_a_row_is_what_compressing_that_layer_alone_does(model, batches, name, quick_cp):
    found = measured(model, batches, formats=(name,), ratios=(0.5, 0.3))
    assert len(found.rows) == 8
    for row in found.rows:
        others = [layer for layer in ("stem", "head", *LAYERS) if layer != row.layer]
        spec = {"default": {"format": name, "rank": {"params_ratio": row.ratio}}, "keep_dense": others}
        small = tnc.compress(model, spec)
        (planned,) = small.tncompress_plan.compressed
        assert (planned.name, planned.ranks) == (row.layer, row.ranks)
        assert math.isclose(planned.rel_error, row.local_loss, rel_tol=1e-9)
        assert_close((row.error, row.kl, row.accuracy_change), obvious(model, small, batches))
        assert row.error > 0
        assert row.kl > 0


@every_name
def test_a_kernel_that_loses_nothing_changes_nothing(model, batches, name):
    """Of rank 1 in every format, so that half of the parameters hold all of it."""
    with torch.no_grad():
        for layer in LAYERS:
            weight = model.get_submodule(layer).weight
            legs = [torch.randn(n).double() for n in weight.shape]
            weight.copy_(torch.einsum("a,b,c,d->abcd", *legs))
    for row in measured(model, batches, formats=(name,)).rows:
        assert row.error < 1e-20
        assert row.kl < 1e-15
        assert row.accuracy_change == 0


def test_a_constant_offset_is_no_signal(model, batches):
    before = measured(model, batches)
    with torch.no_grad():
        model.head.bias += 1e3
    after = measured(model, batches)
    assert_close([row.error for row in after.rows], [row.error for row in before.rows])


def test_images_count_alike_however_they_are_batched(model, batches):
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    one, other = measured(model, batches), measured(model, [(x, y)])
    for row, same in zip(one.rows, other.rows, strict=True):
        assert_close((row.error, row.kl), (same.error, same.kl))
    few = measured(model, batches, images=7)
    assert few.images == 7
    assert_close(few.rows[0].error, measured(model, [x[:7]]).rows[0].error)


def test_labels_are_optional_and_a_batch_may_be_a_mapping(model, batches):
    labelled = measured(model, [{"image": x, "label": y} for x, y in batches])
    plain = measured(model, [x for x, _ in batches])
    assert labelled.accuracy == measured(model, batches).accuracy is not None
    assert plain.accuracy is None
    for row, same in zip(plain.rows, labelled.rows, strict=True):
        assert row.accuracy_change is None
        assert same.accuracy_change is not None
        assert row.error == same.error


def test_outputs_may_be_many_and_of_any_shape(model, batches):
    model.__class__ = Many
    found = measured(model, batches)
    errors = {row.layer: row.error for row in found.rows}
    assert errors["left"] > 0 == errors["right"]
    assert {row.kl for row in found.rows} == {None}
    assert found.accuracy is None


@every_name
def test_calibrated_rows_are_what_calibrated_compression_does(model, batches, name, quick_cp):
    """Means are kept by biases and BatchNorms; a layer that no input reaches is truncated plainly."""
    model.__class__ = Many if name == "svd" else Branching
    moments = tnc.calibrate(model, batches)
    found = measured(model, batches, formats=(name,), calibration=moments)
    assert found.calibrated
    assert found == measured(model, batches, formats=(name,), calibration=batches)
    x = torch.cat([x for x, _ in batches])
    dense = DenseOutputs(model, Images((x,), None))
    for row in found.rows:
        others = [layer for layer in ("stem", "head", *LAYERS) if layer != row.layer]
        spec = {"default": {"format": name, "rank": {"params_ratio": 0.5}}, "keep_dense": others}
        small = tnc.compress(model, spec, calibration=moments)
        (planned,) = small.tncompress_plan.compressed
        reached = row.layer in moments.layers
        assert_close(row.local_loss, planned.output_error if reached else planned.rel_error)
        assert_close(row.error, dense.change(small).error)
    assert (len(moments.layers) < len(LAYERS)) is (name == "svd")


def test_the_loss_of_a_last_layer_is_the_change_of_the_output(batches):
    """Both are then the squared error of the same outputs, about their mean over pixels or over images."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(98, 12), nn.ReLU(), nn.Linear(12, 7, bias=False)).double()
    model[3].bias = nn.Parameter(torch.zeros(7).double())
    found = measured(model, batches, calibration=batches, keep_dense=(), ratios=(0.7, 0.5, 0.3))
    last = [row for row in found.rows if row.layer == "3"]
    assert len(last) == 3
    for row in last:
        assert_close(row.error, row.local_loss**2)
        assert_close(found.predict("3", row.local_loss), row.error)


# --- the model is left alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_the_model_is_left_as_it_was(model, batches, monkeypatch, error):
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules, modes = list(model.modules()), [module.training for module in model.modules()]
    if error is None:
        measured(model, batches)
    else:
        stop_after(monkeypatch, 1, error)
        with pytest.raises(error):
            measured(model, batches)
    assert list(model.modules()) == modules
    assert [module.training for module in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_it_is_deterministic_and_leaves_the_random_state(model, batches, quick_cp):
    state = torch.get_rng_state()
    one = measured(model, batches, formats=("cp", "tucker"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert measured(model, batches, formats=("cp", "tucker")) == one


# --- what is not run again ---------------------------------------------------------------------------------


class InPlace(Branching):
    """Works on what layers put out, has a hook change it, and a layer whose forward is its own."""

    def __init__(self):
        super().__init__()
        self.left.register_forward_hook(lambda _, args, output: output * 2 + 1)
        self.block.forward = functools.partial(nn.Conv2d.forward, self.block)

    def forward(self, x):
        x = self.block(self.stem(x).relu_()).mul_(3)
        x = self.left(x) + self.right(x).relu_()
        return self.head(x.mean((2, 3)))


def forwards(model):
    """Return what each module of ``model`` holds by itself."""
    return {name: vars(module).get("forward") for name, module in model.named_modules()}


@pytest.mark.parametrize("kind", [Branching, Many, Clipped, InPlace])
@pytest.mark.parametrize("room", [6000, 2**30])
def test_rows_are_the_same_where_layers_before_a_change_are_not_run(kind, room, batches, monkeypatch):
    model, options = kind().double().eval(), {"formats": ("svd", "tucker"), "ratios": (0.6, 0.3)}
    dense = DenseOutputs(model, Images(tuple(x for x, _ in batches), None), [model.stem, model.left])
    before = forwards(model)
    assert dense.change(model, model.left).error == 0
    assert forwards(model) == before
    found = []
    for most in (0, room):
        monkeypatch.setattr(sys.modules["tncompress.outputs"], "Replay", functools.partial(Replay, room=most))
        found.append(measured(model, batches, **options).rows)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changed", "spared"),
    [
        ("stem", []),
        ("block", ["stem"]),
        ("left", ["stem", "block"]),
        ("twice", ["stem", "block", "left", "right"]),
        ("head", ["stem", "block", "left", "right"]),  # what is called twice is run again
    ],
)
def test_layers_called_before_the_changed_one_are_not_run(changed, spared, batches):
    model, ran = Branching().double().eval(), []
    layers = {name: getattr(model, name) for name in ("stem", *LAYERS, "head")}
    for name, layer in layers.items():
        layer.forward = lambda x, name=name, layer=layer: ran.append(name) or type(layer).forward(layer, x)
    dense = DenseOutputs(model, Images(tuple(x for x, _ in batches), None), layers.values())
    ran.clear()
    assert dense.change(model, layers[changed]).error == 0
    assert set(ran) == set(layers) - set(spared)


# --- the cache ----------------------------------------------------------------------------------------------


def stop_after(monkeypatch, count, error=KeyboardInterrupt):
    """Let ``count`` measurements pass, then raise; return the list of measured ones."""
    change, done = DenseOutputs.change, []

    def limited(self, model, changed=None):
        if len(done) >= count:
            raise error
        done.append(1)
        return change(self, model, changed)

    monkeypatch.setattr(DenseOutputs, "change", limited)
    return done


@pytest.mark.parametrize("cut", [0, 1, 9, 40, None])
def test_a_killed_run_goes_on_where_it_was(model, batches, monkeypatch, tmp_path, cut):
    options = {"formats": ("svd", "tucker"), "ratios": (0.5, 0.3)}
    whole = measured(model, batches, **options)
    cache = tmp_path / "rows.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            measured(model, batches, cache=cache, **options)
    lines = cache.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    if cut is not None:
        cache.write_text("".join(lines) + lines[0][:cut])
    else:
        cache.write_text("".join(lines)[:-1])  # all but the end of the last line
    done = stop_after(monkeypatch, 100)
    assert measured(model, batches, cache=cache, **options) == whole
    assert len(done) == (len(whole.rows) - 5 if cut is not None else len(whole.rows) - 4)
    assert measured(model, batches, cache=cache, **options) == whole
    assert len(done) <= len(whole.rows) - 4
    assert all(json.loads(line) for line in cache.read_text().splitlines())


def changed(what, model, batches):
    options = {}
    if what == "another layer's weight":
        model.stem.weight.data[0, 0, 0, 0] += 1e-9
    elif what == "a buffer":
        model.norm.running_mean += 1e-9
    elif what == "the structure":
        model.norm.eps *= 2
    elif what == "the code":
        model.__class__ = Clipped
    elif what == "an image":
        batches[1][0][0, 0, 0, 0] += 1e-9
    elif what == "fewer images":
        options = {"images": 8}
    elif what == "a label":
        batches[0][1][0] += 1
    elif what == "a calibration":
        options = {"calibration": tnc.calibrate(model, batches)}
    elif what == "the dtype":
        model.float()
        batches = [(x.float(), y) for x, y in batches]
    return measured(model, batches, formats=("svd", "tucker"), **options), batches, options


@pytest.mark.parametrize(
    "what",
    [
        "another layer's weight",
        "a buffer",
        "the structure",
        "the code",
        "an image",
        "fewer images",
        "a label",
        "a calibration",
        "the dtype",
    ],
)
def test_rows_of_something_else_are_never_taken(model, batches, monkeypatch, tmp_path, what):
    cache = tmp_path / "rows.jsonl"
    measured(model, batches, formats=("svd", "tucker"), cache=cache)
    fresh, batches, options = changed(what, model, batches)
    done = stop_after(monkeypatch, 100)
    assert measured(model, batches, formats=("svd", "tucker"), cache=cache, **options) == fresh
    assert len(done) == 8


@pytest.mark.parametrize("text", ["no cache\n", "no cache", '{"key": 1}\n', '[1]\n{"key": "a', '{"kay": "a'])
def test_no_other_file_is_taken_for_a_cache(model, batches, tmp_path, text):
    (tmp_path / "notes").write_text(text)
    with pytest.raises(ValueError, match=r"notes is no cache of measured rows: its line 1|it ends in"):
        measured(model, batches, cache=tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == text


def test_a_cache_that_cannot_be_written_is_one_line(model, batches, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the cache .*rows can't be written: No such file"):
        measured(model, batches, cache=tmp_path / "absent" / "rows")


# --- prediction ---------------------------------------------------------------------------------------------


def rows_of(points, layer="a", format="svd"):
    return [
        Row(layer, tnc.formats.make_format(format), 0.5, (1,), loss, error, None, None)
        for loss, error in points
    ]


def test_predictions_meet_the_measured_points_and_go_with_the_square_beyond():
    points = [(0.1, 0.002), (0.3, 0.004), (0.5, 0.9)]
    found = Sensitivity(tuple(rows_of(points)), 1)
    for loss, error in points:
        assert_close(found.predict("a", loss), error)
    assert_close(found.predict("a", 0.01), 0.002 / 100)
    assert_close(found.predict("a", 1.0), 0.9 * 4)
    middle = math.exp((math.log(0.002) + math.log(0.004)) / 2)
    assert_close(found.predict("a", math.sqrt(0.1 * 0.3)), middle)
    assert found.predict("a", 0.0) == 0


def test_predictions_grow_with_the_loss_whatever_was_measured():
    for _ in range(50):
        count = int(torch.randint(1, 9, ()))
        losses = (torch.rand(count) * 3 - 2).exp() * torch.randint(0, 2, (count,)).clamp(0, 1)
        errors = torch.randn(count).exp() * (torch.rand(count) > 0.2)
        curve = fit_curve([*losses.tolist(), 0.3, 0.3], [*errors.tolist(), 0.1, 0.2])
        values = [curve(loss) for loss in torch.linspace(0, 4, 200).tolist()]
        assert values[0] == 0
        assert all(a < b for a, b in pairwise(values))


def test_a_layer_that_reaches_no_output_is_predicted_to_change_nothing():
    assert fit_curve([0.1, 0.4], [0.0, 0.0])(0.3) == 0
    assert_close(fit_curve([0.0], [0.0])(0.3), 0.09)  # nothing known: the loss itself


def test_a_layer_without_rows_cannot_be_predicted():
    found = Sensitivity(tuple(rows_of([(0.1, 0.2)])), 1)
    with pytest.raises(ValueError, match="layer 'b' was not measured; measured are a"):
        found.predict("b", 0.1)
    for loss in (-0.1, math.nan):
        with pytest.raises(ValueError, match="a loss is a number from 0 on"):
            found.predict("a", loss)


def test_a_format_has_its_own_curve_or_a_factor():
    """With as many rows as any its own points; with fewer the others' curve, times how far it lies above."""
    law = [(loss, loss**2) for loss in (0.1, 0.2, 0.4)]
    own = [(loss, 0.5 * loss) for loss in (0.1, 0.2, 0.4)]
    few = [(0.1, 0.03), (0.2, 0.12)]
    rows = rows_of(law) + rows_of(own, format="mps") + rows_of(few, format="cp")
    found, pooled = Sensitivity(tuple(rows), 1), Sensitivity(tuple(rows_of(law) + rows_of(own)), 1)
    svd, mps, cp, tucker = map(tnc.formats.make_format, ("svd", "mps", "cp", "tucker"))
    for loss in (0.05, 0.1, 0.2, 0.4, 0.8):
        assert_close(found.predict("a", loss, svd), loss**2)
        factor = math.sqrt(math.prod(y / pooled.predict("a", x) for x, y in few))
        assert_close(found.predict("a", loss, cp), factor * pooled.predict("a", loss))
        assert found.predict("a", loss, tucker) == found.predict("a", loss)
    assert_close(found.predict("a", 0.2, mps), 0.1)
    assert found.predict("a", 0.0, cp) == 0
    idle = Sensitivity(tuple(rows_of(law) + rows_of([(0.1, 0.0)], format="cp")), 1)
    assert idle.predict("a", 0.3, cp) == idle.predict(
        "a", 0.3, svd
    )  # nothing to be had from a row without change


def test_the_rank_correlation_leaves_one_format_out():
    """Formats that tell the same law predict each other; where one tells the reverse, none does."""
    law = [(loss, loss**2) for loss in (0.1, 0.2, 0.4)]
    same = rows_of(law) + rows_of(law, format="cp") + rows_of([(x, 9 * y) for x, y in law], "b")
    assert Sensitivity(tuple(same), 1).rank_correlation() == 1  # layer b has one format: not predicted
    steep = [(0.1, 0.9), (0.2, 0.8), (0.4, 0.7)]
    assert Sensitivity(tuple(rows_of(law) + rows_of(steep, format="cp")), 1).rank_correlation() < 0.5
    alone = Sensitivity(tuple(rows_of(law)), 1)
    assert alone.rank_correlation() is None
    assert alone.rank_correlation(Sensitivity(tuple(rows_of(steep)), 1)) == -1


# --- forms of the result ------------------------------------------------------------------------------------


def test_a_sensitivity_survives_a_file_and_shows_all(model, batches, tmp_path):
    found = measured(model, batches, formats=(tnc.MPS("out in spatial"), "cp"), ratios=(0.5, 0.02))
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found
    for text in (str(found), found.to_markdown()):
        assert all(name in text for name in (*LAYERS, "mps(out in spatial)", "one format left out at a time"))
    assert "the stem (first layer)" in str(found)
    assert any(entry.ratio == 0.02 and "hold" in entry.reason for entry in found.unmeasured)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 3}, "this is no sensitivity: rows"),
        ({"version": 2}, "version 2, this release reads 1: upgrade"),
        ({"odd": 1}, "unknown key 'odd'"),
        (None, "is not valid JSON"),
    ],
)
def test_files_that_hold_none_are_one_line(tmp_path, change, message):
    fields = Sensitivity(tuple(rows_of([(0.1, 0.2)])), 1).to_dict()
    text = json.dumps(fields | change) if change is not None else "{"
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Sensitivity.load(tmp_path / "s.json")
    assert str(caught.value).startswith(f"sensitivity {tmp_path}")
    assert "\n" not in str(caught.value)


# --- the quick form -----------------------------------------------------------------------------------------


def test_the_quick_form_takes_no_more_images_than_it_can_afford(model, batches, monkeypatch):
    found = quick_sensitivity(model, batches, formats=("svd",), ratios=(0.5, 0.3))
    assert found.images == 9
    assert found.rows == measured(model, batches, ratios=(0.5, 0.3)).rows
    module = sys.modules["tncompress.sensitivity"]  # the package has the function by this name
    monkeypatch.setattr(module, "QUICK_MACS", 1)
    monkeypatch.setattr(module, "QUICK_IMAGES", (4, 256))
    assert quick_sensitivity(model, batches).images == 4
    assert quick_sensitivity(model, batches, images=8, keep_dense=("l*",)).images == 8
    assert {row.layer for row in quick_sensitivity(model, batches, keep_dense=("l*",)).rows} >= {
        "stem",
        "head",
    }


def test_the_quick_form_has_one_row_more_for_each_format_that_stands_apart(model, batches, monkeypatch):
    """On kernels of 1x1 all formats are one network."""
    monkeypatch.setattr(sys.modules["tncompress.sensitivity"], "QUICK_RATIO", 0.3)
    found = quick_sensitivity(model, batches, calibration=batches, ratios=(0.5,))
    rows = {(row.layer, str(row.format)): row for row in found.rows}
    assert {format for layer, format in rows if layer == "block"} == {
        "svd", "svd(out kw|in kh)", "tucker", "mps", "cp",
    }  # fmt: skip
    assert {format for layer, format in rows if layer == "twice"} == {"svd"}
    assert any("no network of its own" in entry.reason for entry in found.unmeasured)
    exact = measured(model, batches, formats=("mps",), ratios=(0.3,), calibration=batches)
    for row in exact.rows:
        drafted = rows.get((row.layer, "mps"))
        if drafted is not None:
            assert drafted.ranks == row.ranks
            assert drafted.local_loss >= row.local_loss * (1 - 1e-6)


# --- misuse -------------------------------------------------------------------------------------------------


def images(*shape):
    return [torch.randn(*shape).double()]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "wanted at least one batch of inputs, got none"),
        (images(0, 2, 7, 7), {}, "wanted at least one batch of inputs, got none"),
        (images(1, 2, 7, 7), {}, "the output does not differ between the 1 images: wanted several"),
        (images(4, 3, 7, 7), {}, r"the model can't be run on batches of shape \(4, 3, 7, 7\): "),
        ([torch.full((4, 2, 7, 7), math.nan).double()], {}, "holds NaN or infinity"),
        (["a"], {}, "wanted batches that are tensors, or begin with one, got str"),
        (images(4, 2, 7, 7), {"images": 0}, "wanted at least 1 image, got images=0"),
        (images(4, 2, 7, 7), {"formats": ("tt",)}, "unknown format 'tt'; the formats are"),
        (images(4, 2, 7, 7), {"formats": ()}, "at least one format and one ratio"),
        (
            images(4, 2, 7, 7),
            {"ratios": (0.5, 1.5)},
            "params_ratio is a number above 0 and at most 1, got 1.5",
        ),
        (images(4, 2, 7, 7), {"ratios": (0.0,)}, "params_ratio is a number above 0 and at most 1, got 0.0"),
        (images(4, 2, 7, 7), {"keep_dense": ("layer9",)}, "the pattern 'layer9' matches no layer"),
        (images(4, 2, 7, 7), {"include": ("odd",)}, "include.0: input should be"),
    ],
)
def test_misuse_is_one_line(model, given, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        measured(model, given, **options)
    assert "\n" not in str(caught.value)


def test_labels_for_some_batches_only_are_one_line(model, batches):
    with pytest.raises(ValueError, match="labels with all batches or none, but batch 2 has none"):
        measured(model, [batches[0], batches[1][0]])
    with pytest.raises(ValueError, match="batch 2 has some, and those before it none"):
        measured(model, [batches[0][0], batches[1]])


def test_a_kernel_with_nan_and_models_without_weights_are_one_line(model, batches):
    with pytest.raises(ValueError, match=r"on the meta device.*: load its weights"):
        measured(Branching().to("meta"), batches)
    other = tnc.calibrate(Branching().double(), batches)
    with pytest.raises(ValueError, match="the moments are of other weights of layer 'stem'"):
        measured(model, batches, calibration=other)
    model.__class__ = Many
    model.right.weight.data[0] = math.nan
    with pytest.raises(ValueError, match=r"layer 'right' with kernel \(12, 4, 3, 3\) holds NaN or infinity"):
        measured(model, batches)


def test_layers_without_rows_say_why(batches):
    """Also those whose truncation makes the output overflow."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3), nn.Flatten()).double()
    found = measured(model, batches, keep_dense=("stem",), formats=("svd", tnc.SVD("kw|rest")), ratios=(0.5,))
    reasons = {(entry.layer, str(entry.format or "")): entry.reason for entry in found.unmeasured}
    assert "kept dense" in reasons["0", ""]
    assert "kw" in reasons["1", "svd(kw|rest)"]
    assert {row.layer for row in found.rows} == {"1", "2"} - {layer for layer, f in reasons if f == "svd"}
    dense = DenseOutputs(model, Images.gather(batches, torch.device("cpu")))
    assert dense.change(nn.Sequential(model, nn.Threshold(1e9, math.inf))) is None


def test_the_command_prints_saves_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "sensitivity --model zoo:cnn4 --data digits --formats svd,tucker --ratios 0.3 --images 8"
    result = CliRunner().invoke(app, [*line.split(), "--cache", "rows", "--out", "s.json"])
    assert result.exit_code == 0, result.output
    assert "conv4" in result.stdout
    assert "no --weights" in result.stderr
    assert len(Sensitivity.load("s.json").rows) == 6
    assert len((tmp_path / "rows").read_text().splitlines()) == 6
    again = CliRunner().invoke(app, [*line.split(), "--json"])
    assert Sensitivity.from_dict(json.loads(again.stdout)).images == 8
    wrong = CliRunner().invoke(app, [*line.split(), "--ratios", "half"])
    assert wrong.stderr == "error: --ratios are numbers with commas between them, got 'half'\n"
    there = CliRunner().invoke(app, [*line.split(), "--out", "s.json"])
    assert "s.json is there already" in there.stderr


def test_rows_are_frozen(model, batches):
    with pytest.raises(dataclasses.FrozenInstanceError):
        measured(model, batches).rows[0].error = 0.0


@pytest.mark.parametrize("layer", ["block", "left", "right"])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_the_closed_form_is_the_best_cut_of_its_rank(model, batches, layer, ratio):
    """No fit of the same rank has a smaller output error, and the promised one is that of its factors."""
    moments = tnc.calibrate(model, batches)
    subject = Subject.of(next(found for found in find_layers(model) if found.name == layer), moments)
    settings = tnc.Settings(format="svd", rank=tnc.ParamsRatio(ratio))
    ranks, fit = projected(subject, settings)
    other, best = chosen(subject, settings)
    assert ranks == other
    built = subject.built(settings.format, fit)
    lost = subject.kernels - subject.layer.geometry.kernels(built.weight.detach())
    metric = moments.metric(layer)
    error = metric.squared_norm(lost).sum() / metric.squared_norm(subject.kernels).sum()
    assert_close(fit.output_error, float(error.sqrt()))
    assert_close(fit.rel_error, float(lost.norm() / subject.kernels.norm()))
    assert fit.output_error <= best.output_error * (1 + 1e-9)
    assert fit.output_error > 0.9 * best.output_error


def test_the_closed_form_says_where_it_does_not_fit(model, batches):
    found = quick_sensitivity(model, batches, formats=(), calibration=batches, ratios=(0.05,))
    assert not found.rows
    assert "at rank 1 holds" in found.unmeasured[-1].reason
