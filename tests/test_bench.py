"""The bench: what is measured of which model, and what it says of the machine that it was measured on."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import tncompress as tnc
from tncompress import allocator, bench_table, benching, noise
from tncompress.bench_table import Bench, Timing, Unmeasured
from tncompress.freezing import Frozen
from tncompress.noise import Load

QUICK = {"seconds": 0.01}
SPEC = {"default": {"format": "svd", "rank": {"params_ratio": 0.5}}, "keep_dense": []}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.drop(self.norm(self.conv(x))) * scale


@pytest.fixture
def pair():
    dense = Net().train()
    return dense, tnc.compress(dense, SPEC), torch.randn(2, 3, 8, 8)


def test_every_model_in_every_way_on_every_batch_size(pair):
    dense, small, x = pair
    found = tnc.bench(
        dense,
        {"svd": small, "again": small},
        example_inputs=x,
        batch_sizes=[1, 5],
        ways=["frozen", "eager", "channels_last"],
        **QUICK,
    )
    told = [(t.batch, t.model, t.way) for t in found.timings]
    models, ways = ("dense", "svd", "again"), ("frozen", "eager", "channels_last")
    assert told == [(size, model, way) for size in (1, 5) for model in models for way in ways]
    for t in found.timings:
        assert 0 < t.low <= t.median <= t.high
        assert t.runs >= benching.FEWEST
        assert t.rel_error < 1e-5
        assert (t.made != "") == (t.way == "frozen")
    assert found.input_shapes == ((3, 8, 8),)
    assert dense.training
    assert dense.drop.training
    assert not dense.conv._forward_hooks


def test_a_slower_model_is_measured_slower():
    fast = nn.Conv2d(16, 16, 1)
    slow = nn.Sequential(*[nn.Conv2d(16, 16, 5, padding=2) for _ in range(6)])
    x = torch.randn(1, 16, 32, 32)
    found = tnc.bench(slow, fast, example_inputs=x, ways=["eager"], seconds=0.1)
    dense, small = found.timings
    assert dense.median > 3 * small.median
    assert found.speedup(small) == dense.median / small.median
    assert found.speedup(dense) == 1


def test_samples_are_cut_or_repeated():
    x, mask = torch.arange(6.0).reshape(3, 2), torch.tensor([1.0])
    inputs = {"x": x, "pair": [x + 1, "word"], "mask": mask, "scale": 2.0}
    found = benching.resized(inputs, 3, 5)
    assert torch.equal(found["x"], x[[0, 1, 2, 0, 1]])
    assert torch.equal(found["pair"][0], x[[0, 1, 2, 0, 1]] + 1)
    assert (found["pair"][1], found["scale"]) == ("word", 2.0)
    assert found["mask"] is mask
    assert torch.equal(benching.resized(x, 3, 1), x[:1])
    assert benching.resized(inputs, 3, 3) is inputs


def test_inputs_are_a_tensor_a_tuple_or_a_mapping(pair):
    dense, _, x = pair
    for inputs in (x, (x, 2.0), {"x": x, "scale": 2.0}):
        (timing,) = tnc.bench(dense, example_inputs=inputs, ways=["eager"], **QUICK).timings
        assert timing.batch == 2


def test_threads_are_put_back(pair):
    dense, _, x = pair
    found = tnc.bench(dense, example_inputs=x, ways=["eager"], threads=2, **QUICK)
    assert found.environment["threads"] == 2
    assert torch.get_num_threads() == 1


def test_a_way_that_cannot_be_run_is_listed_with_its_reason(pair, monkeypatch):
    dense, small, x = pair

    def broken(model, inputs):
        raise RuntimeError("No working C++ compiler found in\nall of these places")

    monkeypatch.setitem(benching.MAKERS, "compiled", broken)
    found = tnc.bench(dense, small, example_inputs=x, **QUICK)
    assert {t.way for t in found.timings} == {"eager", "frozen"}
    assert [(u.model, u.way) for u in found.unmeasured] == [("dense", "compiled"), ("compressed", "compiled")]
    assert found.unmeasured[0].reason == "RuntimeError: No working C++ compiler found in"
    assert "not measured: dense, compiled, batch 2: RuntimeError" in str(found)


def test_a_way_that_computes_something_else_is_warned_of(pair, monkeypatch):
    dense, _, x = pair
    wrong = benching._Run("", "frozen", lambda: torch.full((2, 8, 6, 6), float("nan")))
    monkeypatch.setitem(benching.MAKERS, "frozen", lambda model, inputs: wrong)
    found = tnc.bench(dense, example_inputs=x, ways=["eager", "frozen"], **QUICK)
    assert any("dense, frozen, batch 2: its outputs differ" in words for words in found.warnings)
    smaller = benching._Run("", "frozen", lambda: torch.zeros(2, 8))
    monkeypatch.setitem(benching.MAKERS, "frozen", lambda model, inputs: smaller)
    found = tnc.bench(dense, example_inputs=x, ways=["eager", "frozen"], **QUICK)
    assert "its outputs have shapes" in found.unmeasured[0].reason


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_torch_compile_is_measured_for_more_variants_than_it_keeps():
    class Scaled(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return x * self.by

    others = {f"times {k}": Scaled(k) for k in range(2, 12)}
    x = torch.randn(2, 3)
    found = tnc.bench(Scaled(1), others, example_inputs=x, ways=["compiled"], **QUICK)
    if "compiler" in " ".join(u.reason.lower() for u in found.unmeasured):
        pytest.skip("no compiler")
    assert len(found.timings) == 11
    assert all(t.rel_error < 1e-6 for t in found.timings)


BAD = {
    "way": ({"ways": ["eager", "magic"]}, "ways to run a model are eager"),
    "no way": ({"ways": []}, "got none"),
    "graphs": ({"ways": ["graphed"]}, "CUDA graphs take a GPU"),
    "batch": ({"batch_sizes": [0]}, r"from 1, got \[0\]"),
    "no batch": ({"batch_sizes": []}, "from 1"),
    "threads": ({"threads": 0}, "at least one thread"),
    "inputs": ({"example_inputs": 3}, "a tensor whose first size is the batch"),
    "name": ({"compressed": {"dense": nn.Identity()}}, "another name"),
}


@pytest.mark.parametrize("kind", BAD)
def test_misuse_is_one_clear_line(kind, pair):
    options, words = BAD[kind]
    dense, _, x = pair
    with pytest.raises(ValueError, match=words):
        tnc.bench(dense, **({"example_inputs": x} | options))
    assert torch.get_num_threads() == 1


def test_inputs_that_the_model_does_not_take_are_an_error(pair):
    dense, _, _ = pair
    with pytest.raises(RuntimeError, match="channels") as told:
        tnc.bench(dense, example_inputs=torch.randn(1, 4, 8, 8), **QUICK)
    assert told.value.__notes__[-1] == "while running the dense model on a batch of 1"
    assert dense.training


# --- the result as a value ----------------------------------------------------------------------------------


def timing(model="dense", way="eager", batch=1, median=1.0, **rest):
    return Timing(model, way, batch, median, 0.9 * median, 1.2 * median, 20, 0.0, **rest)


@pytest.fixture
def made():
    timings = (timing(), timing(way="frozen", median=0.5, made="packed"), timing("svd", median=0.4))
    return Bench(
        (*timings, timing("svd", batch=8, median=2.0)),
        (Unmeasured("svd", "compiled", 1, "no compiler"),),
        "dense",
        ((3, 8, 8),),
        {"device": "a processor", "threads": 1},
        {"OMP_WAIT_POLICY": None},
        warnings=("noise",),
        hints=("advice",),
    )


def test_speedups_are_to_the_same_way_and_to_the_fastest_dense(made):
    svd = made.select(model="svd", batch=1)[0]
    assert made.speedup(svd, same_way=True) == 2.5
    assert made.speedup(svd) == 0.5 / 0.4
    assert made.speedup(made.select(batch=8)[0]) is None
    assert made.timings[0].spread == pytest.approx(0.3)
    told = made.to_dict()["timings"]
    assert [t["faster_than_best_reference"] for t in told] == [0.5, 1.0, 1.25, None]


def test_it_prints_and_is_saved(made, tmp_path):
    for text in (str(made), made.to_markdown()):
        for words in ("frozen (packed)", "2.50x", "svd, compiled, batch 1: no compiler", "warning: noise"):
            assert words in text
    assert all(len(row) == len(bench_table.COLUMNS) for row in made.rows())
    made.save(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(json.dumps(made.to_dict()))
    made.save(tmp_path / "b.md")
    assert "OMP_WAIT_POLICY unset" in (tmp_path / "b.md").read_text()
    with pytest.raises(FileExistsError, match="is there already"):
        made.save(tmp_path / "b.md")
    with pytest.raises(ValueError, match=r"\.json or \.md, got b\.txt"):
        made.save(tmp_path / "b.txt")


# --- what else the machine does -----------------------------------------------------------------------------


def test_the_time_of_other_processes_is_what_is_busy_without_us(monkeypatch, tmp_path):
    """The clocks are fakes: of 10 s, two cores were busy for 18 s, of which 9 were ours."""
    busy, own, now = iter([100.0, 118.0]), iter([50.0, 59.0]), iter([7.0, 17.0])
    monkeypatch.setattr(noise, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(noise, "_own_seconds", lambda: next(own))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    load = Load(before=0.0)
    with load.watched():
        pass
    monkeypatch.undo()
    assert load.others == pytest.approx(0.9)
    (words,) = load.warnings(0.05)
    assert words.startswith("other processes took 0.9 of ")
    assert "quartiles are up to 30 % of the median apart" in load.warnings(0.3)[0]


def test_busy_seconds_are_read_from_the_system(monkeypatch, tmp_path):
    monkeypatch.setattr(noise, "PROC_STAT", tmp_path / "stat")
    assert noise._busy_seconds() is None
    (tmp_path / "stat").write_text("cpu  100 20 30 9999 8888 1 2 47 5 5\ncpu0 1 1 1 1\n")
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    assert noise._busy_seconds() == 2.0
    (tmp_path / "stat").write_text("cpu  what\n")
    assert noise._busy_seconds() is None


def test_without_such_counts_the_load_before_is_what_is_known(monkeypatch):
    monkeypatch.setattr(noise, "_busy_seconds", lambda: None)
    for before, warned in ((3.2, True), (0.1, False), (None, False)):
        load = Load(before=before)
        with load.watched():
            pass
        assert load.others is None
        assert bool(load.warnings(0.0)) is warned
    monkeypatch.delattr("os.getloadavg")
    assert noise.load_average() is None


def test_absent_settings_are_hinted_at_where_they_matter(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(allocator, "_kept", False)
    for name in noise.ADVISED:
        monkeypatch.delenv(name, raising=False)
    (words,) = noise.hints(threads=1)
    assert "MALLOC_TOP_PAD_=268435456" in words
    assert "OMP" not in words
    assert "OMP_WAIT_POLICY=ACTIVE" in noise.hints(threads=2)[0]
    assert noise.hints(2, torch.device("cuda")) == []
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert noise.hints(threads=1) == []
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert noise.hints(threads=2) == []
    assert noise.settings()["OMP_WAIT_POLICY"] == "PASSIVE"


def faults_of_large_tensors(before=""):
    """Return the page faults of allocating and freeing 64 MiB fifty times, in a Python of its own."""
    code = f"""
