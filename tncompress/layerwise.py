"""One piece of work for each layer, several layers at a time where that helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from tncompress.discovery import Layer
from tncompress.tables import progress_bar
from tncompress.threads import side_by_side

R = TypeVar("R")


def for_each_layer(
    layers: Sequence[Layer],
    work: Callable[[Layer], R],
    words: str,
    *,
    at_once: int | None,
    progress: bool = False,
) -> dict[str, R]:
    """Return ``work(layer)`` by the name of each layer, at most ``at_once`` side by side, each on a core.

    None is as many as there are cores. Only on a CPU, largest layers first; ``words`` says on the progress
    bar what is done to them.
    """
    cores = torch.get_num_threads()
    on_cpu = all(layer.weight().device.type == "cpu" for layer in layers)
    with progress_bar(len(layers), show=progress) as advance:
        found = side_by_side(
            work,
            layers,
            threads=min(at_once or cores, cores) if on_cpu else 1,
            cost=lambda layer: layer.params,
            done=lambda layer: advance(f"{words} {layer.name}"),
        )
    return {layer.name: one for layer, one in zip(layers, found, strict=True)}
