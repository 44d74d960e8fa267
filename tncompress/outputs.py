"""A network's outputs on images held in memory, and how far another's are from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tncompress.replay import Replay
from tncompress.running import eval_mode


@dataclass(frozen=True)
class Images:
    """Batches of inputs on the device where they are used, with their labels if they all have some."""

    inputs: tuple[Tensor, ...]
    labels: tuple[Tensor, ...] | None

    @classmethod
    def gather(cls, batches: Iterable[Any], device: torch.device, most: int | None = None) -> Images:
        """Return at most ``most`` images; none at all, or labels for some only, are a ``ValueError``.

        A batch is a tensor, or a tuple or mapping whose first item is the input. The second is taken for
        labels where it is a whole number for each image.
        """
        if most is not None and most < 1:
            raise ValueError(f"wanted at least 1 image, got images={most}")
        inputs: list[Tensor] = []
        labels: list[Tensor] = []
        count = 0
        for batch in batches:
            x, y = _split(batch)
            if most is not None:
                x, y = x[: most - count], y[: most - count] if y is not None else None
            inputs.append(x.to(device))
            if y is not None:
                labels.append(y.to(device))
            if len(labels) not in (0, len(inputs)):
                has = "none" if y is None else "some, and those before it none"
                raise ValueError(f"wanted labels with all batches or none, but batch {len(inputs)} has {has}")
            count += len(x)
            if count == most:
                break
        if not count:
            raise ValueError("wanted at least one batch of inputs, got none (a generator that was used up?)")
        return cls(tuple(inputs), tuple(labels) or None)

    def __len__(self) -> int:
        return sum(len(x) for x in self.inputs)

    def first(self, most: int) -> Images:
        """Return the first ``most`` images."""
        labels = self.labels or (None,) * len(self.inputs)
        return Images.gather(zip(self.inputs, labels, strict=True), self.inputs[0].device, most)

    def digest(self) -> str:
        """Return a fingerprint of images and labels, whatever the sizes of the batches."""
        found = hashlib.blake2b(digest_size=16)
        for parts in (self.inputs, self.labels or ()):
            found.update(repr([(part.dtype, part.shape[1:]) for part in parts[:1]]).encode())
            for part in parts:
                found.update(bytes_of(part))
        return found.hexdigest()


def _split(batch: Any) -> tuple[Tensor, Tensor | None]:
    items = list(batch.values()) if isinstance(batch, Mapping) else batch
    items = list(items) if isinstance(items, tuple | list) else [items]
    if not items or not isinstance(items[0], Tensor) or not items[0].ndim:
        came = type(items[0]).__name__ if items else "nothing"
        raise ValueError(f"wanted batches that are tensors, or begin with one, got {came}")
    x, y = items[0], items[1] if len(items) > 1 else None
    if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != x.shape[:1]:
        return x, None
    return x, y


def bytes_of(tensor: Tensor) -> bytes:
    """Return the raw values of a tensor."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Change:
    """How far outputs are from the dense ones: see :class:`~tncompress.responses.Row`."""

    error: float
    kl: float | None
    accuracy: float | None


class DenseOutputs:
    """What the dense model puts out on ``images``, against which others are measured.

    Of ``layers``, outputs are kept, so that of the model with one of them changed only the rest is run.
    """

    def __init__(self, model: nn.Module, images: Images, layers: Iterable[nn.Module] = ()) -> None:
        self.images, self.replay = images, Replay(layers)
        found = []
        try:
            for number, x in enumerate(images.inputs):
                with self.replay.recorded(number):
                    found.append(_run(model, x))
        except RuntimeError as error:
            shape, reason = tuple(images.inputs[0].shape), str(error).splitlines()[0]
            raise ValueError(f"the model can't be run on batches of shape {shape}: {reason}") from error
        self.outputs = [output for output, _ in found]
        self.classes = all(classes for _, classes in found)
        mean = torch.stack([output.double().sum(0) for output in self.outputs]).sum(0) / len(images)
        self.signal = sum(_squares(output, mean) for output in self.outputs)
        if not self.signal < float("inf"):
            raise ValueError("the dense model's output on these images holds NaN or infinity")
        if self.signal == 0:
            raise ValueError(f"the output does not differ between the {len(images)} images: wanted several")
        self.accuracy = self._accuracy(self.outputs)

    def change(self, model: nn.Module, changed: nn.Module | None = None) -> Change | None:
        """Return how far the outputs of ``model`` are from the dense ones; None where some are not finite.

        If it is the dense model with another in the place of one layer, ``changed`` is that layer.
        """
        outputs = []
        for number, x in enumerate(self.images.inputs):
            with self.replay.up_to(changed, number) if changed is not None else nullcontext():
                outputs.append(_run(model, x)[0])
        pairs = list(zip(outputs, self.outputs, strict=True))
        error = sum(_squares(output, dense.double()) for output, dense in pairs) / self.signal
        if not error < float("inf"):
            return None
        kl = None
        if self.classes:
            total = sum(
                F.kl_div(_log_shares(output), _log_shares(dense), reduction="sum", log_target=True)
                for output, dense in pairs
            )
            kl = max(float(total) / len(self.images), 0.0)
        return Change(error, kl, self._accuracy(outputs))

    def _accuracy(self, outputs: Sequence[Tensor]) -> float | None:
        if self.images.labels is None or not self.classes:
            return None
        pairs = zip(outputs, self.images.labels, strict=True)
        return sum(int((output.argmax(1) == y).sum()) for output, y in pairs) / len(self.images)


def _run(model: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """Return the output as ``(images, numbers)``, and whether it is one number for each class.

    All floating-point tensors of the output count that have an entry for each image.
    """
    with eval_mode(model):
        leaves = tree_leaves(model(x))
    found = [
        leaf
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == x.shape[:1]
    ]
    if not found:
        raise ValueError("the model's output holds no floating-point tensor with an entry for each image")
    return torch.cat([leaf.flatten(1) for leaf in found], 1), len(found) == 1 and found[0].ndim == 2


def _squares(output: Tensor, centre: Tensor) -> float:
    return float((output.double() - centre).square().sum())


def _log_shares(output: Tensor) -> Tensor:
    return output.double().log_softmax(1)
