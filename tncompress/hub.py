"""Saved models on the Hugging Face Hub (an extra): the folder of :func:`tncompress.save` as a repository."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tncompress.export import MANIFEST, SAFE_SOURCES, WEIGHTS, load, save
from tncompress.saved import CARD
from tncompress.textfiles import one_line

HISTORY = "history.json"
HEAD = "---\nlibrary_name: tncompress\ntags:\n- tensor-network\n- model-compression\n---\n\n"


def push_to_hub(
    small: nn.Module,
    repo_id: str,
    *,
    source: Mapping[str, Any] | None = None,
    history: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    private: bool = False,
    message: str = "Save a compressed model",
    replace_card: bool = False,
    api: Any = None,
) -> None:
    """Save ``small`` as the repository ``repo_id`` (``"owner/name"``) of the hub, in one commit.

    ``source``, ``history`` and ``input_shape`` are those of :func:`tncompress.save`; paths on this machine
    are not recorded. The repository is made if there is none, ``private`` if asked. Of one that is there the
    files of this library are replaced, a ``README.md`` only with ``replace_card``; the hub keeps what was.
    ``api`` is an ``HfApi`` with settings of your own (token, endpoint).
    """
    hub = _hub(api)
    _check_name(repo_id)
    known = source if source and str(source.get("source")).startswith(SAFE_SOURCES) else None
    with tempfile.TemporaryDirectory() as place, _one_line(f"pushing to {repo_id!r}"):
        folder = Path(place) / repo_id.rpartition("/")[2]
        save(small, folder, source=known, history=history, input_shape=input_shape)
        card = folder / CARD
        text = card.read_text(encoding="utf-8")
        text = text.replace(f'tnc.load("{folder.name}"', f'tnc.from_pretrained("{repo_id}"')
        card.write_text(HEAD + text, encoding="utf-8")
        hub.create_repo(repo_id=repo_id, private=private, exist_ok=True)
        keep_card = not replace_card and hub.file_exists(repo_id=repo_id, filename=CARD)
        hub.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message=message,
            ignore_patterns=[CARD] if keep_card else None,
            delete_patterns=[MANIFEST, WEIGHTS, HISTORY],
        )


def from_pretrained(
    repo_id: str,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    *,
    revision: str | None = None,
    api: Any = None,
) -> nn.Module:
    """Return the model in the repository ``repo_id`` of the hub, in eval mode on the CPU.

    ``model`` is the dense architecture, as :func:`tncompress.load` takes it; it can be left out where the
    repository records a source in the zoo or in torchvision. ``revision`` is a branch, a tag or a commit.
    Only the manifest and safetensors files are fetched, and checked as any folder is: no code of the
    repository runs. ``api`` is an ``HfApi`` with settings of your own.
    """
    hub = _hub(api)
    _check_name(repo_id)
    with _one_line(f"fetching {repo_id!r}"):
        folder = hub.snapshot_download(
            repo_id=repo_id, revision=revision, allow_patterns=[MANIFEST, "*.safetensors"]
        )
    return load(folder, model)


def _hub(api: Any) -> Any:
    if api is not None:
        return api
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("huggingface_hub is not installed: pip install 'tncompress[hub]'") from error
    return HfApi()


def _check_name(repo_id: str) -> None:
    parts = repo_id.split("/")
    if len(parts) != 2 or not all(parts) or any(part.startswith(".") for part in parts):
        raise ValueError(f"a repository of the hub is named 'owner/name', got {one_line(repr(repo_id))}")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what the hub or the network raise, which may be pages long, into one line."""
    try:
        yield
    except (ValueError, TypeError, FileExistsError):
        raise
    except Exception as error:
        raise ConnectionError(f"{what} failed: {one_line(error)}") from error
