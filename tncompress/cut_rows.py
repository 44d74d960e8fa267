"""One row of an atlas: a kernel seen across one cut, and the numbers that follow from its spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tncompress.cuts import LEGS, Cut
from tncompress.kernel_spectra import sides

KernelKind = Literal["trained", "random", "shuffled"]
MetricKind = Literal["norm", "data"]

QUARTER = 0.25
"""The part of the full rank, and of the parameters, at which tables state the norm loss."""


@dataclass(frozen=True)
class CutRow:
    """The kernel of ``layer`` across ``cut``; its ``spectrum`` is that of all ``groups`` together.

    ``depth`` counts the convolutions from 1 in the order of registration. ``shape`` is that of the kernel of
    one group, ``(out, in, *spatial)``; all groups are truncated to one rank, and value number k of the
    spectrum is the root of the sum of the squares of theirs. ``kernel`` says which: the layer's own
    (``trained``), or a control. In the metric ``data`` norms are those of the layer's output.

    >>> row = CutRow("conv", 1, "out|rest", "trained", "norm", (4, 2, 3, 3), 1, (2.0, 1.0, 1.0, 0.0))
    >>> round(row.effective_rank, 3), row.rank_for(0.5), round(row.rel_error(1) ** 2, 3)
    (2.381, 2, 0.333)
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    layer: str
    depth: int
    cut: str
    kernel: KernelKind
    metric: MetricKind
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    groups: Annotated[int, Field(ge=1)]
    spectrum: tuple[Annotated[float, Field(ge=0)], ...]

    def __post_init__(self) -> None:
        full = min(self.sides)
        if len(self.spectrum) != full:
            raise ValueError(
                f"layer {self.layer!r}, cut {self.cut!r}: a kernel {self.shape} has {full} singular values "
                f"there, got {len(self.spectrum)}"
            )

    @cached_property
    def sides(self) -> tuple[int, int]:
        """How many rows and columns the unfolded kernel of one group has."""
        return sides(self.shape, Cut.parse(self.cut))

    @property
    def full(self) -> int:
        """The full rank."""
        return len(self.spectrum)

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm of the kernel; in the metric ``data`` the root mean square of the output."""
        top = max(self.spectrum)
        return top * math.sqrt(sum((s / top) ** 2 for s in self.spectrum)) if top > 0 else 0.0

    @cached_property
    def weights(self) -> np.ndarray:
        """The parts of the squared norm: squares of the singular values, of sum 1 (or 0 of a zero kernel)."""
        top = max(self.spectrum)
        squares = np.square(np.array(self.spectrum) / top) if top > 0 else np.zeros(self.full)
        return squares / (squares.sum() or 1.0)

    @cached_property
    def tails(self) -> np.ndarray:
        """The discarded weight of a truncation to rank r, for r from 0 to the full rank."""
        sums = np.cumsum(self.weights[::-1])[::-1]
        return np.append(sums, 0.0)

    @cached_property
    def entropy(self) -> float:
        """The correlation entropy -sum p log p of the :attr:`weights`, in nats."""
        p = self.weights[self.weights > 0]
        return max(0.0, -float((p * np.log(p)).sum()))

    @property
    def relative_entropy(self) -> float | None:
        """The entropy over its largest value, the logarithm of the full rank; None where that is 1."""
        return self.entropy / math.log(self.full) if self.full > 1 else None

    @property
    def effective_rank(self) -> float:
        """The number of equal singular values that would have this entropy, exp(entropy)."""
        return math.exp(self.entropy)

    def rel_error(self, rank: int) -> float:
        """Return the norm loss of a truncation to ``rank``: the root of the discarded weight."""
        if not 0 <= rank <= self.full:
            raise ValueError(f"the rank across {self.cut} is 0 to {self.full}, got {rank}")
        return math.sqrt(self.tails[rank])

    def rank_for(self, loss: int | float) -> int:
        """Return the smallest rank, from 1, whose norm loss is at most ``loss``."""
        if not 0 <= loss < 1:
            raise ValueError(f"a norm loss is a number from 0 to below 1, got {loss!r}")
        kept = int(np.searchsorted(-self.tails, -(loss**2), side="left"))
        return min(max(kept, 1), self.full)

    def params_ratio(self, rank: int) -> float:
        """Return how many numbers two factors of this rank hold, over those of the kernel."""
        rows, columns = self.sides
        return rank * (rows + columns) / (rows * columns)

    def loss_at_rank(self, fraction: int | float) -> float:
        """Return the norm loss at this part of the full rank, rounded up to a whole rank."""
        return self.rel_error(max(1, math.ceil(fraction * self.full - 1e-9)))

    def loss_at_params(self, ratio: int | float) -> float | None:
        """Return the norm loss at the largest rank whose factors hold at most ``ratio`` of the parameters.

        None where those of rank 1 hold more: across such a cut the kernel can't be that small.
        """
        rank = min(int(ratio / self.params_ratio(1) + 1e-9), self.full)
        return self.rel_error(rank) if rank >= 1 else None

    def to_dict(self, losses: tuple[float, ...] = ()) -> dict[str, Any]:
        """Return fields and what follows from them, with the rank for each of ``losses``: plain values."""
        fields = {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__}
        return fields | {
            "shape": list(self.shape),
            "spectrum": list(self.spectrum),
            "full": self.full,
            "entropy": self.entropy,
            "relative_entropy": self.relative_entropy,
            "effective_rank": self.effective_rank,
            "ranks": [self.rank_for(loss) for loss in losses],
            "loss_at_quarter_rank": self.loss_at_rank(QUARTER),
            "loss_at_quarter_params": self.loss_at_params(QUARTER),
        }


MEASURES: dict[str, str] = {
    "entropy": "correlation entropy / log(full rank)",
    "rank": "norm loss at a quarter of the full rank",
    "params": "norm loss at a quarter of the parameters",
}
"""What layers and cuts are compared by, and what it is called."""


def measured(row: CutRow, measure: str) -> float | None:
    """Return a measure of one row; None where the cut leaves nothing to measure."""
    if measure not in MEASURES:
        raise ValueError(f"a measure is one of {', '.join(MEASURES)}, got {measure!r}")
    if row.full == 1 or row.norm == 0:
        return None
    if measure == "entropy":
        return row.relative_entropy
    return row.loss_at_rank(QUARTER) if measure == "rank" else row.loss_at_params(QUARTER)


def cut_order(name: str) -> tuple[int, list[int]]:
    """Return by what cuts are put in order: the number of legs on the left, and which they are."""
    left = Cut.parse(name).left
    return len(left), [LEGS.index(leg) for leg in left]


class RowFile(BaseModel):
    """A row in a file. What follows from the spectrum is there for other readers, and made anew."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    layer: str
    depth: int
    cut: str
    kernel: Literal["trained", "random", "shuffled"]
    metric: Literal["norm", "data"]
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2, max_length=5)]
    groups: Annotated[int, Field(ge=1)]
    spectrum: Annotated[int, Field(ge=0)]
    entropy: float

    def made(self, spectra: tuple[tuple[float, ...], ...]) -> CutRow:
        """Return the row; a ``ValueError`` where its numbers contradict its spectrum."""
        where = f"this is no atlas: the row of layer {self.layer!r}, cut {self.cut!r}"
        if self.spectrum >= len(spectra):
            raise ValueError(f"{where} names spectrum {self.spectrum} of {len(spectra)}")
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "entropy"}
        row = CutRow(**fields | {"spectrum": spectra[self.spectrum]})
        if any(a < b for a, b in zip(row.spectrum, row.spectrum[1:], strict=False)):
            raise ValueError(f"{where} has a spectrum that is not sorted")
        if not math.isclose(row.entropy, self.entropy, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(f"{where} has entropy {self.entropy:.6g}, its spectrum {row.entropy:.6g}")
        return row
