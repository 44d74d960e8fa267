"""The commands up to a compressed model: calibrate, sensitivity, plan, compress."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.export import MANIFEST
from tncompress.spec import read_settings
from tncompress.storage import check_writable, new_file


class Gradients(StrEnum):
    """Whose cross-entropy ``calibrate`` takes gradients of."""

    none = "none"
    teacher = "teacher"
    labels = "labels"


@cli.guarded
def calibrate(
    model: cli.ModelOption,
    data: cli.DataOption,
    out: Annotated[Path, typer.Option("--out", help="The file, .safetensors.", show_default=False)],
    weights: cli.WeightsOption = None,
    images: Annotated[int, typer.Option("--images", min=1, help="How many unlabelled images to use.")] = 1024,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="As in the spec: depthwise, subclasses ...")
    ] = None,
    gradients: Annotated[
        Gradients,
        typer.Option(help="Also gradients, for the model's own labels (teacher) or the true ones."),
    ] = Gradients.none,
    memory: Annotated[
        float, typer.Option("--memory", help="GiB for the moments; the largest are simplified beyond.")
    ] = 4.0,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Measure what each layer is given, for plans that keep the outputs close.

    Example: `tncompress calibrate --model zoo:cnn4 --weights w.safetensors --data digits --out m.safetensors`
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out is a file that ends in .safetensors, got {out}")
    with new_file(out, overwrite=overwrite) as fresh:
        loaded = cli.load_data(data, data_dir=data_dir)
        dense, _ = cli.open_model(model, weights, loaded)
        made = tnc.calibrate(
            dense.to(cli.pick_device(device)),
            loaded.calibration_loader(images, seed=seed),
            include=include or (),
            gradients=None if gradients is Gradients.none else gradients.value,  # type: ignore[arg-type]
            memory_limit=int(memory * 2**30),
            progress=not as_json,
        )
        made.save(fresh)
    cli.show(
        {
            "images": made.images,
            "layers": len(made.layers),
            "bytes": made.num_bytes,
            "separable": list(made.separable),
            "left_out": list(made.left_out),
            "unreached": list(made.unreached),
            "moments": str(out),
        },
        as_json=as_json,
    )
    if weights is None:
        cli.say("no --weights: the moments are those of random weights")


@cli.guarded
def sensitivity(
    model: cli.ModelOption,
    data: cli.DataOption,
    weights: cli.WeightsOption = None,
    formats: Annotated[
        str, typer.Option("--formats", help="Names of formats, with commas between them.")
    ] = "svd,tucker,mps,cp",
    ratios: Annotated[
        str, typer.Option("--ratios", help="Parameters, truncated / dense, with commas between them.")
    ] = "0.5,0.25,0.125",
    images: Annotated[int, typer.Option("--images", min=2, help="How many training images to use.")] = 256,
    calibration: cli.CalibrationOption = None,
    calibrate: cli.CalibrateOption = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="A file of rows, with which a killed run goes on.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Save the sensitivity as JSON.")] = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Measure how the network's output changes when each layer alone is truncated.

    Example: `tncompress sensitivity --model zoo:cnn4 --weights dense.safetensors --data digits`
    """
    try:
        fractions = [float(part) for part in ratios.split(",")]
    except ValueError:
        raise ValueError(f"--ratios are numbers with commas between them, got {ratios!r}") from None
    loaded = cli.load_data(data, data_dir=data_dir)
    dense, _ = cli.open_model(model, weights, loaded)
    with new_file(out, overwrite=overwrite) if out is not None else nullcontext() as fresh:
        made = tnc.sensitivity(
            dense.to(cli.pick_device(device)),
            loaded.calibration_loader(images, seed=seed),
            formats=[part.strip() for part in formats.split(",")],
            ratios=fractions,
            calibration=cli.moments_for(calibration, calibrate, loaded),
            cache=cache,
            progress=not as_json,
        )
        if fresh is not None:
            made.save(fresh)
    cli.show(made, as_json=as_json)
    if weights is None:
        cli.say("no --weights: what was measured are random weights")


