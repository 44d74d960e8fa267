"""The trainings that finetune_recovery.py carries out: their sizes, formats and recipes, part by part."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

GOALS = {4: 3, 8: 5, 16: 5}
"""After how many epochs a goal is set, by how many times fewer parameters there are."""
FORMATS = ("mps", "tucker", "cp", "auto")
CONTROLS = ("global", "rate x 0.5", "sgd", "augmented", "library's default")
"""How the dense model is trained as many epochs more; the others only where recipes are compared."""
PEERS = {"tltorch CP": "CP", "tltorch Tucker": "Tucker", "tltorch TT": "TT"}
BASE = {"optimizer": "adamw", "lr": 1e-3, "distill": 0.0, "augment": False}
"""What every training here has, unless its recipe says otherwise."""
RECIPES = {
    "global": {},
    "local": {"epochs": 0},
    "hybrid": {"local_epochs": 1},
    "progressive": {},
    "features": {"features": 0.1},
    "distillation": {"distill": 1.0},
    "distillation, rate x 0.5": {"distill": 1.0, "lr": 5e-4},
    "frobenius": {"frobenius_decay": 5e-4},
    "balanced": {"balance": True},
    "balanced, frobenius": {"balance": True, "frobenius_decay": 5e-4},
    "rebalanced": {"balance": True, "rebalance_every": 200},
    "rate x 2": {"lr": 2e-3},
    "rate x 0.5": {"lr": 5e-4},
    "factors' rate x 0.5": {"lr_factors": 5e-4},
    "ema": {"ema": 0.998},
    "augmented": {"augment": True},
    "augmented, distillation": {"augment": True, "distill": 1.0},
    "sgd": {"optimizer": "sgd", "lr": 0.02},
    "library's default": {"optimizer": "sgd", "lr": 0.02, "augment": True, "distill": 1.0},
}
SCRATCH = {"optimizer": "sgd", "lr": 0.1}
PARTS = ("goals", "peers", "controls", "recipes", "time", "curves")


@dataclass(frozen=True)
class Run:
    """One training: ``of`` epochs of ``recipe``, of a format at a size; or of the dense model."""

    format: str
    of: int
    times: int | None = None
    recipe: str | None = None

    @property
    def key(self) -> dict:
        """What its rows have in common."""
        named = {"times": self.times, "format": self.format, "recipe": self.recipe}
        return {name: value for name, value in named.items() if value is not None} | {"of": self.of}

    @property
    def kind(self) -> str:
        """What is trained, as far as time is concerned."""
        return "dense" if self.times is None else "peer" if self.format in PEERS else "ours"


def runs_of(part: str, options: argparse.Namespace) -> Iterator[Run]:
    """Yield the trainings of a part, in the order in which they are carried out."""
    points = [(times, options.epochs or GOALS.get(times, 5)) for times in options.times]
    if part == "goals":
        lengths = dict.fromkeys(of for _, of in points)
        yield from (Run("dense control", of, recipe="global") for of in lengths)
        yield from (Run("auto", of, times, "global") for times, of in points)
    elif part == "peers":
        peers = ["tltorch CP"] if options.brief else PEERS
        yield from (Run(name, of, times, "global") for name in peers for times, of in points)
    elif part == "controls":  # the formats by themselves, and from scratch
        alone = [name for name in options.formats if name != "auto"]
        yield from (Run(name, of, times, "global") for name in alone for times, of in points)
        yield from (Run(name, of, times, "scratch") for name in options.formats for times, of in points)
    elif part in ("recipes", "time"):
        names = options.recipes if part == "recipes" else ["local, equal time", "hybrid, equal time"]
        for times, of in points:
            if times == 8 or len(points) == 1:
                yield from (Run("auto", of, times, name) for name in ("global", *names))
                if part == "recipes":
                    yield from (Run("dense control", of, recipe=name) for name in CONTROLS if name in names)
    else:  # the other lengths
        lengths = [options.epochs] if options.epochs else sorted(set(GOALS.values()))
        yield from (Run("dense control", of, recipe="global") for of in lengths)
        for times in options.times:
            yield from (
                Run(name, of, times, "global") for of in lengths for name in (*options.formats, *PEERS)
            )
            yield from (Run(name, of, times, "scratch") for of in lengths for name in options.formats)
