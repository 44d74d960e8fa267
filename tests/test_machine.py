"""The cost model of a machine: fitted to times whose constants are known, kept in a file that is checked."""

import json
import random

import pytest
import torch
from torch import nn

import tncompress as tnc
from tncompress import cost_model, latency, machine, machine_fit
from tncompress.contraction import chain_macs, dense_stage
from tncompress.geometry import ConvGeometry
from tncompress.latency import modelled
from tncompress.layers import TNConv
from tncompress.machine import Machine, keep_machine, machine_for, read_machines, terms

KNOWN = Machine(start=2e-5, products=90e9, memory=20e9, depthwise=7e9, width=8)


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Keep fitted machines in a folder of the test's own."""
    path = tmp_path / "caches" / "machines.json"
    monkeypatch.setattr(machine, "machines_file", lambda: path)
    return path


def close(found, wanted, rel):
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in Machine.__dataclass_fields__}
    return all(a == pytest.approx(b, rel=rel) for a, b in pairs.values())


def synthetic(seed=0, noise=0.0, outliers=0, known=KNOWN):
    rng = random.Random(seed)
    chosen = [setting.terms for setting in machine_fit.settings(seed, "cpu")]
    seconds = [known.seconds(each) * (1 + noise * rng.uniform(-1, 1)) for each in chosen]
    for k in rng.sample(range(len(seconds)), outliers):
        seconds[k] *= rng.choice([0.5, 3, 20])
    return chosen, seconds


@pytest.mark.parametrize("known", [KNOWN, Machine(), Machine(5e-6, 4e13, 2e12, 3e11, width=64, itemsize=2)])
def test_the_fit_recovers_the_constants_that_times_were_made_with(known):
    chosen, seconds = synthetic(known=known)
    found = machine_fit.fit_machine(chosen, seconds, itemsize=known.itemsize)
    assert close(found, known, rel=1e-6)
    assert max(machine_fit.relative_errors(found, chosen, seconds)) < 1e-6


def test_outliers_do_not_move_the_fit():
    chosen, seconds = synthetic(outliers=24)
    assert close(machine_fit.fit_machine(chosen, seconds), KNOWN, rel=1e-6)


def test_noise_moves_the_fit_by_less_than_itself():
    chosen, seconds = synthetic(noise=0.05, outliers=8)
    assert close(machine_fit.fit_machine(chosen, seconds), KNOWN, rel=0.05)


def test_settings_are_of_every_kind_and_the_same_for_a_seed():
    chosen = machine_fit.settings(0, "cpu")
    assert chosen == machine_fit.settings(0, "cpu")
    assert {setting.kernel for setting in chosen} == {(1, 1), (3, 3), (3, 1), (1, 3)}
    assert {setting.depthwise for setting in chosen} == {False, True}
    assert any(setting.out % 16 for setting in chosen)
    assert all(setting.terms.operations(1) <= 1e9 for setting in chosen)


def test_terms_are_those_of_the_convolution():
    conv = nn.Conv2d(12, 20, (3, 2), groups=4)
    geometry, shape = ConvGeometry.of(conv), (2, 12, 7, 6)
    stages = [dense_stage(geometry)]
    outputs = conv(torch.randn(shape))
    each = terms(pixels=2 * outputs[0, 0].numel(), groups=4, into=3, out=5, window=6)
    assert each.operations(1) == 2 * chain_macs(geometry, stages, (7, 6), 2)
    assert each.operations(8) == each.operations(1) * 8 / 5
    assert each.written == outputs.numel()
    assert modelled(geometry, stages, shape, KNOWN) == KNOWN.seconds(each)
    assert modelled(geometry, stages, shape) == Machine().seconds(each)


def test_a_calibrated_machine_is_kept_and_used(places, monkeypatch):
    """The clock is a fake: what comes out is what it was wound up with."""
    monkeypatch.setattr(machine_fit, "measured", lambda setting, *_: KNOWN.seconds(setting.terms))
    assert machine_for() == Machine()
    found = tnc.calibrate_machine(threads=1)
    assert close(found.machine, KNOWN, rel=1e-6)
    assert found.error < 1e-6 < 0.1 < found.built_in_error
    assert found.path == places
    assert machine_for() == found.machine
    assert machine_for("cpu", torch.bfloat16) == Machine()
    assert (found.fitted, found.held_out, found.threads, found.dtype) == (72, 24, 1, "float32")
    assert json.loads(json.dumps(found.to_dict()))["machine"]["width"] == 8
    assert "22.5 %" not in str(found)
    tnc.calibrate_machine(dtype=torch.bfloat16)
    assert machine_for("cpu", torch.bfloat16).itemsize == 2
    assert machine_for() == found.machine
    assert tnc.calibrate_machine(keep=False).path is None


