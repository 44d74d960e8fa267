"""The command line: each verb on a small setting, and one clear line for each misuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tncompress as tnc
from tncompress.cli import app
from tncompress.data import DataSet, load_data
from tncompress.recovery_record import Step, read_recovery
from tncompress.trainer import Trainer

SPEC = "version: 1\ndefault: {format: tucker, rank: {params_ratio: 0.25}}\n"


@pytest.fixture
def trained(tmp_path):
    """A folder with a spec, dense weights, and the model compressed from them."""
    (tmp_path / "spec.yaml").write_text(SPEC)
    torch.manual_seed(0)
    dense = tnc.build_model("zoo:cnn4").eval()
    tnc.save_weights(dense, tmp_path / "dense.safetensors")
    small = tnc.compress(dense, tmp_path / "spec.yaml")
    source = {"source": "zoo:cnn4", "num_classes": 10, "in_channels": 1}
    tnc.save(small, tmp_path / "small", source=source, dense_weights=tmp_path / "dense.safetensors")
    return tmp_path


def test_plan_shows_every_layer_and_changes_nothing(run, trained):
    before = sorted(trained.iterdir())
    text = run("plan --model zoo:cnn4 --weights dense.safetensors --spec spec.yaml --input 1x28x28").stdout
    for name in ("conv1", "conv2", "conv3", "conv4", "fc", "stem", "classifier", "tucker"):
        assert name in text
    assert "[/" not in text  # markup of the console
    data = json.loads(run("plan --model zoo:cnn4 --spec spec.yaml --json").stdout)
    assert [layer["names"] for layer in data["compressed"]] == [["conv2"], ["conv3"], ["conv4"]]
    assert sorted(trained.iterdir()) == before


def test_a_lack_of_memory_is_one_line(run, trained, monkeypatch):
    monkeypatch.setattr(tnc.Tucker, "fit", lambda *_: (_ for _ in ()).throw(MemoryError))
    result = run("plan --model zoo:cnn4 --weights dense.safetensors --spec spec.yaml", code=1)
    assert result.stderr.startswith("error: out of memory while decomposing layer 'conv2'")
    assert result.stderr.count("\n") == 1


def test_models_with_groups_and_transposed_layers_go_the_whole_way(run, trained):
    (trained / "net.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 16, 3, stride=2), nn.Conv2d(16, 32, 3, groups=4),\n"
        "        nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, stride=2, groups=2),\n"
        "        nn.Conv2d(16, 16, 5, groups=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "        nn.Linear(16, num_classes))\n"
    )
    (trained / "spec.yaml").write_text("default: {format: cp, rank: {fixed: 1}}\ninclude: [depthwise]\n")
    run("train --model net.py:net --data digits --epochs 1 --out w.safetensors")
    run("compress --model net.py:net --weights w.safetensors --data digits --spec spec.yaml --out grouped")
    run("repair grouped --model net.py:net --data digits --out repaired")
    found = json.loads(run("report repaired --model net.py:net --data digits --json").stdout)
    assert found["compressed"]["params"] < found["dense"]["params"]
    run("export repaired --model net.py:net --data digits --to onnx")


def test_compress_evaluate_report_export(run, trained):
    run("compress --model zoo:cnn4 --data digits --weights dense.safetensors --spec spec.yaml --out c")
    found = json.loads(run("evaluate c --data digits --json").stdout)
    assert 0 <= found["accuracy"] <= 1
    assert found["images"] == 445
    report = json.loads(run("report c --data digits --json --out r.md").stdout)
    assert report["compressed"]["params"] < report["dense"]["params"]
    assert "Measured on" in (trained / "r.md").read_text()
    made = json.loads(run("export c --to onnx --data digits --json").stdout)
    assert made["relative_difference"] < 1e-4
    assert (trained / "c" / "model.onnx").stat().st_size > 1000


def test_a_saved_plan_is_a_spec(run, trained):
    run("plan --model zoo:cnn4 --weights dense.safetensors --spec spec.yaml --out plan.json")
    run("compress --model zoo:cnn4 --weights dense.safetensors --spec plan.json --out c")
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(tnc.load(trained / "c")(x), tnc.load(trained / "small")(x))


def test_calibrated_plans_and_models(run, trained):
    model = "--model zoo:cnn4 --data digits --weights dense.safetensors"
    made = json.loads(run(f"calibrate {model} --images 128 --out m.safetensors --json").stdout)
    assert (made["images"], made["layers"], made["separable"]) == (128, 5, [])
    found = json.loads(run(f"plan {model} --spec spec.yaml --calibration m.safetensors --json").stdout)
    assert all(0 < layer["output_error"] < layer["rel_error"] for layer in found["compressed"])
    run(f"plan {model} --spec spec.yaml --calibrate 128 --out plan.json")
    assert "output error" in run(f"plan {model} --spec spec.yaml --calibrate 128").stdout
    run(f"compress {model} --spec spec.yaml --calibration m.safetensors --out one")
    run(f"compress {model} --spec plan.json --calibrate 128 --out two")
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(tnc.load(trained / "one")(x), tnc.load(trained / "two")(x))
    tight = json.loads(run(f"calibrate {model} --images 64 --memory 0.005 --out t.safetensors --json").stdout)
    assert tight["separable"]


def test_repair_and_finetune(run, trained):
    mended = json.loads(run("repair small --data digits --images 256 --out mended --json").stdout)
    assert mended["accuracy"] >= 0
    steps = [step["name"] for step in mended["repair"]["steps"]]
    assert steps == ["least squares", "BatchNorm", "classifier"]
    model = "--model zoo:cnn4 --weights dense.safetensors --data digits --images 256"
    run(f"calibrate {model} --gradients teacher --out g.safetensors")
    by_gradients = "repair small --data digits --images 256 --calibration g.safetensors --out weighed --json"
    weighed = json.loads(run(by_gradients).stdout)["repair"]["layers"]
    assert weighed[0]["error_after"] > mended["repair"]["layers"][0]["error_after"]  # not what it makes least
    run(f"calibrate {model} --out m.safetensors")
    refused = run("repair small --data digits --calibration m.safetensors --out no", code=1)
    assert 'this one has none: calibrate(..., gradients="teacher")' in refused.stderr
    few = "--least-squares none --no-batchnorm --no-classifier --images 64 --out few"
    assert "distance to the dense outputs" in run(f"repair small --data digits {few}").stdout
    result = run("finetune small --data digits --epochs 1 --out tuned --json")
    history = json.loads(result.stdout)
    assert history["epochs"][0]["accuracy"] > history["accuracy_start"]
    assert len(history["control"]) == 1
    kept = json.loads((trained / "tuned" / "history.json").read_text())
    assert [step["name"] for step in kept.pop("steps")] == ["before tuning", "tuned"]
    assert kept == history
    assert json.loads(run("evaluate tuned --data digits --json").stdout)["accuracy"] == history["accuracy"]


def test_finetune_takes_a_config_file(run, trained):
    (trained / "c.toml").write_text("epochs = 1\nlr = 0.01\ndistill = 0.0\n")
    history = json.loads(
        run("finetune small --data digits --config c.toml --no-control --out t --json").stdout
    )
    assert history["config"]["lr"] == 0.01
    assert history["control"] == []


RECIPE = """
epochs: 1
local_epochs: 1
slices: [conv2, "re:conv[34]"]
optimizer: adamw
lr_factors: 0.002
schedule: one-cycle
features: 0.1
frobenius_decay: 0.0001
balance: true
ema: 0.99
accumulate: 2
"""


@pytest.mark.slow
def test_finetune_has_keys_for_all_and_writes_curve_and_table(run, trained):
    (trained / "c.yaml").write_text(RECIPE)
    line = (
        "finetune small --data digits --config c.yaml --no-control --out t --curve c.png --csv h.csv --json"
    )
    history = json.loads(run(line).stdout)
    assert len(history["local"]) == len(history["epochs"]) == 1
    assert history["config"]["slices"] == ["conv2", "re:conv[34]"]
    assert (trained / "c.png").stat().st_size > 1000
    assert (trained / "h.csv").read_text().count("\n") == 3
    assert not (trained / "t.checkpoint").exists()
    line = "finetune small --data digits --epochs 1 --no-control --out u --curve c.png"
    assert "c.png is there already" in run(line, code=1).stderr


def interrupted_and_resumed(run, monkeypatch, command, out, other):
    """Return what ``command`` prints that was interrupted in its second epoch, and then given again.

    It does not go on as another run: with the options ``other``.
    """
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_end_epoch", interrupted_at(2, Trainer._end_epoch))
        stopped = run(f"{command} {out}", code=130)
    said = f"nothing was saved; the same command goes on from {out}.checkpoint"
    assert said in " ".join(stopped.stderr.split())
    assert not Path(out).exists()
    assert "is of another run" in run(f"{command} {out} {other}", code=1).stderr
    found = json.loads(run(f"{command} {out}").stdout)
    assert not Path(f"{out}.checkpoint").exists()
    return found


@pytest.mark.slow
def test_finetune_goes_on_by_the_same_command(run, trained, monkeypatch):
    command = "finetune small --data digits --epochs 2 --no-control --json --out"
    whole = json.loads(run(f"{command} whole").stdout)
    history = interrupted_and_resumed(run, monkeypatch, command, "t", "--seed 1")
    losses = [[epoch["loss"] for epoch in each["epochs"]] for each in (whole, history)]
    assert losses[0] == losses[1]
    one, other = (tnc.load(trained / name).state_dict() for name in ("whole", "t"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_progressive_goes_on_by_the_same_command(run, trained, monkeypatch):
    """The first time, it is interrupted in its second round; what comes out is lowered once more."""
    (trained / "c.yaml").write_text("epochs: 1\ncheckpoint_every: 5\n")
    line = (
        "progressive --model zoo:cnn4 --weights dense.safetensors --data digits --spec spec.yaml --rounds 2"
    )
    command = f"{line} --config c.yaml --images 64 --no-control --json --out"
    whole = json.loads(run(f"{command} whole").stdout)
    made = interrupted_and_resumed(run, monkeypatch, command, "t", "--epochs 2")
    losses = [[each["epochs"][0]["loss"] for each in one["rounds"]] for one in (whole, made)]
    assert losses[0] == losses[1]
    one, other = (tnc.load(trained / name).state_dict() for name in ("whole", "t"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    found = json.loads(run("retruncate t --rank rank_fraction=0.5 --layers conv2 --out s --json").stdout)
    (layer,) = found["layers"]
    assert layer["params"] < layer["params_before"]
    assert list(tnc.load(trained / "s").conv2.ranks) == layer["ranks"]
    (trained / "ranks.yaml").write_text("conv2: {fixed: 3}\n'conv[34]': {rank_fraction: 0.5}\n")
    assert "3 layers truncated again" in run("retruncate t --ranks ranks.yaml --out r").stdout


def test_retruncate_carries_on_what_is_recorded(run, trained):
    steps = [{"name": "truncated", "accuracy": 0.5, "images": 445}, {"name": "tuned", "accuracy": 0.75}]
    origin = {"source": {"source": "zoo:cnn4", "in_channels": 1}, "input_shape": (1, 32, 32)}
    tnc.save(tnc.load(trained / "small"), trained / "tuned", **origin, history={"steps": steps})
    run("retruncate tuned --rank rank_fraction=0.5 --out plain")
    assert read_recovery(trained / "plain") == read_recovery(trained / "tuned")
    assert tnc.read_saved(trained / "plain").input_shape == (1, 32, 32)
    line = "retruncate tuned --rank rank_fraction=0.5 --data digits --json --out measured"
    found = json.loads(run(line).stdout)
    *kept, last = read_recovery(trained / "measured").steps
    assert tuple(kept) == read_recovery(trained / "tuned").steps
    assert last == Step("truncated again", found["accuracy"], 445)
    assert json.loads(run("evaluate measured --data digits --json").stdout)["accuracy"] == last.accuracy
    shown = run("retruncate small --rank rank_fraction=0.5 --data digits --out first").stdout
    assert "accuracy before: " in shown
    named = [step.name for step in read_recovery(trained / "first").steps]
    assert named == ["compressed", "truncated again"]
    run("retruncate small --rank rank_fraction=0.5 --out bare")
    assert not (trained / "bare" / "history.json").exists()


def interrupted_at(number, ended):
    count = 0

    def end(self, *args):
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        ended(self, *args)

    return end


def test_train_writes_weights(run, tmp_path):
    found = json.loads(
        run("train --model zoo:cnn4 --data digits --epochs 1 --out w.safetensors --json").stdout
    )
    model = tnc.build_model("zoo:cnn4")
    tnc.load_weights(model, tmp_path / "w.safetensors")
    assert tnc.evaluate(model, load_data("digits").test_loader()).accuracy == found["accuracy"]


def test_models_known_to_take_it_are_trained_in_the_fast_layout(run, trained, monkeypatch):
    asked = []

    def seen(model, loader, settings, **_):
        asked.append((settings.channels_last, settings.mixed_precision))
        raise ValueError("seen enough")

    monkeypatch.setattr("tncompress.cli_train.train_", seen)
    monkeypatch.setattr(tnc, "finetune", seen)
    (trained / "plain.yaml").write_text("channels_last: false\nmixed_precision: no\n")
    (trained / "own.py").write_text(
        "import tncompress as tnc\ndef net():\n    return tnc.build_model('zoo:cnn4')\n"
    )
    zoo, own = "train --model zoo:cnn4 --data digits --out n.safetensors", "own.py:net"
    for line in (zoo, f"{zoo} --config plain.yaml", zoo.replace("zoo:cnn4", own)):
        run(line, code=1)
    for line in (
        "finetune small --data digits --out n",
        f"finetune small --model {own} --data digits --out n",
    ):
        run(line, code=1)
    assert [layout for layout, _ in asked] == [True, False, False, True, False]
    assert asked[1][1] == "no"  # YAML reads it as false


@pytest.mark.slow
def test_train_goes_on_by_the_same_command(run, tmp_path, monkeypatch):
    command = "train --model zoo:cnn4 --data digits --epochs 2 --json --out"
    whole = json.loads(run(f"{command} whole.safetensors").stdout)
    found = interrupted_and_resumed(run, monkeypatch, command, "w.safetensors", "--seed 1")
    assert found["accuracy"] == whole["accuracy"]
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_images_are_augmented_unless_told_otherwise(run, trained, monkeypatch):
    asked = []

    def loader(self, **how):
        asked.append(how)
        raise ValueError("seen enough")

    monkeypatch.setattr(DataSet, "train_loader", loader)
    for option, wanted in (("", True), ("--no-augment", False)):
        run(f"train --model zoo:cnn4 --data digits --out d.safetensors {option}", code=1)
        run(f"finetune small --data digits --out t {option}", code=1)
        run(f"progressive --model zoo:cnn4 --data digits --spec spec.yaml --out p {option}", code=1)
        assert asked == 3 * [{"seed": 0, "augment": wanted}]
        asked.clear()


FACTORY = """
from torch import nn
def make(num_classes=3):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, num_classes))
"""


def test_a_factory_in_a_file(run, trained):
    (trained / "mine.py").write_text(FACTORY)
    run("compress --model mine.py:make --spec spec.yaml --input 3x16x16 --out mine")
    run("export mine --to onnx --input 3x16x16", code=1)
    made = run("export mine --model mine.py:make --to onnx --input 3x16x16 --json")
    assert json.loads(made.stdout)["relative_difference"] < 1e-4


IMAGES = """
import torch
from torch.utils.data import TensorDataset
def splits():
    made = [TensorDataset(torch.randn(n, 3, 16, 16), torch.arange(n) % 3) for n in (12, 6)]
    return *made, 3
