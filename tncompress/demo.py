"""The whole way once, on real data: train, compress, repair, fine-tune, measure, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tncompress.data import DataSet, load_data
from tncompress.export import save
from tncompress.finetune import Epoch, FinetuneConfig, History, finetune, train_
from tncompress.measure import Latency, evaluate, latencies, macs, num_params, recovery
from tncompress.onnx_export import export_onnx
from tncompress.planner import make_plan
from tncompress.policies import ParamsRatio
from tncompress.repair import repair
from tncompress.report import environment, milliseconds, report
from tncompress.spec import Settings, Spec
from tncompress.storage import new_directory
from tncompress.surgery import compress
from tncompress.tables import count, markdown_table, percent, ratio
from tncompress.weights import save_weights
from tncompress.zoo import build_model

if TYPE_CHECKING:
    from rich.table import Table

FORMATS = ("mps", "tucker", "cp")
MODEL, MARKER = "zoo:cnn4", "demo.json"
LATENCY_BATCH = 64


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does: ``epochs`` for the dense model, ``tune_epochs`` for each other and the control."""

    data: str = "digits"
    epochs: int = 10
    tune_epochs: int = 5
    params_ratio: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        ParamsRatio(self.params_ratio)


@dataclass(frozen=True)
class Result:
    """One format: accuracies on the test split, size, cost and speed."""

    format: str
    truncated: float
    repaired: float
    tuned: float
    recovery: float | None
    conv_params: int
    macs: int
    latency: Latency


@dataclass(frozen=True)
class Demo:
    """What the demo found. ``control`` is the dense model trained for as many epochs more as the others."""

    config: DemoConfig
    dense: float
    control: float
    conv_params: int
    macs: int
    latency: Latency
    input_shape: tuple[int, ...]
    results: tuple[Result, ...]

    @property
    def best(self) -> Result:
        """The result with the highest accuracy after fine-tuning; the fewest parameters break a tie."""
        return max(self.results, key=lambda result: (result.tuned, -result.conv_params))

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table: the dense model, then each format."""
        dense, control = percent(self.dense), percent(self.control)
        lines: list[tuple[str, ...]] = [
            ("dense", dense, "", "", "", control, "", *self._cost(self.conv_params, self.macs, self.latency))
        ]
        for r in self.results:
            back = f"{100 * r.recovery:.0f} %" if r.recovery is not None else "nothing lost"
            accuracies = dense, percent(r.truncated), percent(r.repaired), percent(r.tuned), control
            lines.append((r.format, *accuracies, back, *self._cost(r.conv_params, r.macs, r.latency)))
        return lines

    def _cost(self, conv_params: int, macs: int, latency: Latency) -> tuple[str, str, str]:
        fewer = f" ({ratio(self.conv_params, conv_params)})" if conv_params < self.conv_params else ""
        less = f" ({ratio(self.macs, macs)})" if macs < self.macs else ""
        return f"{count(conv_params)}{fewer}", f"{count(macs)}{less}", milliseconds(latency)

    @property
    def header(self) -> tuple[str, ...]:
        """The columns of :meth:`rows`."""
        accuracies = "dense", "truncated", "repaired", "fine-tuned", "dense control"
        return "", *accuracies, "recovery", "conv params", "MACs", f"latency, batch {self.input_shape[0]}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self) | {"best": self.best.format, "environment": environment()}

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        return markdown_table(self.header, self.rows()) + "\n"

    def __rich__(self) -> Table:
        from rich.table import Table

        c = self.config
        title = f"{MODEL} on {c.data}: test accuracy, {c.epochs} epochs dense, {c.tune_epochs} of fine-tuning"
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(self.header):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows():
            table.add_row(*row)
        return table


def run_demo(
    config: DemoConfig,
    out: str | Path,
    *,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Return the demo's figures and leave the best model in the new folder ``out``.

    The folder holds ``model/`` (see :func:`tncompress.save`), ``model.onnx``, ``dense.safetensors``, the
    spec as ``spec.yaml``, ``report.md``, ``report.json`` and the demo's own figures, ``demo.md`` and
    ``demo.json``.
    """
    with new_directory(out, marker=MARKER, overwrite=overwrite) as folder:
        data = load_data(config.data, data_dir=data_dir)
        dense = _train_dense(config, data, device, progress, say)
        spec = {name: _spec(config, dense, name) for name in FORMATS}
        tuned, rows = _compress_all(config, data, dense, spec, progress, say)
        x = data.example_input(LATENCY_BATCH).to(device)
        say("measuring latency")
        times = latencies([dense, *(history.model for history in tuned)], x, seconds=1.0)
        one = data.example_input().to(device)
        results = tuple(
            Result(name, *row, conv_params(h.model), macs(h.model, one), latency)
            for name, row, h, latency in zip(FORMATS, rows, tuned, times[1:], strict=True)
        )
        first, cost = tuned[0], (conv_params(dense), macs(dense, one), times[0])
        demo = Demo(config, first.accuracy_dense, first.accuracy_control, *cost, tuple(x.shape), results)  # type: ignore[arg-type]
        best = FORMATS.index(demo.best.format)
        say(f"saving and exporting the best, {demo.best.format}")
        _leave(folder, Path(out), demo, data, dense, tuned[best].model, spec[demo.best.format])
    return demo


