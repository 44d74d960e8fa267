"""Accuracy at a given size, without labels or training: step by step, with seeds, beside tltorch.

    python examples/accuracy_at_size.py train                             # dense models on Fashion-MNIST
    python examples/accuracy_at_size.py measure --network cnn4 --seed 0   # hours for all; resumed if stopped
    python examples/accuracy_at_size.py time --network resnet50           # wall time and peak memory
    python examples/accuracy_at_size.py page                              # writes docs/accuracy.md

Convolution parameters, or MACs of the whole model, are cut 2, 4, 8 and 16 times, the stem included. Steps
add up: uniform truncation, a budget over all layers, data-aware truncation, repair. All of it sees 1,024
unlabelled images; accuracies are those of the 10,000 test images. Results go to docs/accuracy.jsonl.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import nn

import tncompress as tnc
from tncompress.data import load_data
from tncompress.discovery import find_layers
from tncompress.measure import macs, num_params
from tncompress.noise import has_bf16
from tncompress.repair import reestimate_batchnorm_
from tncompress.report import environment
from tncompress.running import copy_model

DATA, IMAGES = "fashion-mnist", 1024
DENSE = {"cnn4": (0, 1, 2), "resnet20": (0,)}  # seeds of the dense training
SEEDS = {"cnn4": ((0, 0), (1, 1), (2, 2)), "resnet20": ((0, 0), (0, 1), (0, 2))}  # of training, of images
EPOCHS = {"cnn4": 12, "resnet20": 20}
TIMES, BOTH = (2, 4, 8, 16), (4, 8)
FORMATS = {"mps": "mps", "cp": "cp", "tucker": "tucker", "svd": {"name": "svd", "cut": "out kw|in kh"}}
PEERS = {"tltorch CP": "CP", "tltorch Tucker": "Tucker", "tltorch TT": "TT"}
BOUND = "budget's ranks, aware + BatchNorm"
WEIGHED = "repair, weighed by gradients"
PARTS = ("goal", "main", "formats", "macs", "gradients")
HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "accuracy.jsonl"


class Bench:
    """One trained network, its calibration images and test split, and the file that results go to."""

    def __init__(
        self,
        network: str,
        seeds: tuple[int, int],
        weights: Path,
        results: Path,
        *,
        brief: bool = False,
        formats: Iterable[str] | None = None,
    ) -> None:
        self.network, self.seeds, self.results, self.brief = network, seeds, results, brief
        self.formats = {name: FORMATS[name] for name in formats or FORMATS}
        self.data = load_data(DATA)
        self.dense = tnc.build_model(f"zoo:{network}", num_classes=10, in_channels=1).eval()
        tnc.load_weights(self.dense, weights / f"{network}-{seeds[0]}.safetensors")
        self.dense.to(memory_format=torch.channels_last)  # faster on a CPU
        self.images = [x for x, _ in self.data.calibration_loader(IMAGES, seed=seeds[1])]
        self.example = self.data.example_input()
        self.done = {key_of(row) for row in read(results)}
        self.dense_outputs = self.outputs(self.dense)
        self._refuse_rows_of_other_weights()
        self.conv, self.total = conv_params(self.dense), num_params(self.dense)
        self.macs = macs(self.dense, self.example)
        self.calibration = tnc.calibrate(self.dense, self.images)
        self.sensitivity = tnc.quick_sensitivity(self.dense, self.images, calibration=self.calibration)

    def _refuse_rows_of_other_weights(self) -> None:
        logits, labels = self.dense_outputs
        own = round(100 * float((logits.argmax(1) == labels).double().mean()), 4)
        about = key_of({"network": self.network, "seeds": self.seeds, "step": "dense"})
        for row in read(self.results):
            if key_of(row) == about and abs(row["accuracy"] - own) > 0.02:  # rounding turns an image or two
                raise SystemExit(
                    f"{self.results} holds rows of {self.network} with an accuracy of {row['accuracy']}, "
                    f"these weights have {own}: give the weights of those rows, or another --results"
                )

    def outputs(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the test images, and their labels."""
        with torch.inference_mode():
            found = [(model(x), y) for x, y in self.data.test_loader()]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def budget(self, resources: str, times: int) -> dict:
        """Return the budget on the whole model with ``times`` fewer convolution parameters, or MACs."""
        params = (self.conv / times + self.total - self.conv) / self.total
        return {
            "params": {"params": params},
            "macs": {"macs": 1 / times},
            "both": {"params": params, "macs": 1 / times},
        }[resources]

    def write(self, model: nn.Module, seconds: float, **key) -> None:
        """Measure ``model`` on the test images, and append a row."""
        logits, labels = self.outputs(model)
        dense, _ = self.dense_outputs
        missing = (logits - dense).square().sum() / (dense - dense.mean(0)).square().sum()
        row = {"network": self.network, "seeds": self.seeds} | key
        row |= {
            "accuracy": round(100 * float((logits.argmax(1) == labels).double().mean()), 4),
            "output_error": float(missing.sqrt()),
            "conv_params": conv_params(model) / self.conv,
            "macs": macs(model, self.example) / self.macs,
            "seconds": round(seconds, 2),
        }
        self.done.add(key_of(row))
        append(self.results, row)
        shown = {
            name: value for name, value in row.items() if name in ("resource", "times", "format", "step")
        }
        print(self.network, self.seeds, *shown.values(), row["accuracy"], f"{seconds:.0f}s", flush=True)

    def refuse(self, key: dict, step: str, reason: str) -> None:
        """Append a row that says why there is nothing to measure."""
        row = {"network": self.network, "seeds": self.seeds} | key | {"step": step, "no": reason}
        if key_of(row) not in self.done:
            self.done.add(key_of(row))
            append(self.results, row)

    def is_done(self, **key) -> bool:
        """Say whether the row with this key has been measured."""
        return key_of({"network": self.network, "seeds": self.seeds} | key) in self.done

    def with_batchnorm(self, model: nn.Module) -> nn.Module:
        """Return a copy with BatchNorm's statistics taken again."""
        copied = copy_model(model)
        reestimate_batchnorm_(copied, self.images)
        return copied


