"""What the commands share: options, the way errors are told, and how a model is found."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from typer.core import TyperGroup

from tncompress.calibrate import Calibration
from tncompress.data import NAMES, DataSet, load_data
from tncompress.discovery import find_layers
from tncompress.export import load, read_manifest
from tncompress.narrow import fitted
from tncompress.responses import Sensitivity
from tncompress.tables import render
from tncompress.weights import load_weights
from tncompress.zoo import build_model

ModelOption = Annotated[
    str, typer.Option("--model", help="zoo:NAME, torchvision:NAME or FILE.py:FACTORY.", show_default=False)
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="Trained weights: .safetensors, or a checkpoint of tensors.")
]
SpecOption = Annotated[
    Path | None,
    typer.Option(
        "--spec", help="What to compress and how: .yaml, .toml or .json. Default: MPS at a quarter."
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="In place of a spec: the part of the model that may be left, such as params=0.25,macs=0.5. "
        "Formats and ranks are chosen.",
    ),
]
DataOption = Annotated[str, typer.Option("--data", help=f"One of {', '.join(NAMES)}.", show_default=False)]
MaybeDataOption = Annotated[str | None, typer.Option("--data", help=f"One of {', '.join(NAMES)}.")]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Where the data lie, beside the usual places.")
]
InputOption = Annotated[
    str | None,
    typer.Option(
        "--input", "--input-shape", help="Shape of one input, such as 3x224x224: what runs needs it."
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="Moments that `tncompress calibrate` wrote: keep the outputs close."),
]
CalibrateOption = Annotated[
    int | None,
    typer.Option("--calibrate", min=1, help="The same, measured on so many unlabelled images of --data."),
]
SensitivityOption = Annotated[
    Path | None,
    typer.Option("--sensitivity", help="What `tncompress sensitivity --out` wrote: judges a budget."),
]
OutOption = Annotated[Path, typer.Option("--out", help="A new folder for the result.", show_default=False)]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of shuffling, augmentation and dropout.")]
AugmentOption = Annotated[
    bool,
    typer.Option(
        "--augment/--no-augment", help="Shift and flip training images; a few epochs may do better without."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a result that is there already.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

FolderArgument = Annotated[Path, typer.Argument(help="A folder written by compress.", show_default=False)]
ModelForFolder = Annotated[
    str | None, typer.Option("--model", help="The architecture, where it was FILE.py:FACTORY.")
]
DenseOption = Annotated[
    Path | None,
    typer.Option("--weights", help="The dense model's weights; default: those given to compress."),
]

PIPE_WIDTH = 160
"""Of tables that go to a file or a pipe."""
USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError, MemoryError)


def say(words: str) -> None:
    """Print a line of progress on standard error."""
    Console(stderr=True, highlight=False).print(words, soft_wrap=True, markup=False)


def show(value: Any, *, as_json: bool) -> None:
    """Print a result on standard output: as JSON, or as its table, plain where that is no terminal.

    Tables are as wide as the terminal, or as ``COLUMNS`` says; lines of words are left to the terminal.
    """
    if as_json:
        sys.stdout.write(json.dumps(value.to_dict() if hasattr(value, "to_dict") else value, indent=1) + "\n")
        return
    if isinstance(value, dict):
        value = "\n".join(f"{name.replace('_', ' ')}: {_plain(entry)}" for name, entry in value.items())
    console = Console(highlight=False)
    if isinstance(value, str):
        console.print(value, markup=False, soft_wrap=True)
    elif console.is_terminal:
        console.print(fitted(value))
    else:
        width = console.width if os.environ.get("COLUMNS", "").isdigit() else PIPE_WIDTH
        sys.stdout.write(render(value, width) + "\n")


def _plain(entry: Any) -> str:
    return f"{entry:.4g}" if isinstance(entry, float) else str(entry)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with errors told in one line and exit code 1; ``--debug`` shows the traceback."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            command(*args, debug=debug, **kwargs)
        except KeyboardInterrupt:
            say("interrupted; nothing was written")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                raise
            lines = [str(error) or type(error).__name__, *getattr(error, "__notes__", [])]
            text = " ".join(" ".join(lines).split())
            if not isinstance(error, USER_ERRORS):
                text = f"unexpected {type(error).__name__}: {text} (--debug shows where)"
            sys.stderr.write(f"error: {text}\n")
            raise typer.Exit(1) from None

    return run


class Verbs(TyperGroup):
    """The commands; an option that they do not know is told in one line, too, with exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what stands before the verb."""
        with _misuse_in_one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Parse the rest, and run the verb."""
        with _misuse_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _misuse_in_one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
            raise  # no misuse of options, or no error: the help is shown
        words = " ".join(error.format_message().split()).rstrip(".")
        where = getattr(getattr(error, "ctx", None), "command_path", "tncompress")
        sys.stderr.write(f"error: {words} ({where} --help says what there is)\n")
        raise typer.Exit(getattr(error, "exit_code", 2)) from None


