"""The command line: one verb per step, each a thin layer over the public functions."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.demo import DemoConfig, run_demo
from tncompress.export import MANIFEST, read_manifest
from tncompress.finetune import FinetuneConfig, train_
from tncompress.measure import evaluate as measure_accuracy
from tncompress.spec import read_settings
from tncompress.storage import check_writable, new_file
from tncompress.tables import percent
from tncompress.weights import save_weights

app = typer.Typer(
    name="tncompress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn the dense convolutions of a trained PyTorch network into tensor-network layers.\n\n"
    "Start with `tncompress demo`. Then, on your own model:\n\n"
    "`tncompress plan --model torchvision:resnet50 --weights w.safetensors --spec spec.yaml`\n\n"
    "`tncompress compress ... --out small` · `tncompress finetune small --data cifar10 --out tuned`\n\n"
    "`tncompress report tuned --data cifar10` · `tncompress export tuned --to onnx`",
)

FolderArgument = Annotated[Path, typer.Argument(help="A folder written by compress.", show_default=False)]
ModelForFolder = Annotated[
    str | None, typer.Option("--model", help="The architecture, where it was FILE.py:FACTORY.")
]
DenseOption = Annotated[
    Path | None,
    typer.Option("--weights", help="The dense model's weights; default: those given to compress."),
]


class Solved(StrEnum):
    """Which factors ``repair`` solves for."""

    all = "all"
    last = "last"
    none = "none"


@app.command()
@cli.guarded
def demo(
    data: Annotated[str, typer.Option("--data", help="digits, fashion-mnist, cifar10 ...")] = "digits",
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Dense training; default 10 on digits, 6 elsewhere.")
    ] = None,
    tune_epochs: Annotated[
        int, typer.Option("--tune-epochs", min=1, help="Fine-tuning, and the control.")
    ] = 5,
    ratio: Annotated[
        float, typer.Option("--ratio", help="Convolution parameters, compressed / dense.")
    ] = 0.25,
    out: Annotated[Path, typer.Option("--out", help="A new folder for the result.")] = Path(
        "tncompress-demo"
    ),
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Train a four-layer CNN, compress it with MPS, Tucker and CP, and bring its accuracy back.

    Example: `tncompress demo --data fashion-mnist --epochs 6 --out fashion`
    """
    config = DemoConfig(data, epochs or (10 if data == "digits" else 6), tune_epochs, ratio, seed)
    where = cli.pick_device(device)
    made = run_demo(
        config, out, data_dir=data_dir, device=where, overwrite=overwrite, progress=not as_json, say=cli.say
    )
    cli.show(made, as_json=as_json)
    cli.say(f"best: {made.best.format}, {percent(made.best.tuned)}; in {out}:")
    for name, what in (
        ("model/", "the compressed model; tnc.load() reads it"),
        ("model.onnx", "the same for onnxruntime, batch size free"),
        ("report.md, report.json", "dense beside compressed, layer by layer"),
        ("spec.yaml", "what was asked for; edit it and run tncompress compress"),
        ("dense.safetensors", "the trained dense weights"),
        ("demo.md, demo.json", "the table above"),
    ):
        cli.say(f"  {name:24} {what}")