"""


def test_a_budget_without_a_spec_on_images_of_ones_own(run, trained):
    (trained / "mine.py").write_text(FACTORY)
    (trained / "own.py").write_text(IMAGES)
    own = "--model mine.py:make --data own.py:splits"
    run(f"compress {own} --budget params=0.7,macs=0.9 --calibrate 8 --out own")
    plan = tnc.load(trained / "own", tnc.build_model(f"{trained}/mine.py:make")).tncompress_plan
    assert plan.params <= 0.7 * plan.params_model
    assert plan.spec.budget.asked == {"params": 0.7, "macs": 0.9}
    assert json.loads(run(f"evaluate own {own} --json").stdout)["images"] == 6


BASE = "plan --model zoo:cnn4"
MISUSE = {
    "unknown format": (
        f"{BASE} --spec bad_format.yaml",
        "unknown format 'spline'; the formats are cp, mps, svd, tucker",
    ),
    "spec and budget": (f"{BASE} --spec rank0.yaml --budget params=0.5", "--spec FILE or --budget, not both"),
    "budget": (f"{BASE} --budget 0.25", "--budget is such as params=0.25 or params=0.25,macs=0.5, got 0.25"),
    "budget on what": (f"{BASE} --budget param=0.25", "did you mean 'params'?"),
    "two calibrations": (f"{BASE} --data digits --calibration m.safetensors --calibrate 9", "not both"),
    "no images": (f"{BASE} --calibrate 9", "--calibrate takes its images from --data"),
    "no moments": (f"{BASE} --calibration none.safetensors", "no file of moments none.safetensors"),
    "foreign moments": (f"{BASE} --calibration dense.safetensors", "holds no moments"),
    "moments suffix": ("calibrate --model zoo:cnn4 --data digits --out m.pt", ".safetensors, got m.pt"),
    "calibrated include": (
        "calibrate --model zoo:cnn4 --data digits --include depth --out m.safetensors",
        "include",
    ),
    "misspelt key": (
        f"{BASE} --spec bad_key.yaml",
        "unknown key 'default.fromat'; the keys there are format",
    ),
    "rank 0": (f"{BASE} --spec rank0.yaml", "whole numbers from 1 on, got 0"),
    "rank too high": (f"{BASE} --spec rank999.yaml", "layer 'conv2' with kernel (64, 32, 3, 3)"),
    "pattern": (f"{BASE} --spec pattern.yaml", "'layer9.*' matches no layer; the layers are conv1"),
    "broken yaml": (f"{BASE} --spec broken.yaml", "is not valid YAML"),
    "no spec": (f"{BASE} --spec none.yaml", "there is no spec file none.yaml"),
    "model": ("plan --model zoo:cnn5", "unknown model 'zoo:cnn5': the zoo has cnn4, resnet20, resnet50"),
    "model kind": ("plan --model cnn4", "wanted zoo:NAME"),
    "torchvision model": ("plan --model torchvision:resnet51", "resnet50"),
    "no weights": (f"{BASE} --weights none.safetensors", "no weights file none.safetensors"),
    "short weights": (f"{BASE} --weights short.safetensors", "is not a whole safetensors file"),
    "other weights": ("plan --model zoo:resnet20 --weights dense.safetensors", "does not fit CifarResNet"),
    "nan": (
        f"{BASE} --weights nan.safetensors",
        "layer 'conv3' with kernel (128, 64, 3, 3) holds NaN or infinity",
    ),
    "data": (f"{BASE} --data mnist", "unknown data set 'mnist': the names are digits"),
    "input": (f"{BASE} --input 3by4", "--input is a shape such as 3x224x224, got '3by4'"),
    "device": ("compress --model zoo:cnn4 --out o --device tpu9", "device 'tpu9' is not to be had here"),
    "folder in the way": ("compress --model zoo:cnn4 --out small", "already holds a result"),
    "foreign folder": ("compress --model zoo:cnn4 --out foreign --overwrite", "holds other files"),
    "file in the way": ("demo --out spec.yaml", "is a file"),
    "unwritable": ("demo --out /proc/none/here", "can't be written"),
    "unwritable save": ("compress --model zoo:cnn4 --out /proc/none/here", "can't be written"),
    "no result": ("evaluate nothing --data digits", "holds no saved model"),
    "export format": ("export small --to tflite", "unknown export format 'tflite'; the formats are onnx"),
    "config": (
        "finetune small --data digits --config bad_config.yaml --out t",
        "unknown key 'epoch'; the keys there are epochs",
    ),
    "config values": (
        "finetune small --data digits --config bad_value.yaml --out t",
        "schedule: input should be 'cosine' or 'one-cycle', got 'step'",
    ),
    "slices": (
        "finetune small --data digits --config bad_slices.yaml --out t",
        "slices: 'conv9' matches no module",
    ),
    "checkpoint": (
        "finetune small --data digits --checkpoint spec.yaml --out t",
        "spec.yaml is a file: choose another checkpoint folder",
    ),
    "foreign checkpoint": (
        "finetune small --data digits --checkpoint others --out t",
        "holds no checkpoint (no checkpoint.json): choose another folder",
    ),
    "workers without slices": (
        "finetune small --data digits --workers 2 --out t",
        "share out the slices of local_epochs, got none of those",
    ),
    "no rank": ("retruncate small --out t", "how far? Give --rank, such as rank_fraction=0.5"),
    "rank text": (
        "retruncate small --rank half --out t",
        "--rank is a policy with its number, such as rank_fraction=0.5, got 'half'",
    ),
    "rank policy": ("retruncate small --rank half=0.5 --out t", "unknown rank policy 'half'; the tags are"),
    "retruncated pattern": (
        "retruncate small --rank rank_fraction=0.5 --layers conv9 --out t",
        "the pattern 'conv9' matches no compressed layer; those are conv2, conv3, conv4",
    ),
    "rounds of another key": (
        "progressive --model zoo:cnn4 --data digits --config bad_config.yaml --out t",
        "unknown key 'epoch'; the keys there are epochs",
    ),
    "no tensorboard": (
        "finetune small --data digits --log-dir logs --out t",
        "--log-dir needs tensorboard, which is not there: pip install tensorboard",
    ),
    "report suffix": ("report small --out r.html", ".md or .json, got r.html"),
    "train suffix": ("train --model zoo:cnn4 --data digits --out w.pt", ".safetensors, got w.pt"),
    "demo ratio": ("demo --epochs 1 --ratio 2", "params_ratio is a number above 0 and at most 1"),
}


@pytest.mark.parametrize("kind", MISUSE)
def test_misuse_gets_one_line_and_changes_nothing(run, trained, kind, monkeypatch):
    if kind == "no tensorboard":
        monkeypatch.setattr("tncompress.cli_train.find_spec", lambda name: None)
    bad = {
        "bad_format.yaml": "default: {format: spline}",
        "bad_key.yaml": "default: {fromat: mps}",
        "rank0.yaml": "default: {rank: {fixed: 0}}",
        "rank999.yaml": "default: {rank: {fixed: [999, 999, 999]}}",
        "pattern.yaml": "rules: [{pattern: 'layer9.*'}]",
        "broken.yaml": "default: {format: [",
        "bad_config.yaml": "epoch: 3",
        "bad_value.yaml": "schedule: step",
        "bad_slices.yaml": "{local_epochs: 1, slices: [conv9]}",
    }
    for name, text in bad.items():
        (trained / name).write_text(text)
    whole = (trained / "dense.safetensors").read_bytes()
    (trained / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    model = tnc.build_model("zoo:cnn4")
    model.conv3.weight.data[0, 0, 0, 0] = float("nan")
    tnc.save_weights(model, trained / "nan.safetensors")
    (trained / "foreign").mkdir()
    (trained / "foreign" / "thesis.tex").write_text("mine")
    (trained / "others" / "tuned").mkdir(parents=True)
    (trained / "others" / "tuned" / "thesis.tex").write_text("mine")
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    line, words = MISUSE[kind]
    result = run(line, code=1)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert result.stdout == ""
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before
    assert not list(trained.rglob(".*"))


def test_debug_shows_the_traceback(trained):
    line = [sys.executable, "-m", "tncompress", "plan", "--model", "zoo:none"]
    plain = subprocess.run(line, capture_output=True, text=True)
    debug = subprocess.run([*line, "--debug"], capture_output=True, text=True)
    assert plain.returncode == debug.returncode == 1
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


def test_usage_errors_are_exit_code_2(run):
    run("plan --modle zoo:cnn4", code=2)
    run("compress --model zoo:cnn4", code=2)


@pytest.mark.parametrize(
    "verb", ["", *(command.name or command.callback.__name__ for command in app.registered_commands)]
)
def test_help_teaches_by_example(run, verb):
    text = run(f"{verb} --help").output
    assert "tncompress" in text
    if verb:
        assert "Example" in text


def test_the_version_is_the_packages(run):
    assert run("--version").stdout == f"tncompress {tnc.__version__}\n"


@pytest.mark.slow
def test_the_demo_leaves_what_it_names(run, tmp_path):
    result = run("demo --epochs 2 --tune-epochs 1 --out d --json")
    demo = json.loads(result.stdout)
    for name in (
        "model/tncompress.json",
        "model.onnx",
        "report.md",
        "report.json",
        "spec.yaml",
        "dense.safetensors",
        "demo.md",
    ):
        assert (tmp_path / "d" / name).is_file()
    assert [r["format"] for r in demo["results"]] == ["mps", "tucker", "cp"]
    for r in demo["results"]:
        assert r["conv_params"] <= 0.25 * demo["conv_params"]
        assert r["tuned"] > 0.5
    best = next(r for r in demo["results"] if r["format"] == demo["best"])
    found = json.loads(run("evaluate d/model --data digits --json").stdout)
    assert found["accuracy"] == best["tuned"]
    run("demo --out d", code=1)
