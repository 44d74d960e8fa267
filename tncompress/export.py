"""A compressed model on disk: a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tncompress.discovery import find_layers, refuse_wrapped
from tncompress.formats import make_format
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    check_weights,
    read_manifest,
    write_manifest,
)
from tncompress.plan import Plan
from tncompress.running import copy_model
from tncompress.saved import measured_in, write_card
from tncompress.storage import new_directory
from tncompress.swap import replace_module_
from tncompress.textfiles import one_line
from tncompress.weights import Unfilled, fill_weights, save_weights
from tncompress.zoo import build_model

__all__ = ["FORMAT_VERSION", "MANIFEST", "WEIGHTS", "load", "read_manifest", "save"]

SAFE_SOURCES = ("zoo:", "torchvision:")
LARGEST_RATIO = 1000
"""No model is built that has more numbers for each byte of its compressed weights."""


def save(
    small: nn.Module,
    directory: str | Path,
    *,
    source: Mapping[str, Any] | None = None,
    dense_weights: str | Path | None = None,
    history: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``small`` to a new ``directory``: ``model.safetensors``, ``tncompress.json`` and ``README.md``.

    ``source`` says how the dense model is built: the arguments of :func:`tncompress.build_model`, such as
    ``{"source": "zoo:cnn4", "num_classes": 10}``, with which :func:`load` needs no model; ``dense_weights``
    where its weights lie, for a later comparison; ``history`` how it was trained, kept as
    ``history.json``; ``input_shape`` that of one input, such as ``(3, 224, 224)``, for later exports. The
    ``README.md`` is for people: what the model is, its sizes, what was measured. The folder appears whole or
    not at all; one that exists is refused, or replaced with ``overwrite`` if it holds a saved model.

    >>> import tempfile, torch, tncompress as tnc
    >>> dense, x = tnc.build_model("zoo:cnn4").eval(), torch.randn(1, 1, 28, 28)
    >>> small = tnc.compress(dense, {"default": {"format": "svd", "rank": {"fixed": 8}}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tnc.save(small, f"{folder}/small", source={"source": "zoo:cnn4"}, input_shape=(1, 28, 28))
    ...     torch.equal(tnc.load(f"{folder}/small")(x), small(x)), tnc.read_saved(f"{folder}/small").model
    (True, 'CNN4')
    """
    refuse_wrapped(small)
    layers = [layer for layer in find_layers(small) if isinstance(layer.module, TNConv)]
    if any("" in layer.names for layer in layers):
        raise ValueError("save wants a model that holds its TNConv layers: put a single one in nn.Sequential")
    plan = getattr(small, "tncompress_plan", None)
    fields = {
        "class": type(small).__name__,
        "source": dict(source) if source else None,
        "dense_weights": str(Path(dense_weights).expanduser().resolve()) if dense_weights else None,
        "layers": [_describe(layer.names, layer.module) for layer in layers],
        "plan": plan.to_dict() if plan is not None else None,
        "input_shape": list(input_shape) if input_shape is not None else None,
    }
    with new_directory(directory, marker=MANIFEST, overwrite=overwrite) as folder:
        save_weights(small, folder / WEIGHTS)
        manifest = write_manifest(folder, fields)
        write_card(folder, Path(directory).name, manifest, measured_in(history))
        if history is not None:
            (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")


def load(directory: str | Path, model: nn.Module | Callable[[], nn.Module] | str | None = None) -> nn.Module:
    """Return the model that :func:`save` wrote to ``directory``, in eval mode on the CPU.

    ``model`` is the dense architecture: a module (which is copied), a function that returns one, or a name
    for :func:`tncompress.build_model`. It can be left out for a model whose recorded source is in the zoo or
    in torchvision; a recorded Python file is never run unasked. Damaged files are a ``ValueError``.
    """
    folder = Path(directory).expanduser()
    while True:  # again, where another process replaced the folder in the middle
        manifest = read_manifest(folder)
        try:
            loaded = _load(folder, manifest, model)
        except (ValueError, OSError):
            if read_manifest(folder) == manifest:
                raise
        else:
            if read_manifest(folder) == manifest:
                return loaded


def _load(folder: Path, manifest: Mapping[str, Any], model: Any) -> nn.Module:
    weights = check_weights(folder, manifest)
    target = _architecture(manifest, model, folder)
    with _in_one_line(f"{folder / MANIFEST} does not describe a {type(target).__name__}"):
        geometries = [ConvGeometry.from_dict(fields["geometry"]) for fields in manifest["layers"]]
    _check_layers(manifest["layers"], geometries, target, folder)
    with _in_one_line(f"{folder / MANIFEST} does not describe a {type(target).__name__}"):
        made = [(fields["names"], _empty_layer(fields)) for fields in manifest["layers"]]
        plan = Plan.from_dict(manifest["plan"]) if manifest["plan"] else None
    for names, layer in made:
        for name in names:
            replace_module_(target, name, layer)
    _match_dtypes(target, weights)
    fill_weights(target, weights)
    if plan is not None:
        target.tncompress_plan = plan  # type: ignore[assignment]
    return target.eval()


def _describe(names: tuple[str, ...], layer: TNConv) -> dict[str, Any]:
    return {
        "names": list(names),
        "format": layer.format.to_dict(),
        "ranks": list(layer.ranks),
        "geometry": layer.geometry.to_dict(),
        "bias": layer.bias is not None,
        "rel_error": layer.rel_error,
    }


def _empty_layer(fields: Mapping[str, Any]) -> TNConv:
    format, geometry = make_format(fields["format"]), ConvGeometry.from_dict(fields["geometry"])
    ranks = format.check_ranks(geometry.kernel_shape, fields["ranks"])
    shapes = format.factor_shapes(geometry.kernel_shape, ranks, geometry.groups)
    factors = [torch.zeros(shape) for shape in shapes]
    bias = torch.zeros(geometry.out_channels) if fields["bias"] else None
    return TNConv(format, geometry, factors, bias, rel_error=fields["rel_error"])


def _architecture(manifest: Mapping[str, Any], model: Any, folder: Path) -> nn.Module:
    """Return a fresh dense model to put the layers in."""
    source = manifest["source"]
    if isinstance(model, nn.Module):
        return copy_model(model)
    if callable(model):
        return model()
    if isinstance(model, str):
        source = {**(source or {}), "source": model}
    elif source is None or not source["source"].startswith(SAFE_SOURCES):
        raise ValueError(f"{folder} {_unbuilt(source)}")
    if not source["source"].startswith(SAFE_SOURCES):
        return build_model(**source)
    stored = (folder / manifest.get("weights", WEIGHTS)).stat().st_size
    with _in_one_line(f"{folder} needs another model=: building {one_line(source)} failed"):
        if (size := _size_of(source)) > LARGEST_RATIO * stored:
            raise ValueError(f"a model of {size} numbers is far too large for {stored} bytes of weights")
        with Unfilled():
            return build_model(**source)


def _unbuilt(source: Mapping[str, Any] | None) -> str:
    """Return why no architecture is built unasked, and what to pass."""
    if source is None:
        return "was saved without a source to build from: pass model= (in a command --model)"
    made = one_line(source["source"])
    return f"was made from {made}, and a file is never run unasked: pass model= (in a command --model {made})"


def _size_of(source: Mapping[str, Any]) -> int:
    """Return how many numbers the model holds, without the memory that they take."""
    counts = [source.get(name) or 0 for name in ("num_classes", "in_channels")]
    try:
        with torch.device("meta"):
            return sum(tensor.numel() for tensor in build_model(**source).state_dict().values())
    except NotImplementedError:  # torchvision's regnets look at their weights
        return LARGEST_RATIO * max(counts)


def _check_layers(
    layers: Sequence[Mapping[str, Any]], geometries: Sequence[ConvGeometry], target: nn.Module, folder: Path
) -> None:
    """Raise ``ValueError`` unless ``target`` has a layer of the same geometry in each place."""
    modules = dict(target.named_modules(remove_duplicate=False))
    names = [name for fields in layers for name in fields["names"]]
    misfit = f"{folder} does not fit {type(target).__name__}"
    if missing := [name for name in names if name not in modules]:
        some = ", ".join(map(repr, missing[:2])) + (", ..." if len(missing) > 2 else "")
        raise ValueError(
            f"{misfit}: {len(missing)} of its {len(names)} compressed layers are not there "
            f"({one_line(some)}); pass the architecture that it was saved from as model="
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{folder / MANIFEST} names a layer twice: save the model again")
    for fields, saved in zip(layers, geometries, strict=True):
        for name in fields["names"]:
            there = _geometry_of(modules[name])
            if repr(saved) != repr(there):  # 1.0 and True are equal to 1, but no stride
                found = there or f"a {type(modules[name]).__name__}"
                raise ValueError(
                    f"{misfit}: layer {name!r} was saved for {one_line(saved)}, there it is {found}"
                )
            if fields["bias"] is not (getattr(modules[name], "bias", None) is not None):
                raise ValueError(f"{misfit}: layer {name!r} has a bias on one side only")


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turn what a wrong value in a manifest can raise into one ``ValueError`` that begins with ``what``."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{what}: {one_line(error)}") from None


def _geometry_of(module: nn.Module) -> ConvGeometry | None:
    if isinstance(module, TNConv):
        return module.geometry
    try:
        return ConvGeometry.of(module)
    except ValueError:
        return None


def _match_dtypes(target: nn.Module, path: Path) -> None:
    """Give the parameters and buffers of ``target`` the dtypes that they have in the file."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({one_line(error)})") from None
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, tensor in target.state_dict(keep_vars=True).items():
        dtype = dtypes.get(stored.get(name, ""))
        if dtype is not None and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
