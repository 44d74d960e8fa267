"""How much of the accuracy fine-tuning brings back, how fast, and beside what.

    python examples/finetune_recovery.py estimate --network cnn4          # how long each part takes here
    python examples/finetune_recovery.py measure --network cnn4 --brief   # what the goals are about
    python examples/finetune_recovery.py measure --network cnn4           # all parts, or those of --parts
    python examples/finetune_recovery.py steps --network resnet20         # time and memory of a training step
    python examples/finetune_recovery.py page                             # writes docs/recovery.md

Convolution parameters are cut 4, 8 and 16 times under a budget over all layers, fitted on 1,024 unlabelled
images and repaired on them; then come epochs with labels. Beside each run stand the dense model trained for
as many epochs more, the same shape trained from scratch (SGD at 0.1), and tltorch's layers at the same
parameters with the same recipe, after their BatchNorm was taken again. The dense models were trained by
``accuracy_at_size.py train``: see ``examples/weights/README.md``. A run that is stopped goes on where it
was; a row, once there, is not measured again. Rows go to docs/recovery.jsonl, times as they were here.
"""

import argparse
import json
import math
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path

import torch
from accuracy_at_size import append, conv_params, tltorch_model
from recovery_runs import BASE, FORMATS, GOALS, PARTS, PEERS, RECIPES, SCRATCH, Run, runs_of
from recovery_steps import backwards_in_turns, steps
from torch import nn

import tncompress as tnc
from tncompress.data import load_data
from tncompress.gauge import balance_, squared_norm
from tncompress.measure import num_params
from tncompress.noise import has_bf16
from tncompress.repair import reestimate_batchnorm_
from tncompress.running import copy_model
from tncompress.slices import SliceDistillation, find_slices

IMAGES, SEEDS = 1024, {"cnn4": (0, 1, 2), "resnet20": (0,)}
KEY = ("network", "seed", "times", "format", "recipe", "of", "epoch")
HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "recovery.jsonl"
SLOWER = {"peer": 1.6, "ours": 1.2, "dense": 1.0}
"""How long a step takes over the dense one's, before any was measured."""