import resource
import torch
import tncompress as tnc
{before}
def once():
    torch.ones(1 << 24)
once()
count = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - count)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_memory_of_large_tensors_is_kept_where_that_was_asked_for():
    handed_back = faults_of_large_tensors()
    assert handed_back > 1000
    kept = faults_of_large_tensors("assert tnc.keep_memory()")  # what lies beside may take part of a place
    assert kept < handed_back / 2


def test_memory_is_not_kept_where_the_c_library_is_another(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator, "_kept", False)
    assert not tnc.keep_memory()
    assert not allocator.keeps_memory()


def test_kept_memory_is_a_setting_as_advised(monkeypatch):
    monkeypatch.setattr(allocator, "_kept", True)
    for name in noise.ADVISED:
        monkeypatch.delenv(name, raising=False)
    assert noise.settings() == noise.ADVISED | {"OMP_WAIT_POLICY": None}
    assert noise.hints(threads=1) == []


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    dense = tnc.build_model("zoo:cnn4").eval()
    small = tnc.compress(dense, {"default": {"format": "tucker", "rank": {"params_ratio": 0.25}}})
    tnc.save(small, tmp_path / "small", source={"source": "zoo:cnn4", "num_classes": 10, "in_channels": 1})
    return tmp_path


FEW = "--input 1x16x16 --batch 1,2 --seconds 0.01"


