"""Passes over the same batches that don't run again what comes before the first change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

ROOM = 2**30
"""How many bytes of outputs are kept at most."""


@dataclass
class _Pass:
    """What layers put out in one pass: those called once, and the place of each one's first call."""

    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    places: dict[nn.Module, int] = field(default_factory=dict)
    calls: int = 0


class Replay:
    """What layers of a network put out on each batch, to stand for those before the first changed one.

    Up to there the network does what it did before, so that the outputs are the same, bit for bit. What
    lies between layers is run again; so is a layer called twice in a pass, and all that finds no
    ``room``.
    """

    def __init__(self, layers: Iterable[nn.Module], room: int = ROOM) -> None:
        self.layers, self.room = list(layers), room
        self._passes: dict[int, _Pass] = {}

    @contextmanager
    def recorded(self, number: int) -> Iterator[None]:
        """Keep what the layers put out in the pass over batch ``number`` that is made in the block."""
        made = self._passes[number] = _Pass()

        def keep(layer: nn.Module, args: Any, output: Any) -> None:
            made.calls += 1
            if layer in made.places:
                dropped = made.outputs.pop(layer, None)
                self.room += dropped.nbytes if dropped is not None else 0
                return
            made.places[layer] = made.calls
            if isinstance(output, Tensor) and output.nbytes <= self.room:
                self.room -= output.nbytes
                made.outputs[layer] = output.clone()  # what follows may work in place

        # before hooks of the user's, which will see what is put out again
        handles = [layer.register_forward_hook(keep, prepend=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def up_to(self, changed: nn.Module, number: int) -> Iterator[None]:
        """Have layers called before ``changed`` put out what was kept of batch ``number``."""
        kept = self._passes[number]
        place = kept.places.get(changed, 0)
        some = {layer: out for layer, out in kept.outputs.items() if kept.places[layer] < place}
        own = {layer: vars(layer)["forward"] for layer in some if "forward" in vars(layer)}
        for layer, output in some.items():
            vars(layer)["forward"] = lambda *_, output=output, **__: output.clone()
        try:
            yield
        finally:
            for layer in some:
                del vars(layer)["forward"]  # and so back to that of its class
                vars(layer).update({"forward": own[layer]} if layer in own else {})
