"""What a compressed model can be written as, for other programs: one function for each kind of file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from tncompress.cuts import legs_of
from tncompress.discovery import Layer, find_layers
from tncompress.interop import to_tensornetwork, to_tltorch
from tncompress.layers import TNConv
from tncompress.onnx_export import export_onnx, quantize_onnx, run_onnx
from tncompress.packaged import export_aoti
from tncompress.programs import export_program, relative_error
from tncompress.running import copy_model, eval_mode
from tncompress.storage import new_directory, new_file
from tncompress.stripping import strip
from tncompress.surgery import merge

Facts = dict[str, Any]
NETWORKS = "networks.json"


@dataclass(frozen=True)
class Wanted:
    """A model to be written, where, and how; ``example`` is a batch of inputs, where one is known."""

    model: nn.Module
    place: Path
    example: Tensor | None = None
    overwrite: bool = False
    fused: bool = False
    fold_batchnorm: bool = False
    dynamic_size: bool = False
    int8: str | None = None
    batches: Iterable[Any] | None = None

    def agreement(self, other: nn.Module) -> Facts:
        """Return how far the outputs of ``other`` are from the model's, where there is an example."""
        if self.example is None:
            return {}
        with eval_mode(self.model), eval_mode(other):
            return {"relative_difference": relative_error(other(self.example), self.model(self.example))}


@dataclass(frozen=True)
class Target:
    """A kind of file: its usual name, whether it takes an input to make it, and which options it has."""

    write: Callable[[Wanted], Facts]
    file: str
    what: str
    needs_input: bool = False
    options: tuple[str, ...] = ()


def export_to(to: str, wanted: Wanted) -> Facts:
    """Write a model as one of :data:`TARGETS`, and return what there is to say about it."""
    target = target_of(to)
    for option in ("fused", "fold_batchnorm", "dynamic_size", "int8"):
        if getattr(wanted, option) and option not in target.options:
            has = [name for name, other in TARGETS.items() if option in other.options]
            raise ValueError(f"--{option.replace('_', '-')} is for --to {', '.join(has)}, got --to {to}")
    if target.needs_input and wanted.example is None:
        raise ValueError(
            f"--to {to} runs the model, and the folder does not say on what: give the shape of an input "
            "with --input-shape, such as 3x224x224, or --data"
        )
    return {to: str(wanted.place), **target.write(wanted)}


def target_of(to: str) -> Target:
    """Return the target of a name; an unknown one is a ``ValueError``."""
    if to not in TARGETS:
        raise ValueError(f"unknown export format {to!r}; the formats are {', '.join(TARGETS)}")
    return TARGETS[to]


def _onnx(wanted: Wanted) -> Facts:
    assert wanted.example is not None
    how: dict[str, Any] = {"fused": wanted.fused, "fold_batchnorm": wanted.fold_batchnorm}
    if wanted.int8 is None:
        error = export_onnx(wanted.model, wanted.place, wanted.example, **how, overwrite=wanted.overwrite)
        return {"relative_difference": error}
    with new_file(wanted.place, overwrite=wanted.overwrite) as fresh:
        full = fresh.with_name("float.onnx")
        error = export_onnx(wanted.model, full, wanted.example, **how)
        batches = wanted.batches if wanted.int8 == "static" else None
        quantize_onnx(full, fresh, batches, kind=wanted.int8, overwrite=True)  # type: ignore[arg-type]
        found, exact = run_onnx(fresh, wanted.example), run_onnx(full, wanted.example)
        sizes = {"bytes": fresh.stat().st_size, "float_bytes": full.stat().st_size}
    return {"relative_difference": error, "int8_difference": relative_error(found, exact), **sizes}


def _torch_export(wanted: Wanted) -> Facts:
    program = export_program(
        wanted.model,
        wanted.example,
        path=wanted.place,
        dynamic_size=wanted.dynamic_size,
        overwrite=wanted.overwrite,
    )
    return wanted.agreement(_Run(program.module()))


class _Run(nn.Module):
    """An exported program, which has no eval mode of its own to be put in."""

    def __init__(self, run: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "run", run)

    def forward(self, x: Tensor) -> Any:
        return self.run(x)  # type: ignore[operator]


def _aoti(wanted: Wanted) -> Facts:
    error = export_aoti(wanted.model, wanted.place, wanted.example, overwrite=wanted.overwrite)
    return {"relative_difference": error}


