"""Models on the hub, against a folder that keeps files as the hub does: no network."""

import fnmatch
import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from torch import nn

import tncompress as tnc
from tncompress.export import MANIFEST

SOURCE = {"source": "zoo:cnn4", "num_classes": 10, "in_channels": 1}


class LocalHub:
    """What this library asks of ``HfApi``, on a folder: a commit is a folder, downloads are links to files.

    Every call has to fit the signature of the real method.
    """

    def __init__(self, root: Path):
        self.root = root
        self.calls = []

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def call(*args, **kwargs):
            inspect.signature(getattr(HfApi, name)).bind(self, *args, **kwargs)
            self.calls.append(name)
            return found(*args, **kwargs)

        return call

    def _commits(self, repo_id):
        if not (self.root / repo_id).is_dir():
            raise FileNotFoundError(f"404 Client Error.\n\nRepository Not Found for {repo_id}.")
        return sorted((self.root / repo_id).iterdir(), key=lambda path: int(path.name))

    def create_repo(self, repo_id, private, exist_ok):
        (self.root / repo_id / "0").mkdir(parents=True, exist_ok=exist_ok)

    def file_exists(self, repo_id, filename):
        return (self._commits(repo_id)[-1] / filename).exists()

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns, delete_patterns):
        last = self._commits(repo_id)[-1]
        new = shutil.copytree(last, last.with_name(str(int(last.name) + 1)))
        for path in new.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in delete_patterns or []):
                path.unlink()
        for path in Path(folder_path).iterdir():
            if not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignore_patterns or []):
                shutil.copy(path, new / path.name)

    def snapshot_download(self, repo_id, revision, allow_patterns):
        commits = self._commits(repo_id)
        source = commits[int(revision)] if revision else commits[-1]
        cache = self.root / "cache" / repo_id / source.name
        cache.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not (cache / path.name).exists():
                (cache / path.name).symlink_to(path)
        return str(cache)


@pytest.fixture
def hub(tmp_path):
    return LocalHub(tmp_path / "hub")


def small_model(format="mps"):
    torch.manual_seed(0)
    model = tnc.build_model("zoo:cnn4").eval()
    return tnc.compress(model, {"default": {"format": format, "rank": {"params_ratio": 0.2}}})


def test_a_model_pushed_and_fetched_is_bit_equal(hub):
    small = small_model()
    tnc.push_to_hub(small, "me/small", source=SOURCE, input_shape=(1, 28, 28), api=hub)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(tnc.from_pretrained("me/small", api=hub)(x), small(x))
    files = sorted(path.name for path in (hub.root / "me/small/1").iterdir())
    assert files == ["README.md", "model.safetensors", "tncompress.json"]
    card = (hub.root / "me/small/1/README.md").read_text()
    assert card.startswith("---\nlibrary_name: tncompress\n")
    assert 'model = tnc.from_pretrained("me/small")\n' in card


def test_a_revision_is_what_it_was(hub):
    models = [small_model(format) for format in ("mps", "cp")]
    for model in models:
        tnc.push_to_hub(model, "me/small", source=SOURCE, api=hub)
    x = torch.randn(2, 1, 28, 28)
    for revision, model in zip((None, "1", "2"), (models[1], *models), strict=True):
        assert torch.equal(tnc.from_pretrained("me/small", revision=revision, api=hub)(x), model(x))


def test_what_the_owner_wrote_stays_and_what_is_old_goes(hub):
    tnc.push_to_hub(small_model(), "me/small", source=SOURCE, history={"accuracy": 0.9}, api=hub)
    (hub.root / "me/small/1/README.md").write_text("mine")
    (hub.root / "me/small/1/notes.txt").write_text("mine")
    tnc.push_to_hub(small_model("cp"), "me/small", source=SOURCE, api=hub)
    new = hub.root / "me/small/2"
    assert (new / "README.md").read_text() == (new / "notes.txt").read_text() == "mine"
    assert not (new / "history.json").exists()
    tnc.push_to_hub(small_model("cp"), "me/small", source=SOURCE, replace_card=True, api=hub)
    assert "compressed model" in (hub.root / "me/small/3/README.md").read_text()


def test_no_path_of_this_machine_is_pushed(hub, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    small = tnc.compress(model, {"default": {"format": "svd", "rank": {"fixed": 2}}, "keep_dense": []})
    tnc.push_to_hub(small, "me/own", source={"source": f"{tmp_path}/net.py:make"}, api=hub)
    manifest = (hub.root / "me/own/1" / MANIFEST).read_text()
    assert str(tmp_path) not in manifest
    assert json.loads(manifest)["source"] is None
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(tnc.from_pretrained("me/own", model, api=hub)(x), small.eval()(x))


def test_nothing_but_manifest_and_weights_is_fetched(hub):
    tnc.push_to_hub(small_model(), "me/small", source=SOURCE, api=hub)
    (hub.root / "me/small/1/evil.py").write_text("1 / 0")
    (hub.root / "me/small/1/model.pt").write_text("pickle")
    tnc.from_pretrained("me/small", api=hub)
    fetched = {path.name for path in (hub.root / "cache/me/small/1").iterdir()}
    assert fetched == {"model.safetensors", MANIFEST}


def test_a_damaged_repository_is_refused_as_a_folder_is(hub):
    tnc.push_to_hub(small_model(), "me/small", source=SOURCE, api=hub)
    path = hub.root / "me/small/1/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="checksum differs"):
        tnc.from_pretrained("me/small", api=hub)


def test_errors_are_one_line(hub, monkeypatch):
    with pytest.raises(OSError, match=r"fetching 'me/none' failed: 404 Client Error\. Repository Not") as e:
        tnc.from_pretrained("me/none", api=hub)
    assert "\n" not in str(e.value)
    for name in ("small", "a/b/c", "/x", "../x", "a/"):
        with pytest.raises(ValueError, match="is named 'owner/name', got"):
            tnc.from_pretrained(name, api=hub)
        with pytest.raises(ValueError, match="is named 'owner/name', got"):
            tnc.push_to_hub(small_model(), name, api=hub)
    assert not hub.root.exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'tncompress\[hub\]'"):
        tnc.from_pretrained("me/small")
