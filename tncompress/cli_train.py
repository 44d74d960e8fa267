"""The commands that train, or measure what training is for: train, finetune, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.export import MANIFEST
from tncompress.finetune import FinetuneConfig, train_
from tncompress.measure import evaluate as measure_accuracy
from tncompress.spec import read_settings
from tncompress.storage import check_writable, new_file
from tncompress.weights import save_weights


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


@cli.guarded
def finetune(
    folder: cli.FolderArgument,
    data: cli.DataOption,
    out: cli.OutOption,
    config: Annotated[
        Path | None, typer.Option("--config", help="Training settings: .yaml, .toml, .json.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1)] = None,
    control: Annotated[bool, typer.Option(help="Train the dense model as long, for comparison.")] = True,
    model: cli.ModelForFolder = None,
    weights: cli.DenseOption = None,
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
    small, dense, origin = cli.open_folder(folder, model, weights, where)
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


@cli.guarded
def evaluate(
    folder: cli.FolderArgument,
    data: cli.DataOption,
    model: cli.ModelForFolder = None,
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


def _training(defaults: dict[str, Any], config: Path | None, epochs: int | None, seed: int) -> FinetuneConfig:
    given = read_settings(config, "config") if config is not None else {}
    if not isinstance(given, dict):
        raise ValueError(f"config {config} holds no settings: wanted keys such as epochs and lr")
    return FinetuneConfig.parse({**defaults, "seed": seed, **given, **({"epochs": epochs} if epochs else {})})