def test_a_saved_model_against_its_dense_one(run, saved):
    result = run(f"bench small {FEW} --ways eager,frozen --out speed.md")
    for words in ("dense", "compressed", "frozen", "to best dense", "1x16x16"):
        assert words in result.stdout
    assert "Measured on" in (saved / "speed.md").read_text()
    found = json.loads(run(f"bench small {FEW} --ways eager --threads 1 --json").stdout)
    assert [(t["model"], t["batch"]) for t in found["timings"]] == [
        ("dense", 1),
        ("compressed", 1),
        ("dense", 2),
        ("compressed", 2),
    ]
    assert set(found["settings"]) == set(noise.ADVISED)
    alone = json.loads(run(f"bench --model zoo:cnn4 {FEW} --ways eager --json").stdout)
    assert {t["model"] for t in alone["timings"]} == {"dense"}
    assert run(f"bench small {FEW} --out speed.md", code=1).stderr.count("\n") == 1
    for verb in ("bench", "report"):  # weights that are named are never made up
        assert (
            "none.safetensors" in run(f"{verb} small --weights none.safetensors --input 1x8x8", code=1).stderr
        )


def test_calibrating_needs_no_model(run, tmp_path, monkeypatch):
    from tncompress import machine, machine_fit

    known = machine.Machine(start=1e-3, width=8)
    monkeypatch.setattr(machine_fit, "measured", lambda setting, *_: known.seconds(setting.terms))
    monkeypatch.setattr(machine, "machines_file", lambda: tmp_path / "machines.json")
    found = json.loads(run("bench --calibrate --device cpu --json").stdout)
    assert found["machine"]["start"] == pytest.approx(1e-3)
    assert "1e+03 us a call" in run("bench --calibrate --device cpu --dtype bfloat16").stdout
    assert machine.machine_for("cpu", torch.bfloat16).start == pytest.approx(1e-3)
    run(f"bench --calibrate --model zoo:cnn4 {FEW} --ways eager --json")
    (tmp_path / "machines.json").write_text("{}")
    assert "'version' is missing" in run("bench --calibrate --device cpu", code=1).stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bench", "name a folder that compress wrote"),
        ("bench --calibrate --out x.md", "--out takes what a bench of a model measures"),
        ("bench --calibrate --dtype int8", "--dtype is one of float32"),
        ("bench --model zoo:cnn4 --batch 1,two", "--batch takes whole numbers"),
        ("bench --model zoo:cnn4 --batch 0", "from 1"),
        ("bench --model zoo:cnn4 --ways slow", "ways to run a model"),
        ("bench --model zoo:cnn4 --out speed.txt", "ends in .md or .json"),
        ("bench nowhere", "nowhere"),
    ],
)
def test_misuse_of_the_command_is_one_line(run, line, words):
    result = run(line, code=1)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_frozen_models_can_be_measured(pair):
    dense, _, x = pair
    frozen = tnc.freeze(dense, x, seconds=0.01)
    assert isinstance(frozen, Frozen)
    found = tnc.bench(dense, {"ours": frozen}, example_inputs=x, ways=["eager"], **QUICK)
    assert len(found.timings) == 2