def pick_device(name: str) -> torch.device:
    """Return the device that ``--device`` names; one that is not there is a ``ValueError``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"device {name!r} is not to be had here: {reason}") from None
    return device


def open_data(name: str | None, data_dir: Path | None) -> DataSet | None:
    """Return the data set, or None where none is named."""
    return load_data(name, data_dir=data_dir) if name is not None else None


def open_model(model: str, weights: Path | None, data: DataSet | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the dense model in eval mode, and its source: the arguments that build it again."""
    source: dict[str, Any] = {"source": model}
    if data is not None:
        source["num_classes"] = data.num_classes
        if not model.startswith("torchvision:"):
            source["in_channels"] = data.input_shape[0]
    built = build_model(**source)
    if weights is not None:
        load_weights(built, weights)
    return built.eval(), source


def moments_for(
    path: Path | None, images: int | None, data: DataSet | None, *, seed: int = 0
) -> Calibration | Iterable[Any] | None:
    """Return the moments in a file, or batches to measure them on; None where neither is asked for."""
    if path is not None and images is not None:
        raise ValueError("give --calibration FILE or --calibrate N, not both")
    if images is not None and data is None:
        raise ValueError("--calibrate takes its images from --data: name a data set")
    if path is not None:
        return Calibration.load(path)
    return data.calibration_loader(images, seed=seed) if data is not None and images is not None else None


def sensitivity_in(path: Path | None) -> Sensitivity | None:
    """Return the sensitivity in a file, if one is named."""
    return Sensitivity.load(path) if path is not None else None


def example_for(model: nn.Module, shape: str | None, data: DataSet | None, batch: int = 1) -> Tensor | None:
    """Return inputs: of the shape asked for, of the data, or of an image size that suits the model's kind.

    None where the last is a mere guess that the model does not take.
    """
    if shape is not None:
        try:
            sizes = [int(part) for part in shape.lower().split("x")]
        except ValueError:
            sizes = []
        if not sizes or min(sizes) < 1:
            raise ValueError(f"--input is a shape such as 3x224x224, got {shape!r}")
        return torch.randn(batch, *sizes)
    if data is not None:
        return data.example_input(batch)
    first = next((layer.module for layer in find_layers(model) if hasattr(layer.module, "in_channels")), None)
    if not isinstance(first, nn.Conv2d):
        return None
    side = 224 if type(model).__module__.startswith("torchvision.") else 32
    guess = torch.randn(batch, first.in_channels, side, side)
    try:
        with torch.no_grad():
            model(guess)
    except Exception:  # a guess that does not fit is no error of the user's
        return None
    return guess


def open_folder(
    folder: Path, model: str | None, weights: Path | None, device: torch.device, *, need_weights: bool = True
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Return the compressed model of ``folder``, the dense one it is from, and what save records of it.

    Without ``need_weights`` the dense model is random where its recorded weights are gone; weights that are
    given are always read.
    """
    small = load(folder, model).to(device)
    manifest = read_manifest(folder)
    source = {**(manifest["source"] or {}), **({"source": model} if model else {})}
    recorded = manifest.get("dense_weights")
    path = weights or (Path(recorded) if recorded else None)
    if path is None and need_weights:
        raise ValueError(f"{folder} does not know the dense model's weights: give them with --weights")
    dense = build_model(**source).eval()
    if path is not None and (weights or need_weights or path.exists()):
        load_weights(dense, path)
    origin = {"source": source, "dense_weights": path, "input_shape": manifest.get("input_shape")}
    return small, dense.to(device), origin
