"""The history of a run: what it says, in a file and in a figure, and what is told while it goes on."""

import csv
import json
import sys

import pytest
import torch
from torch import nn

import tncompress as tnc
from tncompress.finetune import Epoch, FinetuneConfig, History
from tncompress.watching import Position, Watch


@pytest.fixture
def history():
    epochs = Epoch(0.5, 0.8, 1.5, 0.75), Epoch(0.25, 0.9, 1.25, 0.875, rebalanced=2)
    control = Epoch(0.25, 0.94, 1.0, 0.9375), Epoch(0.125, 0.96, 1.0, 1.0)
    local = (Epoch(2.0, 0.7, 0.5),)
    return History(nn.Identity(), epochs, FinetuneConfig(epochs=2, local_epochs=1), 0.5, 0.95, control, local)


def test_recovery_is_the_part_of_the_loss_that_is_back(history):
    assert history.recovery == pytest.approx(0.4 / 0.45)
    assert history.recovery_of_control == pytest.approx(0.4 / 0.46)
    assert history.recovery_at(0.5) == 0.0
    assert history.recovery_at(None) is None


def test_a_history_is_written_as_json_and_csv(history, tmp_path):
    history.save(tmp_path / "h.json")
    assert json.loads((tmp_path / "h.json").read_text()) == history.to_dict()
    history.save(tmp_path / "h.csv")
    with (tmp_path / "h.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("local", "1"),
        ("global", "1"),
        ("global", "2"),
    ]
    assert [float(row["accuracy"]) for row in rows] == [0.7, 0.8, 0.9]
    assert [row["accuracy_control"] for row in rows] == ["", "0.94", "0.96"]
    assert [float(row["recovery"]) for row in rows] == pytest.approx([0.2 / 0.45, 0.3 / 0.45, 0.4 / 0.45])
    assert rows[0]["train_accuracy"] == ""
    before = (tmp_path / "h.csv").read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        history.save(tmp_path / "h.csv")
    with pytest.raises(ValueError, match=r"written as \.json or \.csv, got h\.txt"):
        history.save(tmp_path / "h.txt")
    assert (tmp_path / "h.csv").read_bytes() == before
    history.save(tmp_path / "h.csv", overwrite=True)


def test_the_curve_shows_each_epoch_and_leaves_pyplot_alone(history, tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    figure = history.plot()
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["compressed"] == [[0, 50], [1, 70], [2, 80], [3, 90]]
    assert lines["dense control"] == [[1, 95], [2, 94], [3, 96]]
    assert lines["dense"][0][1] == 95
    assert axes.get_title() == "89 % of the lost accuracy is back"
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert ("matplotlib.pyplot" in sys.modules) is loaded


def test_without_accuracies_the_curve_is_of_the_loss(history):
    bare = History(nn.Identity(), (Epoch(0.5, None, 1.0), Epoch(0.25, None, 1.0)), FinetuneConfig())
    (axes,) = bare.plot().axes
    (line,) = axes.get_lines()
    assert line.get_ydata().tolist() == [0.5, 0.25]
    assert axes.get_ylabel() == "training loss"


def test_the_bar_says_loss_accuracy_and_recovery():
    watch = Watch("tuning", start=0.5, dense=0.9)
    at = Position(epoch=1, epochs=[Epoch(0.5, 0.8, 1.0)])
    assert watch.words(at, 3, 0.1234) == "tuning 2/3, loss 0.123, accuracy 80.00 %, recovery 75 %"
    assert watch.words(Position(), 3, 0.5) == "tuning 1/3, loss 0.500, accuracy 50.00 %, recovery 0 %"
    assert Watch("training").words(Position(), 3, 0.5) == "training 1/3, loss 0.500"


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(6 * 25, 2)
    )
    x = torch.randn(64, 1, 9, 9)
    data = [(x[i : i + 16], (x[i : i + 16].mean((1, 2, 3)) > 0).long()) for i in range(0, 64, 16)]
    tnc.train_(model, data, {"epochs": 10, "lr": 0.05})
    spec = {"default": {"format": "svd", "rank": {"fixed": 1}}, "keep_dense": ["0", "4"]}
    return model, tnc.compress(model, spec), data


def test_a_run_ends_when_enough_is_back_and_its_control_as_early():
    model, small, data = model_and_data()
    config = {"epochs": 20, "lr": 0.05, "target_recovery": 0.6}
    history = tnc.finetune(small, data, config, teacher=model, val_loader=data)
    whole = tnc.finetune(small, data, config | {"target_recovery": None}, teacher=model, val_loader=data)
    assert whole.accuracy_start < whole.accuracy_dense
    enough = [whole.recovery_at(epoch.accuracy) >= 0.6 for epoch in whole.epochs]
    assert any(enough)
    assert len(history.epochs) == len(history.control) == enough.index(True) + 1 < 20
    assert history.reached
    assert not whole.reached
    assert [e.loss for e in history.epochs] == [e.loss for e in whole.epochs[: len(history.epochs)]]
    assert "ended early" in " ".join(str(history).split())
    local = config | {"epochs": 0, "local_epochs": 50, "target_recovery": 0.1, "local_lr": 0.02}
    with torch.no_grad():
        small[2].factors[0].mul_(-1.0)
    sliced = tnc.finetune(small, data, local, teacher=model, val_loader=data)
    assert sliced.reached
    assert len(sliced.local) < 50


def test_tensorboard_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _, small, data = model_and_data()
    with pytest.raises(
        ImportError, match=r"log_dir is for TensorBoard.* pip install 'tncompress\[tensorboard\]'"
    ):
        tnc.finetune(small, data, {"epochs": 1}, log_dir=tmp_path / "logs")


def test_tensorboard_gets_each_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, small, data = model_and_data()
    config = {"epochs": 2, "local_epochs": 1}
    history = tnc.finetune(small, data, config, teacher=model, val_loader=data, log_dir=tmp_path / "logs")
    found = EventAccumulator(str(tmp_path / "logs")).Reload()
    told = [event.value for event in found.Scalars("tuning/accuracy")]
    assert told == pytest.approx([epoch.accuracy for epoch in history.epochs])
    assert [event.step for event in found.Scalars("tuning/loss")] == [4, 8]
    assert {"slices/loss", "dense control/accuracy"} <= set(found.Tags()["scalars"])
