"""The commands that truncate what is tuned: progressive, retruncate."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.checkpoint import remove_checkpoints
from tncompress.cli_train import (
    CheckpointOption,
    ConfigOption,
    in_the_fast_layout,
    kept_place,
    training_settings,
)
from tncompress.data import DataSet
from tncompress.export import MANIFEST, read_manifest
from tncompress.measure import evaluate as measure_accuracy
from tncompress.policies import make_policy
from tncompress.recovery_record import recorded_steps
from tncompress.spec import read_settings
from tncompress.storage import check_writable


@cli.guarded
def progressive(
    model: cli.ModelOption,
    data: cli.DataOption,
    out: cli.OutOption,
    weights: cli.WeightsOption = None,
    spec: Annotated[
        Path | None, typer.Option("--spec", help="What to compress: .yaml, .toml, .json.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How many steps to the last size.")] = 3,
    config: ConfigOption = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=0, help="Of the last round.")] = None,
    between: Annotated[
        Path | None,
        typer.Option("--between", help="Settings of the rounds before the last; default: 1 epoch."),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=0, help="Unlabelled ones to fit and repair on; 0 for none.")
    ] = 1024,
    control: Annotated[bool, typer.Option(help="Train the dense model as long, for comparison.")] = True,
    checkpoint: CheckpointOption = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    seed: cli.SeedOption = 0,
    augment: cli.AugmentOption = True,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Compress in rounds: truncate a little, repair, tune, and again. Goes on if killed, as finetune does.

    Example: `tncompress progressive --model zoo:cnn4 --weights dense.safetensors --data digits --out tuned`
    """
    check_writable(out, marker=MANIFEST, overwrite=overwrite)
    settings = training_settings({}, config, epochs, seed)
    middle = training_settings({}, between, None, seed) if between is not None else None
    asked = tnc.Spec.parse(spec) if spec is not None else tnc.Spec()
    place = checkpoint or out.with_name(f"{out.name}.checkpoint")
    with ExitStack() as stack:
        stack.enter_context(kept_place(place))
        loaded = cli.load_data(data, data_dir=data_dir)
        dense, source = cli.open_model(model, weights, loaded)
        where = cli.pick_device(device)
        settings = in_the_fast_layout(settings, model, where)
        middle = in_the_fast_layout(middle, model, where) if middle is not None else None
        made = tnc.progressive(
            dense,
            asked,
            loaded.train_loader(seed=seed, augment=augment),
            settings,
            rounds=rounds,
            between=middle,
            images=[x for x, _ in loaded.calibration_loader(images, seed=seed)] if images else None,
            val_loader=loaded.test_loader(),
            control=control,
            example_inputs=loaded.example_input(),
            device=where,
            progress=not as_json,
            checkpoint=place,
        )
        origin: Any = {"source": source, "dense_weights": weights, "input_shape": loaded.input_shape}
        tnc.save(made.model.cpu(), out, **origin, history=made.to_dict(), overwrite=overwrite)
    if checkpoint is None:
        remove_checkpoints(place)
    cli.show(made, as_json=as_json)
    cli.say(f"saved in {out}")
    if weights is None:
        cli.say("no --weights: what was compressed are random weights")


@cli.guarded
def retruncate(
    folder: cli.FolderArgument,
    out: cli.OutOption,
    rank: Annotated[
        str | None,
        typer.Option("--rank", help="A policy for all layers: rank_fraction=0.5, params_ratio=0.1."),
    ] = None,
    ranks: Annotated[
        Path | None, typer.Option("--ranks", help="A file with a policy for each name or pattern.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option("--layers", help="Names or patterns that --rank is for.")
    ] = None,
    model: cli.ModelForFolder = None,
    data: cli.MaybeDataOption = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Lower the ranks of a compressed model, tuned or not; its factors are cut in canonical form.

    With --data the accuracy before and after is measured, and recorded for `tncompress report`.

    Example: `tncompress retruncate tuned --rank rank_fraction=0.5 --out smaller`
    """
    check_writable(out, marker=MANIFEST, overwrite=overwrite)
    policy: Any = _policy(rank, ranks)
    if ranks is not None and layers:
        raise ValueError("--layers is for --rank: a file of --ranks names its own")
    images, where = cli.open_data(data, data_dir), cli.pick_device(device)
    small = tnc.load(folder, model).to(where)
    found = tnc.retruncate(small, policy, layers=layers or ("*",), progress=not as_json)
    before, after = (_accuracy(each, images) for each in (small, found.model))
    named = ("compressed", before), ("truncated again", after)
    steps = recorded_steps(folder, *named, len(images.test) if images is not None else None)
    manifest = read_manifest(folder)
    origin: Any = {key: manifest.get(key) for key in ("dense_weights", "input_shape")}
    origin["source"] = {**(manifest["source"] or {}), **({"source": model} if model else {})}
    tnc.save(
        found.model.cpu(), out, **origin, history={"steps": steps} if steps else None, overwrite=overwrite
    )
    known = {"accuracy_before": before, "accuracy": after} if images is not None else {}
    cli.show(found.to_dict() | known if as_json else found, as_json=as_json)
    if known and not as_json:
        cli.show(known, as_json=False)
    cli.say(f"saved in {out}")


def _accuracy(model: nn.Module, images: DataSet | None) -> float | None:
    return measure_accuracy(model, images.test_loader()).accuracy if images is not None else None


def _policy(rank: str | None, ranks: Path | None) -> Any:
    if (rank is None) == (ranks is None):
        raise ValueError("how far? Give --rank, such as rank_fraction=0.5, or a file of --ranks")
    if ranks is not None:
        return read_settings(ranks, "ranks")
    tag, _, number = str(rank).partition("=")
    try:
        value: Any = int(number) if number.strip().isdigit() else float(number)
    except ValueError:
        raise ValueError(
            f"--rank is a policy with its number, such as rank_fraction=0.5, got {rank!r}"
        ) from None
    return make_policy({tag.strip(): value})
