"""The command line: one verb per step, each a thin layer over the public functions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tncompress import __version__
from tncompress import cli_options as cli
from tncompress.cli_atlas import atlas
from tncompress.cli_bench import bench
from tncompress.cli_export import export, info
from tncompress.cli_plan import calibrate, compress, plan, sensitivity
from tncompress.cli_progressive import progressive, retruncate
from tncompress.cli_result import repair, report
from tncompress.cli_sweep import sweep
from tncompress.cli_train import evaluate, finetune, train
from tncompress.demo import DemoConfig, run_demo
from tncompress.tables import percent

app = typer.Typer(
    name="tncompress",
    cls=cli.Verbs,
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


def _tell_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"tncompress {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take what stands before the verb."""


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


STEPS = (
    demo,
    train,
    atlas,
    sweep,
    calibrate,
    sensitivity,
    plan,
    compress,
    repair,
    finetune,
    progressive,
    retruncate,
    evaluate,
    report,
    bench,
    info,
    export,
)
for step in STEPS:
    app.command()(step)


def main() -> None:
    """Run the command line; letters that the output can't show become question marks, not errors."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()
