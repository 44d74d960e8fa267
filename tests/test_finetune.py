"""Fine-tuning: what is trained, what is left alone, and what the history says."""

import copy
import json
import re
import warnings

import pytest
import torch
from torch import nn

import tncompress as tnc
from tncompress.data import load_data
from tncompress.finetune import FinetuneConfig, parameter_groups, train_
from tncompress.noise import has_bf16


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )


@pytest.fixture(scope="module")
def trained(data):
    model = tiny()
    train_(model, data.train_loader(batch_size=64), {"epochs": 4, "lr": 0.1})
    spec = {"default": {"format": "mps", "rank": {"params_ratio": 0.12}}}
    return model, tnc.compress(model, spec)


def state(model):
    return copy.deepcopy(model.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_lost_accuracy_comes_back(data, trained):
    model, small = trained
    before, of_teacher = state(small), state(model)
    history = tnc.finetune(
        small, data.train_loader(), {"epochs": 2}, teacher=model, val_loader=data.test_loader()
    )
    test = data.test_loader()
    assert history.accuracy_start == tnc.evaluate(small, test).accuracy
    assert history.accuracy_dense == tnc.evaluate(model, test).accuracy
    assert history.accuracy == tnc.evaluate(history.model, test).accuracy
    assert history.accuracy > history.accuracy_start + 0.05
    lost = history.accuracy_dense - history.accuracy_start
    assert history.recovery == pytest.approx((history.accuracy - history.accuracy_start) / lost)
    to_control = history.accuracy_control - history.accuracy_start
    assert history.recovery_of_control == pytest.approx(
        (history.accuracy - history.accuracy_start) / to_control
    )
    assert len(history.epochs) == len(history.control) == 2
    assert history.epochs[1].loss < history.epochs[0].loss
    assert same(before, state(small))
    assert same(of_teacher, state(model))
    assert json.loads(json.dumps(history.to_dict()))["recovery"] == history.recovery
    assert f"{100 * history.recovery:.0f} % of the loss is back" in str(history)
    for epoch in (*history.epochs, *history.control):
        assert f"{100 * epoch.accuracy:.2f} %" in str(history)


def test_repair_alone_brings_accuracy_back(data, trained):
    model, small = trained
    test = data.test_loader()
    mended = tnc.repair(small, model, data.calibration_loader())
    assert tnc.evaluate(mended, test).accuracy > tnc.evaluate(small, test).accuracy + 0.02


def test_factors_are_what_is_trained(data, trained):
    _, small = trained
    history = tnc.finetune(small, data.train_loader(), {"epochs": 1})
    for (name, old), (_, new) in zip(small.named_parameters(), history.model.named_parameters(), strict=True):
        assert not torch.equal(old, new), name
    assert isinstance(history.model[3], tnc.TNConv)
    assert history.accuracy is history.recovery is history.accuracy_control is None


def test_it_is_deterministic_and_leaves_the_global_generator_alone(data, trained):
    model, small = trained
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = tnc.finetune(small, data.train_loader(seed=3), {"epochs": 1}, teacher=model, control=False)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    second = tnc.finetune(small, data.train_loader(seed=3), {"epochs": 1}, teacher=model, control=False)
    assert same(state(first.model), state(second.model))
    other = tnc.finetune(
        small, data.train_loader(seed=3), {"epochs": 1, "seed": 1}, teacher=model, control=False
    )
    assert not same(state(first.model), state(other.model))


def test_loaders_that_draw_from_the_global_generator_do_not_move_it(trained):
    _, small = trained
    images = torch.utils.data.TensorDataset(torch.randn(32, 1, 32, 32), torch.randint(0, 10, (32,)))
    loader = torch.utils.data.DataLoader(images, batch_size=16, shuffle=True)
    before = torch.get_rng_state()
    tnc.finetune(small, loader, {"epochs": 1}, val_loader=loader)
    assert torch.equal(before, torch.get_rng_state())


def test_a_control_can_be_taken_over(data, trained):
    model, small = trained
    test = data.test_loader()
    first = tnc.finetune(small, data.train_loader(), {"epochs": 1}, teacher=model, val_loader=test)
    second = tnc.finetune(
        small, data.train_loader(), {"epochs": 1}, teacher=model, val_loader=test, control=first.control
    )
    assert second.control == first.control


def test_distillation_follows_the_teacher(data, trained):
    model, small = trained
    x, _ = next(iter(data.test_loader()))

    def gap(distill):
        config = {"epochs": 1, "distill": distill}
        tuned = tnc.finetune(small, data.train_loader(), config, teacher=model, control=False).model
        with torch.no_grad():
            return float((tuned(x).log_softmax(1) - model(x).log_softmax(1)).norm())

    assert gap(4.0) < gap(0.0)


def test_weight_decay_leaves_factors_biases_and_norms_alone(trained):
    _, small = trained
    config = FinetuneConfig(weight_decay=0.1, lr_factors=0.5)
    groups = parameter_groups(small, config)
    dense, factors, others = (group["params"] for group in groups)
    assert {id(p) for p in dense} == {id(small[0].weight), id(small[10].weight)}
    assert {id(p) for p in factors} == {id(f) for m in (small[3], small[6]) for f in m.factors}
    assert len(dense) + len(factors) + len(others) == len(list(small.parameters()))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group["lr"] for group in groups] == [config.lr, 0.5, config.lr]
    small_frozen = copy.deepcopy(small)
    small_frozen[0].weight.requires_grad_(False)
    assert len(parameter_groups(small_frozen, config)[0]["params"]) == 1


