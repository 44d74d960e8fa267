"""Faults and hostile files: a killed writer leaves the old result or the new, and no file is believed."""

import ctypes
import errno
import hashlib
import json
import os
import pickle
import random
import resource
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
import tncompress.export
from tncompress import Plan, Spec, storage
from tncompress.export import MANIFEST, WEIGHTS
from tncompress.manifest import checksum
from tncompress.storage import check_writable, new_directory, new_file
from tncompress.textfiles import MAX_BYTES, read_settings
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
        name = "" if isinstance(path, int) else os.fsdecode(path)
        return not name.startswith("/") or name.startswith(self.folder)

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
    monkeypatch.setattr("tncompress.onnx_export._onnx_error", lambda *_: 0.5)
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


def test_a_folder_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    real, swept = storage._lock, []

    def lock(place):
        if not swept:
            swept.append(place)
            shutil.rmtree(place)
        return real(place)

    monkeypatch.setattr(storage, "_lock", lock)
    write, read = pairs(tmp_path / "m")
    write("new")
    assert swept
    assert read() == "new"
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
    _, read = pairs(path)
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
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
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


@pytest.mark.parametrize("lack", ["libc", "kernel"])
def test_without_an_exchange_folders_are_renamed(tmp_path, monkeypatch, lack):
    class Libc:
        """A C library without the call, or with one that the kernel or file system does not know."""

    if lack == "kernel":
        Libc.renameat2 = lambda *args: ctypes.set_errno(errno.EINVAL) or -1
    monkeypatch.setattr(storage.ctypes, "CDLL", lambda *args, **kwargs: Libc)
    write, read = pairs(tmp_path / "m")
    write("old")
    write("new")
    assert read() == "new"
    assert not hidden(tmp_path)


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        Spec().save(tmp_path / "spec.json")
    assert not list(tmp_path.iterdir())


# --- damaged and swapped files ------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    tnc.save(net(), tmp_path / "m", source={"source": "zoo:cnn4"})
    return tmp_path / "m"


def refused_or_same(folder, model=Net):
    """Load what may be damaged: the very model that was saved, or one line."""
    try:
        loaded = tnc.load(folder, model)
    except (ValueError, OSError) as error:
        return one_line(error)
    assert same(loaded, net())
    assert loaded.tncompress_plan == net().tncompress_plan
    return None


