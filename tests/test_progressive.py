"""Progressive compression: rounds on the way to the ranks that were asked for, and a run that goes on."""

import json
import math
import os
import signal

import pytest
import torch
from conftest import every_format_and_shape
from test_checkpoints import in_a_fork, was_killed
from torch import nn

import tncompress as tnc
from tncompress.finetune import train_
from tncompress.progressive import progressive, ranks_between

SPEC = {"default": {"format": "mps", "rank": {"params_ratio": 0.1}}, "keep_dense": ["0", "9"]}


def net() -> nn.Module:
    torch.manual_seed(0)
    convs = (
        nn.Conv2d(1, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3),
        nn.BatchNorm2d(12),
    )
    more = nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 4)
    return nn.Sequential(*convs, *more)


def batches(seed=1):
    """Images of four kinds, which a network can learn."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(4, 1, 15, 15, generator=torch.Generator().manual_seed(0))
    made = []
    for _ in range(6):
        y = torch.randint(4, (16,), generator=generator)
        made.append((kinds[y] + 1.5 * torch.randn(16, 1, 15, 15, generator=generator), y))
    return made


@pytest.fixture(scope="module")
def dense():
    model = net()
    train_(model, batches(), {"epochs": 6, "lr": 0.05})
    return model


def run(dense, data=None, val=None, **options):
    images = [x for x, _ in batches()]
    options = {"rounds": 3, "images": images, "control": False} | options
    config = options.pop("config", {"epochs": 2, "checkpoint_every": 1})
    return progressive(dense, SPEC, data or batches(), config, val_loader=val or batches(7), **options)


@every_format_and_shape
def test_ranks_on_the_way_shrink_to_the_last(format, shape):
    full = format.max_ranks(shape)
    last = format.feasible(shape, tuple(max(1, r // 4) for r in full))
    before, dense, held = None, 3 * math.prod(shape), format.num_params(shape, last, 3)
    for part in (0.2, 0.4, 0.6, 0.8, 1.0):
        ranks = ranks_between(format, shape, 3, last, part)
        assert format.feasible(shape, ranks) == ranks
        assert all(low <= r <= top for low, r, top in zip(last, ranks, full, strict=True))
        if held <= dense:
            assert format.num_params(shape, ranks, 3) <= dense ** (1 - part) * held**part * (1 + 1e-9)
        if before is not None:
            assert all(r <= b for r, b in zip(ranks, before, strict=True))
        before = ranks
    assert ranks == last


def test_the_last_round_has_the_size_that_was_asked_for(dense):
    plan = tnc.make_plan(dense, SPEC, calibration=[x for x, _ in batches()])
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    made = run(dense, control=True)
    for layer in plan.compressed:
        assert made.model.get_submodule(layer.name).ranks == layer.ranks
        assert made.model.get_submodule(layer.name).format == layer.format
    sizes = [each.params for each in made.rounds]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[0] <= sizes[2] ** (1 / 3) + 1e-9
    assert [len(each.epochs) for each in made.rounds] == [1, 1, 2]
    assert len(made.control) == 4
    assert made.accuracy == tnc.evaluate(made.model, batches(7)).accuracy == made.rounds[2].epochs[1].accuracy
    assert made.accuracy_dense == tnc.evaluate(dense, batches(7)).accuracy
    lost = made.accuracy_dense - made.rounds[2].truncated
    assert made.recovery == pytest.approx((made.accuracy - made.rounds[2].truncated) / lost)
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    assert "3 rounds, accuracy" in str(made)
    assert json.loads(json.dumps(made.to_dict()))["rounds"][0]["params"] == sizes[0]
    assert made.model.tncompress_plan.params == sum(p.numel() for p in made.model.parameters())


def test_one_round_is_to_compress_repair_and_tune(dense):
    images = [x for x, _ in batches()]
    small = tnc.compress(dense, SPEC, calibration=images)
    repaired = tnc.repair(small, dense, images)
    tuned = tnc.finetune(repaired, batches(), {"epochs": 2}, teacher=dense, control=False).model
    made = run(dense, rounds=1)
    assert made.rounds[0].repaired == tnc.evaluate(repaired, batches(7)).accuracy
    for key, value in tuned.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_a_later_round_starts_from_what_was_tuned(dense):
    """Its truncation is relative to the tuned kernels, and smaller than that of one step."""
    made = run(dense, rounds=2, between={"epochs": 1, "lr": 1e-12, "weight_decay": 0.0}, images=None)
    direct = run(dense, rounds=1, images=None)
    assert made.rounds[1].rel_error < direct.rounds[0].rel_error
    first, second, full = (each.rel_error**2 for each in (*made.rounds, *direct.rounds))
    assert first + (1 - first) * second == pytest.approx(full, rel=0.05)  # of what the first has left
    assert made.rounds[0].repaired is None


class Fatal(list):
    """Batches that kill the process when one is asked for once too often."""

    def __init__(self, items, last):
        super().__init__(items)
        self.count, self.last = 0, last

    def __iter__(self):
        for item in super().__iter__():
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


@pytest.mark.slow
@pytest.mark.forks
def test_a_run_killed_in_any_round_ends_with_the_same_weights(dense, tmp_path):
    whole = run(dense, control=True)
    for last in (2, 8, 16, 28):  # within each round, and within the control
        place = tmp_path / str(last)
        killed = in_a_fork(
            lambda n=last, p=place: run(dense, Fatal(batches(), n), control=True, checkpoint=p)
        )
        assert was_killed(killed)
        again = run(dense, control=True, checkpoint=place)
        told = [
            [(e.loss, e.accuracy) for each in made.rounds for e in each.epochs] for made in (whole, again)
        ]
        assert told[0] == told[1]
        assert [(e.loss, e.accuracy) for e in whole.control] == [(e.loss, e.accuracy) for e in again.control]
        assert [each.repaired for each in whole.rounds] == [each.repaired for each in again.rounds]
        ours, theirs = whole.model.state_dict(), again.model.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert repr(whole.model) == repr(again.model)
        assert whole.model.tncompress_plan == again.model.tncompress_plan


def test_a_folder_of_another_run_is_refused_and_kept(dense, tmp_path):
    first = run(dense, rounds=2, checkpoint=tmp_path / "c")
    assert first.rounds == run(dense, rounds=2, checkpoint=tmp_path / "c").rounds  # read, not run again
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for other, words in (
        ({"rounds": 3}, "rounds rounds 2, now 3"),
        ({"config": {"epochs": 1}}, "config epochs 2, now 1"),
        ({"images": None}, "data images True, now False"),
    ):
        with pytest.raises(ValueError, match="is of another run") as caught:
            run(dense, **({"rounds": 2} | other), checkpoint=tmp_path / "c")
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="another model"):
        run(net(), rounds=2, checkpoint=tmp_path / "c")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rounds": 0}, ValueError, "rounds is a number from 1 on, got 0"),
        ({"config": {"epoch": 1}}, ValueError, "config: unknown key 'epoch'; the keys there are epochs"),
        ({"between": {"lr": 0}}, ValueError, "config: lr: input should be greater than 0"),
        ({"data": iter([])}, TypeError, "a loader with a length"),
    ],
)
def test_what_cannot_be_is_one_line(dense, options, error, words):
    with pytest.raises(error, match=words):
        run(dense, **options)


def test_a_spec_that_compresses_nothing_is_told(dense):
    with pytest.raises(ValueError, match=r"the spec compresses no layer \(0: kept dense by keep_dense"):
        progressive(dense, {"keep_dense": ["*"]}, batches())


def test_it_is_of_one_process(dense, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="progressive runs in one process: start it without torchrun"):
        run(dense)
