"""How much of the accuracy fine-tuning brings back, how fast, and beside what.

    python examples/finetune_recovery.py measure --network cnn4 --weights accuracy-weights
    python examples/finetune_recovery.py measure --recipes global local hybrid --times 8 --formats mps
    python examples/finetune_recovery.py steps --network resnet20       # time and memory of a training step
    python examples/finetune_recovery.py page > recovery.md

Convolution parameters are cut 4, 8 and 16 times under a budget over all layers, fitted on 1,024 unlabelled
images and repaired on them; then come epochs with labels. Beside each run stand the dense model trained for
as many epochs more, the same shape trained from scratch (at five times the learning rate), and tltorch's
layers at the same parameters with the same recipe, after their BatchNorm statistics were taken again. The
dense models are those of ``accuracy_at_size.py train``. A run that is stopped goes on where it was; a row,
once there, is not measured again.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accuracy_at_size import append, conv_params, tltorch_model
from torch import nn

import tncompress as tnc
from tncompress.data import load_data
from tncompress.gauge import balance_, squared_norm
from tncompress.measure import macs, num_params, peak_memory
from tncompress.repair import reestimate_batchnorm_
from tncompress.report import environment
from tncompress.running import copy_model

IMAGES, TIMES, EPOCHS, SEEDS = 1024, (4, 8, 16), (3, 5), (0, 1, 2)
FORMATS = ("mps", "tucker", "cp", "auto")
PEERS = {"tltorch CP": "CP", "tltorch Tucker": "Tucker", "tltorch TT": "TT"}
RECIPES = {
    "global": {},
    "local": {"epochs": 0},
    "hybrid": {"local_epochs": 1},
    "features": {"features": 0.1},
    "frobenius": {"frobenius_decay": 5e-4},
    "balanced": {"balance": True},
    "rebalanced": {"balance": True, "rebalance_every": 200},
    "adamw": {"optimizer": "adamw"},
    "ema": {"ema": 0.998},
}
KEY = ("network", "seed", "times", "format", "recipe", "of", "epoch")
RESULTS = Path(__file__).parent.parent / "docs" / "recovery.jsonl"


@dataclass
class Bench:
    """One trained network with its data, the file of results, and what is in it already."""

    network: str
    seed: int
    weights: Path
    results: Path
    data_name: str = "fashion-mnist"
    images: int = IMAGES
    done: set = field(default_factory=set)

    def __post_init__(self) -> None:
        self.data = load_data(self.data_name)
        shape = {"num_classes": self.data.num_classes, "in_channels": self.data.input_shape[0]}
        self.dense = tnc.build_model(f"zoo:{self.network}", **shape).eval()
        tnc.load_weights(self.dense, self.weights / f"{self.network}-{self.seed}.safetensors")
        self.batches = [x for x, _ in self.data.calibration_loader(self.images, seed=self.seed)]
        self.conv, self.total = conv_params(self.dense), num_params(self.dense)
        self.done = {tuple(row.get(name) for name in KEY) for row in read(self.results)}
        self._measured = None

    def budget(self, times: int) -> dict:
        """Return the budget on the whole model with ``times`` fewer convolution parameters."""
        return {"params": (self.conv / times + self.total - self.conv) / self.total}

    def compressed(self, format: str, times: int) -> nn.Module:
        """Return the model within the budget, fitted on the unlabelled images."""
        if self._measured is None:
            calibration = tnc.calibrate(self.dense, self.batches)
            found = tnc.quick_sensitivity(self.dense, self.batches, calibration=calibration)
            self._measured = {"calibration": calibration, "sensitivity": found}
        spec = {"default": {"format": format}, "budget": self.budget(times)}
        return tnc.compress(self.dense, spec, example_inputs=self.data.example_input(), **self._measured)

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test images, in percent."""
        return 100 * tnc.evaluate(model, self.data.test_loader()).accuracy

    def is_done(self, **key) -> bool:
        """Say whether the row with this key is there."""
        whole = {"network": self.network, "seed": self.seed} | key
        return tuple(whole.get(name) for name in KEY) in self.done

    def write(self, accuracy: float, **row) -> None:
        """Append a row."""
        row = {"network": self.network, "seed": self.seed} | row | {"accuracy": round(accuracy, 4)}
        self.done.add(tuple(row.get(name) for name in KEY))
        append(self.results, row)
        print(*(row[name] for name in (*KEY, "accuracy") if row.get(name) is not None), flush=True)

    def tune(self, model: nn.Module, settings: dict, epochs: int, *, dense: bool = False, **key) -> None:
        """Write a row for each epoch of training ``model``, ``epochs`` in all, local ones counted."""
        if self.is_done(**key, of=epochs, epoch=epochs):
            return
        local = epochs if settings.get("epochs") == 0 else settings.get("local_epochs", 0)
        config = {"seed": self.seed} | settings | {"local_epochs": local, "epochs": epochs - local}
        place = self.results.with_name(
            "-".join(str(part).replace(" ", "-") for part in (self.network, self.seed, *key.values(), epochs))
        )
        place = place.with_name(f"{place.name}.checkpoint")
        history = tnc.finetune(
            model,
            self.data.train_loader(seed=self.seed),
            config,
            teacher=None if dense else self.dense,
            val_loader=self.data.test_loader(),
            control=False,
            checkpoint=place,
        )
        seconds = 0.0
        for number, epoch in enumerate((*history.local, *history.epochs), 1):
            seconds += epoch.seconds
            if not self.is_done(**key, of=epochs, epoch=number):
                told = {
                    "loss": epoch.loss,
                    "seconds": round(seconds, 1),
                    "params": conv_params(model) / self.conv,
                }
                self.write(100 * epoch.accuracy, **key, of=epochs, epoch=number, **told)
        shutil.rmtree(place, ignore_errors=True)


