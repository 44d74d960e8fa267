"""The file ``tncompress.json`` beside saved weights: what is written, and what is believed when it is read.

It holds a checksum of the weights and one of itself. They tell damage, not malice: whoever writes a file can
write its checksum. So nothing in it is run or allocated before it is compared with the model and the weights.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from tncompress.geometry import ConvGeometry
from tncompress.plan import Names
from tncompress.spec import explain
from tncompress.storage import restore
from tncompress.textfiles import one_line, parse_json, read_text
from tncompress.weights import refuse_pickle

FORMAT_VERSION, OLDEST = 2, 1
"""What is written, and the oldest that is still read; ``tests/files`` has a folder of each."""
MANIFEST, WEIGHTS = "tncompress.json", "model.safetensors"
LIBRARIES = ("tncompress", "torch", "numpy", "safetensors")
_AGAIN = "copy the whole folder again, or save the model again"


class _Source(BaseModel):
    """The arguments of ``build_model``."""

    model_config = ConfigDict(extra="allow")

    source: StrictStr
    num_classes: StrictInt | None = Field(None, ge=1)
    in_channels: StrictInt | None = Field(None, ge=1)


class _Layer(BaseModel):
    """One compressed layer, under all its names."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    names: Names
    format: StrictStr | dict[str, Any]
    ranks: tuple[StrictInt, ...]
    geometry: ConvGeometry
    bias: StrictBool
    rel_error: float | None


class _Manifest(BaseModel):
    """The keys of format version 2. Version 1 has neither ``input_shape`` nor ``versions``.

    Its first files have none of ``weights``, ``bytes`` and ``checksum`` either.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format_version: StrictInt
    class_: StrictStr | None = Field(None, alias="class")
    source: _Source | None
    dense_weights: StrictStr | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    layers: tuple[_Layer, ...]
    plan: dict[str, Any] | None
    input_shape: Annotated[tuple[Annotated[StrictInt, Field(ge=1)], ...], Field(min_length=1)] | None = None
    versions: dict[str, StrictStr] = Field({}, max_length=64)
    weights: StrictStr = WEIGHTS
    bytes: StrictInt | None = None
    checksum: StrictStr | None = None


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``fields`` and what tells whether the weights and the manifest are whole; return all of it.

    What could not be read again is a ``ValueError`` now.
    """
    weights = folder / WEIGHTS
    manifest = {
        "format_version": FORMAT_VERSION,
        **fields,
        "versions": library_versions(),
        "weights": WEIGHTS,
        "bytes": weights.stat().st_size,
        "sha256": sha256_of(weights),
    }
    manifest["checksum"] = checksum(manifest)
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise ValueError(f"this model can't be saved: {explain(error, _Manifest)}") from None
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return what ``tncompress.json`` in ``directory`` says; errors are one line."""
    path = Path(directory).expanduser() / MANIFEST
    restore(path.parent)
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no saved model ({MANIFEST} is missing)")
    try:
        manifest = parse_json(read_text(path, "manifest"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}; {_AGAIN}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is damaged: wanted a mapping, got a {type(manifest).__name__}; {_AGAIN}")
    if "checksum" in manifest and manifest["checksum"] != checksum(manifest):
        raise ValueError(f"{path} is damaged or was edited (its checksum differs); {_AGAIN}")
    _check_version(path, manifest.get("format_version"))
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {explain(error, _Manifest)}; {_AGAIN}") from None
    first = manifest["format_version"] == OLDEST and {"weights", "bytes"}.isdisjoint(manifest)
    if "checksum" not in manifest and not first:
        raise ValueError(f"{path} is damaged: 'checksum' is missing; {_AGAIN}")
    return manifest


def check_weights(folder: Path, manifest: Mapping[str, Any], *, read: bool = True) -> Path:
    """Return the path of the weights that ``manifest`` was saved with, or say what is there in their place.

    A link to a file elsewhere is followed, as the caches of model hubs have it: its checksum is what counts.
    It takes reading the file once; without ``read`` only the file's size is compared.
    """
    name = manifest.get("weights", WEIGHTS)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", name):
        raise ValueError(
            f"{folder / MANIFEST} names its weights {one_line(repr(name))}: wanted the plain name of a file "
            f"in its own folder, such as {WEIGHTS}; a path that may leave the folder is not followed"
        )
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole folder, or save the model again")
    refuse_pickle(path)
    found, wanted = path.stat().st_size, manifest.get("bytes")
    if wanted is not None and found != wanted:
        how = "was cut short" if found < wanted and not _is_whole(path) else "is not the file saved here"
        raise ValueError(
            f"{path} {how}, its checksum differs: it has {found} bytes, wanted {wanted}; {_AGAIN}"
        )
    if read and sha256_of(path) != manifest["sha256"]:
        raise ValueError(
            f"{path} is damaged, or holds another model's weights: its checksum differs from that of the "
            f"file saved here; {_AGAIN}"
        )
    return path


def checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all keys but ``checksum``: the same however the text is spaced or ordered."""
    others = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_version(path: Path, found: Any) -> None:
    if type(found) is int and OLDEST <= found <= FORMAT_VERSION:
        return
    reads = f"{OLDEST} to {FORMAT_VERSION}"
    if type(found) is int and found > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {found}, and this release reads {reads}: it was saved by "
            "a newer tncompress; upgrade (pip install --upgrade tncompress)"
        )
    raise ValueError(
        f"{path} has format version {one_line(repr(found))}, wanted {reads}: it is damaged, or "
        f"no file of tncompress; {_AGAIN}"
    )


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result rests on, as far as known."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            continue
    return found


def _is_whole(path: Path) -> bool:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt"):
            return True
    except Exception:  # whatever it stumbles over, it is not whole
        return False