def test_bf16_trains_too(data, trained):
    _, small = trained
    history = tnc.finetune(
        small, data.train_loader(), {"epochs": 1, "mixed_precision": "bf16"}, val_loader=data.test_loader()
    )
    assert history.accuracy > history.accuracy_start
    assert next(history.model.parameters()).dtype == torch.float32


def test_a_processor_that_emulates_bf16_is_named(data, trained, monkeypatch):
    monkeypatch.setattr("tncompress.engine.has_bf16", lambda device: False)
    batch = [next(iter(data.train_loader(batch_size=8)))]
    with pytest.warns(UserWarning, match="bf16 on .+, which does not compute in it: steps may take many"):
        tnc.finetune(trained[1], batch, {"epochs": 1, "mixed_precision": "bf16"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tnc.finetune(trained[1], batch, {"epochs": 1, "mixed_precision": "no"})


@pytest.mark.parametrize(
    ("instructions", "theirs"), [("avx512_bf16", True), ("bf16", True), ("avx512_f", False)]
)
def test_a_processor_has_bf16_by_instructions_of_its_own(monkeypatch, instructions, theirs):
    known = {"avx512_bf16": False, "bf16": False} | {instructions: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert has_bf16() is theirs


@pytest.mark.parametrize("told", [None, True, False])
def test_an_older_torch_is_asked_in_its_own_way(monkeypatch, told):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.delattr(torch._C._cpu, "_is_avx512_bf16_supported", raising=False)
    if told is not None:
        monkeypatch.setattr(torch._C._cpu, "_is_avx512_bf16_supported", lambda: told, raising=False)
    assert has_bf16() is bool(told)


def test_each_epoch_leaves_a_line_where_there_is_no_terminal(data, trained, capsys):
    options = {"val_loader": data.test_loader(), "teacher": trained[0]}
    config = {"epochs": 2, "local_epochs": 1}
    history = tnc.finetune(trained[1], data.train_loader(), config, progress=True, **options)
    lines = capsys.readouterr().err.splitlines()
    found = [
        re.fullmatch(r"(.+) epoch (\d) of (\d): loss ([\d.]+), accuracy ([\d.]+) %.*, \d+ s", x)
        for x in lines
    ]
    epochs = [*history.local, *history.epochs, *history.control]
    labels = [("slices", 1, 1)] + [(name, n, 2) for name in ("tuning", "dense control") for n in (1, 2)]
    assert [(x[1], int(x[2]), int(x[3])) for x in found] == labels
    assert [x[5] for x in found] == [f"{100 * epoch.accuracy:.2f}" for epoch in epochs]
    tnc.finetune(trained[1], data.train_loader(), config, **options)
    assert capsys.readouterr().err == ""


def test_channels_last_is_a_layout_for_the_training_alone(data, trained):
    model, small = trained
    seen = []
    small = copy.deepcopy(small)
    small[8].p = 0.0  # which units are dropped goes by their order in memory
    small[6].register_forward_hook(lambda _, args, out: seen.append(out.stride()[1]))
    before = [p.stride() for p in (*small.parameters(), *model.parameters())]
    images = list(data.train_loader(batch_size=32))[:3]
    tuned = {}
    for layout in (False, True):
        seen.clear()
        config = {"epochs": 1, "channels_last": layout}
        tuned[layout] = tnc.finetune(small, images, config, teacher=model, control=False).model
        assert all((stride == 1) is layout for stride in seen)
    for (name, one), other in zip(tuned[False].named_parameters(), tuned[True].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
        assert one.stride() == other.stride()
    dense = copy.deepcopy(model)
    held = list(dense.parameters())
    train_(dense, images, {"epochs": 1, "channels_last": True}, teacher=model)
    assert all(p is q for p, q in zip(held, dense.parameters(), strict=True))
    assert [p.stride() for p in (*small.parameters(), *model.parameters())] == before


def test_a_loss_that_is_not_finite_stops(data, trained):
    _, small = trained
    before = state(small)
    with pytest.raises(FloatingPointError, match=r"the loss became .* in epoch 1: try a learning rate below"):
        tnc.finetune(small, data.train_loader(), {"epochs": 1, "lr": 1e30, "warmup": 0.0, "clip_norm": None})
    assert same(before, state(small))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"epoch": 3}, "unknown key 'epoch'; the keys there are epochs, lr"),
        ({"epochs": 0}, "wanted at least 1 of epochs and local_epochs, got 0, 0"),
        ({"epochs": -1}, "epochs: input should be greater than or equal to 0, got -1"),
        ({"lr": -1}, "lr: input should be greater than 0"),
        ({"mixed_precision": "int8"}, "mixed_precision"),
    ],
)
def test_a_wrong_config_is_one_line(data, trained, config, words):
    with pytest.raises(ValueError, match="config: ") as caught:
        tnc.finetune(trained[1], data.train_loader(), config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_round_trips():
    config = FinetuneConfig(epochs=7, lr=0.5)
    assert FinetuneConfig.parse(config.model_dump()) == config
    assert FinetuneConfig.parse(None) == FinetuneConfig()


def test_a_loader_has_a_length_and_something_in_it(trained):
    with pytest.raises(ValueError, match="empty loader"):
        tnc.finetune(trained[1], [])
    with pytest.raises(TypeError, match="a loader with a length"):
        tnc.finetune(trained[1], iter([]))


def test_the_teacher_stays_in_its_mode(data, trained):
    model, small = trained
    teacher = copy.deepcopy(model).train()
    teacher[1].eval()
    train_(copy.deepcopy(small), data.train_loader(), {"epochs": 1}, teacher=teacher)
    assert [module.training for module in teacher[:3]] == [True, False, True]
    assert teacher.training
