"""The scripts under examples/ on a small setting."""

import json

import deployment
import deployment_page
import finetune_recovery
import geometry_grid
import open_a_layer
import pytest
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
    few = [
        "--seeds",
        "0",
        "--times",
        "8",
        "--epochs",
        "1",
        "--images",
        "64",
        "--formats",
        "mps",
        "--no-peers",
    ]
    finetune_recovery.main(["measure", *places, *few, "--recipes", "global", "local"])
    text = (tmp_path / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    told = [(row["format"], row.get("recipe"), row.get("of"), row["epoch"]) for row in rows]
    assert told[:2] == [("dense", None, None, 0), ("dense control", None, 1, 1)]
    ours = [
        ("truncated", None, 0),
        ("repaired", None, 0),
        *((n, 1, 1) for n in ("global", "local", "scratch")),
    ]
    assert told[2:] == [("mps", *row) for row in ours]
    assert all(0.05 < row["params"] < 0.14 for row in rows if row.get("of") and row.get("times"))
    finetune_recovery.main(["measure", *places, *few, "--recipes", "global", "local"])
    assert (tmp_path / "rows.jsonl").read_text() == text
    assert not list(tmp_path.glob("*.checkpoint"))
    capsys.readouterr()
    finetune_recovery.main(["page", *places])
    assert "| cnn4 | 8x | mps | scratch | 1 | 1 |" in capsys.readouterr().out


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
