"""The scripts under examples/ on a small setting."""

import json

import finetune_recovery
import geometry_grid
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