def measure(
    bench: Bench, formats: list, times_all: list, recipes: list, epochs_all: list, peers: bool
) -> None:
    """Write the rows that are not there yet."""
    if not bench.is_done(format="dense", epoch=0):
        bench.write(bench.accuracy(bench.dense), format="dense", epoch=0)
    for epochs in epochs_all:
        bench.tune(bench.dense, {}, epochs, dense=True, format="dense control")
    for times in times_all:
        for format in formats:
            ours(bench, format, times, recipes, epochs_all)
        for name in PEERS if peers else ():
            theirs(bench, name, times, epochs_all)


def ours(bench: Bench, format: str, times: int, recipes: list, epochs_all: list) -> None:
    """Write the rows of one format at one size: truncated, repaired, tuned, and trained from scratch."""
    key = {"times": times, "format": format}
    runs = [(name, epochs) for name in (*recipes, "scratch") for epochs in epochs_all]
    if all(bench.is_done(**key, recipe=name, of=epochs, epoch=epochs) for name, epochs in runs):
        return
    try:
        small = bench.compressed(format, times)
    except ValueError as error:
        print(f"{format} at {times}x: {error}", flush=True)
        return
    if not bench.is_done(**key, recipe="truncated", epoch=0):
        bench.write(bench.accuracy(small), **key, recipe="truncated", epoch=0)
    repaired = tnc.repair(small, bench.dense, bench.batches)
    if not bench.is_done(**key, recipe="repaired", epoch=0):
        bench.write(bench.accuracy(repaired), **key, recipe="repaired", epoch=0)
    for name, epochs in runs:
        if name == "scratch":
            bench.tune(from_scratch(repaired, bench.seed), {"lr": 0.1}, epochs, **key, recipe=name)
        else:
            bench.tune(repaired, RECIPES[name], epochs, **key, recipe=name)