def write_sealed(folder, manifest):
    """Write a manifest as someone would who knows how its checksum is made."""
    (folder / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


def reseal(folder, **changes):
    raw = (folder / changes.get("weights", WEIGHTS)).read_bytes() if "sha256" not in changes else b""
    manifest = json.loads((folder / MANIFEST).read_text())
    if raw:
        manifest |= {"sha256": storage_digest(raw), "bytes": len(raw)}
    write_sealed(folder, manifest | changes)


def storage_digest(raw):
    return hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_flipped_bit_is_never_another_model(saved, name):
    raw, rng = (saved / name).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        at, bit = rng.randrange(len(raw)), rng.randrange(8)
        (saved / name).write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        words = refused_or_same(saved)
        refused += words is not None
        assert words is None or name in words
        if name == WEIGHTS:
            assert "is damaged" in words or "in truth" in words
    assert refused > 250


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_file_cut_short_is_told(saved, name):
    raw, rng = (saved / name).read_bytes(), random.Random(0)
    for length in {0, 1, 7, 8, len(raw) // 2, len(raw) - 2, *(rng.randrange(len(raw)) for _ in range(60))}:
        (saved / name).write_bytes(raw[:length])
        words = refused_or_same(saved)
        if name == WEIGHTS:
            assert f"was cut short, its checksum differs: it has {length} bytes" in words
        else:
            assert "is damaged" in words or (words is None and not raw[length:].strip())


def test_bytes_at_random_are_refused(saved):
    rng = random.Random(0)
    for name in (MANIFEST, WEIGHTS):
        raw = (saved / name).read_bytes()
        for _ in range(100):
            at, length = rng.randrange(len(raw)), rng.randrange(1, 40)
            (saved / name).write_bytes(raw[:at] + rng.randbytes(length) + raw[at + rng.randrange(40) :])
            refused_or_same(saved)
        (saved / name).write_bytes(raw)
    assert refused_or_same(saved) is None


def test_how_the_manifest_is_spaced_and_ordered_is_all_one(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    backwards = dict(reversed(manifest.items()))
    for text in (json.dumps(manifest), json.dumps(backwards, indent=4), "\ufeff" + json.dumps(manifest)):
        (saved / MANIFEST).write_text(text, encoding="utf-8")
        assert refused_or_same(saved) is None


def test_a_manifest_from_before_there_were_checksums_is_read(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    for key in ("checksum", "weights", "bytes", "versions", "input_shape"):
        del manifest[key]
    manifest["format_version"] = 1
    (saved / MANIFEST).write_text(json.dumps(manifest))
    assert refused_or_same(saved) is None
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-1])
    assert "checksum differs" in refused_or_same(saved)


def test_a_checksum_that_is_gone_is_missed(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["checksum"]
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="'checksum' is missing"):
        tnc.load(saved, Net)


def test_the_weights_of_another_model_are_refused(saved, tmp_path):
    tnc.save(net(1), tmp_path / "same_size")
    tnc.save(net(0, width=9), tmp_path / "larger")
    tnc.save(net(0, width=4), tmp_path / "smaller")
    for other, words in {
        "same_size": "holds another model's weights: its checksum differs",
        "larger": "is not the file saved here, its checksum differs",
        "smaller": "is not the file saved here, its checksum differs",
    }.items():
        shutil.copy(tmp_path / other / WEIGHTS, saved / WEIGHTS)
        with pytest.raises(ValueError, match=words) as caught:
            tnc.load(saved, Net)
        one_line(caught.value)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_folder_that_is_replaced_while_it_is_read_is_no_mixture(saved, monkeypatch, when):
    real, done = tncompress.export.check_weights, []

    def check_weights(folder, manifest):
        made = real(folder, manifest) if when == "after" else None
        if not done:
            tnc.save(net(1), saved, overwrite=True)
        done.append(manifest)
        return made or real(folder, manifest)

    monkeypatch.setattr("tncompress.export.check_weights", check_weights)
    loaded = tnc.load(saved, Net)
    assert len(done) == 2
    assert same(loaded, net(1))
    assert loaded.tncompress_plan == net(1).tncompress_plan != net(0).tncompress_plan


class Other(nn.Module):
    """Another network: it has a ``stem`` and a ``block``, but of other kinds."""

    def __init__(self, stem, block):
        super().__init__()
        self.stem, self.block = stem, block


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 6, 3)), r"3 of its 3 compressed layers are not there \('stem', "),
        (lambda: Other(nn.Conv2d(1, 6, 3), nn.ReLU()), r"2 of its 3 .* \('block.0', 'head'\)"),
        (lambda: Net(7), r"layer 'stem' was saved for .*out_channels=6.*, there it is .*out_channels=7"),
        (lambda: swapped(stem=nn.Conv2d(1, 6, 3, stride=2)), r"layer 'stem' was saved for .* there it is"),
        (lambda: swapped(stem=nn.ReLU()), r"layer 'stem' was saved for .* there it is a ReLU"),
        (lambda: swapped(block=nn.Sequential(nn.Sequential(), nn.ReLU())), "'block.0' .* a Sequential"),
        (lambda: swapped(head=nn.Linear(5, 4, bias=False)), "layer 'head' has a bias on one side only"),
        (lambda: swapped(more=nn.Linear(5, 4)), "2 keys missing"),
    ],
)
def test_a_folder_of_another_architecture_is_refused(saved, model, words):
    with pytest.raises(ValueError, match="does not fit .*" + words) as caught:
        tnc.load(saved, model)
    one_line(caught.value)