@dataclass
class Bench:
    """One trained network with its data, the file of results, and what is in it already."""

    network: str
    seed: int
    options: argparse.Namespace
    done: set = field(default_factory=set)

    def __post_init__(self) -> None:
        options = self.options
        self.results: Path = options.results
        self.data = load_data(options.data)
        shape = {"num_classes": self.data.num_classes, "in_channels": self.data.input_shape[0]}
        self.dense = tnc.build_model(f"zoo:{self.network}", **shape).eval()
        if (weights := options.weights / f"{self.network}-{self.seed}.safetensors").exists():
            tnc.load_weights(self.dense, weights)
        else:
            raise SystemExit(f"no {weights}: python examples/accuracy_at_size.py train --weights ...")
        self.dense.to(options.device)
        self.batches = [x for x, _ in self.data.calibration_loader(options.images, seed=self.seed)]
        self.conv, self.total = conv_params(self.dense), num_params(self.dense)
        self.rows = [row for row in read(self.results) if row.get("network") == self.network]
        self.done = {key_of(row) for row in self.rows if "accuracy" in row}
        self._measured: dict | None = None
        self._repaired: dict = {}

    def spec(self, format: str, times: int) -> dict:
        """Return the spec with ``times`` fewer convolution parameters, by a budget on the whole model."""
        params = (self.conv / times + self.total - self.conv) / self.total
        return {"default": {"format": format}, "budget": {"params": params}}

    def recipe(self, **settings) -> dict:
        """Return what every training has in common, with ``settings`` over it."""
        common = {"seed": self.seed, "mixed_precision": self.options.precision, "channels_last": True}
        return common | settings

    def start(self, format: str, times: int) -> nn.Module:
        """Return the model that training starts from; write the rows of what it was before."""
        if (format, times) in self._repaired:
            return self._repaired[format, times]
        key = {"times": times, "format": format}
        if format in PEERS:
            small = tltorch_model(self, PEERS[format], times)
        else:
            self._measured = self._measured or measured(self.dense, self.batches)
            example = self.data.example_input().to(self.options.device)
            small = tnc.compress(
                self.dense, self.spec(format, times), example_inputs=example, **self._measured
            )
        self.write_accuracy(small, **key, recipe="truncated", epoch=0)
        if format in PEERS:
            reestimate_batchnorm_(small, self.batches)
        else:
            small = tnc.repair(small, self.dense, self.batches)
        self.write_accuracy(small, **key, recipe="repaired", epoch=0)
        self._repaired = {(format, times): small}  # the last one alone
        return small

    def write_accuracy(self, model: nn.Module, **key) -> None:
        """Append the row of a model that is not trained, if it is not there."""
        if not self.is_done(**key):
            self.write(100 * tnc.evaluate(model, self.data.test_loader()).accuracy, **key)

    def is_done(self, **key) -> bool:
        """Say whether the row with this key is there."""
        return key_of({"network": self.network, "seed": self.seed} | key) in self.done

    def write(self, accuracy: float, **row) -> None:
        """Append a row."""
        row = {"network": self.network, "seed": self.seed} | row | {"accuracy": round(accuracy, 4)}
        self.done.add(key_of(row))
        append(self.results, row)
        print(*(row[name] for name in (*KEY, "accuracy") if row.get(name) is not None), flush=True)

    def is_over(self, run: Run) -> bool:
        """Say whether all of a run is measured."""
        return self.is_done(**run.key, epoch=run.of)

    # --- training

    def carry_out(self, run: Run) -> None:
        """Write a row for each epoch of a run, local ones counted; nothing where they are there."""
        if self.is_over(run):
            return
        place = "-".join(str(part) for part in (self.network, self.seed, *run.key.values()))
        place = self.results.with_name(f"{place.replace(' ', '-').replace(',', '')}.checkpoint")
        trained = self.progressive if run.recipe == "progressive" else self.tuned
        try:
            model, epochs, about = trained(run, place)
        except ValueError as error:
            print(f"{run}: {error}", flush=True)
            return
        for number, epoch, seconds in epochs:
            told = {
                "loss": epoch.loss,
                "seconds": round(seconds, 2),
                "params": conv_params(model) / self.conv,
                "precision": self.options.precision,
            }
            if not self.is_done(**run.key, epoch=number):
                self.write(100 * epoch.accuracy, **run.key, epoch=number, **told, **about)
        shutil.rmtree(place, ignore_errors=True)

    def tuned(self, run: Run, place: Path) -> tuple:
        """Return the model of a run, its epochs, and what else is told of them."""
        settings, about, of = BASE | RECIPES.get(run.recipe or "", {}), {}, run.of
        model = self.dense if run.times is None else self.start(run.format, run.times)
        if run.recipe == "scratch":
            model, settings = from_scratch(model, self.seed), BASE | SCRATCH
        elif run.format in PEERS:
            settings |= {"weight_decay": 0.0}  # like ours, their factors are not decayed
        local = of if settings.get("epochs") == 0 else settings.get("local_epochs", 0)
        if (run.recipe or "").endswith("equal time"):
            pace = self.pace(model)
            local, rest = equal_time(of, pace, whole=not str(run.recipe).startswith("local"))
            about = {
                "pace": pace,
                "time": (local * pace["local"] + rest * pace["global"]) / pace["global"] / of,
            }
        else:
            rest = of - local
        history = tnc.finetune(
            model,
            self.data.train_loader(seed=self.seed, augment=settings.pop("augment")),
            self.recipe(**settings | {"local_epochs": local, "epochs": rest}),
            teacher=self.dense if run.times is not None else None,
            val_loader=self.data.test_loader(),
            control=False,
            checkpoint=place,
        )
        epochs = numbered((*history.local, *history.epochs))
        if about:  # as many as take the time of so many global ones: what came of them all
            about["epochs"] = [local, rest]
            epochs = [(of, *epochs[-1][1:])]
        return history.model, epochs, about

    def progressive(self, run: Run, place: Path) -> tuple:
        """Return the model of a run in rounds, the epochs of all rounds, and nothing else to tell."""
        settings = BASE | {"epochs": max(1, run.of - 2)}
        made = tnc.progressive(
            self.dense,
            self.spec(run.format, run.times or 1),
            self.data.train_loader(seed=self.seed, augment=settings.pop("augment")),
            self.recipe(**settings),
            rounds=min(3, run.of),
            images=self.batches,
            val_loader=self.data.test_loader(),
            control=False,
            example_inputs=self.data.example_input().to(self.options.device),
            checkpoint=place,
        )
        return made.model, numbered([epoch for each in made.rounds for epoch in each.epochs]), {}

    def pace(self, model: nn.Module) -> dict:
        """Return the seconds of a step of the whole network, and of one of slices, taken in turns."""
        (x, y), *_ = islice(self.data.train_loader(seed=self.seed), 1)
        small, dense = copy_model(model).train(), copy_model(self.dense).eval()
        slices = SliceDistillation(copy_model(model), dense, find_slices(model)).train()
        distil = nn.KLDivLoss(reduction="batchmean", log_target=True)

        def whole() -> torch.Tensor:
            logits = small(x)
            with torch.no_grad():
                target = dense(x)
            return nn.functional.cross_entropy(logits, y) + distil(
                logits.log_softmax(1), target.log_softmax(1)
            )

        taken = backwards_in_turns({"global": whole, "local": lambda: slices(x)[0]}, self.options, rounds=6)
        return {name: min(found) for name, found in taken.items()}


def numbered(epochs: Iterable) -> list[tuple]:
    """Return each epoch between its number and the seconds since the first began."""
    seconds = accumulate(epoch.seconds for epoch in epochs)
    return [(n, epoch, taken) for n, (epoch, taken) in enumerate(zip(epochs, seconds, strict=True), 1)]