@cli.guarded
def plan(
    model: cli.ModelOption,
    spec: cli.SpecOption = None,
    budget: cli.BudgetOption = None,
    weights: cli.WeightsOption = None,
    data: cli.MaybeDataOption = None,
    input_shape: cli.InputOption = None,
    calibration: cli.CalibrationOption = None,
    calibrate: cli.CalibrateOption = None,
    sensitivity: cli.SensitivityOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Save the plan as JSON; compress takes it as --spec.")
    ] = None,
    data_dir: cli.DataDirOption = None,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Show what compress would do to each layer, or why it stays dense. Nothing is changed.

    Example: `tncompress plan --model torchvision:resnet50 --spec spec.yaml --input 3x224x224`
    """
    images = cli.open_data(data, data_dir)
    moments = cli.moments_for(calibration, calibrate, images)
    dense, _ = cli.open_model(model, weights, images)
    example = cli.example_for(dense, input_shape, images)
    made = _spec(spec, budget)
    if isinstance(made, tnc.Spec):
        made = tnc.make_plan(
            dense,
            made,
            calibration=moments,
            sensitivity=cli.sensitivity_in(sensitivity),
            example_inputs=example,
            progress=not as_json,
        )
    if out is not None:
        with new_file(out, overwrite=overwrite) as fresh:
            made.save(fresh)
    cli.show(made, as_json=as_json)
    if weights is None:
        cli.say("no --weights: the errors are those of random weights")
    if example is None:
        cli.say("no MACs: give the shape of an input with --input, such as 3x224x224")


@cli.guarded
def compress(
    model: cli.ModelOption,
    out: cli.OutOption,
    spec: cli.SpecOption = None,
    budget: cli.BudgetOption = None,
    weights: cli.WeightsOption = None,
    data: cli.MaybeDataOption = None,
    input_shape: cli.InputOption = None,
    calibration: cli.CalibrationOption = None,
    calibrate: cli.CalibrateOption = None,
    sensitivity: cli.SensitivityOption = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "cpu",
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Compress a model as the spec (or a saved plan) says, and save it in a new folder.

    Example: `tncompress compress --model zoo:cnn4 --weights dense.safetensors --spec spec.yaml --out small`
    """
    check_writable(out, marker=MANIFEST, overwrite=overwrite)
    images = cli.open_data(data, data_dir)
    moments = cli.moments_for(calibration, calibrate, images)
    dense, source = cli.open_model(model, weights, images)
    example = cli.example_for(dense, input_shape, images)
    where = cli.pick_device(device)
    asked = _spec(spec, budget)
    moved = example.to(where) if example is not None else None
    small = tnc.compress(
        dense.to(where),
        asked,
        calibration=moments,
        sensitivity=cli.sensitivity_in(sensitivity),
        example_inputs=moved,
        progress=not as_json,
    )
    made: Any = small.tncompress_plan
    shape = tuple(example.shape[1:]) if example is not None else None
    origin: Any = {"source": source, "dense_weights": weights, "input_shape": shape}
    tnc.save(small.cpu(), out, **origin, overwrite=overwrite)
    cli.show(made, as_json=as_json)
    cli.say(f"saved in {out}")
    if weights is None:
        cli.say("no --weights: what was compressed are random weights")


def _spec(path: Path | None, budget: str | None) -> tnc.Spec | tnc.Plan:
    """Return the spec in a file, or the plan if it holds one; or what a budget alone stands for."""
    if budget is not None:
        if path is not None:
            raise ValueError("give --spec FILE or --budget, not both: a spec may hold a budget")
        return tnc.Spec.parse({"default": {"format": "auto"}, "budget": _fractions(budget)})
    if path is None:
        return tnc.Spec()
    fields = read_settings(path, "spec")
    return (
        tnc.Plan.from_dict(fields)
        if isinstance(fields, dict) and "compressed" in fields
        else tnc.Spec.parse(path)
    )


def _fractions(budget: str) -> dict[str, float]:
    """Return the fractions in ``params=0.25,macs=0.5``."""
    parts = [part.split("=") for part in budget.split(",")]
    try:
        return {name.strip(): float(value) for name, value in parts}
    except ValueError:
        raise ValueError(f"--budget is such as params=0.25 or params=0.25,macs=0.5, got {budget}") from None