def test_another_machine_chooses_another_contraction(places):
    layer = TNConv.from_dense(nn.Conv2d(64, 64, 3, padding=1), tnc.MPS(), (24, 24, 24))
    calls = [(1, 64, 14, 14)]
    keep_machine(Machine(start=1.0), "cpu", torch.float32, 0.0)
    assert str(cost_model.modelled_contraction(layer, calls)) == "kernel"
    keep_machine(Machine(start=0.0, memory=1e18, products=1e6, width=1), "cpu", torch.float32, 0.0)
    assert str(cost_model.modelled_contraction(layer, calls)) == "chain"
    clock = latency.Clock("model")
    found = tnc.make_plan(nn.Sequential(layer.to_dense()), {"keep_dense": []})
    assert found.layers
    (dense,) = list(tnc.discovery.find_layers(nn.Sequential(layer.to_dense())))
    assert clock.layer(dense, calls) > 1.0  # 7 M products at a million a second


def test_half_precision_is_shortlisted_by_its_own_machine(places):
    layer = TNConv.from_dense(nn.Conv2d(64, 64, 3, padding=1), tnc.MPS(), (24, 24, 24))
    keep_machine(Machine(start=1.0), "cpu", torch.bfloat16, 0.0)
    ways = cost_model.shortlist(layer, [(1, 64, 14, 14)], dtype=torch.bfloat16)
    assert [str(way) for way in ways] == ["kernel"]
    assert len(cost_model.shortlist(layer, [(1, 64, 14, 14)])) > 1


# --- the file -----------------------------------------------------------------------------------------------


def spoilt(fields, **changes):
    return json.dumps({**fields, "machines": [{**fields["machines"][0], **changes}]})


DAMAGE = {
    "no JSON": (lambda f: "{", "is not valid JSON"),
    "cut short": (lambda f: json.dumps(f)[:-20], "is not valid JSON"),
    "a list": (lambda f: "[]", "input should be"),
    "no version": (lambda f: json.dumps({"machines": []}), "'version' is missing"),
    "newer": (lambda f: json.dumps({"version": 2, "machines": []}), "version 2 is of a newer tncompress"),
    "a speed of zero": (lambda f: spoilt(f, products=0), "machines.0.products: input should be greater"),
    "a negative start": (lambda f: spoilt(f, start=-1), "machines.0.start"),
    "no number": (lambda f: spoilt(f, memory="fast"), "machines.0.memory"),
    "infinite": (lambda f: spoilt(f, memory=float("inf")), "Infinity is no number"),
    "width zero": (lambda f: spoilt(f, width=0), "machines.0.width"),
    "an unknown key": (
        lambda f: spoilt(f, cores=3),
        "unknown key 'machines.0.cores'; the keys there are",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_told_of_and_stops_nothing(places, kind):
    keep_machine(KNOWN, "cpu", torch.float32, 0.1)
    assert machine_for() == KNOWN
    damage, words = DAMAGE[kind]
    places.write_text(damage(json.loads(places.read_text())))
    before = places.read_text()
    with pytest.raises(ValueError, match=words) as told:
        read_machines(places)
    assert "\n" not in str(told.value)
    with pytest.warns(UserWarning, match="the built-in cost model is used"):
        assert machine_for() == Machine()
    with pytest.raises(ValueError, match=words):
        keep_machine(KNOWN, "cpu", torch.float32, 0.1)
    assert places.read_text() == before


def test_machines_are_told_apart_by_device_threads_and_dtype(places, monkeypatch):
    keep_machine(KNOWN, "cpu", torch.float32, 0.0)
    monkeypatch.setattr(machine, "device_name", lambda _: "another")
    machine._name.cache_clear()
    assert machine_for() == Machine()
    keep_machine(Machine(start=1e-3), "cpu", torch.float32, 0.0)
    assert machine_for() == Machine(start=1e-3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert machine_for() == Machine()
    keep_machine(Machine(start=2e-3), "cpu", torch.float32, 0.0)
    keep_machine(Machine(start=3e-3), "cpu", torch.float32, 0.0)
    monkeypatch.undo()
    machine._name.cache_clear()
    assert len(read_machines(places)) == 3


def test_the_file_is_in_the_folder_of_caches(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.machines_file() == tmp_path / "tncompress" / "machines.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.machines_file() == tmp_path / ".cache" / "tncompress" / "machines.json"


def test_a_convolution_is_measured_as_frozen_layers_run_it():
    slow = machine_fit.Setting(1, 56, 64, 64, (3, 3), depthwise=False)
    fast = machine_fit.Setting(1, 8, 16, 16, (1, 1), depthwise=False)
    thin = machine_fit.Setting(1, 8, 16, 16, (1, 3), depthwise=True)
    times = [machine_fit.measured(s, torch.device("cpu"), torch.float32) for s in (slow, fast, thin)]
    assert times[0] > 3 * times[1] > 0 < times[2]


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="fitted on cpu or cuda, got meta"):
        tnc.calibrate_machine("meta")
    with pytest.raises(ValueError, match="at least one thread, got 0"):
        tnc.calibrate_machine(threads=0)
