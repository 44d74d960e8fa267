"""A compressed model on disk: a folder of its own, and ONNX."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.discovery import eval_mode, find_layers
from tncompress.formats import make_format
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.plan import Plan
from tncompress.storage import new_directory, new_file
from tncompress.surgery import replace_module_
from tncompress.weights import load_weights, save_weights
from tncompress.zoo import build_model

FORMAT_VERSION = 1
MANIFEST, WEIGHTS = "tncompress.json", "model.safetensors"
SAFE_SOURCES = ("zoo:", "torchvision:")


def save(
    small: nn.Module,
    directory: str | Path,
    *,
    source: Mapping[str, Any] | None = None,
    dense_weights: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``small`` to a new ``directory``: ``model.safetensors`` and ``tncompress.json``.

    ``source`` says how the dense model is built: the arguments of :func:`tncompress.build_model`, such as
    ``{"source": "zoo:cnn4", "num_classes": 10}``, with which :func:`load` needs no model; ``dense_weights``
    where its weights lie, for a later comparison. The folder appears whole or not at all; one that exists is
    refused, or replaced with ``overwrite`` if it holds a saved model.
    """
    with new_directory(directory, marker=MANIFEST, overwrite=overwrite) as folder:
        save_weights(small, folder / WEIGHTS)
        plan = getattr(small, "tncompress_plan", None)
        manifest = {
            "format_version": FORMAT_VERSION,
            "class": type(small).__name__,
            "source": dict(source) if source else None,
            "dense_weights": str(Path(dense_weights).expanduser().resolve()) if dense_weights else None,
            "sha256": _sha256(folder / WEIGHTS),
            "layers": [
                _describe(layer.names, layer.module)
                for layer in find_layers(small)
                if isinstance(layer.module, TNConv)
            ],
            "plan": plan.to_dict() if plan is not None else None,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def load(directory: str | Path, model: nn.Module | Callable[[], nn.Module] | str | None = None) -> nn.Module:
    """Return the model that :func:`save` wrote to ``directory``, in eval mode on the CPU.

    ``model`` is the dense architecture: a module (which is copied), a function that returns one, or a name
    for :func:`tncompress.build_model`. It can be left out for a model whose recorded source is in the zoo or
    in torchvision; a recorded Python file is never run unasked. Damaged files are a ``ValueError``.
    """
    folder = Path(directory).expanduser()
    manifest = read_manifest(folder)
    if _sha256(folder / WEIGHTS) != manifest["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged or not the file that was saved here (checksum differs)"
        )
    target = _architecture(manifest, model, folder)
    try:
        for fields in manifest["layers"]:
            layer = _empty_layer(fields)
            for name in fields["names"]:
                replace_module_(target, name, layer)
        plan = Plan.from_dict(manifest["plan"]) if manifest["plan"] else None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} does not describe a {type(target).__name__}: {' '.join(str(error).split())}"
        ) from None
    _match_dtypes(target, folder / WEIGHTS)
    load_weights(target, folder / WEIGHTS)
    if plan is not None:
        target.tncompress_plan = plan  # type: ignore[assignment]
    return target.eval()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return what ``tncompress.json`` in ``directory`` says; errors are one line."""
    path = Path(directory).expanduser() / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no saved model ({MANIFEST} is missing)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}")
    if missing := {"sha256", "layers", "plan", "source"} - set(manifest):
        raise ValueError(f"{path} is damaged: '{min(missing)}' is missing")
    return manifest


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor,
    *,
    tolerance: float = 1e-4,
    overwrite: bool = True,
) -> float:
    """Write ``model`` as ONNX with a dynamic batch axis; return how far onnxruntime's output is off.

    The file is checked by ``onnx.checker`` and run by onnxruntime on a batch of another size than it was
    traced with. An output that differs by more than ``tolerance``, relative to the largest, is a
    ``ValueError``, and no file is left.
    """
    import onnx

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = example_inputs.to(device)
    traced, other = (torch.cat([example] * 3)[:size] for size in (2, 3))
    batch = torch.export.Dim("batch", min=1)
    with new_file(path, overwrite=overwrite) as fresh, eval_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (traced,),
            str(fresh),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["input"],
            output_names=["output"],
            external_data=False,
            verbose=False,
        )
        onnx.checker.check_model(str(fresh))
        error = _onnx_error(fresh, other, model(other))
        if not error <= tolerance:
            raise ValueError(f"the ONNX model's output is off by {error:.2g}, wanted at most {tolerance:.2g}")
    return error


def _onnx_error(path: Path, x: Tensor, wanted: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    wanted = wanted.cpu()
    return float((torch.from_numpy(output) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


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
        return copy.deepcopy(model)
    if callable(model):
        return model()
    if isinstance(model, str):
        return build_model(**{**(source or {}), "source": model})
    if source is None or not str(source.get("source")).startswith(SAFE_SOURCES):
        recorded = f" (it was {source['source']!r})" if source else ""
        raise ValueError(f"{folder} was saved without a source to build from{recorded}: pass model=")
    return build_model(**source)


def _match_dtypes(target: nn.Module, path: Path) -> None:
    """Give the parameters and buffers of ``target`` the dtypes that they have in the file."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, tensor in target.state_dict(keep_vars=True).items():
        dtype = dtypes.get(stored.get(name, ""))
        if dtype is not None and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