def measure(bench: Bench, part: str) -> None:
    """Write the rows of one network and pair of seeds, those of one part, that are not there yet.

    The ``goal`` is all formats together under a budget; then come MPS and tltorch (``main``), each other
    format by itself (``formats``), and each at fewer MACs (``macs``). What gradients of the dense model
    would bring in repair is the part ``gradients``.
    """
    first = {"mps": FORMATS["mps"]}
    rest = {name: fmt for name, fmt in bench.formats.items() if name not in first}
    if not bench.is_done(step="dense"):
        bench.write(bench.dense, 0.0, step="dense")
    if part == "goal":
        budgets(bench, "params", TIMES, {"auto": "auto"})
        budgets(bench, "both", BOTH, {"auto": "auto"})
    elif part == "main":
        uniform(bench, "params", TIMES, first)
        peers(bench, TIMES)
        budgets(bench, "macs", TIMES, {"auto": "auto"})
        budgets(bench, "params", TIMES, first)
    elif part == "formats":
        budgets(bench, "params", TIMES, rest)
        uniform(bench, "params", TIMES, rest)
    elif part == "macs":
        budgets(bench, "macs", TIMES, bench.formats)
        uniform(bench, "macs", TIMES, bench.formats)
    else:
        repaired_by_gradients(bench, [("params", times) for times in TIMES] + [("both", t) for t in BOTH])


