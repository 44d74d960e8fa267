"""The scripts under examples/ on a small setting."""

import json
import re
import runpy
import sys
from fnmatch import fnmatch
from pathlib import Path

import accuracy_at_size
import accuracy_page
import atlas_speed
import benchmark_rows
import benchmarks_page
import budget_for_a_model
import compress_on_photos
import deployment
import deployment_page
import export_and_compare
import finetune_recovery
import frozen_beside_dense
import geometry_grid
import open_a_layer
import pytest
import recovery_page
import torch
import train_in_your_loop
from few_images import few_digits
from PIL import Image

import tncompress as tnc
from tncompress import data

EXAMPLES = Path(deployment.__file__).parent
SCRIPTS = {str(path.relative_to(EXAMPLES)): path.read_text() for path in sorted(EXAMPLES.rglob("*.py"))}
MEASUREMENTS = (  # which write the pages of numbers, with what belongs to them
    "accuracy_at_size.py",
    "accuracy_page.py",
    "atlas_speed.py",
    "benchmarks/*",
    "deployment.py",
    "deployment_page.py",
    "finetune_recovery.py",
    "geometry_grid.py",
    "landing_picture.py",
    "paper/*",
    "recovery_page.py",
    "recovery_runs.py",
    "recovery_steps.py",
    "zoo_table.py",
)
PACKAGES = ("own_format/*",)
SHORT = [name for name in SCRIPTS if not any(fnmatch(name, kind) for kind in (*MEASUREMENTS, *PACKAGES))]


# --- scripts to start from ----------------------------------------------------------------------------------


def test_what_is_no_measurement_is_short_and_on_the_page_of_examples():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    assert len(SHORT) >= 7
    for name in SHORT:
        assert len(SCRIPTS[name].splitlines()) <= 100, name
        assert '__name__ == "__main__"' in SCRIPTS[name], name
        assert re.search(rf"^    python examples/{name}", SCRIPTS[name], re.MULTILINE), name
        assert f"{{download}}`{name} <../examples/{name}>`\n: " in page
    for kind in (*MEASUREMENTS, *PACKAGES):
        assert any(fnmatch(name, kind) for name in SCRIPTS), f"there is no {kind}"


@pytest.mark.parametrize("name", [name for name in SCRIPTS if '__name__ == "__main__"' in SCRIPTS[name]])
def test_every_script_says_what_it_takes(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: ")
    if name in SHORT:
        assert SCRIPTS[name].split('"""')[1].splitlines()[0] in said


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setitem(data._IN_MEMORY, "digits", few_digits())


@pytest.mark.parametrize("model", ["squeezenet1_1", "timm:test_resnet"])
def test_a_model_under_a_budget(model, capsys):
    few = ["--params", "0.6", "--macs", "0.9", "--format", "svd", "--side", "64"]
    budget_for_a_model.main(["--model", model, *few])
    said = capsys.readouterr().out
    assert re.search(r": svd of ranks \d+, \d+% left", said)
    assert "parameters: the stem (first layer), kept dense by default" in said
    reached = {name: float(part) for name, part in re.findall(r"(params|macs) (\d\.\d+) of", said)}
    assert reached["params"] <= 0.6
    assert reached["macs"] <= 0.9


TINY = """
from torch import nn
def tiny(num_classes):
    body = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
"""


def test_photos_of_ones_own(tmp_path, capsys, quick_cp):
    for split, count in (("train", 6), ("val", 3)):
        for shade, kind in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 30), (90 * shade, 20 * number, 99)).save(folder / f"{number}.png")
    (tmp_path / "net.py").write_text(TINY)
    model = tnc.build_model(f"{tmp_path}/net.py:tiny", num_classes=2)
    tnc.save_weights(model, tmp_path / "dense.safetensors")
    named = ["--model", f"{tmp_path}/net.py:tiny", "--weights", str(tmp_path / "dense.safetensors")]
    few = ["--side", "16", "--images", "8", "--params", "0.6", "--macs", "0.8"]
    compress_on_photos.main([str(tmp_path / "photos"), *named, *few, "--out", str(tmp_path / "small")])
    said = capsys.readouterr().out
    assert all(re.search(rf"^ *{name}: ", said, re.MULTILINE) for name in ("dense", "truncated", "repaired"))
    assert said.count("of 6 images right") == 3
    small = tnc.load(tmp_path / "small", model)
    assert sum(p.numel() for p in small.parameters()) <= 0.6 * sum(p.numel() for p in model.parameters())


