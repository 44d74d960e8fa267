"""What is made small in training: each part of the loss, each slice, against the plain formula."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import tncompress as tnc
from tncompress.averaging import MovingAverage
from tncompress.finetune import FinetuneConfig, train_
from tncompress.objectives import GlobalObjective
from tncompress.recipe import make_optimizer, make_schedule
from tncompress.slices import SliceDistillation, find_slices


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.two(self.norm(self.one(x)).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.body = nn.Sequential(Block(6), Block(6))
        self.head = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.head(self.body(self.stem(x))).mean((2, 3)))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    dense = Net().double().eval()
    spec = {"default": {"format": "svd", "rank": {"params_ratio": 0.5}}, "keep_dense": ["stem", "fc"]}
    return tnc.compress(dense, spec), dense


def batch(n=8):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 1, 7, 7, generator=generator, dtype=torch.float64), torch.arange(n) % 4


def outputs(model, names, x):
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: found.update({name: out})
        )
        for name in names
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, found


def test_the_loss_is_its_parts(pair):
    small, dense = pair
    x, y = batch()
    names = ["body.0.one", "body.0.two", "body.1.one", "body.1.two", "head"]
    small.train()
    logits, ours = outputs(small, names, x)
    target, theirs = outputs(dense, names, x)
    p, q, t = (target / 3).softmax(1), (logits / 3).softmax(1), 3.0
    parts = {
        "cross-entropy": F.cross_entropy(logits, y, label_smoothing=0.1),
        "distil": t * t * (p * (p.log() - q.log())).sum(1).mean(),
        "features": torch.stack(
            [
                ((ours[n] - theirs[n]).square().sum((1, 2, 3)) / theirs[n].square().sum((1, 2, 3))).mean()
                for n in names
            ]
        ).mean(),
    }
    config = FinetuneConfig(label_smoothing=0.1, distill=0.7, temperature=3.0, features=0.3)
    loss, right = GlobalObjective(small, dense, config).train()(x, y)
    assert_close(loss, parts["cross-entropy"] + 0.7 * parts["distil"] + 0.3 * parts["features"])
    assert int(right) == int((logits.argmax(1) == y).sum())
    few = FinetuneConfig(distill=0.0, features=1.0, feature_layers=("*.one",))
    loss, _ = GlobalObjective(small, dense, few).train()(x, y)
    only = [
        ((ours[n] - theirs[n]).square().sum((1, 2, 3)) / theirs[n].square().sum((1, 2, 3))).mean()
        for n in names[::2][:2]
    ]
    assert_close(loss, F.cross_entropy(logits, y) + torch.stack(only).mean())
    assert all(not m._forward_hooks for m in (*small.modules(), *dense.modules()))


def test_slices_are_layers_blocks_or_named(pair):
    small, _ = pair
    layers = ["body.0.one", "body.0.two", "body.1.one", "body.1.two", "head"]
    assert find_slices(small, "layer") == layers
    assert find_slices(small, "block") == ["body.0", "body.1", "head"]
    assert find_slices(small, ("body", "head")) == ["body", "head"]
    assert find_slices(small, ("re:body.0.*e$",)) == ["body.0.one"]


def test_a_block_around_another_is_none():
    """A layer beside a block, both in one module, is a slice by itself."""
    model = nn.Sequential(nn.Sequential(Block(6), nn.Conv2d(6, 6, 3)), nn.Conv2d(6, 6, 3))
    small = tnc.compress(model, {"default": {"rank": {"params_ratio": 0.5}}, "keep_dense": []})
    assert find_slices(small, "block") == ["0.0", "0.1", "1"]


@pytest.mark.parametrize(
    ("slices", "words"),
    [
        (("layer9",), "'layer9' matches no module; they are stem, body"),
        (("stem",), "'stem' holds no compressed layer; those are body.0.one"),
        (("body", "body.0"), "'body.0' lies in 'body', which is a slice, too"),
    ],
)
def test_wrong_slices_are_one_line(pair, slices, words):
    with pytest.raises(ValueError, match="slices: ") as caught:
        find_slices(pair[0], slices)
    assert words in str(caught.value)


def test_slices_of_a_dense_model_are_refused(pair):
    with pytest.raises(ValueError, match="holds no compressed layer"):
        find_slices(pair[1])


@pytest.mark.parametrize("slices", ["layer", "block"])
def test_each_slice_gets_the_teachers_inputs(pair, slices):
    small, dense = pair
    x, _ = batch()
    names = find_slices(small, slices)
    inputs = {}
    handles = [
        dense.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: inputs.update({n: args[0]}))
        for n in names
    ]
    _, targets = outputs(dense, names, x)
    for handle in handles:
        handle.remove()
    expected = sum(((small.get_submodule(n)(inputs[n]) - targets[n]) ** 2).mean() for n in names)
    loss, right = SliceDistillation(small, dense, names).train()(x)
    assert_close(loss, expected)
    assert right is None


def test_slices_learn_together_what_each_learns_alone(pair):
    """They share a pass of the teacher, and nothing else."""
    small, dense = pair
    data = [batch(8), batch(6)]
    config = {"epochs": 0, "local_epochs": 3, "local_lr": 1e-2}
    together = tnc.finetune(small, data, config, teacher=dense).model
    names = find_slices(small)
    for name in names:
        alone = tnc.finetune(small, data, config | {"slices": (name,)}, teacher=dense).model
        for own, theirs in zip(
            alone.get_submodule(name).parameters(), together.get_submodule(name).parameters(), strict=True
        ):
            assert_close(own, theirs, rtol=1e-9, atol=1e-12)
        others = [n for n, _ in alone.named_parameters() if not n.startswith(name)]
        assert all(torch.equal(alone.get_parameter(n), small.get_parameter(n)) for n in others)


def test_local_epochs_bring_the_slices_closer_without_labels(pair):
    small, dense = pair
    data = [batch(8)[0], batch(6)[0]]
    before = {n: t.clone() for n, t in small.state_dict().items()}
    history = tnc.finetune(small, data, {"epochs": 0, "local_epochs": 20, "local_lr": 1e-2}, teacher=dense)
    assert history.epochs == history.control == ()
    assert history.local[-1].loss < 0.7 * history.local[0].loss
    assert history.local[0].train_accuracy is None
    factors = {n for n in before if ".factors." in n or n.rpartition(".")[0] in find_slices(small)}
    for name, value in history.model.state_dict().items():
        if ".norm." not in name or name.endswith(("weight", "bias")):  # statistics are taken again
            assert torch.equal(value, before[name]) is (name not in factors), name
    assert all(p.requires_grad for p in history.model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())


def test_hybrid_is_local_then_global(pair):
    small, dense = pair
    data = [batch(8), batch(6)]
    hybrid = {"local_epochs": 2, "epochs": 2, "seed": 3}
    history = tnc.finetune(small, data, hybrid, teacher=dense, val_loader=data)
    local = tnc.finetune(small, data, hybrid | {"epochs": 0}, teacher=dense, val_loader=data)
    whole = tnc.finetune(local.model, data, hybrid | {"local_epochs": 0}, teacher=dense, val_loader=data)
    assert_close(history.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert [e.loss for e in history.local] == [e.loss for e in local.local]
    assert [e.loss for e in history.epochs] == [e.loss for e in whole.epochs]
    assert [row["stage"] for row in history.rows()] == ["local", "local", "global", "global"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"labels": [0, 4]},
            ValueError,
            "wanted labels from 0 to 3, one for each output of the model, got 4",
        ),
        (
            {"labels": [-1, 2]},
            ValueError,
            "wanted labels from 0 to 3, one for each output of the model, got -1",
        ),
        (
            {"labels": [0.0, 1.0]},
            ValueError,
            "wanted a whole number for each of 2 images, got labels torch.float32",
        ),
        ({"labels": [0, 1, 2]}, ValueError, r"wanted one label for each of 2 images, got a tensor \(3,\)"),
        ({"labels": None}, ValueError, r"wanted batches \(inputs, labels\), got inputs alone"),
        (
            {"classes": 7},
            ValueError,
            r"the teacher puts out \(2, 7\), the model \(2, 4\): wanted a teacher with the",
        ),
        (
            {"config": {"feature_layers": ["x"], "features": 1}},
            ValueError,
            "feature_layers: 'x' matches no module",
        ),
        (
            {"config": {"target_recovery": 0.9}},
            ValueError,
            "target_recovery needs a teacher and a val_loader",
        ),
        ({"config": {"local_epochs": 1}, "teacher": None}, ValueError, "local_epochs need a teacher"),
    ],
)
def test_wrong_data_and_teachers_are_one_line(pair, options, error, words):
    small, dense = pair
    x, labels = batch(2)[0], options.get("labels", [0, 1])
    data = [(x, torch.tensor(labels)) if labels is not None else x]
    teacher = copy.deepcopy(dense)
    if "classes" in options:
        teacher.fc = nn.Linear(6, options["classes"]).double()
    teacher = options.get("teacher", teacher)
    with pytest.raises(error, match=words) as caught:
        tnc.finetune(small, data, options.get("config"), teacher=teacher)
    assert "\n" not in str(caught.value)


def test_a_teacher_without_the_slice_is_refused(pair):
    small, _ = pair
    other = nn.Sequential(nn.Flatten(), nn.Linear(49, 4)).double()
    with pytest.raises(ValueError, match="the teacher has no module 'body\\.0\\.one'"):
        tnc.finetune(small, [batch()], {"epochs": 0, "local_epochs": 1}, teacher=other)


def test_a_model_with_nothing_to_train_is_refused(pair):
    small, _ = pair
    small.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        tnc.finetune(small, [batch()])


def test_train_is_of_the_whole():
    with pytest.raises(ValueError, match="local_epochs are for finetune"):
        train_(Net(), [batch()], {"local_epochs": 1})
    with pytest.raises(ValueError, match="target_recovery is for finetune"):
        train_(Net(), [batch()], {"target_recovery": 0.5})


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_the_learning_rates_rise_and_fall(pair, schedule):
    small, _ = pair
    config = FinetuneConfig(schedule=schedule, lr=0.4, lr_factors=0.1, warmup=0.25)
    optimizer = make_optimizer(small, config)
    rising = make_schedule(optimizer, config, 40)
    rates = []
    for _ in range(40):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        rising.step()
    first = [rate[0] for rate in rates]
    assert max(first) == pytest.approx(0.4, rel=5e-3)
    assert first.index(max(first)) == pytest.approx(10, abs=1)
    assert first[0] <= 0.041
    assert first[-1] < 0.002
    assert all(rate[1] == pytest.approx(rate[0] / 4) for rate in rates)
    if schedule == "cosine":
        assert first[25] == pytest.approx(0.2 * (1 + math.cos(math.pi * 15 / 30)))


def test_adamw_has_a_learning_rate_of_its_own():
    assert FinetuneConfig(optimizer="adamw").lr == 1e-3
    assert FinetuneConfig(optimizer="adamw", lr=0.3).lr == 0.3
    assert FinetuneConfig().lr == FinetuneConfig(optimizer="sgd").lr == 0.02
    config = FinetuneConfig(optimizer="adamw", lr=0.3)
    assert FinetuneConfig.parse(config.model_dump()) == config
    assert isinstance(make_optimizer(Net(), config), torch.optim.AdamW)


def test_the_average_is_that_of_the_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = MovingAverage(model, 0.5)
    expected = model[0].weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        average.update()
    live = model[0].weight.detach().clone()
    average.swap_in()
    assert_close(model[0].weight.detach(), expected)
    average.swap_out()
    assert torch.equal(model[0].weight, live)


def test_the_result_is_the_average_and_the_accuracy_is_its_own(pair):
    small, _ = pair
    data = [batch(8), batch(6)]
    plain = tnc.finetune(small, data, {"epochs": 3, "lr": 0.2})
    smooth = tnc.finetune(small, data, {"epochs": 3, "lr": 0.2, "ema": 0.9}, val_loader=data)
    assert [e.loss for e in plain.epochs] == [e.loss for e in smooth.epochs]
    assert not torch.equal(plain.model.fc.weight, smooth.model.fc.weight)
    assert smooth.accuracy == tnc.evaluate(smooth.model, data).accuracy


def test_factors_learn_at_their_own_rate(pair):
    small, dense = pair
    data = [batch(8)]
    still = tnc.finetune(small, data, {"epochs": 1, "lr_factors": 1e-30}, teacher=dense, control=False).model
    moved = [n for n, p in still.named_parameters() if not torch.equal(p, small.get_parameter(n))]
    assert moved
    assert not any(".factors." in name for name in moved)