def measured(dense: nn.Module, batches: list) -> dict:
    """Return what a data-aware compression goes by."""
    calibration = tnc.calibrate(dense, batches)
    found = tnc.quick_sensitivity(dense, batches, calibration=calibration)
    return {"calibration": calibration, "sensitivity": found}


def equal_time(of: int, pace: dict, *, whole: bool) -> tuple[int, int]:
    """Return how many local and global epochs take about as long as ``of`` global ones."""
    if not whole:
        return max(1, round(of * pace["global"] / pace["local"])), 0
    return 1, max(1, round(of - pace["local"] / pace["global"]))


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


# --- how long it takes --------------------------------------------------------------------------------------


def seconds_by_kind(bench: Bench) -> dict[str, float]:
    """Return the seconds of an epoch: as rows of this network tell, else by a few steps of the dense one."""
    found = defaultdict(list)
    for row in bench.rows:
        if "seconds" in row and "accuracy" in row and row["epoch"]:
            kind = Run(row["format"], row["of"], row.get("times"), row.get("recipe")).kind
            found[kind].append(row["seconds"] / row["epoch"])
    taken = {kind: statistics.median(each) for kind, each in found.items()}
    if "dense" not in taken:
        model = copy_model(bench.dense).to(memory_format=torch.channels_last).train()
        loader = bench.data.train_loader(seed=bench.seed)
        x, y = (tensor.to(bench.options.device) for tensor in next(iter(loader)))
        loss = {"dense": lambda: nn.functional.cross_entropy(model(x), y)}
        steps = backwards_in_turns(loss, bench.options, rounds=6)
        taken["dense"] = min(steps["dense"]) * len(loader) * 1.1  # the test images come on top
    return {kind: taken.get(kind, taken["dense"] * slower) for kind, slower in SLOWER.items()}


def estimate(bench: Bench) -> None:
    """Print for each part how many epochs are left of it, and about how long they take."""
    pace, total, counted = seconds_by_kind(bench), 0.0, set()
    for part in bench.options.parts:
        left = [run for run in runs_of(part, bench.options) if not bench.is_over(run) and run not in counted]
        counted |= set(left)
        epochs = sum(run.of for run in set(left))
        seconds = sum(run.of * pace[run.kind] for run in set(left))
        total += seconds
        words = f"{len(set(left))} runs, {epochs} epochs, about {seconds / 3600:.1f} h"
        print(f"{bench.network} seed {bench.seed}, {part}: {words}", flush=True)
    print(f"{bench.network} seed {bench.seed}: about {total / 3600:.1f} h in all, beside fits", flush=True)


def measure(bench: Bench) -> None:
    """Write the rows that are not there yet, part by part."""
    estimate(bench)
    bench.write_accuracy(bench.dense, format="dense", epoch=0)
    for part in bench.options.parts:
        runs = dict.fromkeys(runs_of(part, bench.options))
        by_start = sorted(runs, key=lambda run: (run.times or 0, run.format))  # fitted once for each
        for run in by_start if part != "goals" else runs:
            bench.carry_out(run)


# --- the file and the command line --------------------------------------------------------------------------


def key_of(row: dict) -> tuple:
    """Return what a row is about."""
    return tuple(row.get(name) for name in KEY)


def read(results: Path) -> list:
    """Return the rows written so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def parsed(arguments: list | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("estimate", "measure", "steps", "page"))
    parser.add_argument("--network", default="cnn4")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the dense training; all by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--brief", action="store_true", help="the goals, with tltorch's CP, and no more")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--times", type=int, nargs="+", default=tuple(GOALS))
    parser.add_argument("--recipes", nargs="*", default=tuple(RECIPES), choices=RECIPES)
    parser.add_argument("--epochs", type=int, help="of every run, in place of those of the goals")
    precision = "bf16" if has_bf16() else "no"
    parser.add_argument("--precision", default=precision, choices=("no", "bf16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=IMAGES, help="unlabelled ones")
    parser.add_argument("--batch", type=int, default=64, help="of a timed step")
    parser.add_argument("--rounds", type=int, default=12, help="of timing a step")
    parser.add_argument("--weights", type=Path, default=HERE / "weights")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "recovery.md", help="of page")
    options = parser.parse_args(arguments)
    options.parts = options.parts or (PARTS[:2] if options.brief else PARTS)
    return options


def main(arguments: list | None = None) -> None:
    """Run the command line."""
    options = parsed(arguments)
    if options.command == "steps":
        steps(options)
    elif options.command == "page":
        from recovery_page import page

        options.out.write_text(page(read(options.results)))
    else:
        for seed in options.seeds or SEEDS.get(options.network, (0,)):
            bench = Bench(options.network, seed, options)
            estimate(bench) if options.command == "estimate" else measure(bench)


if __name__ == "__main__":
    main()
