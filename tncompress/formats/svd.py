"""A single cut through the kernel: two factors, one bond, the best approximation there is at its rank."""

from __future__ import annotations

from dataclasses import dataclass

from tncompress.cuts import Cut
from tncompress.formats.base import register_format
from tncompress.formats.chain import ChainFormat, Groups


@register_format("svd")
@dataclass(frozen=True)
class SVD(ChainFormat):
    """One cut of the kernel, ``out|rest`` by default, truncated to its leading singular values.

    ``out|rest`` runs as a full-sized convolution to the bond and a 1x1 convolution from it, ``in|rest`` the
    other way round, ``out kw|in kh`` as a vertical and a horizontal convolution (Jaderberg et al. 2014).

    >>> SVD().factor_shapes((64, 32, 3, 3), ranks=(16,))
    ((16, 32, 3, 3), (64, 16))
    """

    cut: str = "out|rest"

    def __post_init__(self) -> None:
        Cut.parse(self.cut)

    def grouping(self, ndim: int) -> Groups:
        return Cut.parse(self.cut).modes(ndim)

    @classmethod
    def contenders(cls) -> tuple[SVD, ...]:
        """Return the response's cut and the separable one: where kernels have most to give."""
        return cls(), cls("out kw|in kh")
