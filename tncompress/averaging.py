"""A moving average of the weights that a run goes through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage:
    """An exponential moving average of a model's weights and BatchNorm statistics, kept beside it.

    The first steps count more, so that the start is soon forgotten: the decay is at most (1 + n) / (10 +
    n) after n steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.values = self._copy()
        self._aside: dict[str, Tensor] | None = None

    def _live(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.model.state_dict().items() if isinstance(t, Tensor)}

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._live().items()}

    def update(self) -> None:
        """Take the present weights in."""
        self.steps += 1
        part = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in self._live().items():
            kept = self.values[name]
            if kept.is_floating_point():
                kept.lerp_(tensor.detach().to(kept.device), part)
            else:
                kept.copy_(tensor)

    def restart(self) -> None:
        """Begin anew from the present weights: an average of factors in two gauges stands for nothing."""
        self.values, self.steps = self._copy(), 0

    def swap_in(self) -> None:
        """Put the average into the model."""
        self._aside = self._copy()
        self._put(self.values)

    def swap_out(self) -> None:
        """Put the weights that are trained back into the model."""
        if self._aside is not None:
            self._put(self._aside)
            self._aside = None

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._live().items():
                tensor.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of steps."""
        return {"values": self.values, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""
        live = self._live()
        self.values = {name: tensor.to(live[name].device) for name, tensor in state["values"].items()}
        self.steps = state["steps"]
