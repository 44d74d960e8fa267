"""The commands on a compressed model: repair, report."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.export import MANIFEST
from tncompress.measure import evaluate as measure_accuracy
from tncompress.recovery_record import read_recovery, recorded_steps
from tncompress.storage import check_writable, new_file

ERROR_IMAGES = 64
"""On how many images the errors of layers' outputs are measured for a report."""


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
    calibration: Annotated[
        Path | None,
        typer.Option(help="Moments of `tncompress calibrate --gradients teacher`: weigh outputs by them."),
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
    """Bring accuracy back without labels or training, from a few images.

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
        calibration=None if calibration is None else tnc.Calibration.load(calibration),
        memory_limit=int(memory * 2**30),
        progress=not as_json,
    )
    after = measure_accuracy(mended, loaded.test_loader()).accuracy
    steps = recorded_steps(folder, ("truncated", before), ("repaired", after), len(loaded.test))
    tnc.save(mended.cpu(), out, **origin, history={"steps": steps}, overwrite=overwrite)
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
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write it as one page that works offline.")
    ] = None,
    spectra: Annotated[
        bool | None,
        typer.Option("--spectra/--no-spectra", help="Spectra of the dense kernels; default: with --html."),
    ] = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Put the dense and the compressed model side by side: accuracy, size, cost, latency, memory, layers.

    Example: `tncompress report tuned --data digits --batch 64 --html report.html`
    """
    if out is not None and out.suffix not in (".md", ".json"):
        raise ValueError(f"--out is a file that ends in .md or .json, got {out}")
    _check_html(html)
    images, where = cli.open_data(data, data_dir), cli.pick_device(device)
    small, dense, origin = cli.open_folder(folder, model, weights, where, need_weights=data is not None)
    example = cli.example_for(dense.cpu(), input_shape, images, batch)
    if example is None:
        raise ValueError("give the shape of an input with --input, such as 3x224x224, or --data")
    trained = origin["dense_weights"] is not None and origin["dense_weights"].exists()
    with ExitStack() as stack:
        files = [
            (path, stack.enter_context(new_file(path, overwrite=overwrite)) if path is not None else None)
            for path in (out, html)
        ]
        taken = trained and (html is not None if spectra is None else spectra)
        made = tnc.report(
            dense.to(where),
            small,
            example_inputs=example.to(where),
            evaluate=(lambda m: measure_accuracy(m, images.test_loader())) if images is not None else None,
            batches=images.calibration_loader(ERROR_IMAGES) if images is not None else None,
            history=read_recovery(folder),
            atlas=tnc.atlas(dense, progress=not as_json) if taken else None,
            source=origin["source"],
        )
        made = _without_errors(made, kernels=not trained, outputs=not trained or images is None)
        for path, fresh in files:
            if path is not None and fresh is not None:
                fresh.write_text(
                    _written(made, path, f"{folder.name}: dense and compressed"), encoding="utf-8"
                )
    cli.show(made, as_json=as_json)
    if not trained:
        cli.say("the dense model's weights are not known (--weights): errors and spectra are left out")
    for path in (out, html):
        if path is not None:
            cli.say(f"written: {path}")


def _written(made: tnc.Report, path: Path, title: str) -> str:
    """Return the report as the kind of text that the file's name ends in."""
    if path.suffix == ".json":
        return made.to_json()
    return made.to_markdown() if path.suffix == ".md" else made.to_html(title)


def _check_html(path: Path | None) -> None:
    """Say now, not after the measurements, what the page lacks."""
    if path is None:
        return
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--html is a file that ends in .html, got {path}")
    if find_spec("plotly") is None:
        raise ValueError("--html needs plotly, which is not there: pip install tncompress[report]")


def _without_errors(made: tnc.Report, *, kernels: bool, outputs: bool) -> tnc.Report:
    """Leave out what was measured against weights, or on inputs, that are not the real ones."""
    blank: Any = {name: None for name, out in (("kernel_error", kernels), ("output_error", outputs)) if out}
    return replace(made, layers=tuple(replace(layer, **blank) for layer in made.layers))
