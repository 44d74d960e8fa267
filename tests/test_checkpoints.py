"""Nothing is lost: a run that was killed ends with the weights of one that was not, bit for bit."""

import errno
import json
import os
import random
import signal
import time
import traceback
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tncompress as tnc
from tncompress import checkpoint
from tncompress.finetune import train_


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.Dropout(0.2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 4),
    )


def compressed(model=None) -> nn.Module:
    spec = {"default": {"format": "tucker", "rank": {"params_ratio": 0.5}}, "keep_dense": ["0", "7"]}
    return tnc.compress(model or net(), spec)


class Noisy(TensorDataset):
    """Images that are changed at random, as by augmentation, each time that one is taken."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn_like(x) * random.random(), y


def loader(**options):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(27, 1, 9, 9, generator=generator), torch.randint(4, (27,), generator=generator)
    return DataLoader(Noisy(x, y), **({"batch_size": 6, "shuffle": True} | options))  # five batches


CONFIG = {
    "epochs": 2,
    "local_epochs": 1,
    "ema": 0.8,
    "accumulate": 2,
    "balance": True,
    "rebalance_every": 2,
    "checkpoint_every": 1,
    "target_recovery": 50.0,
}


def run(place, data=None, config=CONFIG, small=None):
    data = data if data is not None else loader()
    return tnc.finetune(
        small or compressed(), data, config, teacher=net(), val_loader=loader(), checkpoint=place
    )


def outcome(history):
    told = [
        (e.loss, e.accuracy, e.train_accuracy) for e in (*history.local, *history.epochs, *history.control)
    ]
    return history.model.state_dict(), told


def same(one, other):
    return one[1] == other[1] and all(torch.equal(one[0][key], other[0][key]) for key in one[0])


def in_a_fork(work) -> int:
    """Start ``work`` in a process of its own; return its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def was_killed(child) -> bool:
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


class Fatal:
    """A loader that kills its process when it is asked for batch number ``last``."""

    def __init__(self, last):
        self.last, self.count, self.loader = last, 0, loader()

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


@pytest.mark.slow
@pytest.mark.forks
def test_a_run_killed_at_any_batch_ends_with_the_same_weights(tmp_path):
    whole = outcome(run(None))
    assert same(whole, outcome(run(tmp_path / "never killed")))
    for last in range(1, 21, 4):
        place = tmp_path / str(last)
        assert was_killed(in_a_fork(lambda last=last, place=place: run(place, Fatal(last))))
        assert same(whole, outcome(run(place))), last


@pytest.mark.slow
@pytest.mark.forks
def test_a_run_killed_again_and_again_at_random_moments_ends_with_the_same_weights(tmp_path):
    whole = outcome(run(None))  # the first run of a process imports, too
    started = time.monotonic()
    run(None)
    took, kills, place = time.monotonic() - started, 0, tmp_path / "checkpoint"
    chance = random.Random(0)
    for _ in range(12):
        child = in_a_fork(lambda: run(place))
        time.sleep(chance.uniform(0.05, 0.7) * took)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        kills += was_killed(child)
    assert kills >= 3
    assert same(whole, outcome(run(place)))
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_finished_run_is_read_and_not_trained_again(tmp_path):
    first = run(tmp_path / "c")

    class Untouched(list):
        def __iter__(self):
            raise AssertionError("the run is over")

    assert same(outcome(first), outcome(run(tmp_path / "c", Untouched(range(5)))))


def test_the_state_of_the_users_generators_is_kept(tmp_path, unchecked):
    """(Unchecked, since checks of types draw random items to look at.)"""
    small, teacher, own = compressed(), net(), torch.Generator()

    def seeded():
        for seed in (torch.manual_seed, np.random.seed, random.seed, own.manual_seed):
            seed(5)

    def drawn():
        return float(torch.rand(1)), np.random.rand(), random.random(), float(torch.rand(1, generator=own))

    seeded()
    expected = drawn()
    seeded()
    data = loader(generator=own)
    tnc.finetune(small, data, CONFIG, teacher=teacher, val_loader=data, checkpoint=tmp_path / "c")
    assert drawn() == expected


def test_the_seeds_of_loader_and_config_both_count():
    def trained(seed, own):
        data = loader(generator=torch.Generator().manual_seed(own))
        return outcome(tnc.finetune(compressed(), data, {"epochs": 1, "seed": seed}))

    assert same(trained(0, 0), trained(0, 0))
    assert not same(trained(0, 0), trained(1, 0))
    assert not same(trained(0, 0), trained(0, 1))


