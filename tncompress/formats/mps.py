"""The matrix product state (tensor train): one core for each leg of the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from tncompress.cuts import legs_of, parse_legs
from tncompress.formats.base import register_format
from tncompress.formats.chain import ChainFormat, Groups


@register_format("mps")
@dataclass(frozen=True)
class MPS(ChainFormat):
    """A matrix product state over the kernel's legs in ``order``, spatial ones in place of ``spatial``.

    The default runs as four convolutions: 1x1, kh x 1, 1 x kw, 1x1. Legs that a kernel does not have are
    passed over, so that one order serves 1d, 2d and linear layers; ``spatial`` stands for all of them.
    Ranks are those of the bonds along the chain. The fit truncates from both ends (TT-SVD, Oseledets 2011)
    and sweeps.

    >>> MPS().max_ranks((64, 32, 3, 3)), MPS().factor_shapes((64, 32, 3, 3), ranks=(8, 12, 16))
    ((32, 96, 64), ((8, 32), (12, 8, 3), (16, 12, 3), (64, 16)))
    """

    order: str = "in spatial out"

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", " ".join(self.order.split()))
        legs = parse_legs(self.order.replace("spatial", "kd kh kw"))
        if not {"in", "out"} <= set(legs) or "rest" in legs:
            raise ValueError(f"an MPS order names in and out, as in 'in kh kw out', got {self.order!r}")

    def grouping(self, ndim: int) -> Groups:
        names = legs_of(ndim)
        legs = parse_legs(self.order.replace("spatial", " ".join(names[2:])))
        if missing := [name for name in names if name not in legs]:
            kernel = " ".join(names)
            raise ValueError(
                f"the MPS order '{self.order}' does not place leg {missing[0]} of a kernel ({kernel})"
            )
        return tuple((names.index(leg),) for leg in legs if leg in names)
