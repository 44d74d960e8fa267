"""Faults and hostile files: a killed writer leaves the old result or the new, and no file is believed."""

import json
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import tncompress as tnc
from tncompress import Plan, Spec, storage
from tncompress.export import MANIFEST, WEIGHTS
from tncompress.manifest import checksum
from tncompress.storage import check_writable, new_directory, new_file
from tncompress.textfiles import MAX_BYTES
from tncompress.weights import load_weights

pytestmark = pytest.mark.usefixtures("unchecked")  # wrong types are met by errors of our own here

SPEC = {"default": {"format": "svd", "rank": {"fixed": 2}}, "keep_dense": []}
ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


class Net(nn.Module):
    """A block, two convolutions and a linear layer: little to read and write."""

    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3)
        self.block = nn.Sequential(nn.Conv2d(width, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def net(seed=0, width=6):
    torch.manual_seed(seed)
    return tnc.compress(Net(width).eval(), SPEC)


def same(one, other):
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def one_line(error):
    text = str(error)
    assert text
    assert text.splitlines() == [text]
    assert all(c.isprintable() for c in text)
    return text


# --- killed at every step -----------------------------------------------------------------------------------

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "fcntl.flock"}
"""What Python tells of before it does it; around other calls there is a step before and one after."""


class Steps:
    """Counts what a process does to the file system, and kills it before number ``last``."""

    def __init__(self, last, folder):
        self.count, self.last, self.folder = 0, last, str(folder)

    def step(self):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self):
        """Count from here on. What is written elsewhere (caches, the terminal) is none of our steps."""

        def hook(event, args):
            if event in EVENTS and self.ours(args[0]):
                self.step()

        for name in ("fsync", "unlink", "rmdir"):
            setattr(os, name, self.around(getattr(os, name)))
        storage._exchange = self.around(storage._exchange)
        sys.addaudithook(hook)

    def ours(self, path):
        """Say whether a path lies in the folder, or is given in relation to an open folder."""
        return isinstance(path, int) or not os.path.isabs(path) or os.fsdecode(path).startswith(self.folder)

    def around(self, call):
        def watched(*args, **kwargs):
            self.step()
            made = call(*args, **kwargs)
            self.step()
            return made

        return watched


def killed_after(last, folder, work):
    """Run ``work`` in a fork that is killed at step ``last``; return whether it was."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Steps(last, folder).watch()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def every_kill(folder, work, fewest):
    """Yield after each kill of ``work``, at its first step, its second ...; it then runs to its end."""
    last = 1
    while killed_after(last, folder, work):
        yield last
        last += 1
    assert last > fewest


@contextmanager
def no_exchange(monkeypatch):
    """A system that can't swap two folders in one step."""
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_exchange", lambda one, other: False)
        yield


def pairs(path):
    """Write two files that belong together, and say which pair is there."""

    def write(word):
        with new_directory(path, marker="a", overwrite=True) as fresh:
            (fresh / "a").write_text(word)
            (fresh / "b").write_text(word)

    def read():
        words = {(path / name).read_text() for name in "ab"}
        assert len(words) == 1, "a mixture"
        return words.pop()

    return write, read


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "rename"])
def test_a_killed_writer_leaves_the_old_folder_or_the_new(tmp_path, monkeypatch, exchange):
    path = tmp_path / "result"
    write, read = pairs(path)
    write("old")
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    found = set()
    for _ in every_kill(tmp_path, lambda: write("new"), fewest=20):
        if exchange:
            assert path.exists()
        storage.restore(path)
        found.add(read())
        write("old")
        assert not hidden(tmp_path)
    assert found == {"old", "new"}
    assert read() == "new"


def test_a_killed_first_writer_leaves_nothing_or_all(tmp_path):
    path = tmp_path / "sub" / "result"
    write, read = pairs(path)
    found = set()
    for _ in every_kill(tmp_path, lambda: write("new"), fewest=20):
        found.add(read() if path.exists() else None)
        shutil.rmtree(path, ignore_errors=True)
        check_writable(path, marker="a")
    assert found == {None, "new"}
    assert not hidden(path.parent)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "rename"])
def test_a_killed_save_leaves_a_model_that_loads(tmp_path, monkeypatch, exchange):
    old, new, path = net(0), net(1), tmp_path / "m"
    tnc.save(old, path)
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    found = []
    for _ in every_kill(tmp_path, lambda: tnc.save(new, path, overwrite=True), fewest=30):
        loaded = tnc.load(path, Net)
        assert same(loaded, old) or same(loaded, new)
        found.append(same(loaded, new))
        tnc.save(old, path, overwrite=True)
        assert not hidden(tmp_path)
    assert found == sorted(found)
    assert {*found} == {False, True}
    assert same(tnc.load(path, Net), new)


