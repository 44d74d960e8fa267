"""The command that looks at every kernel across every cut: atlas."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import tncompress as tnc
from tncompress import cli_options as cli
from tncompress.atlas import LOSSES, MEASURES
from tncompress.kernel_spectra import CONTROLS
from tncompress.storage import check_writable, new_directory, new_file

MARKER = "atlas.json"
_LOSSES = ",".join(f"{loss:g}" for loss in LOSSES)


@cli.guarded
def atlas(
    model: cli.ModelOption,
    weights: cli.WeightsOption = None,
    data: cli.MaybeDataOption = None,
    calibration: cli.CalibrationOption = None,
    calibrate: cli.CalibrateOption = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Beside: random and shuffled kernels of the same shapes.")
    ] = False,
    linear: Annotated[bool, typer.Option("--linear", help="Linear layers, too.")] = False,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="As in the spec: depthwise, subclasses ...")
    ] = None,
    losses: Annotated[
        str, typer.Option("--losses", help="Norm losses to state ranks for, with commas between them.")
    ] = _LOSSES,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A new folder for page, figures and tables; or .json, .html, .md, .csv."),
    ] = None,
    data_dir: cli.DataDirOption = None,
    device: cli.DeviceOption = "cpu",
    seed: cli.SeedOption = 0,
    as_json: cli.JsonOption = False,
    overwrite: cli.OverwriteOption = False,
    debug: cli.DebugOption = False,
) -> None:
    """Show how correlated each kernel is across each cut of its legs: spectra, entropies, ranks.

    Example: `tncompress atlas --model zoo:resnet20 --weights w.safetensors --controls --out atlas`
    """
    if out is not None:
        _check_out(out, overwrite=overwrite)
    asked = _numbers(losses)
    images = cli.open_data(data, data_dir)
    moments = cli.moments_for(calibration, calibrate, images, seed=seed)
    dense, _ = cli.open_model(model, weights, images)
    made = tnc.atlas(
        dense.to(cli.pick_device(device)),
        calibration=moments,
        controls=CONTROLS if controls else (),
        include=include or (),
        linear=linear,
        losses=asked,
        seed=seed,
        progress=not as_json,
    )
    if out is not None:
        _write(made, out, f"Cut atlas of {model}", overwrite=overwrite)
    cli.show(made, as_json=as_json)
    if out is not None:
        cli.say(f"saved in {out}")
    if weights is None:
        cli.say("no --weights: what was looked at are random weights")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--losses are numbers with commas between them, got {text!r}") from None


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Raise now what :func:`_write` would raise of the place, before long work."""
    if out.suffix in _WRITERS:
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder: name a file in it")
        if out.exists() and not overwrite:
            raise FileExistsError(f"{out} is there already: choose another name, or overwrite it")
    elif out.suffix:
        raise ValueError(f"--out is a folder, or a file that ends in {', '.join(_WRITERS)}, got {out}")
    else:
        check_writable(out, marker=MARKER, overwrite=overwrite)


def _write(made: tnc.CutAtlas, out: Path, title: str, *, overwrite: bool) -> None:
    if out.suffix in _WRITERS:
        with new_file(out, overwrite=overwrite) as fresh:
            _WRITERS[out.suffix](made, fresh, title)
        return
    with new_directory(out, marker=MARKER, overwrite=overwrite) as folder:
        for suffix, write in _WRITERS.items():
            write(made, folder / f"atlas{suffix}", title)
        for metric in made.metrics:
            end = "" if metric == "norm" else "-data"
            made.plot_spectra(metric=metric).savefig(folder / f"spectra{end}.png", dpi=150)
            made.plot_entropy(metric=metric).savefig(folder / f"entropy{end}.png", dpi=150)
            for measure in MEASURES:
                figure = made.plot_heatmap(measure, metric=metric)
                figure.savefig(folder / f"heatmap-{measure}{end}.png", dpi=150)


def _csv(made: tnc.CutAtlas, path: Path, title: str) -> None:
    columns = made.columns()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


_WRITERS: dict[str, Callable[[tnc.CutAtlas, Path, str], None]] = {
    ".json": lambda made, path, title: made.save(path),
    ".html": lambda made, path, title: made.save_html(path, title),
    ".md": lambda made, path, title: _text_to(path, f"# {title}\n\n{made.to_markdown()}"),
    ".csv": _csv,
}


def _text_to(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