def budgets(bench: Bench, resource_name: str, times_all: tuple[int, ...], formats: dict) -> None:
    """Write the rows of the steps under a budget."""
    for name, fmt in formats.items():
        for times in times_all:
            key = {"resource": resource_name, "times": times, "format": name}
            spec = {"default": {"format": fmt}, "budget": bench.budget(resource_name, times)}
            if not bench.brief and not bench.is_done(**key, step="budget + BatchNorm"):
                truncated(bench, spec, key, "budget")
            if resource_name == "params" and not bench.brief and not bench.is_done(**key, step=BOUND):
                fitted_at_ranks(bench, spec, key)
            if bench.is_done(**key, step="repair"):
                continue
            started = time.perf_counter()
            options = {"calibration": bench.calibration, "sensitivity": bench.sensitivity}
            aware = attempt(bench, spec, key, "aware", **options)
            if aware is None:
                continue
            bench.write(aware, time.perf_counter() - started, **key, step="aware")
            if not bench.brief:
                bench.write(bench.with_batchnorm(aware), 0.0, **key, step="aware + BatchNorm")
            started = time.perf_counter()
            repaired = tnc.repair(aware, bench.dense, bench.images)
            bench.write(repaired, time.perf_counter() - started, **key, step="repair")


def repaired_by_gradients(bench: Bench, settings: list[tuple[str, int]]) -> None:
    """Write the rows of a repair that weighs outputs by the gradients of the dense model's own labels."""
    wanted = {(r, t): {"resource": r, "times": t, "format": "auto"} for r, t in settings}
    missing = {at: key for at, key in wanted.items() if not bench.is_done(**key, step=WEIGHED)}
    if not missing:
        return
    moments = tnc.calibrate(bench.dense, bench.images, gradients="teacher", gradient_batches=IMAGES)
    options = {"calibration": bench.calibration, "sensitivity": bench.sensitivity}
    for at, key in missing.items():
        spec = {"default": {"format": "auto"}, "budget": bench.budget(*at)}
        aware = attempt(bench, spec, key, WEIGHED, **options)
        if aware is not None:
            started = time.perf_counter()
            repaired = tnc.repair(aware, bench.dense, bench.images, calibration=moments)
            bench.write(repaired, time.perf_counter() - started, **key, step=WEIGHED)


def fitted_at_ranks(bench: Bench, spec: dict, key: dict) -> None:
    """Write the row of the plain budget's formats and ranks with data-aware fits: what these alone bring."""
    try:
        plan = tnc.make_plan(bench.dense, spec, example_inputs=bench.example)
    except ValueError as error:
        bench.refuse(key, BOUND, str(error))
        return
    rules = [
        {"pattern": f"re:^{re.escape(p.name)}$", "format": p.format, "rank": {"fixed": list(p.ranks)}}
        for p in plan.compressed
    ]
    rules += [{"pattern": "*", "keep_dense": True}]
    fitted = tnc.compress(bench.dense, {"rules": rules}, calibration=bench.calibration)
    bench.write(bench.with_batchnorm(fitted), 0.0, **key, step=BOUND)


def uniform(bench: Bench, resource_name: str, times_all: tuple[int, ...], formats: dict) -> None:
    """Write the rows of truncation at one ratio for all layers: plain, data-aware, and repaired."""
    for name, fmt in formats.items():
        for times in times_all:
            key = {"resource": resource_name, "times": times, "format": name}
            if bench.is_done(**key, step="uniform, aware, repair"):
                continue
            spec = uniform_spec(bench, fmt, resource_name, times)
            if spec is None:
                bench.refuse(key, "uniform", "the stem alone takes more")
                continue
            truncated(bench, spec, key, "uniform")
            aware = tnc.compress(bench.dense, spec, calibration=bench.calibration)
            bench.write(aware, 0.0, **key, step="uniform, aware")
            repaired = tnc.repair(aware, bench.dense, bench.images)
            bench.write(repaired, 0.0, **key, step="uniform, aware, repair")


