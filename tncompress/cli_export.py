"""The commands that take a saved model elsewhere, and that say what is in one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.export import read_manifest
from tncompress.targets import TARGETS, Wanted, export_to, target_of


class Int8(StrEnum):
    """How int8 gets the ranges of activations."""

    dynamic = "dynamic"
    static = "static"


@cli.guarded
def export(
    folder: cli.FolderArgument,
    to: Annotated[
        str, typer.Option("--to", help="; ".join(f"{name}: {t.what}" for name, t in TARGETS.items()) + ".")
    ] = "onnx",
    model: cli.ModelForFolder = None,
    data: cli.MaybeDataOption = None,
    input_shape: cli.InputOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; default: one in the folder, named by its kind.")
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="onnx: merge neighbouring cores where that takes less time.")
    ] = False,
    fold_batchnorm: Annotated[
        bool, typer.Option("--fold-batchnorm", help="onnx: BatchNorm as part of the convolution before it.")
    ] = False,
    int8: Annotated[
        Int8 | None, typer.Option("--int8", help="onnx: quantized; static takes its ranges from --data.")
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="torch-export: images of any size.")
    ] = False,
    data_dir: cli.DataDirOption = None,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Write a compressed model for other programs, and check what was written against the model.

    What runs takes batches of any size. The input that it is traced with has the shape that the folder
    records, unless --input-shape or --data say another.

    Example: `tncompress export tuned --to onnx --fused --fold-batchnorm`
    """
    target, images = target_of(to), cli.open_data(data, data_dir)
    if int8 is Int8.static and images is None:
        raise ValueError("--int8 static takes the ranges of activations from images: name them with --data")
    small = tnc.load(folder, model)
    recorded = read_manifest(folder).get("input_shape")
    if input_shape is None and images is None and recorded:
        input_shape = "x".join(map(str, recorded))
    batches = images.calibration_loader(256) if images is not None else None
    wanted = Wanted(
        small,
        out or folder / target.file,
        cli.example_for(small, input_shape, images),
        overwrite=overwrite,
        fused=fused,
        fold_batchnorm=fold_batchnorm,
        dynamic_size=dynamic_size,
        int8=int8.value if int8 else None,
        batches=batches,
    )
    cli.show(export_to(to, wanted), as_json=as_json)


@cli.guarded
def info(
    folder: cli.FolderArgument,
    check: Annotated[
        bool, typer.Option("--check", help="Also read the weights once, and compare their checksum.")
    ] = False,
    as_json: cli.JsonOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Say what is in a saved model, without loading its weights.

    Example: `tncompress info tuned`
    """
    found = tnc.read_saved(folder, check=check)
    cli.show(found, as_json=as_json)
    if check:
        cli.say("the checksum of the weights is right")
