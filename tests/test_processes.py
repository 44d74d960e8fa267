"""Training by Accelerate: several processes learn what one does, and nothing of it stays behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.finetune import train_

STATES = PartialState, AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def no_state():
    """Accelerate as a process finds it that has not used it, whatever tests ran before."""
    before = [dict(kind._shared_state) for kind in STATES]
    for kind in STATES:
        kind._shared_state.clear()
    yield
    for kind, state in zip(STATES, before, strict=True):
        kind._shared_state.clear()
        kind._shared_state.update(state)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, 4),
    ).double()


def batches(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 1, 15, 15, generator=generator, dtype=torch.float64),
            torch.randint(4, (n,), generator=generator),
        )
        for n in sizes
    ]


def compressed() -> nn.Module:
    spec = {"default": {"format": "mps", "rank": {"params_ratio": 0.5}}, "keep_dense": ["0", "7"]}
    return tnc.compress(net(), spec)


RECIPES = {
    "plain": {"epochs": 2, "ema": 0.9},
    "all": {
        "epochs": 2,
        "local_epochs": 1,
        "accumulate": 2,
        "frobenius_decay": 1e-2,
        "rebalance_every": 3,
        "features": 0.1,
        "optimizer": "adamw",
    },
}


def tuned(recipe):
    """What is compared: weights and accuracies, with batches that do not divide by the processes."""
    data = batches(9, 8, 8, 1, 2)
    history = tnc.finetune(compressed(), data, RECIPES[recipe], teacher=net(), val_loader=data[:3])
    epochs = [
        (e.loss, e.accuracy, e.train_accuracy) for e in (*history.local, *history.epochs, *history.control)
    ]
    return history.model.state_dict(), epochs


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(Path(__file__).parent), str(Path(tnc.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [*command, __file__, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    for recipe in RECIPES:
        weights, epochs = tuned(recipe)
        for rank in range(2):
            theirs = torch.load(tmp_path / f"{recipe}-{rank}.pt", weights_only=True)
            assert_close(theirs["weights"], weights, rtol=1e-6, atol=1e-8)
            assert_close(theirs["epochs"], epochs, rtol=1e-8, atol=1e-10)
        assert all(theirs["checks"].values()), theirs["checks"]


def of_a_process(folder: Path):
    """What each of the two processes does."""
    rank = int(os.environ["RANK"])
    checks = {}
    for recipe in RECIPES:
        weights, epochs = tuned(recipe)
        checks["no state is left"] = not any(kind._shared_state for kind in STATES)
        torch.save({"weights": weights, "epochs": epochs, "checks": checks}, folder / f"{recipe}-{rank}.pt")
        resumed = tnc.finetune(
            compressed(), batches(4, 4), {"epochs": 1}, control=False, checkpoint=folder / "checkpoint"
        )
        again = tnc.finetune(
            compressed(), batches(4, 4), {"epochs": 1}, control=False, checkpoint=folder / "checkpoint"
        )
        same = zip(resumed.model.parameters(), again.model.parameters(), strict=True)
        checks["a finished run is read"] = all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_users_accelerator_is_left_alone(precision):
    own = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=3)
    kept = [dict(kind._shared_state) for kind in STATES]
    for ours in ("bf16", "no"):
        config = {"epochs": 1, "mixed_precision": ours, "accumulate": 2}
        tnc.finetune(compressed(), batches(4, 4), config, teacher=net())
        assert [dict(kind._shared_state) for kind in STATES] == kept
    assert own.mixed_precision == precision
    assert own.gradient_accumulation_steps == 3
    assert Accelerator(cpu=True).mixed_precision == precision


def test_state_is_put_back_after_an_error_too():
    with pytest.raises(ValueError, match="wanted labels from 0 to 3"):
        train_(net(), [(batches(2)[0][0], torch.tensor([0, 4]))], {"epochs": 1})
    assert not any(kind._shared_state for kind in STATES)


def test_precisions_follow_each_other_and_each_is_used():
    losses = {}
    for precision in ("no", "bf16", "no"):
        model = net().float()
        data = [(x.float(), y) for x, y in batches(8, 8)]
        (epoch,) = train_(model, data, {"epochs": 1, "mixed_precision": precision, "warmup": 0.0})
        assert losses.setdefault(precision, epoch.loss) == epoch.loss
        assert "forward" not in vars(model)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses["no"] != losses["bf16"]
    assert losses["no"] == pytest.approx(losses["bf16"], rel=0.05)


def test_half_precision_needs_a_gpu():
    with pytest.raises(ValueError, match="mixed_precision fp16 needs a GPU, got the CPU: try bf16"):
        train_(net(), batches(4), {"epochs": 1, "mixed_precision": "fp16"})


def test_batches_that_are_added_up_are_one_batch():
    """Without BatchNorm, four batches of any size for a step are their union, the last group included."""
    parts, unions = batches(4, 4, 4, 4, 4, 4), []
    for first in (0, 4):
        group = parts[first : first + 4]
        unions.append(tuple(torch.cat(tensors) for tensors in zip(*group, strict=True)))
    models = []
    for data, count in ((parts, 4), (unions, 1)):
        plain = nn.Sequential(*(module for module in net() if not isinstance(module, nn.BatchNorm2d)))
        train_(plain, data, {"epochs": 2, "accumulate": count, "warmup": 0.5})
        models.append(plain)
    assert_close(models[0].state_dict(), models[1].state_dict())


if __name__ == "__main__":
    of_a_process(Path(sys.argv[1]))
