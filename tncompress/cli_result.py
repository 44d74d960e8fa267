"""The commands on a compressed model: repair, report."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.export import MANIFEST
from tncompress.measure import evaluate as measure_accuracy
from tncompress.storage import check_writable, new_file


class Solved(StrEnum):
    """Which factors ``repair`` solves for."""

    all = "all"
    last = "last"
    none = "none"


@cli.guarded
def repair(
    folder: cli.FolderArgument,
    data: cli.DataOption,
    out: cli.OutOption,
    model: cli.ModelForFolder = None,
    weights: cli.DenseOption = None,
    images: Annotated[int, typer.Option("--images", min=1, help="How many unlabelled images to use.")] = 1024,
    least_squares: Annotated[
        Solved, typer.Option(help="Factors to solve for, layer by layer: all, last or none.")
    ] = Solved.all,
    bias: Annotated[bool, typer.Option(help="Make mean outputs those of the dense layers.")] = True,
    batchnorm: Annotated[bool, typer.Option(help="Take BatchNorm statistics again.")] = True,
    classifier: Annotated[bool, typer.Option(help="Solve for the last linear layer.")] = True,
    ridge: Annotated[
        float | None, typer.Option(min=0, help="Pull towards the dense kernels; default: by the data.")
    ] = None,
    memory: Annotated[
        float, typer.Option(min=0.001, help="Gigabytes that activations and moments may take.")
    ] = 4.0,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Bring accuracy back without labels or gradients, from a few images.

    Layers are solved one after another, on what the compressed network really feeds them, for the dense
    outputs. Prints what each step brought back.

    Example: `tncompress repair small --data digits --out repaired`
    """
    check_writable(out, marker=MANIFEST, overwrite=overwrite)
    where, loaded = cli.pick_device(device), cli.load_data(data, data_dir=data_dir)
    small, dense, origin = cli.open_folder(folder, model, weights, where)
    before = measure_accuracy(small, loaded.test_loader()).accuracy
    asked: Any = False if least_squares is Solved.none else least_squares.value
    mended: Any = tnc.repair(
        small,
        dense,
        loaded.calibration_loader(images, seed=seed),
        least_squares=asked,
        bias=bias,
        batchnorm=batchnorm,
        classifier=classifier,
        ridge=ridge,
        memory_limit=int(memory * 2**30),
        progress=not as_json,
    )
    after = measure_accuracy(mended, loaded.test_loader()).accuracy
    tnc.save(mended.cpu(), out, **origin, overwrite=overwrite)
    done = {"accuracy_before": before, "accuracy": after, "saved": str(out)}
    if as_json:
        done["repair"] = mended.tncompress_repair.to_dict()
    else:
        cli.show(mended.tncompress_repair, as_json=False)
    cli.show(done, as_json=as_json)


@cli.guarded
def report(
    folder: cli.FolderArgument,
    data: cli.MaybeDataOption = None,
    model: cli.ModelForFolder = None,
    weights: cli.DenseOption = None,
    input_shape: cli.InputOption = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Batch size for cost and latency.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the report: .md or .json.")] = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Put the dense and the compressed model side by side: accuracy, size, cost, latency, memory.

    Example: `tncompress report tuned --data digits --batch 64`
    """
    if out is not None and out.suffix not in (".md", ".json"):
        raise ValueError(f"--out is a file that ends in .md or .json, got {out}")
    images, where = cli.open_data(data, data_dir), cli.pick_device(device)
    small, dense, _ = cli.open_folder(folder, model, weights, where, need_weights=data is not None)
    example = cli.example_for(dense.cpu(), input_shape, images, batch)
    if example is None:
        raise ValueError("give the shape of an input with --input, such as 3x224x224, or --data")
    test = images.test_loader() if images is not None else None
    judge = (lambda m: measure_accuracy(m, test).accuracy) if test is not None else None
    made = tnc.report(dense.to(where), small, example_inputs=example.to(where), evaluate=judge)
    if out is not None:
        with new_file(out, overwrite=overwrite) as fresh:
            fresh.write_text(made.to_markdown() if out.suffix == ".md" else made.to_json())
    cli.show(made, as_json=as_json)