def test_a_compressed_model_serves_as_the_architecture(saved):
    assert refused_or_same(saved, net(1)) is None


def swapped(**children):
    model = Net()
    for name, child in children.items():
        setattr(model, name, child)
    return model


def test_nothing_is_replaced_where_one_layer_does_not_fit(saved):
    model = swapped(head=nn.Linear(5, 3))
    with pytest.raises(ValueError, match="layer 'head' was saved for"):
        tnc.load(saved, lambda: model)
    assert isinstance(model.stem, nn.Conv2d)
    assert isinstance(model.head, nn.Linear)


def test_a_layer_name_that_is_a_block_is_refused(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    for names, words in {
        ("block",): "layer 'block' was saved for .* there it is a Sequential",
        ("",): "layer '' was saved for .* there it is a Net",
        ("stem", "stem"): "names a layer twice",
        ("stem.weight",): r"1 of its 3 compressed layers are not there \('stem.weight'\)",
        ("__class__",): "are not there",
    }.items():
        first = manifest["layers"][0] | {"names": list(names)}
        write_sealed(saved, manifest | {"layers": [first, *manifest["layers"][1:]]})
        with pytest.raises(ValueError, match=words):
            tnc.load(saved, Net)


def test_a_single_layer_is_not_saved_as_if_it_could_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"put a single one in nn\.Sequential"):
        tnc.save(net().stem, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_newer_version_says_what_to_do(saved):
    reseal(saved, format_version=3)
    with pytest.raises(ValueError, match=r"format version 3, and this release reads 1 to 2: .* upgrade") as e:
        tnc.load(saved, Net)
    one_line(e.value)
    for odd in (0, "1", 1.5, None, True, [1]):
        reseal(saved, format_version=odd)
        with pytest.raises(ValueError, match="wanted 1 to 2: it is damaged"):
            tnc.load(saved, Net)


# --- paths that leave the folder ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/model.safetensors", "..", ".", "",
        "sub\\model.safetensors", "C:model.safetensors", "~/x.safetensors", "model.pt", ".safetensors",
        "m\nx.safetensors", "m\0.safetensors", "\ud800.safetensors",
    ],
)  # fmt: skip
def test_a_path_that_leaves_the_folder_is_refused(saved, name):
    shutil.copy(saved / WEIGHTS, saved.parent / "other.safetensors")
    reseal(saved, weights=name, sha256=json.loads((saved / MANIFEST).read_text())["sha256"])
    with pytest.raises(ValueError, match="wanted the plain name of a file in its own folder") as caught:
        tnc.load(saved, Net)
    one_line(caught.value)


def test_weights_may_have_another_plain_name(saved):
    (saved / WEIGHTS).rename(saved / "other.safetensors")
    reseal(saved, weights="other.safetensors")
    assert refused_or_same(saved) is None


def test_links_into_a_cache_are_followed_and_checked(saved, tmp_path):
    (tmp_path / "blobs").mkdir()
    for name in (WEIGHTS, MANIFEST):
        (saved / name).rename(tmp_path / "blobs" / name)
        (saved / name).symlink_to(f"../blobs/{name}")
    assert refused_or_same(saved) is None
    (tmp_path / "blobs" / WEIGHTS).write_bytes(b"secret")
    assert "was cut short" in refused_or_same(saved)


def test_where_the_dense_weights_lie_is_never_opened(saved):
    reseal(saved, dense_weights="/proc/self/mem")
    assert refused_or_same(saved) is None


