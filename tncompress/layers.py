"""The compressed layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.contraction import chain_calls, run_chain
from tncompress.formats.base import Format
from tncompress.geometry import ConvGeometry


class TNConv(nn.Module):
    """A 1d, 2d or 3d convolution, or a linear layer, whose kernel is a tensor network.

    Parameters are ``factors`` (shapes: ``format.factor_shapes``) and ``bias`` (or None). Inputs and outputs
    are those of the dense layer of the same ``geometry``.

    >>> from tncompress import MPS
    >>> conv = nn.Conv2d(8, 16, 3, padding=1)
    >>> layer = TNConv.from_dense(conv, MPS(), ranks=(8, 24, 16))         # the full ranks: exact
    >>> x = torch.randn(1, 8, 5, 5)
    >>> torch.allclose(layer(x), conv(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        format: Format,
        geometry: ConvGeometry,
        factors: Sequence[Tensor],
        bias: Tensor | None = None,
        *,
        rel_error: float | None = None,
    ) -> None:
        super().__init__()
        self.format = format
        self.geometry = geometry
        self.ranks = _ranks_of(format, geometry, factors)
        self.rel_error = rel_error
        self.stages = format.stages(geometry.kernel_shape, self.ranks)
        self._calls = chain_calls(geometry, self.stages)
        self.factors = nn.ParameterList([nn.Parameter(factor) for factor in factors])
        self.bias = nn.Parameter(bias) if bias is not None else None

    @classmethod
    def from_dense(cls, layer: nn.Module, format: Format, ranks: Sequence[int]) -> TNConv:
        """Return the fit of ``format`` at ``ranks`` to a dense layer, whose parameters stay untouched."""
        geometry = ConvGeometry.of(layer)
        dense: Any = layer
        weight, bias = dense.weight.detach(), dense.bias
        fit = format.fit(weight, format.check_ranks(geometry.kernel_shape, ranks))
        copied = bias.detach().clone() if bias is not None else None
        return cls(format, geometry, fit.factors, copied, rel_error=fit.rel_error)

    @property
    def weight(self) -> Tensor:
        """The dense kernel ``(out, in, *spatial)`` that the factors stand for, rebuilt at each access."""
        return self.format.to_dense(list(self.factors), self.geometry.kernel_shape)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of the chain of convolutions (``input`` is what torch's layers call it, too)."""
        return run_chain(input, list(self.factors), self.stages, self._calls, self.bias)

    def to_dense(self) -> nn.Module:
        """Return a fresh dense layer (``nn.Conv2d``, ``nn.Linear`` ...) with the same kernel and bias."""
        weight = self.weight.detach()
        dense: Any = self.geometry.build_dense(
            bias=self.bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            dense.weight.copy_(weight).requires_grad_(any(factor.requires_grad for factor in self.factors))
            if self.bias is not None:
                dense.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Describe format, ranks and geometry in the printed module."""
        shape = "x".join(map(str, self.geometry.kernel_shape))
        return f"{self.format}, kernel={shape}, ranks={self.ranks}, bias={self.bias is not None}"


def _ranks_of(format: Format, geometry: ConvGeometry, factors: Sequence[Tensor]) -> tuple[int, ...]:
    network = format.network(geometry.kernel_shape)
    if len(network) != len(factors) or any(len(n) != f.ndim for n, f in zip(network, factors, strict=False)):
        raise ValueError(
            f"{format} wants factors with legs {network}, got {[tuple(f.shape) for f in factors]}"
        )
    found: dict[str, int] = {}
    for legs, factor in zip(network, factors, strict=True):
        found |= {leg: size for leg, size in zip(legs, factor.shape, strict=True) if leg.startswith("r")}
    ranks = tuple(found[f"r{i}"] for i in range(len(found)))
    wanted = format.factor_shapes(geometry.kernel_shape, ranks)
    if wanted != tuple(tuple(factor.shape) for factor in factors):
        raise ValueError(
            f"{format} on a kernel {geometry.kernel_shape} wants factors {wanted}, "
            f"got {tuple(tuple(factor.shape) for factor in factors)}"
        )
    return ranks