def test_a_loop_of_ones_own(few, capsys):
    train_in_your_loop.main(["--ratio", "0.1", "--epochs", "1", "--dense-epochs", "1"])
    said = capsys.readouterr().out
    assert "my loop, epoch 1: loss" in said
    assert said.count("of 48 images right") == 4
    dense = tnc.build_model("zoo:cnn4").eval()
    small = tnc.compress(dense, {"default": {"format": "tucker", "rank": {"params_ratio": 0.1}}})
    before = {key: value.clone() for key, value in small.state_dict().items()}
    batches = [(torch.randn(8, 1, 16, 16), torch.arange(8))]
    tuned = train_in_your_loop.my_loop(small, dense, batches, 2, 0.1)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert not any(torch.equal(p, before[name]) for name, p in tuned.conv2.named_parameters(prefix="conv2"))


def test_frozen_beside_dense(capsys):
    few = ["--input", "1x16x16", "--batch", "2", "--seconds", "0.01"]
    frozen_beside_dense.main(["--model", "zoo:cnn4", *few])
    said = capsys.readouterr().out
    assert float(re.search(r"outputs off by (\S+)", said)[1]) < 1e-4
    assert re.search(r"^  conv3: ", said, re.MULTILINE)
    assert said.count("frozen") > said.count("eager") > 1


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_what_is_exported_gives_the_same_answers(few, tmp_path, capsys):
    export_and_compare.main(["--out", str(tmp_path / "made"), "--epochs", "1"])
    said = capsys.readouterr().out
    assert [float(off) < 1e-4 for off in re.findall(r"off by (\S+),", said)] == [True] * 3
    assert said.count("100.0% of the answers the same") == 3
    sizes = {name: int(size) for name, size in re.findall(r"(\S+): +(\d+) kB", said)}
    assert all(size < 0.6 * sizes["dense.safetensors"] for name, size in sizes.items() if "dense" not in name)


# --- measurements -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", geometry_grid.cases(), ids=lambda case: case.name)
def test_every_layer_of_the_grid_passes_in_every_format(case):
    for format in geometry_grid.OURS.values():
        assert geometry_grid.verdict(geometry_grid.ours(format), case) == ("pass", "")


def test_the_grid_tells_what_is_wrong():
    """A conversion that forgets the padding is found out, as is one that fails, or does nothing."""
    case = next(case for case in geometry_grid.cases() if case.name == "padding 1")

    def forgetful(layer):
        layer.padding = (0, 0)
        return layer, layer.weight.detach()

    def off(layer):
        return layer, 1.1 * layer.weight.detach()

    def dense(layer):
        raise geometry_grid.LeftDense("as it is")

    assert geometry_grid.verdict(forgetful, case)[0] == "wrong"
    assert "of the kernel 0.1" in geometry_grid.verdict(off, case)[1]
    assert geometry_grid.verdict(lambda layer: 1 / 0, case)[0] == "raises"
    assert geometry_grid.verdict(dense, case) == ("dense", "as it is")