@app.command()
@cli.guarded
def train(
    model: cli.ModelOption,
    data: cli.DataOption,
    out: Annotated[Path, typer.Option("--out", help="The weights file, .safetensors.", show_default=False)],
    config: Annotated[
        Path | None, typer.Option("--config", help="Training settings: .yaml, .toml, .json.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1)] = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Train a dense model and write its weights.

    Example: `tncompress train --model zoo:resnet20 --data cifar10 --epochs 30 --out resnet20.safetensors`
    """
    settings = _training({"lr": 0.1, "epochs": 10}, config, epochs, seed)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out is a file that ends in .safetensors, got {out}")
    with new_file(out, overwrite=overwrite) as fresh:
        images = cli.load_data(data, data_dir=data_dir)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built, _ = cli.open_model(model, None, images)
        built = built.to(cli.pick_device(device))
        loader, test = images.train_loader(seed=seed), images.test_loader()
        done = train_(built, loader, settings, val_loader=test, progress=not as_json, label=model)
        save_weights(built, fresh)
    cli.show({"accuracy": done[-1].accuracy, "weights": str(out)}, as_json=as_json)


@app.command()
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
    """Measure what each layer is given, for plans that keep the outputs close. Labels are not looked at.

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


@app.command()
@cli.guarded
def plan(
    model: cli.ModelOption,
    spec: cli.SpecOption = None,
    weights: cli.WeightsOption = None,
    data: cli.MaybeDataOption = None,
    input_shape: cli.InputOption = None,
    calibration: cli.CalibrationOption = None,
    calibrate: cli.CalibrateOption = None,
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
    made = _spec(spec)
    if isinstance(made, tnc.Spec):
        made = tnc.make_plan(dense, made, calibration=moments, example_inputs=example, progress=not as_json)
    if out is not None:
        with new_file(out, overwrite=overwrite) as fresh:
            made.save(fresh)
    cli.show(made, as_json=as_json)
    if weights is None:
        cli.say("no --weights: the errors are those of random weights")
    if example is None:
        cli.say("no MACs: give the shape of an input with --input, such as 3x224x224")


@app.command()
@cli.guarded
def compress(
    model: cli.ModelOption,
    out: cli.OutOption,
    spec: cli.SpecOption = None,
    weights: cli.WeightsOption = None,
    data: cli.MaybeDataOption = None,
    input_shape: cli.InputOption = None,
    calibration: cli.CalibrationOption = None,
    calibrate: cli.CalibrateOption = None,
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
    asked = _spec(spec)
    moved = example.to(where) if example is not None else None
    small = tnc.compress(
        dense.to(where), asked, calibration=moments, example_inputs=moved, progress=not as_json
    )
    made: Any = small.tncompress_plan
    tnc.save(small.cpu(), out, source=source, dense_weights=weights, overwrite=overwrite)
    cli.show(made, as_json=as_json)
    cli.say(f"saved in {out}")
    if weights is None:
        cli.say("no --weights: what was compressed are random weights")


@app.command()
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
            cache=cache,
            progress=not as_json,
        )
        if fresh is not None:
            made.save(fresh)
    cli.show(made, as_json=as_json)
    if weights is None:
        cli.say("no --weights: what was measured are random weights")


@app.command()
@cli.guarded
def repair(
    folder: FolderArgument,
    data: cli.DataOption,
    out: cli.OutOption,
    model: ModelForFolder = None,
    weights: DenseOption = None,
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
    small, dense, origin = _open(folder, model, weights, where)
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


@app.command()
@cli.guarded
def finetune(
    folder: FolderArgument,
    data: cli.DataOption,
    out: cli.OutOption,
    config: Annotated[
        Path | None, typer.Option("--config", help="Training settings: .yaml, .toml, .json.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1)] = None,
    control: Annotated[bool, typer.Option(help="Train the dense model as long, for comparison.")] = True,
    model: ModelForFolder = None,
    weights: DenseOption = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Fine-tune a compressed model, with the dense one as its teacher and its control.

    Example: `tncompress finetune small --data digits --epochs 3 --out tuned`
    """
    check_writable(out, marker=MANIFEST, overwrite=overwrite)
    settings = _training({}, config, epochs, seed)
    where, images = cli.pick_device(device), cli.load_data(data, data_dir=data_dir)
    small, dense, origin = _open(folder, model, weights, where)
    history = tnc.finetune(
        small,
        images.train_loader(seed=seed),
        settings,
        teacher=dense,
        val_loader=images.test_loader(),
        control=control,
        progress=not as_json,
    )
    tnc.save(history.model.cpu(), out, **origin, history=history.to_dict(), overwrite=overwrite)
    cli.show(history, as_json=as_json)
    cli.say(f"saved in {out}")


@app.command()
@cli.guarded
def evaluate(
    folder: FolderArgument,
    data: cli.DataOption,
    model: ModelForFolder = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    as_json: cli.JsonOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Measure the accuracy of a compressed model on the test split.

    Example: `tncompress evaluate tuned --data digits`
    """
    images, where = cli.load_data(data, data_dir=data_dir), cli.pick_device(device)
    small = tnc.load(folder, model).to(where)
    found = measure_accuracy(small, images.test_loader())
    cli.show({"accuracy": found.accuracy, "loss": found.loss, "images": found.samples}, as_json=as_json)


@app.command()
@cli.guarded
def report(
    folder: FolderArgument,
    data: cli.MaybeDataOption = None,
    model: ModelForFolder = None,
    weights: DenseOption = None,
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
    small, dense, _ = _open(folder, model, weights, where, need_weights=data is not None)
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


@app.command()
@cli.guarded
def export(
    folder: FolderArgument,
    to: Annotated[str, typer.Option("--to", help="onnx.")] = "onnx",
    model: ModelForFolder = None,
    data: cli.MaybeDataOption = None,
    input_shape: cli.InputOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; default: model.onnx in the folder.")
    ] = None,
    data_dir: cli.DataDirOption = None,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Export a compressed model, with a dynamic batch size, and check it against onnxruntime.

    Example: `tncompress export tuned --to onnx --input 1x32x32`
    """
    if to != "onnx":
        raise ValueError(f"unknown export format {to!r}; the formats are onnx")
    small = tnc.load(folder, model)
    example = cli.example_for(small, input_shape, cli.open_data(data, data_dir))
    if example is None:
        raise ValueError("give the shape of an input with --input, such as 3x224x224, or --data")
    path = out or folder / "model.onnx"
    error = tnc.export_onnx(small, path, example, overwrite=overwrite)
    cli.show({"onnx": str(path), "relative_difference": error}, as_json=as_json)


def _spec(path: Path | None) -> tnc.Spec | tnc.Plan:
    """Return the spec in a file, or the plan if it holds one."""
    if path is None:
        return tnc.Spec()
    fields = read_settings(path, "spec")
    return (
        tnc.Plan.from_dict(fields)
        if isinstance(fields, dict) and "compressed" in fields
        else tnc.Spec.parse(path)
    )


def _training(defaults: dict[str, Any], config: Path | None, epochs: int | None, seed: int) -> FinetuneConfig:
    given = read_settings(config, "config") if config is not None else {}
    if not isinstance(given, dict):
        raise ValueError(f"config {config} holds no settings: wanted keys such as epochs and lr")
    return FinetuneConfig.parse({**defaults, "seed": seed, **given, **({"epochs": epochs} if epochs else {})})


def _open(
    folder: Path, model: str | None, weights: Path | None, device: torch.device, *, need_weights: bool = True
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Return the compressed model of ``folder``, the dense one it is from, and what save records of it."""
    small = tnc.load(folder, model).to(device)
    manifest = read_manifest(folder)
    source = {**(manifest["source"] or {}), **({"source": model} if model else {})}
    recorded = manifest.get("dense_weights")
    path = weights or (Path(recorded) if recorded else None)
    if path is None and need_weights:
        raise ValueError(f"{folder} does not know the dense model's weights: give them with --weights")
    dense = tnc.build_model(**source).eval()
    if path is not None and (need_weights or path.exists()):
        tnc.load_weights(dense, path)
    return small, dense.to(device), {"source": source, "dense_weights": path}


def main() -> None:
    """Run the command line."""
    app()