WRITERS = {
    "plan.json": lambda path, n: tnc.make_plan(Net(), {"default": {"rank": {"fixed": n}}}).save(path),
    "spec.json": lambda path, n: Spec.parse({"default": {"rank": {"fixed": n}}}).save(path),
    "spec.yaml": lambda path, n: Spec.parse({"default": {"rank": {"fixed": n}}}).save(path),
    "w.safetensors": lambda path, n: tnc.save_weights(net(n), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_writer_leaves_the_old_file_or_the_new(tmp_path, name):
    path, write = tmp_path / name, WRITERS[name]
    torch.manual_seed(0)
    write(path, 2)
    new, old = None, path.read_bytes()

    def again():
        torch.manual_seed(0)
        write(path, 1)

    found = set()
    for _ in every_kill(tmp_path, again, fewest=10):
        found.add(path.read_bytes())
        path.write_bytes(old)
    new = path.read_bytes()
    assert found == {old, new}
    assert not hidden(tmp_path)


def test_onnx_is_written_beside_its_place(tmp_path, monkeypatch):
    """Its writer is slow to run at every step: it is stopped before the last one."""
    path = tmp_path / "m.onnx"
    path.write_text("old")
    monkeypatch.setattr("tncompress.export._onnx_error", lambda *_: 0.5)
    with pytest.raises(ValueError, match=r"off by 0\.5"):
        tnc.export_onnx(net(), path, torch.randn(1, 1, 6, 6))
    assert path.read_text() == "old"
    assert not hidden(tmp_path)


# --- leftovers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_running_writer_is_left_alone(tmp_path, kind):
    path = tmp_path / "m"
    writer = new_file if kind == "file" else lambda p: new_directory(p, marker="a", overwrite=True)

    def fill(fresh, word):
        (fresh if kind == "file" else fresh / "a").write_text(word)

    with writer(path) as slow:
        with writer(path) as fast:
            fill(fast, "fast")
        fill(slow, "slow")
        assert len(hidden(tmp_path)) == 1
    assert (path if kind == "file" else path / "a").read_text() == "slow"
    assert not hidden(tmp_path)


def test_only_what_is_surely_ours_is_removed(tmp_path):
    kept = [".m.precious", ".m.0123456789abcdef", ".m.0123456789ABCDEF.tnc", ".n.0123456789abcdef.tnc"]
    for name in [*kept, ".m.0123456789abcdef.tnc"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    tnc.save(net(), tmp_path / "m")
    assert sorted(hidden(tmp_path)) == sorted(kept)


def test_a_writer_that_fails_to_move_in_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "m"
    write, read = pairs(path)
    write("old")
    moved = Path.rename

    def rename(self, target):
        if self.name == "new":
            raise OSError("no")
        return moved(self, target)

    with no_exchange(monkeypatch):
        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="no"):
            write("new")
    assert read() == "old"
    assert not hidden(tmp_path)


def test_the_old_folder_of_a_live_writer_is_not_put_back(tmp_path):
    """Where folders can't be swapped, the path is missing for a moment; only a dead writer's is restored."""
    path = tmp_path / "m"
    write, read = pairs(path)
    with storage._workplace(path, "m") as place:
        (place / "old").mkdir()
        storage.restore(path)
        assert not path.exists()
    place.mkdir()
    (place / "old").mkdir()
    for name in "ab":
        (place / "old" / name).write_text("old")
    with pytest.raises(FileExistsError, match="already holds a result"), new_directory(path, marker="a"):
        pass
    assert read() == "old"


def test_a_linked_folder_is_written_through_its_link(tmp_path):
    write, read = pairs(tmp_path / "link")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write("new")
    write("newer")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == read() == "newer"
    assert not hidden(tmp_path)


def test_files_reach_the_disk_before_they_are_moved(tmp_path, monkeypatch):
    done, real = [], {"fsync": os.fsync, "exchange": storage._exchange}

    def fsync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real["fsync"](handle)

    def exchange(one, other):
        done.append("exchange")
        return real["exchange"](one, other)

    write, _ = pairs(tmp_path / "m")
    write("old")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(storage, "_exchange", exchange)
    write("new")
    assert sorted(done[:2]) == ["a", "b"]
    assert done[2:] == ["new", "exchange", tmp_path.name]


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        Spec().save(tmp_path / "spec.json")
    assert not list(tmp_path.iterdir())
