"""The comparison of accuracies: its rows on a small setting, and the page made of them."""

import json
from pathlib import Path

import accuracy_at_size
import accuracy_page
import pytest
import torch

import tncompress as tnc

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Digits and an untrained network in the place of Fashion-MNIST and trained ones."""
    monkeypatch.setattr(accuracy_at_size, "DATA", "digits")
    monkeypatch.setattr(accuracy_at_size, "IMAGES", 64)
    monkeypatch.setattr(accuracy_at_size, "TIMES", (4,))
    monkeypatch.setattr(accuracy_at_size, "BOTH", (4,))
    monkeypatch.setattr(accuracy_at_size, "FORMATS", {"mps": "mps"})
    monkeypatch.setattr(accuracy_at_size, "PEERS", {"tltorch Tucker": "Tucker"})
    tnc.save_weights(
        tnc.build_model("zoo:cnn4", num_classes=10, in_channels=1), tmp_path / "cnn4-0.safetensors"
    )
    return tmp_path


@pytest.mark.slow
def test_every_row_keeps_its_cut_and_is_measured_once(small):
    results = small / "rows.jsonl"
    bench = accuracy_at_size.Bench("cnn4", (0, 0), small, results)
    for part in accuracy_at_size.PARTS:
        accuracy_at_size.measure(bench, part)
    rows = list(accuracy_at_size.read(results))
    keys = [accuracy_at_size.key_of(row) for row in rows]
    assert len(set(keys)) == len(keys)
    steps = {row["step"] for row in rows if row.get("format") == "mps"}
    assert steps >= {"uniform", "budget", "aware", "repair", "uniform, aware"}
    for row in rows:
        if row["step"] == "dense":
            assert row["conv_params"] == row["macs"] == 1
        if row.get("resource") in ("params", "both"):
            assert row["conv_params"] <= 0.25
        if row.get("resource") in ("macs", "both"):
            assert row["macs"] <= 0.25
    again = accuracy_at_size.Bench("cnn4", (0, 0), small, results)
    for part in accuracy_at_size.PARTS:
        accuracy_at_size.measure(again, part)
    assert list(accuracy_at_size.read(results)) == rows
    text = accuracy_page.page(rows)
    assert "tltorch Tucker" in text
    assert f"{rows[0]['accuracy']:.2f}" in text


def test_the_page_is_what_the_rows_say():
    rows = list(accuracy_at_size.read(accuracy_at_size.RESULTS))
    assert (DOCS / "accuracy.md").read_text() == accuracy_page.page(rows)


def row(accuracy, seed=0, **key):
    measured = {"accuracy": accuracy, "output_error": 0.1, "conv_params": 0.25, "macs": 0.3}
    return {"network": "cnn4", "seeds": (seed, seed)} | key | measured


def test_losses_are_against_the_dense_network_of_the_same_seed():
    setting = {"resource": "params", "times": 4, "format": "auto"}
    rows = [row(93.0, 0, step="dense"), row(92.0, 1, step="dense")]
    rows += [row(92.9, 0, step="repair", **setting), row(91.7, 1, step="repair", **setting)]
    table = accuracy_page.page(rows)
    assert "0.20 ± 0.14 | 0.3 | yes" in table
    assert "92.50 ± 0.71 | 92.30 ± 0.85" in table


def test_a_step_that_does_not_help_is_listed():
    setting = {"resource": "params", "times": 4, "format": "mps"}
    rows = [row(93.0, 0, step="dense"), row(90.0, 0, step="aware + BatchNorm", **setting)]
    assert "Nowhere" in accuracy_page.page([*rows, row(90.5, 0, step="repair", **setting)])
    assert "-0.50" in accuracy_page.page([*rows, row(89.5, 0, step="repair", **setting)])


def test_tltorch_holds_no_more_than_asked_for(small):
    torch.manual_seed(0)
    bench = accuracy_at_size.Bench("cnn4", (0, 0), small, small / "rows.jsonl")
    for factorization in ("CP", "Tucker", "TT"):
        model = accuracy_at_size.tltorch_model(bench, factorization, 8)
        assert accuracy_at_size.conv_params(model) <= bench.conv / 8


def test_rows_of_other_weights_are_not_added_to(small, tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"network": "cnn4", "seeds": [0, 0], "step": "dense", "accuracy": 1.25}
    rows.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match=r"accuracy of 1\.25, these weights have"):
        accuracy_at_size.Bench("cnn4", (0, 0), small, rows)