def theirs(bench: Bench, name: str, times: int, epochs_all: list) -> None:
    """Write the rows of tltorch's layers; like ours, their factors are not decayed."""
    key = {"times": times, "format": name}
    if all(bench.is_done(**key, recipe="global", of=epochs, epoch=epochs) for epochs in epochs_all):
        return
    small = tltorch_model(bench, PEERS[name], times)
    if not bench.is_done(**key, recipe="truncated", epoch=0):
        bench.write(bench.accuracy(small), **key, recipe="truncated", epoch=0)
    reestimate_batchnorm_(small, bench.batches)
    if not bench.is_done(**key, recipe="repaired", epoch=0):
        bench.write(bench.accuracy(small), **key, recipe="repaired", epoch=0)
    for epochs in epochs_all:
        bench.tune(small, {"weight_decay": 0.0}, epochs, **key, recipe="global")


def from_scratch(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy with random weights: kernels as large as those of He et al. (2015), bonds balanced."""
    fresh = copy_model(model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in fresh.modules():
            if isinstance(module, tnc.TNConv):
                for factor in module.factors:
                    nn.init.normal_(factor)
                out = module.geometry.out_channels
                scale = math.sqrt(2 * out / float(squared_norm(module)))
                module.factors[0].mul_(scale)
                if module.bias is not None:
                    module.bias.zero_()
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        balance_(fresh)
    return fresh


def steps(network: str, results: Path, batch: int = 64) -> None:
    """Print and append what a training step takes, dense and at a quarter of the MACs, in turns."""
    dense = tnc.build_model(f"zoo:{network}", num_classes=10, in_channels=1)
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
    small = tnc.compress(dense, {"default": {"format": "auto"}, "budget": {"macs": 0.25}}, example_inputs=x)
    models = {"dense": dense.train(), "compressed": small.train()}
    taken: dict[str, list] = {name: [] for name in models}
    for round_ in range(12):
        for name, model in models.items():
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
            started = time.perf_counter()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if round_ > 1:
                taken[name].append(time.perf_counter() - started)
    row = {"network": network, "format": "step", "batch": batch, "environment": environment()}
    row |= {f"seconds {name}": statistics.median(found) for name, found in taken.items()}
    row |= {f"macs {name}": macs(model, x) for name, model in models.items()}
    row |= {f"forward bytes {name}": peak_memory(model, x) for name, model in models.items()}
    append(results, row)
    print(json.dumps(row, indent=1))


def page(rows: list) -> str:
    """Return the tables as Markdown: mean over seeds, and the largest distance from it."""
    found = defaultdict(list)
    for row in rows:
        if "accuracy" in row:
            found[tuple(row.get(name) for name in KEY if name != "seed")].append(row["accuracy"])
    lines = ["| network | fewer parameters | format | recipe | epochs | after | accuracy, % | seeds |"]
    lines.append("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |")
    for key, values in sorted(found.items(), key=lambda item: [str(part) for part in item[0]]):
        network, times, format, recipe, of, epoch = key
        mean = statistics.mean(values)
        spread = max(abs(value - mean) for value in values)
        shown = network, f"{times}x" if times else "", format, recipe or "", of or "", epoch
        lines.append(f"| {' | '.join(map(str, shown))} | {mean:.2f} ± {spread:.2f} | {len(values)} |")
    return "\n".join(lines) + "\n"


def read(results: Path) -> list:
    """Return the rows written so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main(arguments: list | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("measure", "steps", "page"))
    parser.add_argument("--network", default="cnn4")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--times", type=int, nargs="+", default=TIMES)
    parser.add_argument("--recipes", nargs="*", default=("global",), choices=RECIPES)
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, help="one run for each number")
    parser.add_argument("--no-peers", action="store_true", help="leave out tltorch")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=IMAGES, help="unlabelled ones")
    parser.add_argument("--weights", type=Path, default=Path("accuracy-weights"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.command == "steps":
        steps(options.network, options.results)
    elif options.command == "page":
        print(page(read(options.results)), end="")
    else:
        for seed in options.seeds:
            bench = Bench(
                options.network, seed, options.weights, options.results, options.data, options.images
            )
            lists = options.formats, options.times, options.recipes, options.epochs
            measure(bench, *lists, not options.no_peers)


if __name__ == "__main__":
    main()
