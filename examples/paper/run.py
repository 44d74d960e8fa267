"""The paper's experiment: truncate trained kernels along cuts, look at norm and accuracy, train again.

    python examples/paper/run.py --network cnn4 --data fashion-mnist --seeds 0 1 2      # two cores: an hour
    python examples/paper/run.py --network resnet50 --data cifar100 --setting full       # a GPU
    python examples/paper/run.py page                                                    # docs/science.md

Singh, Jahromi, Orus, "Tensor network compressibility of convolutional models", arXiv 2403.14379: a four-
layer CNN and ResNet-50 on CIFAR-10 and CIFAR-100. Each seed trains a dense network (or takes its weights
from ``--weights``), makes its atlas, sweeps every layer by every cut by several ranks, and trains
truncated networks again, freely and held in factors, beside the dense control. Whatever was measured
stays in ``--out``: the same command goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tncompress as tnc
from tncompress.data import DataSet, load_data
from tncompress.noise import has_bf16
from tncompress.outputs import Images
from tncompress.report import environment

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
NETWORKS = ("cnn4", "resnet20", "resnet50")
DATA = ("fashion-mnist", "cifar10", "cifar100", "digits")
TRAINED = {"cnn4": 12, "resnet20": 20, "resnet50": 60}  # epochs of the dense training
CALIBRATION = 1024  # unlabelled images for BatchNorm's statistics
AGAIN = (  # cuts, and the part of the full rank that is left, of all layers together
    (("out|rest",), 0.25),
    (("out kw|in kh",), 0.1),
    (("out|rest", "in|rest"), 0.25),
)


@dataclass(frozen=True)
class Setting:
    """How much is measured; everything else is the same."""

    fractions: tuple[float, ...]
    test_images: int | None
    again: int
    epochs: int


SETTINGS = {
    "cpu": Setting((0.05, 0.1, 0.2, 0.3, 0.5, 0.75), None, 3, 3),
    "brief": Setting((0.1, 0.25, 0.5), 2000, 2, 3),
    "full": Setting((0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9), None, 3, 10),
}


@dataclass(frozen=True)
class Experiment:
    """One trained network, its data, and the folder that keeps what was measured."""

    network: str
    data: str
    seed: int
    setting: Setting
    weights: Path
    out: Path
    device: str
    workers: int

    @property
    def folder(self) -> Path:
        """Where the results of this network, data set and seed lie."""
        return self.out / f"{self.network}-{self.data}-{self.seed}"

    def run(self, *, train_again: bool = True) -> None:
        """Carry out what is not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        images = load_data(self.data)
        model = self.trained(images)
        if not (self.folder / "atlas.json").exists():
            atlas = tnc.atlas(model.cpu(), controls=("random", "shuffled"), seed=self.seed)
            atlas.save(self.folder / "atlas.json")
        model.to(self.device)
        self.swept(model, images, "sweep", fractions=self.setting.fractions)
        if train_again:
            for number, (cuts, fraction) in enumerate(AGAIN[: self.setting.again]):
                again: dict[str, Any] = {"layers": "all", "cuts": [cuts], "fractions": (fraction,)}
                again["retrain"] = {"epochs": self.setting.epochs, "mixed_precision": self.precision}
                again["train_loader"] = images.train_loader(seed=self.seed)
                self.swept(model, images, f"again-{number}", **again)
        about = {"network": self.network, "data": self.data, "seed": self.seed} | environment(self.device)
        (self.folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")

    @property
    def precision(self) -> str:
        """Autocast of training: bf16 where the device computes in it."""
        return "bf16" if self.device == "cpu" and has_bf16() else "auto"

    def trained(self, images: DataSet) -> torch.nn.Module:
        """Return the dense network, trained with the command line if there are no weights of it."""
        path = self.weights / f"{self.network}-{self.seed}.safetensors"
        if self.data != "fashion-mnist":
            path = self.weights / f"{self.network}-{self.data}-{self.seed}.safetensors"
        if not path.exists():
            self.weights.mkdir(parents=True, exist_ok=True)
            config = self.weights / "train.yaml"
            config.write_text(f"mixed_precision: {self.precision}\n")
            options = {"model": f"zoo:{self.network}", "data": self.data, "epochs": TRAINED[self.network]}
            options |= {"seed": self.seed, "config": config, "device": self.device, "out": path}
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            subprocess.run([sys.executable, "-m", "tncompress", "train", *words], check=True)
        shape = {"num_classes": images.num_classes, "in_channels": images.input_shape[0]}
        model = tnc.build_model(f"zoo:{self.network}", **shape).eval()
        tnc.load_weights(model, path)
        return model

    def swept(self, model: torch.nn.Module, images: DataSet, name: str, **options: Any) -> None:
        """Write the sweep ``name``; finished rows are read, not measured."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return
        held = Images.gather(images.test_loader(), torch.device("cpu"), self.setting.test_images)
        assert held.labels is not None
        found = tnc.sweep(
            model,
            list(zip(held.inputs, held.labels, strict=True)),
            images=[x for x, _ in images.calibration_loader(CALIBRATION, seed=self.seed)],
            cache=self.folder / f"{name.partition('-')[0]}.rows",  # the control is trained once
            workers=self.workers,
            seed=self.seed,
            progress=True,
            **options,
        )
        found.save(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("measure", "page"), default="measure")
    parser.add_argument("--network", choices=NETWORKS, default="cnn4")
    parser.add_argument("--data", choices=DATA, default="fashion-mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--weights", type=Path, default=Path("paper-weights"))
    parser.add_argument("--out", type=Path, default=Path("paper-results"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-training", action="store_true", help="atlas and sweep only")
    options = parser.parse_args()
    if options.what == "page":
        from science_page import write_page

        write_page(options.out, DOCS)
        return
    for seed in options.seeds:
        Experiment(
            options.network,
            options.data,
            seed,
            SETTINGS[options.setting],
            options.weights,
            options.out,
            options.device,
            options.workers,
        ).run(train_again=not options.no_training)


if __name__ == "__main__":
    main()