def _safetensors(wanted: Wanted) -> Facts:
    """Write factors and all other tensors, and in the header what network each layer is."""
    layers = {
        name: {
            "format": layer.module.format.to_dict(),
            "ranks": list(layer.module.ranks),
            "equation": layer.module.format.equation(layer.module.geometry.kernel_shape),
            "factor_shapes": [list(tensor.shape) for tensor in layer.module.tensors()],
            "geometry": layer.module.geometry.to_dict(),
        }
        for layer in compressed_layers(wanted.model)
        for name in layer.names
    }
    with new_file(wanted.place, overwrite=wanted.overwrite) as fresh:
        save_model(wanted.model, str(fresh), metadata={"tncompress": json.dumps(layers)})
    return {"compressed_layers": len(layers)}


def _strip(wanted: Wanted) -> Facts:
    plain = strip(wanted.model)
    agreement = wanted.agreement(plain)
    with new_file(wanted.place, overwrite=wanted.overwrite) as fresh:
        torch.save(plain, fresh)
    became: Mapping[str, str] = plain.tncompress_strip  # type: ignore[assignment]
    dense = sum("dense:" in words for words in became.values())
    return {**agreement, "chains": len(became) - dense, "dense_again": dense}


def _merged(wanted: Wanted) -> Facts:
    dense = merge(wanted.model)
    agreement = wanted.agreement(dense)
    with new_file(wanted.place, overwrite=wanted.overwrite) as fresh:
        save_model(dense, str(fresh))
    return agreement


def _tensornetwork(wanted: Wanted) -> Facts:
    """Write a folder with a file of connected nodes (HDF5) for each layer and group."""
    import tensornetwork

    copy = copy_model(wanted.model).requires_grad_(False)
    index: dict[str, Any] = {}
    with new_directory(wanted.place, marker=NETWORKS, overwrite=wanted.overwrite) as folder:
        for layer in compressed_layers(copy):
            module, groups = layer.module, layer.module.geometry.groups
            module = module.float() if module.factors[0].itemsize < 4 else module  # HDF5 knows no bfloat16
            files = []
            for group in range(groups):
                nodes, _ = to_tensornetwork(module, group if groups > 1 else None)
                name = re.sub(r"[^\w.-]", "_", layer.name) + (f".{group}" if groups > 1 else "") + ".h5"
                tensornetwork.save_nodes(nodes, str(folder / name))
                files.append(name)
            index[layer.name] = {
                "files": files,
                "format": module.format.to_dict(),
                "ranks": list(module.ranks),
                "dangling_axes": list(legs_of(len(module.geometry.kernel_shape))),
            }
        (folder / NETWORKS).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return {"networks": sum(len(entry["files"]) for entry in index.values())}


def _tltorch(wanted: Wanted) -> Facts:
    """Write a mapping of the layers' names to layers of tltorch, those that it can express."""
    made, refused = dict[str, nn.Module](), list[str]()
    layers = compressed_layers(wanted.model)
    for layer in layers:
        try:
            new = to_tltorch(layer.module)
        except ValueError as error:
            refused.append(f"{layer.name} ({error})")
        else:
            made |= dict.fromkeys(layer.names, new)
    if not made:
        raise ValueError(f"tltorch can express none of the {len(layers)} compressed layers: {refused[0]}")
    with new_file(wanted.place, overwrite=wanted.overwrite) as fresh:
        torch.save(made, fresh)
    return {"layers": len(made), "left_out": refused or "none"}


def compressed_layers(model: nn.Module) -> list[Layer]:
    """Return the tensor-network layers of a model; one without any is a ``ValueError``."""
    found = [layer for layer in find_layers(model) if isinstance(layer.module, TNConv)]
    if not found:
        raise ValueError(f"{type(model).__name__} holds no compressed layer: there is nothing to write")
    return found


TARGETS: dict[str, Target] = {
    "onnx": Target(_onnx, "model.onnx", "for onnxruntime", True, options=("fused", "fold_batchnorm", "int8")),
    "torch-export": Target(
        _torch_export, "model.pt2", "for torch.export.load", True, options=("dynamic_size",)
    ),
    "aoti": Target(_aoti, "model.aoti.pt2", "compiled, for torch's aoti_load_package", True),
    "safetensors": Target(_safetensors, "factors.safetensors", "the factors, and which network they form"),
    "strip": Target(_strip, "stripped.pt", "a pickled model of torch's own layers"),
    "merged": Target(_merged, "dense.safetensors", "weights for the dense architecture"),
    "tensornetwork": Target(_tensornetwork, "tensornetwork", "a folder of nodes in HDF5, one file a layer"),
    "tltorch": Target(_tltorch, "tltorch.pt", "a pickled mapping of names to tltorch's layers"),
}
