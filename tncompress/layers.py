"""The compressed layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tncompress.contraction import ConvCall, chain_calls, run_chain
from tncompress.formats.base import Format
from tncompress.geometry import ConvGeometry
from tncompress.strategies import (
    Contraction,
    Einsum,
    Kept,
    may_keep,
    merged_stages,
    merged_weights,
)

M = TypeVar("M", bound=nn.Module)


def _of_torch(name: str) -> property:
    """Return an attribute that torch's layer of this geometry has, read-only: the chain is made for it."""

    def read(layer: TNConv) -> Any:
        ndim, transposed = layer.geometry.ndim, layer.geometry.transposed
        plain = {"transposed": transposed, "output_padding": (0,) * ndim} if ndim else {}
        attributes = plain | layer.geometry.torch_arguments()
        if name not in attributes:
            raise AttributeError(name)
        return attributes[name]

    return property(read)


class TNConv(nn.Module):
    """A 1d, 2d or 3d convolution, plain or transposed, or a linear layer, whose kernel is a tensor network.

    Parameters are ``factors``, each held as the weight of its convolution, and ``bias`` (or None);
    :meth:`tensors` gives the factors with the legs of the network. Inputs and outputs are those of the dense
    layer of the same ``geometry``, whose attributes (``in_channels``, ``stride``, ...) can be read here, too.

    >>> from tncompress import MPS
    >>> conv = nn.Conv2d(8, 16, 3, padding=1)
    >>> layer = TNConv.from_dense(conv, MPS(), ranks=(8, 24, 16))         # the full ranks: exact
    >>> x = torch.randn(1, 8, 5, 5)
    >>> torch.allclose(layer(x), conv(x), atol=1e-5)
    True
    """

    in_channels, out_channels = _of_torch("in_channels"), _of_torch("out_channels")
    in_features, out_features = _of_torch("in_features"), _of_torch("out_features")
    kernel_size, stride, dilation = _of_torch("kernel_size"), _of_torch("stride"), _of_torch("dilation")
    padding, padding_mode = _of_torch("padding"), _of_torch("padding_mode")
    output_padding, groups = _of_torch("output_padding"), _of_torch("groups")
    transposed = _of_torch("transposed")

    checkpointing = False
    """Whether a training step keeps the input of the layer only, and computes what lies in between again."""

    def __init__(
        self,
        format: Format,
        geometry: ConvGeometry,
        factors: Sequence[Tensor],
        bias: Tensor | None = None,
        *,
        rel_error: float | None = None,
    ) -> None:
        """Take ``factors`` with the legs of the network (shapes: ``format.factor_shapes``), as in a fit."""
        super().__init__()
        self.format = format
        self.geometry = geometry
        self.ranks = _ranks_of(format, geometry, factors)
        self.rel_error = rel_error
        self.stages = format.stages(geometry.kernel_shape, self.ranks)
        self.contract("chain")
        shapes = self._stored_shapes()
        held = (factor.reshape(shape) for factor, shape in zip(factors, shapes, strict=True))
        self.factors = nn.ParameterList([nn.Parameter(factor) for factor in held])
        self.bias = nn.Parameter(bias) if bias is not None else None

    @classmethod
    def from_dense(cls, layer: nn.Module, format: Format, ranks: Sequence[int]) -> TNConv:
        """Return the fit of ``format`` at ``ranks`` to a dense layer, whose parameters stay untouched."""
        if not isinstance(format, Format):
            raise TypeError(f"wanted a format, such as MPS(), got {format!r}")
        geometry = ConvGeometry.of(layer)
        dense: Any = layer
        weight, bias = dense.weight.detach(), dense.bias
        ranks = format.check_ranks(geometry.kernel_shape, ranks)
        fit = format.fit_groups(geometry.kernels(weight), ranks)
        copied = bias.detach().clone() if bias is not None else None
        return cls(format, geometry, fit.factors, copied, rel_error=fit.rel_error)

    def _stored_shapes(self) -> list[tuple[int, ...]]:
        stages = sorted(self.stages, key=lambda stage: stage.factor)
        return [stage.stored_shape(self.geometry.groups) for stage in stages]

    @property
    def contraction(self) -> Contraction:
        """How the layer runs: the chain of all its stages, unless :meth:`contract` chose another way."""
        return self._contraction

    def contract(self, contraction: str | Sequence[int] | Contraction) -> TNConv:
        """Choose how the layer runs from now on, and return it; what it computes stays the same.

        ``"chain"`` runs one convolution for each stage, ``"kernel"`` the rebuilt dense kernel, ``"einsum"``
        an einsum over patches (slow: for comparison), and counts like ``(1, 2, 1)`` say how many
        neighbouring stages each convolution merges. Merged weights are kept between calls without gradients,
        and made again when a factor changes. Parameters and ``state_dict`` know nothing of it.

        >>> from tncompress import MPS
        >>> layer = TNConv.from_dense(nn.Conv2d(8, 16, 3), MPS(), ranks=(4, 6, 4))
        >>> str(layer.contract((1, 2, 1)).contraction)        # kh and kw in one convolution
        '1+2+1'
        """
        chosen = Contraction.of(contraction, self.stages)
        self._contraction, self._kept = chosen, Kept()
        self._einsum = Einsum.of(self.format, self.geometry, self.ranks) if chosen.einsum else None
        self.running = merged_stages(self.stages, chosen.merged)
        self._calls = chain_calls(self.geometry, self.running)
        return self

    def weights(self) -> list[Tensor]:
        """Return what the convolutions that run take, of the factors or merged from them."""
        merged, factors, groups = self._contraction.merged, list(self.factors), self.geometry.groups
        if max(merged) == 1:
            return factors
        if not may_keep(factors):
            return merged_weights(factors, self.stages, merged, groups)
        return self._kept.get(merged, factors, lambda: merged_weights(factors, self.stages, merged, groups))

    def tensors(self) -> list[Tensor]:
        """Return the factors with the legs that ``format.network`` names, those of several groups stacked.

        They share their memory with ``factors`` where that is possible, and their gradients always.
        """
        shapes = self.format.factor_shapes(self.geometry.kernel_shape, self.ranks, self.geometry.groups)
        return [factor.reshape(shape) for factor, shape in zip(self.factors, shapes, strict=True)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load factors with the legs of the network, too, as the first format of saved models has them."""
        shapes = self.format.factor_shapes(self.geometry.kernel_shape, self.ranks, self.geometry.groups)
        for i, (legs, held) in enumerate(zip(shapes, self._stored_shapes(), strict=True)):
            found = state_dict.get(key := f"{prefix}factors.{i}")
            if found is not None and found.shape == legs:
                state_dict[key] = found.reshape(held)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors stand for, shaped as torch's, rebuilt at each access."""
        shape, groups = self.geometry.kernel_shape, self.geometry.groups
        kernels = self.format.to_dense(self.tensors(), shape)
        return self.geometry.weight(kernels if groups > 1 else kernels[None])

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the output of the chain of convolutions (``input`` is what torch's layers call it, too).

        ``output_size``, of a transposed convolution only, is what torch's layers take: the spatial size
        wanted, where the stride leaves a choice.
        """
        geometry, calls = self.geometry, self._calls
        if output_size is not None:
            geometry = self._geometry_for(input, output_size)
            calls = chain_calls(geometry, self.running)
        if self._einsum is not None:
            return self._einsum(input, self.tensors(), self.bias, geometry)
        if self.checkpointing and self._may_checkpoint():
            return checkpoint(self._chain, input, calls, use_reentrant=False, preserve_rng_state=False)
        return self._chain(input, calls)

    def _chain(self, input: Tensor, calls: Sequence[ConvCall]) -> Tensor:
        return run_chain(input, self.weights(), self.running, calls, self.bias, groups=self.geometry.groups)

    def _may_checkpoint(self) -> bool:
        """Say whether this is a training step, which has something in between, and takes no second pass."""
        in_between = len(self.stages) > 1  # the chain's results, or the merged weights
        transformed = not torch.compiler.is_compiling() and in_transform()
        return self.training and torch.is_grad_enabled() and in_between and not transformed

    def _geometry_for(self, input: Tensor, output_size: Sequence[int]) -> ConvGeometry:
        geometry = self.geometry
        if not geometry.transposed:
            raise TypeError("output_size is for transposed convolutions, which this layer is not")
        lengths = input.shape[input.ndim - geometry.ndim :]
        if len(output_size) not in (geometry.ndim, input.ndim):
            raise ValueError(f"wanted an output size of {geometry.ndim} numbers, got {tuple(output_size)}")
        extra = geometry.output_padding_for(lengths, output_size[len(output_size) - geometry.ndim :])
        return replace(geometry, output_padding=extra)

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
        shape = "x".join(map(str, self.geometry.weight_shape))
        made = f"{self.format}, kernel={shape}, ranks={self.ranks}, bias={self.bias is not None}"
        made += f", groups={self.groups}" if self.geometry.groups > 1 else ""
        made += f", contraction={self.contraction}" if str(self.contraction) != "chain" else ""
        made += ", checkpointing" if self.checkpointing else ""
        return made + (", transposed" if self.geometry.transposed else "")


def checkpoint_activations_(model: M, on: bool = True) -> M:
    """Have every :class:`TNConv` of ``model`` keep its input only in training, and return the model.

    What lies between the convolutions of a layer, which is as large as its bonds, is then computed again in
    the backward pass: the layer keeps what the dense one would, for one more forward pass of most of its
    convolutions. Outputs and gradients stay the same. In eval mode, without gradients, and within
    ``torch.func`` it makes no difference. It is a setting of a training run: copies and pickles keep it,
    ``state_dict`` and saved models know nothing of it. :func:`tncompress.activation_bytes` measures it.

    >>> import tncompress as tnc
    >>> model = tnc.compress(tnc.build_model("zoo:cnn4"), {"default": {"format": "mps"}})
    >>> x = torch.randn(2, 1, 28, 28)
    >>> before = tnc.activation_bytes(model, x)
    >>> tnc.activation_bytes(tnc.checkpoint_activations_(model), x) < before
    True
    """
    layers = [module for module in model.modules() if isinstance(module, TNConv)]
    if not layers:
        raise ValueError("wanted a model with compressed layers, got one without any: compress it first")
    for layer in layers:
        layer.checkpointing = on
    return model


def in_transform() -> bool:
    """Say whether a transform of ``torch.func`` runs, which refuses what checkpoints are made of."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _ranks_of(format: Format, geometry: ConvGeometry, factors: Sequence[Tensor]) -> tuple[int, ...]:
    shape, groups = geometry.kernel_shape, geometry.groups
    network, stacked = format.network(shape), int(groups > 1)
    legs_fit = len(network) == len(factors) and all(
        len(legs) + stacked == factor.ndim for legs, factor in zip(network, factors, strict=True)
    )
    got = tuple(tuple(factor.shape) for factor in factors)
    if not legs_fit:
        before = f" after an axis of {groups} groups" if stacked else ""
        raise ValueError(f"{format} wants factors with legs {network}{before}, got {got}")
    found: dict[str, int] = {}
    for legs, sizes in zip(network, got, strict=True):
        found |= {leg: n for leg, n in zip(legs, sizes[stacked:], strict=True) if leg.startswith("r")}
    ranks = tuple(found[f"r{i}"] for i in range(len(found)))
    wanted = format.factor_shapes(shape, ranks, groups)
    if wanted != got:
        raise ValueError(f"{format} on a kernel {shape} wants factors {wanted}, got {got}")
    return ranks