# --- pickled code -------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["0", "1", "2", "4", "5", "torch.save", "torch.save, old"])
def test_pickled_code_is_told_and_never_run(saved, tmp_path, kind):
    bomb, path = Bomb(tmp_path / "ran"), saved / WEIGHTS
    if kind.isdigit():
        path.write_bytes(pickle.dumps(bomb, protocol=int(kind)))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=kind == "torch.save")
    words = "a file of torch.save" if kind == "torch.save" else "a pickle"
    for seal in (lambda: None, lambda: reseal(saved)):
        seal()
        with pytest.raises(ValueError, match=f"is in truth {words}, which could run any code") as caught:
            tnc.load(saved, Net)
        one_line(caught.value)
    with pytest.raises(ValueError, match="which could run any code"):
        load_weights(net(), path)
    shutil.copy(path, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"could run any code|is damaged, or no file of"):
        load_weights(net(), tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_no_safetensors_file_is_taken_for_a_pickle(tmp_path):
    """A header of 640 bytes begins like a pickle of protocol 2, one of 0x4b50 like a zip."""
    for size in (0x280, 0x580, 0x4B50, 0x28, 0x63):
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        header += b" " * (size - len(header)) if size > len(header) else b""
        (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
        model = nn.Module()
        model.a = nn.Parameter(torch.ones(1))
        load_weights(model, tmp_path / "w.safetensors")
        assert float(model.a.detach()) == 0.0


# --- hostile JSON -------------------------------------------------------------------------------------------

HOSTILE = {
    "nothing": "",
    "deep lists": "[" * 100_000,
    "deep lists that end": "[" * 900 + "]" * 900,
    "deep mappings": '{"a":' * 100_000,
    "many digits": '{"format_version": ' + "9" * 5000 + "}",
    "a large number": '{"format_version": ' + "9" * 500 + "}",
    "not a number": '{"format_version": NaN}',
    "infinity": '{"format_version": Infinity}',
    "a key twice": '{"format_version": 1, "format_version": 1}',
    "a surrogate": '{"format_version": "\\ud800"}',
    "a key of surrogates": '{"format_version": 1, "\\ud800\\n\\u001b[31m": 1}',
    "a list": "[1]",
    "null": "null",
    "bytes": b"\xff\xfe\x00",
    "utf-16": '{"format_version": 1}'.encode("utf-16"),
    "two values": "{} {}",
    "zeros": b"\0" * 1000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_one_line_everywhere(saved, kind):
    text = HOSTILE[kind]
    raw = text if isinstance(text, bytes) else text.encode()
    readers = [(saved / MANIFEST, lambda path: tnc.load(path.parent, Net))]
    readers += [(saved / "plan.json", Plan.load)]
    readers += [(saved / f"spec{suffix}", Spec.parse) for suffix in (".json", ".yaml", ".toml")]
    for path, read in readers:
        path.write_bytes(raw)
        if path.suffix == ".toml" and kind == "nothing":
            assert read(path) == Spec()
            continue
        with pytest.raises(ValueError, match=path.name) as caught:
            read(path)
        assert len(one_line(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"version": 1, "version": 1}', "the key 'version' is there twice"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' is there twice"),
        ('{"version": NaN}', "NaN is no number in JSON"),
        ('{"version": -Infinity}', "-Infinity is no number in JSON"),
        ('{"version": 1' + "0" * 200 + "}", "a whole number of more than 512 bits"),
    ],
)
def test_json_is_strict(saved, text, words):
    for path, read in (
        (saved / MANIFEST, lambda path: tnc.load(path.parent, Net)),
        (saved / "plan.json", Plan.load),
        (saved / "spec.json", Spec.parse),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read(path)


@pytest.mark.parametrize("depth", [70, 200, 100_000])
def test_depth_is_told(saved, depth):
    (saved / MANIFEST).write_text("[" * depth + "]" * depth)
    (saved / "plan.json").write_text('{"a":' * depth + "1" + "}" * depth)
    (saved / "spec.yaml").write_text("[" * min(depth, 5000) + "]" * min(depth, 5000))
    (saved / "spec.toml").write_text("a = " + "[" * depth + "]" * depth)
    for read in (
        lambda: tnc.load(saved, Net),
        lambda: Plan.load(saved / "plan.json"),
        lambda: Spec.parse(saved / "spec.yaml"),
        lambda: Spec.parse(saved / "spec.toml"),
    ):
        with pytest.raises(ValueError, match="nested deeper than 64 levels"):
            read()


def test_a_file_without_end_is_not_read(tmp_path):
    for name in ("plan.json", "spec.yaml"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
    for read in (lambda: Plan.load(tmp_path / "plan.json"), lambda: Spec.parse(tmp_path / "spec.yaml")):
        with pytest.raises(ValueError, match=f"is larger than {MAX_BYTES >> 20} MiB"):
            read()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 10**12, 2**63, 2**64, 10**100])
    | st.floats()
    | st.text(st.characters(), max_size=6)
    | st.sampled_from(["stem", "head", "zoo:cnn4", "zoo:resnet20", "svd", "mps", "cp", "zeros", "a\nb"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, here=()):
    """Yield the path of keys to every value within ``value``."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*here, key))


def replaced(value, place, new):
    if not place:
        return new
    made = value.copy()
    made[place[0]] = replaced(value[place[0]], place[1:], new)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "m"
    tnc.save(net(), path)
    return path


@pytest.fixture(scope="module")
def manifest(folder):
    return json.loads((folder / MANIFEST).read_text())


@pytest.fixture
def little_memory():
    """Let no tensor of absurd size be asked for: memory that is only promised would go unnoticed."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def loads_or_one_line(folder, model):
    try:
        loaded = tnc.load(folder, model)
    except (ValueError, OSError) as error:
        return one_line(error)
    loaded(torch.randn(1, 1, 8, 8))
    repr(loaded)
    str(getattr(loaded, "tncompress_plan", None))
    return None


@settings(ANY, max_examples=500)
@given(data=st.data(), new=json_values)
def test_any_value_in_a_sealed_manifest_is_a_model_or_one_line(folder, manifest, little_memory, data, new):
    place = data.draw(st.sampled_from(list(places(manifest))[1:]))
    write_sealed(folder, replaced(manifest, place, new))
    loads_or_one_line(folder, Net)


@pytest.mark.parametrize("value", [0, -1, 1.0, 10**12, 2**63, 10**30, "3", None, True, [], {}, [10**12] * 2])
def test_every_place_of_a_sealed_manifest_withstands(folder, manifest, little_memory, value):
    for place in list(places(manifest))[1:]:
        write_sealed(folder, replaced(manifest, place, value))
        loads_or_one_line(folder, Net)


@pytest.mark.parametrize("change", ["more", "less"])
def test_a_key_too_many_or_too_few_is_a_model_or_one_line(folder, manifest, change):
    for place in list(places(manifest)):
        found = manifest
        for key in place:
            found = found[key]
        if change == "more" and isinstance(found, dict):
            made = [{**found, "new\n": 1}]
        elif change == "less" and isinstance(found, dict | list):
            kept = [[k for k in range(len(found)) if k != gone] for gone in range(len(found))]
            items = list(found.items()) if isinstance(found, dict) else found
            made = [type(found)([items[k] for k in some]) for some in kept]
        else:
            continue
        for new in made:
            write_sealed(folder, replaced(manifest, place, new))
            loads_or_one_line(folder, Net)


LARGE = "numbers is far too large for [0-9]+ bytes of weights"


@pytest.mark.parametrize(
    "source",
    [
        {"source": "zoo:cnn4", "num_classes": 10**6},
        {"source": "zoo:cnn4", "num_classes": 10**12},
        {"source": "zoo:cnn4", "in_channels": 10**8},
        {"source": "torchvision:vit_h_14"},
        {"source": "torchvision:regnet_x_400mf", "num_classes": 10**6},
    ],
    ids=str,
)
def test_no_model_is_built_that_the_weights_could_not_fill(folder, manifest, little_memory, source):
    write_sealed(folder, manifest | {"source": source})
    with pytest.raises(ValueError, match=LARGE) as caught:
        tnc.load(folder)
    one_line(caught.value)
    with pytest.raises(ValueError, match=LARGE):
        tnc.load(folder, source["source"])


@pytest.mark.parametrize(
    "source",
    [
        {"source": "zoo:cnn4", "num_classes": 10**30},
        {"source": "zoo:cnn4", "num_classes": "10"},
        {"source": "zoo:cnn4", "weights": "DEFAULT"},
        {"source": "zoo:\nno"},
        {"source": "zoo:"},
        {"source": ["zoo:cnn4"]},
        {},
    ],
    ids=str,
)
def test_a_recorded_source_builds_nothing_absurd(folder, manifest, little_memory, source):
    write_sealed(folder, manifest | {"source": source})
    with pytest.raises(ValueError, match=r"needs another model=: building|is damaged") as caught:
        tnc.load(folder)
    one_line(caught.value)


def test_any_bytes_in_sealed_weights_are_a_model_or_one_line(saved, little_memory):
    raw, rng = (saved / WEIGHTS).read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    for number in range(300):
        at = rng.randrange(8 if number % 3 == 0 else header)
        (saved / WEIGHTS).write_bytes(raw[:at] + rng.randbytes(1) + raw[at + rng.randrange(2) :])
        reseal(saved)
        loads_or_one_line(saved, Net)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64", "BOOL", "NO"])
def test_weights_of_a_hostile_header_are_a_model_or_one_line(saved, little_memory, dtype):
    for shape, name in (([10**12], "a"), ([2**40, 2**40], "a"), ([8], "stem.bias\n\x1b[31m"), ([0], "")):
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}
        header = json.dumps({name: entry}).encode()
        (saved / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        reseal(saved)
        assert loads_or_one_line(saved, Net)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    for source in ({"num_classes": 3}, {"source": "zoo:cnn4", "num_classes": "3"}):
        with pytest.raises(ValueError, match=r"can't be saved: .*source") as caught:
            tnc.save(net(), tmp_path / "m", source=source)
        one_line(caught.value)
    model = net()
    model.stem.rel_error = float("nan")
    with pytest.raises(ValueError, match=r"can't be saved: layers\.0\.rel_error"):
        tnc.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


# --- hostile plans, specs and configs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, (3, 2), padding="same"), nn.Linear(8, 4))
    return tnc.make_plan(model, {"default": {"format": "mps", "rank": {"params_ratio": 0.5}}})


def is_a_plan_or_one_line(make):
    try:
        found = make()
    except (ValueError, OSError) as error:
        return one_line(error)
    assert isinstance(str(found), str)
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    return None


@settings(ANY, max_examples=500)
@given(data=st.data(), new=json_values)
def test_any_value_in_a_plan_is_a_plan_or_one_line(plan, data, new):
    fields = json.loads(json.dumps(plan.to_dict()))
    place = data.draw(st.sampled_from(list(places(fields))))
    is_a_plan_or_one_line(lambda: Plan.from_dict(replaced(fields, place, new)))


@ANY
@given(st.text() | json_values.map(json.dumps))
@example('{"version": 2}')
@example('{"version": 1e400}')
def test_any_text_is_a_plan_or_one_line(tmp_path, text):
    (tmp_path / "plan.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    words = is_a_plan_or_one_line(lambda: Plan.load(tmp_path / "plan.json"))
    assert words is not None
    assert "plan.json" in words


def test_a_newer_plan_says_what_to_do(plan):
    with pytest.raises(ValueError, match="version 2, this release reads 1: upgrade"):
        Plan.from_dict(plan.to_dict() | {"version": 2})


def test_a_plan_whose_order_is_not_its_layers_is_refused(plan):
    fields = plan.to_dict()
    for order in ([], fields["order"][1:], [*fields["order"], "0"], [*fields["order"][1:], "x"]):
        with pytest.raises(ValueError, match="does not name each of its layers once"):
            Plan.from_dict(fields | {"order": order})


def test_an_error_that_is_no_number_and_an_unknown_key_are_no_plan(plan):
    fields = json.loads(json.dumps(plan.to_dict()))
    for place, new, words in (
        (("compressed", 0, "rel_error"), float("nan"), r"compressed\.0\.rel_error: .* finite"),
        (("compressed", 0, "more"), 1, r"compressed\.0\.more: unexpected"),
        (("skipped", 0, "more"), 1, r"skipped\.0\.more: unexpected"),
        (("more",), 1, "unknown key 'more'; the keys there are version, spec"),
    ):
        with pytest.raises(ValueError, match=words):
            Plan.from_dict(added(fields, place, new))


def added(value, place, new):
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    return replaced(value, place[:-1], {**inner, place[-1]: new})


def test_a_spec_in_a_plan_is_no_path(plan, tmp_path):
    Spec().save(tmp_path / "spec.json")
    with pytest.raises(ValueError, match="spec: input should be a valid dictionary"):
        Plan.from_dict(plan.to_dict() | {"spec": str(tmp_path / "spec.json")})


BOMBS = {
    "aliases": "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "aliases in a rank": "default: {rank: {fixed: &b [&a [1,1,1,1,1,1,1,1,1,1],*a,*a,*a,*a,*a,*a,*a,*a]}}\n"
    + "rules:\n"
    + "".join(f"- &c{i} [{','.join([f'*c{i - 1}' if i else '*b'] * 9)}]\n" for i in range(12)),
    "merged keys": "a0: &a0 {x: 1, y: 2}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
    "cycles": "".join(f"a{i}: &a{i} []\n" for i in range(3))
    + "default: &r {rank: [*r, *r, *r, *r, *r, *r, *r, *r, *r]}",
    "depth": "a: " + "{a: " * 400 + "}" * 400,
    "a long number": "version: 0x" + "f" * 5000,
    "a key twice": "keep_dense: []\nkeep_dense: [stem]",
    "an object": "!!python/object/apply:os.system [touch ran]",
    "a tuple": "keep_dense: !!python/tuple [a]",
    "a name": "version: !!python/name:os.system",
    "binary": "version: !!binary /w==",
    "two documents": "a: 1\n---\nb: 2",
    "a repeated group": 'rules: [{pattern: "re:a{99999999999999999999}"}]',
    "deep groups": "rules: [{pattern: 're:" + "(" * 5000 + "'}]",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_yaml_bomb_is_one_line(tmp_path, monkeypatch, little_memory, kind):
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(BOMBS[kind])
    with pytest.raises(ValueError, match=r"spec\.yaml") as caught:
        Spec.parse("spec.yaml")
    assert len(one_line(caught.value)) < 1000
    assert not Path("ran").exists()


def test_aliases_and_merged_keys_still_serve(tmp_path):
    (tmp_path / "spec.yaml").write_text(
        "default: &d {format: svd, rank: {energy: 0.9}, min_rank: 2}\n"
        "rules:\n- {<<: *d, pattern: a, min_rank: 3}\n- {<<: *d, pattern: b}\n"
    )
    spec = Spec.parse(tmp_path / "spec.yaml")
    assert [rule.min_rank for rule in spec.rules] == [3, 2]


@ANY
@given(json_values)
def test_any_config_is_a_config_or_one_line(tmp_path, value):
    for suffix, write in ((".json", json.dumps), (".yaml", yaml.safe_dump)):
        path = tmp_path / f"config{suffix}"
        path.write_text(write(value))
        try:
            fields = read_settings(path, "config")
            tnc.FinetuneConfig.parse(fields if isinstance(fields, dict) else {"lr": fields})
        except ValueError as error:
            one_line(error)
