"""The commands that train, or measure what training is for: train, finetune, evaluate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.checkpoint import remove_checkpoints
from tncompress.export import MANIFEST, SAFE_SOURCES
from tncompress.finetune import FinetuneConfig, train_
from tncompress.measure import evaluate as measure_accuracy
from tncompress.recovery_record import recorded_steps
from tncompress.spec import read_settings
from tncompress.storage import check_writable, new_file
from tncompress.weights import save_weights

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Training settings: .yaml, .toml, .json.")
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="A folder to go on from if killed; default: OUT.checkpoint, removed after."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Processes for slices (local_epochs), or actors with --address."),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of each of them.")]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="A Ray cluster for slices: auto, local, ray://host:port.")
]


@cli.guarded
def train(
    model: cli.ModelOption,
    data: cli.DataOption,
    out: Annotated[Path, typer.Option("--out", help="The weights file, .safetensors.", show_default=False)],
    config: ConfigOption = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="Passes over the images, whatever --config says; default: 10."),
    ] = None,
    checkpoint: CheckpointOption = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    augment: cli.AugmentOption = True,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Train a dense model and write its weights. A run that was killed goes on by the same command.

    Example: `tncompress train --model zoo:resnet20 --data cifar10 --epochs 30 --out resnet20.safetensors`
    """
    settings = training_settings({"lr": 0.1, "epochs": 10}, config, epochs, seed)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out is a file that ends in .safetensors, got {out}")
    place = checkpoint or out.with_name(f"{out.name}.checkpoint")
    with kept_place(place), new_file(out, overwrite=overwrite) as fresh:
        images = cli.load_data(data, data_dir=data_dir)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built, _ = cli.open_model(model, None, images)
        built = built.to(where := cli.pick_device(device))
        settings = in_the_fast_layout(settings, model, where)
        loader, test = images.train_loader(seed=seed, augment=augment), images.test_loader()
        show = not as_json
        done = train_(built, loader, settings, val_loader=test, progress=show, label=model, checkpoint=place)
        save_weights(built, fresh)
    if checkpoint is None:
        remove_checkpoints(place)
    cli.show({"accuracy": done[-1].accuracy, "weights": str(out)}, as_json=as_json)


@cli.guarded
def finetune(
    folder: cli.FolderArgument,
    data: cli.DataOption,
    out: cli.OutOption,
    config: ConfigOption = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", min=0, help="Those of the whole network, whatever --config says; default: 3."
        ),
    ] = None,
    control: Annotated[bool, typer.Option(help="Train the dense model as long, for comparison.")] = True,
    checkpoint: CheckpointOption = None,
    curve: Annotated[
        Path | None, typer.Option("--curve", help="A file for the recovery curve: .png, .svg, .pdf.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", help="A file for the history, a row an epoch.")
    ] = None,
    log_dir: Annotated[Path | None, typer.Option("--log-dir", help="A folder for TensorBoard.")] = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    address: AddressOption = None,
    model: cli.ModelForFolder = None,
    weights: cli.DenseOption = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    augment: cli.AugmentOption = True,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Fine-tune a compressed model, with the dense one as its teacher and its control.

    A run that was killed goes on where it was when the same command is given again. On several GPUs, or
    processes: `accelerate launch -m tncompress finetune ...` or `torchrun --nproc-per-node 2 -m ...`. The
    slices of `local_epochs` can be shared out to `--workers` of this machine, or to a Ray cluster.

    Example: `tncompress finetune small --data digits --epochs 3 --out tuned`
    """
    check_writable(out, marker=MANIFEST, overwrite=overwrite)
    settings = training_settings({}, config, epochs, seed)
    _need("matplotlib", curve, "--curve")
    _need("tensorboard", log_dir, "--log-dir")
    place = checkpoint or out.with_name(f"{out.name}.checkpoint")
    with ExitStack() as stack:
        stack.enter_context(kept_place(place))
        files = {
            path: stack.enter_context(new_file(path, overwrite=overwrite))
            for path in (curve, table)
            if path is not None and _first_process()
        }
        where, images = cli.pick_device(device), cli.load_data(data, data_dir=data_dir)
        small, dense, origin = cli.open_folder(folder, model, weights, where)
        settings = in_the_fast_layout(settings, origin["source"]["source"], where)
        history = tnc.finetune(
            small,
            images.train_loader(seed=seed, augment=augment),
            settings,
            teacher=dense,
            val_loader=images.test_loader(),
            control=control,
            device=where if device != "auto" else None,
            progress=not as_json,
            checkpoint=place,
            log_dir=log_dir,
            workers=workers,
            threads=threads,
            address=address,
        )
        if not _first_process():
            return
        if curve in files:
            history.plot().savefig(files[curve])
        if table in files:
            history.save(files[table], overwrite=True)
        start, end = ("before tuning", history.accuracy_start), ("tuned", history.accuracy)
        about = history.to_dict() | {"steps": recorded_steps(folder, start, end, len(images.test))}
        tnc.save(history.model.cpu(), out, **origin, history=about, overwrite=overwrite)
    if checkpoint is None:
        remove_checkpoints(place)
    cli.show(history, as_json=as_json)
    cli.say(f"saved in {out}")


def _first_process() -> bool:
    """Say whether this process is the one that writes, of those started together."""
    return int(os.environ.get("RANK", 0)) == 0


def _need(library: str, wanted: Path | None, option: str) -> None:
    if wanted is not None and find_spec(library) is None:
        raise ValueError(f"{option} needs {library}, which is not there: pip install {library}")


@contextmanager
def kept_place(place: Path) -> Iterator[None]:
    """Say of an interrupted run where it goes on from."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"; the same command goes on from {place}" if place.is_dir() else ""
        cli.say(f"interrupted, nothing was saved{kept}")
        raise typer.Exit(130) from None


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


def training_settings(
    defaults: dict[str, Any], config: Path | None, epochs: int | None, seed: int
) -> FinetuneConfig:
    """Return the settings in the file ``config``, if there is one, over ``defaults`` and the seed."""
    given = read_settings(config, "config") if config is not None else {}
    if not isinstance(given, dict):
        raise ValueError(f"config {config} holds no settings: wanted keys such as epochs and lr")
    return FinetuneConfig.parse(
        {**defaults, "seed": seed, **given, **({} if epochs is None else {"epochs": epochs})}
    )


def in_the_fast_layout(settings: FinetuneConfig, model: str, device: torch.device) -> FinetuneConfig:
    """Return the settings with channels_last, which is faster on a CPU, unless they say something of it.

    For models whose own code takes it: one of the user's may have views that do not.
    """
    known = model.startswith(SAFE_SOURCES) and device.type == "cpu"
    if not known or "channels_last" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"channels_last": True})