def truncated(bench: Bench, spec: dict, key: dict, step: str) -> None:
    """Write the rows of plain truncation with ``spec``, and of BatchNorm taken again after it."""
    started = time.perf_counter()
    small = attempt(bench, spec, key, step)
    if small is None:
        return
    bench.write(small, time.perf_counter() - started, **key, step=step)
    bench.write(bench.with_batchnorm(small), 0.0, **key, step=f"{step} + BatchNorm")


def attempt(bench: Bench, spec: dict, key: dict, step: str, **options) -> nn.Module | None:
    """Return the compressed model, or None, with a row that says why, where the budget can't be met."""
    try:
        return tnc.compress(bench.dense, spec, example_inputs=bench.example, **options)
    except ValueError as error:
        bench.refuse(key, step, str(error))
        return None


def uniform_spec(bench: Bench, fmt, resource_name: str, times: int) -> dict | None:
    """Return the spec whose one ratio for all layers but the stem comes nearest to the cut, from below."""
    stem = next(layer for layer in find_layers(bench.dense))
    kept, whole = stem.params, bench.conv

    def spec_at(ratio):
        return {"default": {"format": fmt, "rank": {"params_ratio": ratio}}, "keep_dense": ["stem", "fc"]}

    ratio = (whole / times - kept) / (whole - kept)
    if resource_name == "params":
        return spec_at(ratio) if ratio > 0 else None
    low, high = 0.0, min(1.0, 1.5 / times)
    for _ in range(6):
        middle = (low + high) / 2
        plan = tnc.make_plan(bench.dense, spec_at(middle), example_inputs=bench.example)
        low, high = (middle, high) if plan.macs <= bench.macs / times else (low, middle)
    return spec_at(low) if low > 0 else None


def peers(bench: Bench, times_all: tuple[int, ...]) -> None:
    """Write the rows of tltorch's decompositions at as many parameters, before and after BatchNorm."""
    for name, factorization in PEERS.items():
        for times in times_all:
            key = {"resource": "params", "times": times, "format": name}
            if bench.is_done(**key, step="uniform + BatchNorm"):
                continue
            started = time.perf_counter()
            small = tltorch_model(bench, factorization, times)
            bench.write(small, time.perf_counter() - started, **key, step="uniform")
            bench.write(bench.with_batchnorm(small), 0.0, **key, step="uniform + BatchNorm")


def tltorch_model(bench: Bench, factorization: str, times: int) -> nn.Module:
    """Return a copy whose convolutions but the stem are tltorch's, at most at the wanted parameters.

    tltorch takes a fraction of the parameters as its rank, and meets it roughly: the fraction is bisected.
    """
    import tensorly
    import tltorch

    tensorly.set_backend("pytorch")  # which only the first import of tltorch does by itself
    copied = copy_model(bench.dense)
    convs = [layer for layer in find_layers(copied) if isinstance(layer.module, nn.Conv2d)][1:]
    stem = next(layer for layer in find_layers(copied)).params
    limit = (bench.conv / times - stem) / (bench.conv - stem)
    for layer in convs:
        dense = layer.module

        def build(fraction, *, fit, dense=dense):
            return tltorch.FactorizedConv.from_conv(
                dense,
                rank=fraction,
                factorization=factorization,
                implementation="reconstructed",
                decompose_weights=fit,
            )

        low, high = 0.0, 2.0
        for _ in range(12):
            middle = (low + high) / 2
            size = sum(p.numel() for p in build(middle, fit=False).parameters())
            low, high = (middle, high) if size <= limit * dense.weight.numel() else (low, middle)
        parent, _, child = layer.name.rpartition(".")
        setattr(copied.get_submodule(parent), child, build(low or 1e-3, fit=True))
    return copied.eval()


def conv_params(model: nn.Module) -> int:
    """Return the parameters of all convolutions: of what is not a linear layer or BatchNorm."""
    others = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.batchnorm._BatchNorm)]
    return num_params(model) - sum(num_params(module) for module in others)


