"""The command sweep: a folder of rows, results and figures that the same command line goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.finetune import FinetuneConfig
from tncompress.outputs import Images
from tncompress.storage import new_file
from tncompress.sweep_plots import norm_loss_figures, training_figures
from tncompress.sweep_rows import Sweep
from tncompress.textfiles import read_settings, read_value

ARGUMENTS, RESULT, ROWS = "arguments.json", "sweep.json", "rows.jsonl"
BATCH = 128
"""Images in a batch of the test and of BatchNorm statistics."""


@cli.guarded
def sweep(
    model: cli.ModelOption,
    data: cli.DataOption,
    out: Annotated[Path, typer.Option("--out", help="A folder for rows, result and figures.")],
    weights: cli.WeightsOption = None,
    layers: Annotated[
        str, typer.Option("--layers", help="each, all, 'first 2', 'last 2', conv2, conv2+conv3; with commas.")
    ] = "each",
    cuts: Annotated[
        str,
        typer.Option("--cuts", help="all, or cuts with commas; 'out|rest + in|rest' for several at once."),
    ] = "all",
    fractions: Annotated[
        str | None, typer.Option("--fractions", help="Of the full ranks, with commas: 0.5,0.25.")
    ] = None,
    crossing: Annotated[
        str, typer.Option("--crossing", help="measure, or alternate: for cuts that cross.")
    ] = "measure",
    images: Annotated[
        int, typer.Option("--images", min=0, help="Training images for BatchNorm statistics; 0 for none.")
    ] = 1024,
    test_images: Annotated[
        int | None, typer.Option("--test-images", min=1, help="The first N test images; default: all.")
    ] = None,
    retrain_epochs: Annotated[
        int, typer.Option("--retrain-epochs", min=0, help="Epochs of training after each truncation.")
    ] = 0,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings of that training: .yaml, .toml, .json.")
    ] = None,
    held: Annotated[str, typer.Option("--held", help="What is trained: dense, manifold.")] = "dense,manifold",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes, or actors with --address.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of each of them.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="A Ray cluster: auto, local, ray://host:port.")
    ] = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Truncate layers along cuts, over a grid, and measure accuracy; the same command goes on after a kill.

    Example: `tncompress sweep --model zoo:cnn4 --weights dense.safetensors --data digits --out sweep`
    """
    training = _training(retrain_epochs, config, seed)
    asked = {
        "model": model,
        "weights": str(weights) if weights is not None else None,
        "data": data,
        "layers": layers,
        "cuts": cuts,
        "fractions": fractions,
        "crossing": crossing,
        "images": images,
        "test_images": test_images,
        "training": training.model_dump(mode="json") if training is not None else None,
        "held": held if training is not None else None,
        "seed": seed,
    }
    loaded = cli.load_data(data, data_dir=data_dir)
    dense, _ = cli.open_model(model, weights, loaded)
    _open_folder(out, asked, overwrite=overwrite)
    test = Images.gather(loaded.test_loader(BATCH), torch.device("cpu"), test_images)
    with _going_on(out):
        made = tnc.sweep(
            dense.to(cli.pick_device(device)),
            list(zip(test.inputs, test.labels or (), strict=True)),
            layers=_layers(layers),
            cuts=_cuts(cuts),
            fractions=_fractions(fractions),
            crossing=crossing,  # type: ignore[arg-type]
            images=loaded.calibration_loader(images, BATCH, seed) if images else None,
            retrain=training,
            train_loader=loaded.train_loader(seed=seed) if training is not None else None,
            held=_parts(held),
            cache=out / ROWS,
            workers=workers,
            threads=threads,
            address=address,
            progress=not as_json,
        )
    written = _write(made, out)
    cli.show(made, as_json=as_json)
    cli.say(f"in {out}: {', '.join((RESULT, ROWS, *written))}")
    if weights is None:
        cli.say("no --weights: what was truncated are random weights")


def _training(epochs: int, config: Path | None, seed: int) -> FinetuneConfig | None:
    if not epochs:
        if config is not None:
            raise ValueError("--config is for training again: say how long with --retrain-epochs")
        return None
    given = read_settings(config, "config") if config is not None else {}
    if not isinstance(given, dict):
        raise ValueError(f"config {config} holds no settings: wanted keys such as lr")
    return FinetuneConfig.parse({"seed": seed, **given, "epochs": epochs})


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _layers(text: str) -> list[Any]:
    return [tuple(part.split("+")) if "+" in part else part for part in _parts(text)]


def _cuts(text: str) -> Any:
    if text.strip() == "all":
        return "all"
    return [tuple(cut.strip() for cut in part.split("+")) for part in _parts(text)]


def _fractions(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in _parts(text)]
    except ValueError:
        raise ValueError(f"--fractions are numbers with commas between them, got {text!r}") from None


# --- the folder ---------------------------------------------------------------------------------------------


def _open_folder(out: Path, asked: dict[str, Any], *, overwrite: bool) -> None:
    """Make the folder, or find the sweep there that was asked for alike."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another output folder")
    described = out / ARGUMENTS
    if out.is_dir() and any(out.iterdir()) and not described.is_file():
        raise FileExistsError(f"{out} holds other files (no {ARGUMENTS}): choose another output folder")
    begun = (out / RESULT).exists() or ((out / ROWS).is_file() and (out / ROWS).stat().st_size)
    if described.is_file() and begun:
        before = read_value(described, "arguments", _mapping)
        differing = [name for name in asked if before.get(name) != asked[name]]
        if differing and not overwrite:
            name = differing[0]
            raise FileExistsError(
                f"{out} holds a sweep with {name}={before.get(name)!r}, got {asked[name]!r}: choose another "
                "output folder, or --overwrite its result (what is measured already is taken over)"
            )
        if differing:
            for path in [out / RESULT, *out.glob("norm-loss*.png"), *out.glob("training*.png")]:
                path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    with new_file(described) as fresh:
        fresh.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def _mapping(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise ValueError("wanted a mapping")
    return fields


@contextmanager
def _going_on(out: Path) -> Iterator[None]:
    """Say of an interrupted sweep how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        rows = out / ROWS
        kept = sum(1 for _ in rows.open("rb")) if rows.exists() else 0
        cli.say(f"interrupted; {kept} results are kept in {rows}, and the same command goes on there")
        raise typer.Exit(130) from None


def _write(made: Sweep, out: Path) -> list[str]:
    """Write result and figures, and return the names of the figures."""
    made.save(out / RESULT)
    written = []
    for kind, figures in (("norm-loss", norm_loss_figures(made)), ("training", training_figures(made))):
        for number, figure in enumerate(figures, 1):
            name = f"{kind}.png" if len(figures) == 1 else f"{kind}-{number}.png"
            with new_file(out / name) as fresh:
                figure.savefig(fresh, format="png")
            written.append(name)
    return written
