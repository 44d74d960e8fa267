"""Second moments of the loss's gradient at each layer's output: what the network makes of errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tncompress.discovery import Layer

IMAGES = 16
"""How many images are differentiated through at once: their activations are all held."""


class GradientMoments:
    """Sums over images of ``g g'``, with g the gradient of an image's cross-entropy at a pixel of the output.

    Labels are given with the batch, or drawn from the model's own predictions (``teacher``), as the Fisher
    information wants them (Martens & Grosse 2015).
    """

    def __init__(self, layers: list[Layer], labels: Literal["teacher", "labels"]) -> None:
        self.layers, self.teacher, self.images = layers, labels == "teacher", 0
        self.sums: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def add(self, model: nn.Module, x: Tensor, y: Any, number: int) -> None:
        """Take in batch ``number``; the gradients of the model's parameters are left alone."""
        if not self.teacher and (not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]):
            raise ValueError(
                f"gradients='labels' wants batches (x, y), but batch {number} has no label for each x"
            )
        for first in range(0, len(x), IMAGES):
            part = x[first : first + IMAGES]
            held: list[tuple[Layer, Tensor]] = []
            with torch.enable_grad(), _holding(self.layers, held):
                logits = model(part)
                if not isinstance(logits, Tensor) or logits.ndim < 2:
                    raise ValueError(
                        f"gradients want a model whose output are logits, got {type(logits).__name__}"
                    )
                labels = self._drawn(logits) if self.teacher else y[first : first + IMAGES].to(x.device)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                outputs = [output for _, output in held]
                found = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else ()
            for (layer, _), gradient in zip(held, found, strict=True):
                if gradient is not None:
                    self._add(layer, gradient)
        self.images += len(x)

    def of(self, name: str) -> Tensor | None:
        """Return the mean over images of a layer, ``(groups, out, out)``; None if no loss sees it."""
        return self.sums[name] / self.images if name in self.sums else None

    def _drawn(self, logits: Tensor) -> Tensor:
        chances = logits.detach().softmax(1).movedim(1, -1).cpu()
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=self.generator)
        return drawn.reshape(chances.shape[:-1]).to(logits.device)

    def _add(self, layer: Layer, gradient: Tensor) -> None:
        geometry = layer.geometry
        rows = gradient.movedim(gradient.ndim - 1 - geometry.ndim, -1)
        rows = rows.reshape(-1, geometry.groups, geometry.kernel_shape[0]).transpose(0, 1)
        rows = rows.float() if rows.dtype.itemsize < 4 else rows
        square = (rows.mT @ rows).double()
        self.sums[layer.name] = self.sums[layer.name] + square if layer.name in self.sums else square


@contextmanager
def _holding(layers: list[Layer], held: list[tuple[Layer, Tensor]]) -> Iterator[None]:
    """Hold the output of each call of each layer, itself out of the reach of what works in place."""
    handles = []
    for layer in layers:

        def hold(_: nn.Module, args: Any, output: Tensor, layer: Layer = layer) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            held.append((layer, output))
            return output.clone()

        handles.append(layer.module.register_forward_hook(hold))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
