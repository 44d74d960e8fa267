"""The benchmark of training steps on one small layer: what its rows hold, and the page made from them."""

import json

import benchmarks_page
import pytest
import torch
import training_speed
from torch import nn


@pytest.mark.parametrize("name", ["svd", "mps"])
def test_a_row_has_all_that_the_page_tells(name):
    found = training_speed.measure_layer(name, (32, 32, 6), 1, 2.0, seconds=0.001)
    assert found["best"] in found["times"]
    kept = found["activations"]
    assert kept["checkpointed chain"] == kept["dense channels_last"] == 4 * 32 * 36
    assert kept[found["best"]] > kept["dense channels_last"]
    row = {"kind": "training", "format": name, "layer": [32, 32, 6], "batch": 1, "environment": "default"}
    text = benchmarks_page.training([json.loads(json.dumps(row | found))])
    assert f"| 1 | {name} | default | 1 |" in text
    assert "1.00x |\n" in text


def test_a_step_gives_all_gradients_and_the_optimizer_moves():
    layer = nn.Conv2d(4, 4, 3)
    before = layer.weight.detach().clone()
    run = training_speed.step(layer, torch.randn(1, 4, 5, 5))
    with torch.inference_mode():  # as the timers run it
        run()
    assert layer.weight.grad.abs().sum() > 0
    assert torch.equal(layer.weight, before)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    training_speed.step(layer, torch.randn(1, 4, 5, 5), optimizer)()
    assert not torch.equal(layer.weight, before)
