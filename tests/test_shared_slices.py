"""Slices shared out to workers: what they learn, and what is told of it, is what one process learns."""

import os
import signal
from pathlib import Path

import pytest
import torch
from test_checkpoints import in_a_fork, was_killed
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.batchnorm import reestimate_batchnorm_
from tncompress.slices import find_slices

CONFIG = {"epochs": 1, "local_epochs": 2, "balance": True, "checkpoint_every": 1, "accumulate": 2}


def net() -> nn.Module:
    torch.manual_seed(0)
    convs = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Dropout(0.2), nn.Conv2d(8, 6, 3)
    return nn.Sequential(*convs, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)).double()


def compressed() -> nn.Module:
    spec = {"default": {"format": "mps", "rank": {"params_ratio": 0.5}}, "keep_dense": []}
    return tnc.compress(net(), spec)


def batches():
    generator = torch.Generator().manual_seed(1)
    sizes = 6, 6, 6, 3
    return [
        (
            torch.randn(n, 1, 9, 9, generator=generator, dtype=torch.float64),
            torch.randint(4, (n,), generator=generator),
        )
        for n in sizes
    ]


def run(place=None, data=None, val=None, config=CONFIG, **options):
    data = data or batches()
    beside = {"teacher": net(), "val_loader": val or batches(), "control": False, "checkpoint": place}
    return tnc.finetune(compressed(), data, config, **beside, **options)


def same(one, other):
    assert_close(one.model.state_dict(), other.model.state_dict(), rtol=1e-9, atol=1e-11)
    told = [
        [(e.loss, e.accuracy, e.train_accuracy) for e in (*history.local, *history.epochs)]
        for history in (one, other)
    ]
    assert_close(*told, rtol=1e-9, atol=1e-12)


class FatalAt(list):
    """Batches that kill the process when they are gone through for the ``last`` time, or asked for one."""

    def __init__(self, items, last_pass, last_batch=1):
        super().__init__(items)
        self.passes, self.last = 0, (last_pass, last_batch)

    def __iter__(self):
        self.passes += 1
        for number, item in enumerate(super().__iter__(), 1):
            if (self.passes, number) == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


class Untouched(list):
    def __iter__(self):
        raise AssertionError("the run is over")


def test_there_are_as_many_slices_as_compressed_layers():
    assert len(find_slices(compressed())) == 4


@pytest.mark.slow
def test_two_workers_learn_what_one_process_does(tmp_path):
    whole = run()
    same(whole, run(tmp_path / "two", workers=2))
    assert whole.local[1].loss < whole.local[0].loss


def test_the_end_has_statistics_of_its_own_and_accuracies_are_of_what_it_would_be():
    """Whatever the statistics before: a repaired network's are not those of slices like the teacher's."""
    config = CONFIG | {"epochs": 0, "balance": False}
    small = compressed()
    small[5].running_mean.fill_(3.0)
    small[5].running_var.fill_(0.01)
    found = tnc.finetune(small, batches(), config, teacher=net(), val_loader=batches(), control=False)
    model = found.model
    assert found.local[-1].accuracy == tnc.evaluate(model, batches()).accuracy
    taken = [model[5].running_mean.clone(), model[5].running_var.clone()]
    reestimate_batchnorm_(model, batches())
    assert_close(taken, [model[5].running_mean, model[5].running_var])
    once = tnc.finetune(
        small, batches(), config | {"local_epochs": 1}, teacher=net(), val_loader=batches(), control=False
    )
    assert once.local[0].accuracy == found.local[0].accuracy
    assert [e.loss for e in once.local] == [e.loss for e in found.local[:1]]


@pytest.mark.slow
@pytest.mark.forks
def test_a_killed_run_goes_on_with_any_number_of_workers(tmp_path):
    """The first is killed between its epochs, the second within one, while it has no workers."""
    whole = run()
    third_pass = FatalAt(batches(), 4)  # after those of start and teacher, and that of the first epoch
    assert was_killed(in_a_fork(lambda: run(tmp_path / "a", val=third_pass, workers=2)))
    assert (tmp_path / "a" / "local" / "checkpoint.json").is_file()
    same(whole, run(tmp_path / "a"))
    second_epoch = FatalAt(batches(), 3, 4)  # after those of the first, and of its BatchNorm statistics
    assert was_killed(in_a_fork(lambda: run(tmp_path / "b", second_epoch)))
    same(whole, run(tmp_path / "b", workers=2))
    again = Untouched(batches())  # a finished run is read: not one batch is asked for, or sent
    same(whole, tnc.finetune(
        compressed(), again, CONFIG, teacher=net(), val_loader=batches(), control=False,
        checkpoint=tmp_path / "b", workers=2,
    ))  # fmt: skip


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_a_worker_keeps_the_checkpoint(tmp_path):
    data = batches()
    data[2] = (data[2][0] * float("nan"), data[2][1])
    kept = rf"slices: the loss became nan in epoch 1: try .* is kept in {tmp_path / 'c' / 'local'}"
    with pytest.raises(FloatingPointError, match=kept):
        run(tmp_path / "c", data, workers=2)
    assert (tmp_path / "c" / "local" / "checkpoint.json").is_file()


class Workers(list):
    """Batches that say they come from processes of their own."""

    num_workers = 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": {"epochs": 1}, "workers": 2}, "share out the slices of local_epochs, got none of those"),
        ({"config": {"epochs": 1}, "address": "auto"}, "share out the slices of local_epochs"),
        ({"workers": 0}, "workers is a number from 1 on, got 0"),
        ({"data": Workers(batches()), "workers": 2}, "num_workers=3, and worker processes can't start"),
    ],
)
def test_workers_with_nothing_to_do_are_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        run(**options)


def test_one_worker_is_this_process(tmp_path):
    before = set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    same(run(), run(workers=1, threads=1))
    assert set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()) <= before


def test_processes_started_together_take_no_workers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="got workers in one of several processes"):
        run(workers=2)
