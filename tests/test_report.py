"""The report says what was measured, the same in each of its forms."""

import json

import pytest
import torch
from torch import nn

import tncompress as tnc
from tncompress.measure import Latency, macs, num_params
from tncompress.report import Figures, Report
from tncompress.tables import change, count, markdown_table, ratio


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    dense = tnc.build_model("zoo:cnn4").eval()
    small = tnc.compress(dense, {"default": {"format": "tucker", "rank": {"params_ratio": 0.25}}})
    x = torch.randn(2, 1, 28, 28)
    accuracies = {id(dense): 0.93, id(small): 0.91}
    report = tnc.report(dense, small, example_inputs=x, evaluate=lambda m: accuracies[id(m)], seconds=0.05)
    return report, dense, small, x


def test_figures_are_those_of_the_models(made):
    report, dense, small, x = made
    for figures, model in ((report.dense, dense), (report.compressed, small)):
        assert figures.params == num_params(model)
        assert figures.macs == macs(model, x)
        assert figures.latency.median > 0
    assert report.plan == small.tncompress_plan
    assert report.input_shapes == ((2, 1, 28, 28),)


def test_every_form_says_the_same(made):
    report, *_ = made
    markdown, text, data = report.to_markdown(), str(report), json.loads(report.to_json())
    for words in ("93.00 %", "91.00 %", "-2.00 points", count(report.dense.params), "MACs", "latency"):
        assert words in markdown
        assert words in text
    assert data["compressed"]["params"] == report.compressed.params
    for layer in report.plan.layers:
        assert f"| {layer.name} |" in markdown
        assert getattr(layer, "reason", "tucker") in markdown


def test_worse_is_called_worse():
    fast, slow = Latency(1e-3, 1e-5, 10), Latency(4e-3, 1e-5, 10)
    before, after = Figures(None, 100, 10, 400, fast, 50), Figures(None, 200, 10, 400, slow, 25)
    rows = {row[0]: row[3] for row in Report(before, after, None, ((1,),), {}).rows()}
    assert rows["parameters"] == "2.00x more"
    assert rows["latency (median ± IQR/2)"] == "4.00x slower"
    assert rows["peak memory"] == "2.00x less"
    assert "accuracy" not in rows


def test_words_for_numbers():
    assert (count(999), count(1000), count(2.5e9)) == ("999", "1 k", "2.5 G")
    assert (ratio(4, 0), ratio(None, 3)) == ("-", "-")
    assert change(1, 1, "less", "more") == "1.00x less"
    assert markdown_table(("a", "b"), [("x|y", "1")]).endswith("| x\\|y | 1 |")


def test_a_model_that_was_not_compressed_here_is_reported_too():
    conv = nn.Conv2d(3, 4, 1)
    report = tnc.report(conv, conv, example_inputs=torch.randn(1, 3, 4, 4), seconds=0.02)
    assert report.plan is None
    assert "1.00x less" in report.to_markdown()
