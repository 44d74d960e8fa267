"""By what the candidates of a budget are judged: kernels, the outputs of layers, or that of the network."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from torch import Tensor

from tncompress.calibrate import Calibration
from tncompress.discovery import Layer, digest_of
from tncompress.formats import Format
from tncompress.metric import Metric
from tncompress.ranks import RankPath
from tncompress.responses import Sensitivity
from tncompress.spec import Settings

WORKING_MEMORY, COPIES = 4 * 2**30, 6
"""Bytes that layers worked on at once may take with their moments, and how many of each those make."""


class Judge:
    """What is known of a model's layers: moments of their inputs, and how the network answers to each.

    Without a calibration errors are those of kernels, without a sensitivity all layers count alike. A
    sensitivity that was measured on other weights, or on another kind of error, is a ``ValueError``.
    """

    def __init__(
        self,
        calibration: Calibration | None = None,
        sensitivity: Sensitivity | None = None,
        layers: Sequence[Layer] = (),
    ) -> None:
        self.calibration, self.sensitivity = calibration, sensitivity
        self._last = threading.local()
        if sensitivity is None:
            return
        if sensitivity.calibrated != (calibration is not None):
            measured, wanted = ("with", "without") if sensitivity.calibrated else ("without", "with")
            raise ValueError(
                f"the sensitivity was measured {measured} calibration, the plan is made {wanted}: measure it "
                "as the plan is made"
            )
        found = {layer.name: layer for layer in layers}
        for name, digest in (sensitivity.digests or {}).items():
            if name in found and digest_of(found[name].weight()) != digest:
                raise ValueError(f"the sensitivity is of other weights of layer {name!r}: measure it again")

    @property
    def measure(self) -> str:
        """What a loss is the square of: the relative error of what."""
        if self.sensitivity is not None:
            return "network output"
        return "kernel error" if self.calibration is None else "layer output"

    def metric(self, name: str) -> Metric | None:
        """Return the norm in which the layer ``name`` is fitted; None for that of the kernel.

        That of the layer that a thread asks for last is kept, with its roots, for one format after another.
        """
        if self.calibration is None:
            return None
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.metric = name, self.calibration.metric(name)
        found: Metric | None = self._last.metric
        return found

    def at_once(self, layers: Iterable[Layer]) -> int | None:
        """Return how many of ``layers`` may be worked on at once; None for as many as there are cores."""
        if self.calibration is None:
            return None
        known = [
            self.calibration.layers[layer.name] for layer in layers if layer.name in self.calibration.layers
        ]
        largest = max((sum(t.nbytes for t in moments.tensors().values()) for moments in known), default=0)
        return max(1, WORKING_MEMORY // max(1, COPIES * largest))

    def path(self, name: str, kernels: Tensor, settings: Settings) -> RankPath:
        """Return the path of ranks of the layer ``name``."""
        return RankPath(kernels, settings, self.metric(name))

    def loss(self, name: str, error: float, format: Format) -> float:
        """Return what an error of the layer ``name`` in ``format`` adds to the loss of the whole model."""
        if self.sensitivity is not None and name in self.sensitivity.layers:
            return self.sensitivity.predict(name, error, format)
        return error**2