def test_each_step_drops_other_units_out():
    """Also where the loader draws nothing, so that every step begins in the same state."""
    model, masks = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2)), []
    model[0].register_forward_hook(lambda _, args, out: masks.append(tuple((out == 0).flatten().tolist())))
    data = [(torch.ones(1, 1, 8, 8), torch.tensor([0]))] * 3
    train_(model, data, {"epochs": 2})
    assert len(set(masks)) == 6


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def interrupted(place, last=9):
    assert was_killed(in_a_fork(lambda: run(place, Fatal(last))))
    return files(place)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda place: run(place, config={**CONFIG, "lr": 0.5}), "config lr 0.02, now 0.5"),
        (lambda place: run(place, small=compressed(other_net())), "another model"),
        (lambda place: run(place, loader(batch_size=9)), "data batches 5, now 3"),
        (
            lambda place: run(place, loader(shuffle=False)),
            "is not the one after which the checkpoint was written",
        ),
    ],
    ids=["config", "model", "batches", "order"],
)
@pytest.mark.forks
def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path, other, words):
    place = tmp_path / "c"
    before = interrupted(place)
    with pytest.raises(ValueError, match="checkpoint") as caught:
        other(place)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(place) == before


def other_net():
    torch.manual_seed(1)
    return nn.Sequential(*list(net())[:3], nn.Conv2d(6, 8, 3), *list(net())[4:])


@pytest.mark.forks
def test_how_often_checkpoints_are_written_may_change(tmp_path):
    interrupted(tmp_path / "c")
    later = {**CONFIG, "checkpoint_every": None, "checkpoint_seconds": 1e9}
    assert same(outcome(run(None)), outcome(run(tmp_path / "c", config=later)))


def test_other_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file is a file: choose another checkpoint folder"):
        run(tmp_path / "file")
    (tmp_path / "mine" / "local").mkdir(parents=True)
    (tmp_path / "mine" / "local" / "paper.txt").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds no checkpoint \(no checkpoint.json\): choose another"):
        run(tmp_path / "mine")
    assert files(tmp_path) == before


@pytest.mark.forks
def test_a_damaged_checkpoint_is_one_line(tmp_path):
    place = tmp_path / "c"
    interrupted(place, last=3)
    state = place / "local" / checkpoint.STATE
    raw = state.read_bytes()
    state.write_bytes(raw[:-100])
    with pytest.raises(ValueError, match="is damaged: remove it, or put a whole copy there"):
        run(place)
    marker = place / "local" / checkpoint.MARKER
    fields = json.loads(marker.read_text())
    for wrong, words in (
        ({"version": 9}, "its version is 9"),
        ({"run": 3}, "is no checkpoint of a training run"),
    ):
        marker.write_text(json.dumps(fields | wrong))
        with pytest.raises(ValueError, match=words):
            run(place)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    place, save, count = tmp_path / "c", torch.save, 0

    def failing(value, path):
        nonlocal count
        count += 1
        save(value, path)
        if count == 8:
            with open(path, "r+b") as file:  # noqa: PTH123
                file.truncate(50)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(
            OSError, match=r"\(No space left on device\); the one before it is kept: make room"
        ):
            run(place)
    assert len(list(place.iterdir())) == 2  # slices, and the whole that was begun
    assert same(outcome(run(None)), outcome(run(place)))


def test_a_place_that_cant_be_written_is_told_before_training():
    class Untouched(list):
        def __iter__(self):
            raise AssertionError("began to train")

    with pytest.raises(OSError, match="can't be written"):
        train_(net(), Untouched(range(3)), {"epochs": 1}, checkpoint="/proc/none/here")


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    data = list(loader(shuffle=False))
    x, y = data[3]
    bad = [*data[:3], (x * float("nan"), y), data[4]]
    config = {"epochs": 2, "checkpoint_every": 1, "weight_decay": 0.0}
    place = tmp_path / "c"
    with pytest.raises(
        FloatingPointError, match=r"the loss became nan in epoch 1: try a learning rate below 0.02"
    ) as e:
        tnc.finetune(compressed(), bad, config, checkpoint=place)
    assert f"the last good checkpoint is kept in {place / 'tuned'}" in str(e.value)
    found = json.loads((place / "tuned" / checkpoint.MARKER).read_text())
    assert found["progress"]["step"] == 3
    healed = tnc.finetune(compressed(), data, config, checkpoint=place)
    assert same(outcome(healed), outcome(tnc.finetune(compressed(), data, config)))


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    """The loss of the first step is finite, the step leads to infinity."""
    data = [(1e4 * x, y) for x, y in loader(shuffle=False)]
    config = {"epochs": 1, "lr": 1e38, "clip_norm": None, "warmup": 0.0, "checkpoint_every": 1}
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 4))
    with pytest.raises(
        FloatingPointError, match="the weights became infinite or NaN in epoch 1: try a learning"
    ):
        train_(model, data, config, checkpoint=tmp_path / "c")
    saved = torch.load(tmp_path / "c" / "trained" / checkpoint.STATE, weights_only=True)
    assert all(t.isfinite().all() for t in saved["model"].values())