def take_time(network: str, results: Path) -> None:
    """Write the wall time of each step at 4x, and the peak memory of the process."""
    row = {"network": network, "step": "time", "environment": environment()}
    if network == "resnet50":
        dense, images = tnc.build_model("torchvision:resnet50").eval(), IMAGES
        batches = [torch.randn(32, 3, 224, 224) for _ in range(images // 32)]
    else:
        data = load_data(DATA)
        dense = tnc.build_model(f"zoo:{network}", num_classes=10, in_channels=1).eval()
        batches = [x for x, _ in data.calibration_loader(IMAGES)]
    spec = {"default": {"format": "auto"}, "budget": {"params": 0.25}}

    def timed(name, make):
        started = time.perf_counter()
        made = make()
        row[name] = round(time.perf_counter() - started, 1)
        print(network, name, row[name], f"peak {peak():.1f} GiB", flush=True)
        return made

    timed("plan without data", lambda: tnc.make_plan(dense, spec))
    calibration = timed("calibrate", lambda: tnc.calibrate(dense, batches))
    found = timed("sensitivity", lambda: tnc.quick_sensitivity(dense, batches, calibration=calibration))
    plan = timed("plan", lambda: tnc.make_plan(dense, spec, calibration=calibration, sensitivity=found))
    small = timed("compress", lambda: tnc.compress(dense, plan, calibration=calibration))
    timed("repair", lambda: tnc.repair(small, dense, batches))
    row["peak_gib"] = round(peak(), 2)
    append(results, row)


def peak() -> float:
    """Return the largest resident set of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def train(weights: Path) -> None:
    """Train the dense models that are not there yet, in bf16 where there is that, with the command line."""
    weights.mkdir(parents=True, exist_ok=True)
    config = weights / "train.yaml"
    config.write_text(f"mixed_precision: {'bf16' if has_bf16() else 'no'}\n")
    for network, seeds in DENSE.items():
        for seed in seeds:
            out = weights / f"{network}-{seed}.safetensors"
            if not out.exists():
                options = {"model": f"zoo:{network}", "data": DATA, "epochs": EPOCHS[network], "seed": seed}
                words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
                words += ["--config", str(config), "--out", str(out)]
                subprocess.run([sys.executable, "-m", "tncompress", "train", *words], check=True)


def key_of(row: dict) -> tuple:
    """Return what a row is about."""
    return tuple(str(row.get(name)) for name in ("network", "seeds", "resource", "times", "format", "step"))


def read(results: Path) -> Iterator[dict]:
    """Yield the rows written so far."""
    if results.exists():
        for line in results.read_text().splitlines():
            yield {**(row := json.loads(line)), "seeds": tuple(row.get("seeds", ()))}


def append(results: Path, row: dict) -> None:
    """Add a row to the file."""
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("train", "measure", "time", "page"))
    parser.add_argument("--network", choices=(*DENSE, "resnet50"))
    parser.add_argument("--seed", type=int, help="number of the pair of seeds; all by default")
    parser.add_argument("--weights", type=Path, default=HERE / "weights")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=PARTS, help="all, in this order, by default")
    parser.add_argument("--brief", action="store_true", help="leave out the steps before data-aware")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="of the parts formats and macs; all")
    options = parser.parse_args()
    if options.command == "train":
        train(options.weights)
    elif options.command == "time":
        take_time(options.network or "resnet20", options.results)
    elif options.command == "measure":
        parts = [options.part] if options.part else PARTS
        for part, network in product(parts, [options.network] if options.network else DENSE):
            for number, seeds in enumerate(SEEDS[network]):
                if options.seed in (None, number):
                    places = options.weights, options.results
                    chosen = {"brief": options.brief, "formats": options.formats}
                    measure(Bench(network, seeds, *places, **chosen), part)
    else:
        from accuracy_page import page

        (HERE.parent / "docs" / "accuracy.md").write_text(page(list(read(options.results))))


if __name__ == "__main__":
    main()