def conv_params(model: nn.Module) -> int:
    """Return the parameters of all layers but the last, BatchNorm left out: the convolutions'."""
    layers = [m for name, m in model.named_children() if name.startswith("conv")]
    return sum(num_params(layer) for layer in layers)


def _train_dense(
    config: DemoConfig, data: DataSet, device: torch.device | str, progress: bool, say: Callable[[str], None]
) -> nn.Module:
    say(f"training {MODEL} on {config.data} ({len(data.train):,} images, {config.epochs} epochs)")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        dense = build_model(MODEL, num_classes=data.num_classes, in_channels=data.input_shape[0]).to(device)
    dense = dense.to(memory_format=torch.channels_last)  # pooling and BatchNorm are slow without, on a CPU
    loader = data.train_loader(seed=config.seed)
    settings = FinetuneConfig(epochs=config.epochs, lr=0.1, seed=config.seed)
    train_(dense, loader, settings, progress=progress, label="dense")
    return dense


def _spec(config: DemoConfig, dense: nn.Module, format: str) -> Spec:
    """Return a spec whose ratio makes up for the layers that stay dense: it holds over all convolutions."""
    draft = Spec(default=Settings(format=format, rank=ParamsRatio(config.params_ratio)))
    layers = [layer for layer in make_plan(dense, draft).layers if layer.kind != "Linear"]
    total = sum(layer.params_dense for layer in layers)
    kept = sum(layer.params_dense for layer in layers if not hasattr(layer, "format"))
    left = (config.params_ratio * total - kept) / (total - kept)
    if left <= 0:
        raise ValueError(f"a ratio of {config.params_ratio} is less than the first convolution alone")
    return Spec(default=Settings(format=format, rank=ParamsRatio(int(left * 1e4) / 1e4)))


def _compress_all(
    config: DemoConfig,
    data: DataSet,
    dense: nn.Module,
    specs: dict[str, Spec],
    progress: bool,
    say: Callable[[str], None],
) -> tuple[list[History], list[tuple[float, float, float, float | None]]]:
    """Return the history of each format, and its accuracies truncated, repaired, tuned with the recovery."""
    test = data.test_loader()
    settings = FinetuneConfig(epochs=config.tune_epochs, seed=config.seed)
    control: bool | tuple[Epoch, ...] = True
    tuned, rows = [], []
    for name, spec in specs.items():
        say(f"{name}: compressing, repairing, fine-tuning")
        small = compress(dense, spec, example_inputs=data.example_input().to(next(dense.parameters()).device))
        truncated = evaluate(small, test).accuracy
        small = repair(small, dense, data.calibration_loader())
        loader = data.train_loader(seed=config.seed + 1)
        history = finetune(
            small, loader, settings, teacher=dense, val_loader=test, control=control, progress=progress
        )
        control = history.control
        start, end, top = history.accuracy_start, history.accuracy, history.accuracy_dense
        rows.append((truncated, start, end, recovery(end, truncated, top)))  # type: ignore[arg-type]
        tuned.append(history)
    return tuned, rows  # type: ignore[return-value]


def _leave(
    folder: Path, out: Path, demo: Demo, data: DataSet, dense: nn.Module, best: nn.Module, spec: Spec
) -> None:
    dense, best, x = dense.cpu(), best.cpu(), data.example_input()
    source = {"source": MODEL, "num_classes": data.num_classes, "in_channels": data.input_shape[0]}
    save(
        best,
        folder / "model",
        source=source,
        dense_weights=out / "dense.safetensors",
        input_shape=tuple(x.shape[1:]),
    )
    save_weights(dense, folder / "dense.safetensors")
    export_onnx(best, folder / "model.onnx", x)
    spec.save(folder / "spec.yaml")
    made = report(dense, best, example_inputs=x, evaluate=lambda m: evaluate(m, data.test_loader()).accuracy)
    (folder / "report.md").write_text(made.to_markdown())
    (folder / "report.json").write_text(made.to_json())
    (folder / "demo.md").write_text(demo.to_markdown())
    (folder / MARKER).write_text(json.dumps(demo.to_dict(), indent=1))
