"""The command that measures speed: bench."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.benching import WAYS
from tncompress.storage import new_file


@cli.guarded
def bench(
    folder: Annotated[
        Path | None, typer.Argument(help="A folder written by compress: dense against compressed.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="zoo:NAME, torchvision:NAME or FILE.py:FACTORY.")
    ] = None,
    weights: cli.WeightsOption = None,
    input_shape: cli.InputOption = None,
    batches: Annotated[str, typer.Option("--batch", help="Batch sizes, with commas between them.")] = "1,8",
    ways: Annotated[
        str | None,
        typer.Option("--ways", help=f"Some of {','.join(WAYS)}; default: eager,frozen,compiled."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: torch's own.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="Time for each row of the table.")] = 1.0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit the cost model to this device, and keep it.")
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of --calibrate: float32, bfloat16 or float16.")
    ] = "float32",
    out: Annotated[Path | None, typer.Option("--out", help="Also write the result: .md or .json.")] = None,
    data: cli.MaybeDataOption = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "auto",
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Measure forward passes of your model: dense against compressed, eager, frozen and compiled, in turns.

    Weights do not change speed: without --weights they are random. With --calibrate the constants of this
    device are measured, by which contractions are chosen; no model is needed for it.

    Example: `tncompress bench small --input 3x224x224 --batch 1,8 --out speed.md`
    """
    if out is not None and out.suffix not in (".md", ".json"):
        raise ValueError(f"--out is a file that ends in .md or .json, got {out}")
    if folder is None and model is None:
        if not calibrate:
            raise ValueError("name a folder that compress wrote, or a --model, or --calibrate the device")
        if out is not None:
            raise ValueError("--out takes what a bench of a model measures: name a folder or a --model")
    where = cli.pick_device(device)
    if calibrate:
        fitted = _calibrate(where, threads, dtype, progress=not as_json)
        if folder is None and model is None:
            cli.show(fitted if as_json else str(fitted), as_json=as_json)
            return
        cli.say(str(fitted))
    sizes, asked = _whole_numbers(batches), ways.split(",") if ways is not None else None
    images = cli.open_data(data, data_dir)
    dense, small = _models(folder, model, weights, images, where)
    example = cli.example_for(dense.cpu(), input_shape, images)
    if example is None:
        raise ValueError("give the shape of an input with --input, such as 3x224x224, or --data")
    with new_file(out, overwrite=overwrite) if out is not None else nullcontext() as fresh:
        made = tnc.bench(
            dense.to(where),
            small,
            example_inputs=example.to(where),
            batch_sizes=sizes,
            ways=asked,
            threads=threads,
            seconds=seconds,
            progress=not as_json,
        )
        if out is not None and fresh is not None:
            fresh.write_text(made.to_markdown() if out.suffix == ".md" else made.to_json())
    cli.show(made, as_json=as_json)
    if not as_json:
        for line in made.remarks():
            cli.say(line)


def _calibrate(where: torch.device, threads: int | None, dtype: str, *, progress: bool) -> Any:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ValueError(f"--dtype is one of {', '.join(known)}, got {dtype!r}")
    return tnc.calibrate_machine(where, dtype=known[dtype], threads=threads, progress=progress)


def _models(
    folder: Path | None, model: str | None, weights: Path | None, images: Any, where: torch.device
) -> tuple[nn.Module, nn.Module | None]:
    """Return the dense and the compressed model; the latter is None where only a dense one is named."""
    if folder is not None:
        small, dense, _ = cli.open_folder(folder, model, weights, where, need_weights=False)
        return dense, small
    assert model is not None
    dense, _ = cli.open_model(model, weights, images)
    return dense, None


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--batch takes whole numbers with commas between them, got {text!r}") from None
