"""What training of the whole network makes small: cross-entropy, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tncompress.layers import TNConv
from tncompress.recipe import FinetuneConfig
from tncompress.running import at_least_float
from tncompress.slices import tensors_in
from tncompress.spec import matches_any


class GlobalObjective(nn.Module):
    """Cross-entropy, distillation and feature matching of ``model``, which it holds; a teacher it borrows."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, config: FinetuneConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self._teacher = (teacher,)  # in a tuple: not a part of this module
        self.matched = matched_layers(model, teacher, config)

    def train(self, mode: bool = True) -> GlobalObjective:
        """Put the model in training mode, the teacher in eval mode."""
        super().train(mode)
        if self._teacher[0] is not None:
            self._teacher[0].eval()
        return self

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss of a batch, and how many answers are right."""
        config, (teacher,) = self.config, self._teacher
        if y is None:
            raise ValueError(
                "wanted batches (inputs, labels), got inputs alone: only slices learn from those"
            )
        with _outputs_of(self.model, self.matched) as ours:
            logits = self.model(x)
        _check_labels(logits, y)
        logits = at_least_float(logits)
        right = (logits.detach().argmax(1) == y).sum()
        loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
        if teacher is None or not (config.distill or self.matched):
            return loss, right
        with torch.no_grad(), _outputs_of(teacher, self.matched) as theirs:
            target = at_least_float(teacher(x))
        if target.shape != logits.shape:
            raise ValueError(
                f"the teacher puts out {tuple(target.shape)}, the model {tuple(logits.shape)}: wanted a "
                "teacher with the same classes"
            )
        if config.distill:
            loss = loss + config.distill * _divergence(logits, target, config.temperature)
        if self.matched:
            distances = [_relative_distance(ours, theirs, name) for name in self.matched]
            loss = loss + config.features * torch.stack(distances).mean()
        return loss, right


def matched_layers(model: nn.Module, teacher: nn.Module | None, config: FinetuneConfig) -> list[str]:
    """Return the names of the layers whose outputs are matched; a pattern without a match is an error."""
    if teacher is None or not config.features:
        return []
    theirs = dict(teacher.named_modules())
    both = [name for name, _ in model.named_modules() if name and name in theirs]
    if not config.feature_layers:
        found = [name for name in both if isinstance(model.get_submodule(name), TNConv)]
        if not found:
            raise ValueError("features: the model has no compressed layer: name others in feature_layers")
        return found
    for pattern in config.feature_layers:
        if not any(matches_any(pattern, [name]) for name in both):
            shown = ", ".join(both[:6])
            raise ValueError(
                f"feature_layers: {pattern!r} matches no module of both models; they are {shown}"
            )
    return [name for name in both if any(matches_any(p, [name]) for p in config.feature_layers)]


@contextmanager
def _outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield the tensors that the modules ``names`` put out while the block runs, all their calls in turn."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:

        def keep(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            found[name] += tensors_in(output)

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_labels(logits: Tensor, y: Tensor) -> None:
    if logits.ndim != 2:
        raise ValueError(f"wanted outputs (images, classes), got {tuple(logits.shape)} from the model")
    if y.is_floating_point() or y.shape != logits.shape[:1]:
        raise ValueError(
            f"wanted a whole number for each of {len(logits)} images, got labels {y.dtype} {tuple(y.shape)}"
        )
    classes = logits.shape[1]
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"wanted labels from 0 to {classes - 1}, one for each output of the model, got {wrong}"
        )


def _divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the divergence of softened outputs, times the squared temperature (Hinton et al. 2015)."""
    ours, theirs = F.log_softmax(logits / temperature, 1), F.log_softmax(target / temperature, 1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _relative_distance(ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]], name: str) -> Tensor:
    """Return the mean over images of the squared distance over the teacher's square."""
    if not ours[name] or [t.shape for t in ours[name]] != [t.shape for t in theirs[name]]:
        shapes = [[tuple(t.shape) for t in side[name]] for side in (ours, theirs)]
        raise ValueError(
            f"feature_layers: {name!r} puts out {shapes[0]} in the model, {shapes[1]} in the teacher"
        )
    parts = []
    for mine, wanted in zip(ours[name], theirs[name], strict=True):
        mine, wanted = at_least_float(mine), at_least_float(wanted)
        gap = (mine - wanted).flatten(1).square().sum(1)
        parts.append((gap / wanted.flatten(1).square().sum(1).clamp_min(1e-12)).mean())
    return torch.stack(parts).mean()
