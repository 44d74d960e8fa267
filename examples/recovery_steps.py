"""What a step of training takes, dense and compressed: time in turns, and memory."""

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
from accuracy_at_size import append
from torch import nn

import tncompress as tnc
from tncompress.measure import macs, peak_memory, peak_training_memory
from tncompress.noise import ADVISED, settings
from tncompress.report import environment
from tncompress.running import copy_model
from tncompress.timing import samples_in_turns

FORMATS = {"mixed": "auto", "separable": {"name": "svd", "cut": "out kw|in kh"}, "tucker": "tucker"}
"""How there come to be fewer MACs; the first is trained with activations recomputed, too."""


def steps(options: argparse.Namespace) -> None:
    """Append what a training step takes, dense and at a quarter of the MACs, in turns, and its memory.

    The zoo's ResNet-50 has a stem for small images: 56 pixels go through it like 224 through ImageNet's.
    """
    network, device, batch = options.network, options.device, options.batch
    shape, multiple = ((3, 56, 56), 16) if network == "resnet50" else ((1, 28, 28), 8)
    dense = tnc.build_model(f"zoo:{network}", num_classes=10, in_channels=shape[0]).to(device)
    x = torch.randn(batch, *shape, device=device)
    y = torch.randint(10, (batch,), device=device)
    models = {"dense": dense}
    for way, format in FORMATS.items():
        spec = {"default": {"format": format, "round_to": multiple}, "budget": {"macs": 0.25}}
        try:
            models[way] = tnc.compress(dense, spec, example_inputs=x[:1])
        except ValueError as error:
            print(f"{way}: {error}")
    if "mixed" in models:
        models["mixed, checkpointing"] = again = copy_model(models["mixed"])
        tnc.checkpoint_activations_(again)
    row = {"network": network, "format": "step", "batch": batch, "precision": options.precision}
    row["on"] = x.device.type
    row["environment"], row["advised"] = environment(device), settings() == ADVISED
    row["macs"] = {name: macs(model, x[:1]) for name, model in models.items()}
    row["peak bytes"] = {name: peak_training_memory(model, x, y) for name, model in models.items()}
    row["forward bytes"] = {name: peak_memory(model, x) for name, model in models.items()}
    row["convolutions"] = {name: convolutions_share(model, x, y) for name, model in models.items()}
    print(f"{network}: timing {', '.join(models)}", flush=True)
    for layout in ("channels first", "channels last"):
        losses = {}
        for name, model in models.items():
            trained = copy_model(model).train()
            if layout == "channels last":
                trained = trained.to(memory_format=torch.channels_last)
            losses[name] = trainer_of(trained, x, y)
        taken = backwards_in_turns(losses, options, rounds=options.rounds)
        row[layout] = {name: min(found) for name, found in taken.items()}  # others only ever add
    append(options.results, row)
    print(json.dumps(row, indent=1))


def convolutions_share(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return which part of a step's forward and backward pass its convolutions take, channels last."""
    trained = copy_model(model).train().to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    nn.functional.cross_entropy(trained(x), y).backward()
    with torch.profiler.profile() as profile:
        for _ in range(3):
            nn.functional.cross_entropy(trained(x), y).backward()
    events = profile.key_averages()
    on_gpu = x.device.type == "cuda"
    taken = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    return sum(time for key, time in taken.items() if "conv" in key.lower()) / sum(taken.values())


def trainer_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that makes the step of the last call's gradients, then gives the loss again."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)

    def loss() -> torch.Tensor:
        optimizer.step()
        optimizer.zero_grad()
        return nn.functional.cross_entropy(model(x), y)

    return loss


def backwards_in_turns(
    losses: dict[str, Callable], options: argparse.Namespace, rounds: int
) -> dict[str, list]:
    """Return the seconds that each way to a loss takes, its backward pass included, round by round."""
    kind = torch.device(options.device).type

    def backward(loss: Callable) -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=options.precision == "bf16"):
            found = loss()
        found.backward()

    taken = samples_in_turns(
        [partial(backward, loss) for loss in losses.values()], seconds=0.0, rounds=rounds
    )
    return dict(zip(losses, taken, strict=True))
