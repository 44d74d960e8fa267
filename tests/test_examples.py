"""The scripts under examples/ on a small setting."""

import json

import accuracy_at_size
import accuracy_page
import benchmark_rows
import benchmarks_page
import deployment
import deployment_page
import finetune_recovery
import geometry_grid
import open_a_layer
import pytest
import recovery_page
import torch

import tncompress as tnc


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
    assert told[:2] == [("dense", None, None, 0), ("dense control", None, 1, 1)]
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


def made(accuracies: dict, **rest) -> list:
    return [{"network": "cnn4", "seed": seed, "accuracy": value} | rest for seed, value in accuracies.items()]


def test_the_page_sets_goals_beside_what_was_measured():
    rows = made({0: 93.0, 1: 92.0}, format="dense control", of=3, epoch=3)
    tuned = {"times": 4, "recipe": "global", "of": 3}
    rows += made({0: 92.95, 1: 91.95}, format="auto", epoch=3, **tuned)
    rows += made({0: 92.9, 1: 92.0, 2: 50.0}, format="tltorch CP", epoch=3, **tuned)
    rows += made({0: 93.5, 1: 92.2}, format="auto", epoch=3, **tuned | {"recipe": "balanced"})
    page = recovery_page.page(rows)
    assert "| at most 0.1 below" not in page
    aim = "after 3 epochs at most 0.1 below the dense control"
    assert f"| cnn4 | 4x | {aim} | 0.05 ± 0.00 (92.45 ± 0.71 beside 92.50 ± 0.71) | met |" in page
    assert "| +0.00 (tltorch CP) |" in page
    assert "**not met**" in page
    assert "| balanced | 4x, mixed, 3 epochs | 92.85 ± 0.92 | 92.45 ± 0.71 | 0.40 ± 0.21 | helps |" in page
    assert "| cnn4 | 16x | after 5 epochs at most 1.0 below the dense control | – | – |" in page


def test_the_page_says_whether_a_step_is_fast_enough():
    sides = {"dense": 4.0, "mixed": 1.0}
    row = {"network": "resnet20", "format": "step", "batch": 8, "precision": "no", "macs": sides}
    row |= {"environment": {"device": "x86_64"}, "peak bytes": sides, "forward bytes": sides}
    row |= {"channels first": {"dense": 3.0, "mixed": 1.2}, "channels last": {"dense": 2.0, "mixed": 1.5}}
    page = recovery_page.page([row])
    assert "(mixed, batch 8, float32) | 1.67x faster at 4.00x fewer MACs | **not met** |" in page
    row["channels last"]["mixed"] = 1.0
    assert "2.00x faster at 4.00x fewer MACs | met |" in recovery_page.page([row])


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

    times = {"dense": 0.8, "chain": 0.5, "fused": 0.4}
    rows = [
        size("dense", "saved", 4000),
        size("dense", "ONNX", 4100),
        size("compressed", "ONNX", 9999),
        size("compressed", "saved", 1000),
        size("compressed", "stripped", 1000),
        size("compressed", "ONNX", 1025, 2e-7),
        {"part": "latency", "model": "r", "batch": 8, "side": 224, "macs_times": 3.41, **ROW}
        | {"seconds": times, "median": times},
        {"part": "load", "model": "v", "bytes": 10**8, "dense_bytes": 5 * 10**8, **ROW}
        | {"seconds": 0.5, "slowest": 0.9, "times": 1.02},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = deployment_page.page(path)
    assert "| saved | 4 kB | 1 kB | 4.00x | the same bits |" in page
    assert "| stripped | 4 kB | 1 kB | 4.00x | the same bits |" in page
    assert "| ONNX | 4.1 kB | 1.02 kB | 4.00x | 2.0e-07 |" in page
    assert "| fused | 400.0 ms | 400.0 ms | 2.00x |" in page
    assert "The goal of 2.2x is missed: 2.00x." in page
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