@pytest.mark.slow
def test_recovery_is_measured_once_and_beside_its_controls(tmp_path, capsys):
    torch.manual_seed(0)
    tnc.save_weights(tnc.build_model("zoo:cnn4"), tmp_path / "cnn4-0.safetensors")
    places = ["--weights", str(tmp_path), "--results", str(tmp_path / "rows.jsonl"), "--data", "digits"]
    few = ["--seeds", "0", "--times", "8", "--epochs", "1", "--images", "64"]
    few += ["--formats", "mps", "--recipes", "local"]
    parts = ["--parts", "goals", "controls", "recipes"]
    finetune_recovery.main(["measure", *places, *few, *parts])
    assert "recipes: 1 runs, 1 epochs" in capsys.readouterr().out
    text = (tmp_path / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    told = [(row["format"], row.get("recipe"), row.get("of"), row["epoch"]) for row in rows]
    assert told[:2] == [("dense", None, None, 0), ("dense control", "global", 1, 1)]
    before = ("truncated", None, 0), ("repaired", None, 0)
    assert told[2:5] == [("auto", *row) for row in (*before, ("global", 1, 1))]
    assert told[5:9] == [("mps", *row) for row in (*before, ("global", 1, 1), ("scratch", 1, 1))]
    assert told[9:] == [("auto", "local", 1, 1)]
    assert all(0.05 < row["params"] < 0.14 for row in rows if row.get("of") and row.get("times"))
    finetune_recovery.main(["measure", *places, *few, *parts])
    assert (tmp_path / "rows.jsonl").read_text() == text
    assert not list(tmp_path.glob("*.checkpoint"))
    assert "about 0.0 h in all" in capsys.readouterr().out
    finetune_recovery.main(["page", *places, "--out", str(tmp_path / "recovery.md")])
    page = (tmp_path / "recovery.md").read_text()
    accuracy = next(row["accuracy"] for row in rows if row.get("recipe") == "scratch")
    assert f"| 8x | mps | from scratch, 1 epochs |  |  | {accuracy:.2f} |" in page


@pytest.mark.slow
def test_a_step_is_measured_in_every_way(tmp_path):
    results = tmp_path / "rows.jsonl"
    finetune_recovery.main(["steps", "--results", str(results), "--batch", "2", "--rounds", "1"])
    row = json.loads(results.read_text())
    ways = {"dense", "mixed", "separable", "tucker", "mixed, checkpointing"}
    for told in ("macs", "peak bytes", "forward bytes", "channels first", "channels last"):
        assert set(row[told]) == ways
    assert all(0.1 < share < 1 for share in row["convolutions"].values())
    assert row["macs"]["mixed, checkpointing"] == row["macs"]["mixed"] < row["macs"]["dense"] / 3.9


def made(accuracies: dict, **rest) -> list:
    return [{"network": "cnn4", "seed": seed, "accuracy": value} | rest for seed, value in accuracies.items()]


def test_the_page_sets_goals_beside_what_was_measured():
    control = {"format": "dense control", "of": 3, "epoch": 3}
    rows = made({0: 92.9, 1: 92.0}, recipe="global", **control)
    rows += made({0: 93.0, 1: 92.0}, recipe="sgd", **control)
    tuned = {"times": 4, "recipe": "global", "of": 3}
    rows += made({0: 92.95, 1: 91.95}, format="auto", epoch=3, **tuned)
    rows += made({0: 92.9, 1: 92.0, 2: 50.0}, format="tltorch CP", epoch=3, **tuned)
    rows += made({0: 93.5, 1: 92.2}, format="auto", epoch=3, **tuned | {"recipe": "balanced"})
    page = recovery_page.page(rows)
    assert "| at most 0.1 below" not in page
    aim = "after 3 epochs at most 0.1 below the dense control"
    assert "| 1x | dense control | 3 epochs, SGD |" in page
    assert f"| cnn4 | 4x | {aim} | 0.05 ± 0.00 (92.45 ± 0.71 beside 92.50 ± 0.71) | met |" in page
    assert "| +0.00 (tltorch CP); seeds: 2 |" in page
    assert "**not met**" in page
    balanced = "| balanced | 4x, mixed, 3 epochs | 92.85 ± 0.92 | 92.45 ± 0.71 | 0.40 ± 0.21 |"
    assert f"{balanced} too few seeds to tell |" in page
    assert "| cnn4 | 16x | after 5 epochs at most 1.0 below the dense control | – | – |" in page


def test_a_setting_that_helps_is_among_the_goals():
    at_the_end = {"of": 5, "epoch": 5}
    rows = made({0: 93.0, 1: 94.0, 2: 93.5}, format="dense control", recipe="global", **at_the_end)
    small = at_the_end | {"format": "auto", "times": 8}
    rows += made({0: 92.5, 1: 93.5, 2: 93.0}, recipe="global", **small)
    rows += made({0: 92.8, 1: 93.8, 2: 93.2}, recipe="balanced", **small)
    rows += made({0: 99.0, 1: 90.0, 2: 95.0}, recipe="ema", **small)  # more on the mean, and no rule
    page = recovery_page.page(rows)
    assert (
        "| cnn4 | 8x | the same, *balanced* | 0.23 ± 0.06 (93.27 ± 0.50 beside 93.50 ± 0.50) | met |" in page
    )
    assert "the same, *ema*" not in page
    below = "0.50 ± 0.00 (93.00 ± 0.50 beside 93.50 ± 0.50) | **not met** |"
    assert f"| cnn4 | 8x | after 5 epochs at most 0.3 below the dense control | {below}" in page


def test_what_is_left_of_a_gap_stands_beside_the_loss():
    at_the_end = {"recipe": "global", "of": 5, "epoch": 5}
    rows = made({0: 93.0, 1: 94.0}, format="dense control", loss=0.05, **at_the_end)
    rows += made({0: 92.5, 1: 93.5, 2: 10.0}, format="auto", times=8, loss=0.1, **at_the_end)
    rows += made({0: 92.0}, format="cp", times=8, **at_the_end)
    page = recovery_page.page(rows)
    assert "| 8x, 5 epochs | mixed | 0.050 ± 0.000 | 0.100 ± 0.000 | 0.50 ± 0.00 |" in page
    assert "| 8x, 5 epochs | cp |" not in page  # its loss is not known


def test_a_setting_helps_where_the_seeds_leave_no_doubt():
    assert recovery_page.said([0.06, 0.07]) == "too few seeds to tell"
    assert recovery_page.said([0.06, 0.07, 0.05]) == "helps"
    assert recovery_page.said([-0.06, -0.07, -0.05]) == "harms"
    assert recovery_page.said([0.06, 0.2, -0.01]) == "no difference seen"


def test_the_page_says_whether_a_step_is_fast_enough():
    sides = {"dense": 4.0, "tucker": 1.0, "mixed": 1.0}
    row = {"network": "resnet20", "format": "step", "batch": 8, "precision": "no", "macs": sides}
    row |= {
        "environment": {"device": "a processor"},
        "on": "cpu",
        "peak bytes": sides,
        "forward bytes": sides,
        "convolutions": {"dense": 0.8, "tucker": 0.5, "mixed": 0.5},
    }
    row["channels first"] = {"dense": 3.0, "tucker": 1.9, "mixed": 1.2}
    row["channels last"] = {"dense": 2.0, "tucker": 1.3, "mixed": 1.5}
    page = recovery_page.page([row])
    limit = "all but the convolutions stays, so that 2.50x is the limit"
    assert (
        f"(mixed, batch 8, float32, a processor) | 1.67x faster at 4.00x fewer MACs; {limit} | **not met** |"
        in page
    )
    assert "| 80 % |" in page
    assert "(tucker, batch 8" not in page  # the best way alone
    better = row | {"channels last": {"dense": 2.0, "tucker": 1.3, "mixed": 1.0}}
    assert "2.00x faster at 4.00x fewer MACs | met |" in recovery_page.page([row, better])
    assert "1.67x faster" not in recovery_page.page([row, better])  # measured again
    page = recovery_page.page([row, better | {"advised": True}])
    assert "1.67x faster" in page
    assert "(mixed, batch 8, float32, a processor, environment as advised)" in page


def test_a_layer_is_opened_and_put_back(tmp_path, capsys):
    open_a_layer.main(
        ["--channels", "12", "--side", "8", "--keep", "4", "--draw", str(tmp_path / "layer.png")]
    )
    said = capsys.readouterr().out
    assert "put back: ranks (4, 18, 6)" in said
    gap = float(said.split("put back: ranks (6, 18, 6), off the layer by ")[1].split()[0])
    assert gap < 1e-5
    assert "the dense convolution" in said
    assert (tmp_path / "layer.png").stat().st_size > 1000


ROW = {"machine": "x86_64, 2 threads", "torch": "2", "onnxruntime": "1", "date": "2026-01-01"}


def test_the_page_on_deployment_says_the_last_of_each_kind(tmp_path):
    def size(kind, form, size, off=0.0):
        return {"part": "sizes", "model": "net", "kind": kind, "form": form, "bytes": size, **ROW} | {
            "difference": off
        }

    times = {"dense": 0.8, "chain": 0.5, "fused": 0.4, "fused, int8": 0.2}
    quartiles = {form: [0.9 * seconds, seconds, 1.1 * seconds] for form, seconds in times.items()}
    rows = [
        size("dense", "saved", 4000),
        size("dense", "ONNX", 4100),
        size("compressed", "ONNX", 9999),
        size("compressed", "saved", 1000),
        size("compressed", "stripped", 1000),
        size("compressed", "ONNX", 1025, 2e-7),
        size("mps", "saved", 2000),
        size("mps", "ONNX", 2010, 3e-7),
        {"part": "latency", "model": "r", "batch": 8, "side": 224, "macs_times": 3.41, **ROW}
        | {"least": times, "quartiles": quartiles, "differences": {"chain": 1e-7, "fused, int8": 0.03}},
        {"part": "load", "model": "v", "bytes": 10**8, "dense_bytes": 5 * 10**8, **ROW}
        | {"seconds": 0.5, "slowest": 0.9, "times": 1.02},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = deployment_page.page(path)
    assert "| saved | 4 kB | 1 kB | 4.00x | the same bits |" in page
    assert "| stripped | 4 kB | 1 kB | 4.00x | the same bits |" in page
    assert "| ONNX | 4.1 kB | 1.02 kB | 4.00x | 2.0e-07 |" in page
    assert "| mps | 2 kB, the same bits | 2.01 kB, 3.0e-07 |" in page
    assert "| fused | 400 ms | 360 ms | 400 ms | 440 ms | 2.00x |" in page
    assert "The goal of 2.2x is missed: 2.00x." in page
    assert "In int8 the outputs are off by 3.0e-02 of the largest one. " in page
    assert "loads in 0.50 s" in page


@pytest.mark.slow
def test_deployment_is_measured_by_one_command(tmp_path, unchecked, monkeypatch):
    monkeypatch.setattr(
        deployment, "backbone_of", lambda small: (_Pyramid().eval(), torch.randn(2, 3, 16, 16))
    )
    results, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    deployment.main(
        ["--small", "--threads", "1", "--parts", "backbone", "--results", str(results), "--page", str(page)]
    )
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = {(row["kind"], row["form"]): row for row in rows}
    assert found["compressed", "saved"]["difference"] == 0
    assert all(row["difference"] < (1e-4 if "ONNX" in row["form"] else 1e-5) for row in rows)
    assert found["compressed", "ONNX"]["bytes"] < 0.6 * found["dense", "ONNX"]["bytes"]
    assert "backbone: size on disk and agreement" in page.read_text()


class _Pyramid(torch.nn.Module):
    """Several outputs by name, as the backbone of a detection model has them."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.body = torch.nn.Conv2d(16, 64, 3, stride=2, padding=1)
        self.top = torch.nn.Conv2d(64, 16, 1)

    def forward(self, x):
        x = self.body(self.stem(x).relu())
        return {"high": x, "low": self.top(x.relu())}


def test_the_pages_hold_what_the_rows_say(tmp_path):
    """Pages that were edited by hand, or not written again after a measurement, are found out."""
    docs = benchmark_rows.ROWS.parent
    benchmarks_page.write_page(benchmark_rows.known(), tmp_path / "benchmarks.md")
    assert (tmp_path / "benchmarks.md").read_text() == (docs / "benchmarks.md").read_text()
    rows = list(accuracy_at_size.read(accuracy_at_size.RESULTS))
    assert accuracy_page.page(rows) == (docs / "accuracy.md").read_text()
    rows = finetune_recovery.read(docs / "recovery.jsonl")
    assert recovery_page.page(rows) == (docs / "recovery.md").read_text()
    assert deployment_page.page(docs / "deployment.jsonl") == (docs / "deployment.md").read_text()
    rows = atlas_speed.read(docs / "atlas_speed.jsonl")
    assert atlas_speed.page(rows) == (docs / "atlas_speed.md").read_text()
