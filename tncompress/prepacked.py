"""Convolutions for inference: weights laid out for the backend, with what comes after them.

On a CPU oneDNN keeps weights in an order of its own, and adds and activates while the result is still in
cache. Where it can't (other devices, other kinds of layers, gradients, compilers, tracers) the same weights
run through torch's convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tncompress.contraction import ConvCall, chain_calls
from tncompress.formats.base import Stage
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv
from tncompress.strategies import Contraction, merged_stages, merged_weights


class Activation(NamedTuple):
    """torch's function, and oneDNN's word for it with its numbers and variant."""

    function: Callable[[Tensor], Tensor]
    word: str
    numbers: tuple[float, ...] = ()
    variant: str = ""


ACTIVATIONS = {
    "relu": Activation(F.relu, "relu"),
    "relu6": Activation(F.relu6, "hardtanh", (0.0, 6.0)),
    "silu": Activation(F.silu, "swish"),
    "hardswish": Activation(F.hardswish, "hardswish"),
    "gelu": Activation(F.gelu, "gelu", variant="none"),
    "gelu tanh": Activation(partial(F.gelu, approximate="tanh"), "gelu", variant="tanh"),
}
NOTHING = Activation(lambda x: x, "none")

PACKED_DTYPES = (torch.float32, torch.bfloat16)

_Run = Callable[[Tensor, "Tensor | None"], Tensor]
Way = Literal["plain", "packed", "product"]
"""How a layer runs: by torch, by oneDNN with a packed weight, or as oneDNN's product of matrices."""


class FrozenConv(nn.Module):
    """One convolution, or linear map, with a fixed weight, of a layer's chain; ``activation`` comes after it.

    The weight has the shape (out, in / groups, ...) also where the convolution is a transposed one.
    A second input of the output's shape is added before the activation. ``way`` is one of :attr:`ways`,
    of which the last is taken until another is set.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        call: ConvCall,
        activation: str | None = None,
        *,
        pack: bool = True,
    ) -> None:
        super().__init__()
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if pack else {}
        if weight.ndim in formats:
            weight = weight.to(memory_format=formats[weight.ndim])
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.call, self.activation = call, activation
        self.ways: tuple[Way, ...] = self._possible() if pack else ("plain",)
        self.way: Way = self.ways[-1]
        self._kept: _Kept | None = None

    def _possible(self) -> tuple[Way, ...]:
        call = self.call
        if len(call.stride) == 0:
            return "plain", "product"
        if len(call.stride) != 2 or call.output_padding is not None:
            return ("plain",)
        alone = call.groups == 1 and self.weight.shape[2:] == (1, 1) and not call.pad
        if alone and set(call.stride) == {1} and set(call.padding) == {0}:
            return "plain", "packed", "product"
        return "plain", "packed"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # oneDNN's tensors can't be written, and are quickly made

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return the convolution of ``x``, plus ``other``, activated."""
        return self.run(x, other, may_pack(x))

    def run(self, x: Tensor, other: Tensor | None, may: bool) -> Tensor:
        """Return :meth:`forward`'s output; ``may`` says whether oneDNN may see ``x`` as it is."""
        if may and self.way != "plain" and self.takes(x, other):
            prepared = self._prepared(x)
            if prepared is not None:
                return prepared(x, other)
        x = self.call(x, self.weight, self.bias)
        return self._after.function(x if other is None else x + other)

    def takes(self, x: Tensor, other: Tensor | None) -> bool:
        """Say whether oneDNN can run these inputs, in the way that is set."""
        if x.ndim != 4 and (x.ndim < 2 or self.call.stride):  # without a batch
            return False
        if other is None or self.way == "product" or not self.call.stride:
            return True
        return self._fits(x, other)

    def _fits(self, x: Tensor, other: Tensor) -> bool:
        """Say whether ``other`` surely has the output's shape and dtype: oneDNN does not broadcast."""
        if type(other) is not Tensor or other.dtype != x.dtype or other.ndim != 4:
            return False
        call, pad = self.call, self.call.pad or (0, 0, 0, 0)
        (high, wide), (p, q), (d, e), (s, t) = x.shape[2:], call.padding, call.dilation, call.stride
        out, _, kh, kw = self.weight.shape
        high = (high + pad[2] + pad[3] + 2 * p - d * (kh - 1) - 1) // s + 1
        wide = (wide + pad[0] + pad[1] + 2 * q - e * (kw - 1) - 1) // t + 1
        return other.shape == (x.shape[0], out, high, wide)

    def _prepared(self, x: Tensor) -> _Run | None:
        """Return what runs inputs like ``x`` with the weight packed, kept until the weight is another one."""
        weight, bias, kept = self._buffers["weight"], self._buffers["bias"], self._kept
        assert weight is not None
        if weight.dtype != x.dtype or not weight.is_cpu:
            return None
        if kept is not None and kept.is_of(weight, bias, self.way):
            return kept.run
        try:
            with torch.inference_mode(False), torch.no_grad():
                make = self._as_product if self.way == "product" else self._as_convolution
                run = make(weight, bias, x)
        except (RuntimeError, AttributeError):  # this build of torch, or this processor, has no such thing
            self.way, self.ways = "plain", ("plain",)
            return None
        self._kept = _Kept(weight, _version(weight), bias, self.way, run)
        return run

    def _as_product(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> _Run:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1), x.numel() // weight.shape[1])
        multiply, after = torch.ops.mkldnn._linear_pointwise.default, self._after
        is_linear = weight.ndim == 2

        def multiplied(x: Tensor, after: Activation) -> Tensor:
            if is_linear:
                return multiply(x, packed, bias, *after[1:])
            return multiply(x.permute(0, 2, 3, 1), packed, bias, *after[1:]).permute(0, 3, 1, 2)

        def run(x: Tensor, other: Tensor | None) -> Tensor:
            if other is None:
                return multiplied(x, after)
            x = multiplied(x, NOTHING)
            alike = other.shape == x.shape and other.dtype == x.dtype
            return after.function(x.add_(other) if alike else x + other)

        return run

    def _as_convolution(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> _Run:
        call = self.call
        where = (call.padding, call.stride, call.dilation, call.groups)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *where, list(x.shape))
        convolve = torch.ops.mkldnn._convolution_pointwise
        alone, added = convolve.default, convolve.binary
        after = self._after
        fused = after.word if after.word == "relu" else None  # oneDNN's sums take no other
        left = NOTHING if fused else after

        def run(x: Tensor, other: Tensor | None) -> Tensor:
            if call.pad:
                x = F.pad(x, call.pad, mode=call.pad_mode)
            if other is None:
                return alone(x, packed, bias, *where, *after[1:])
            return left.function(added(x, other, packed, bias, *where, "add", None, fused, (), None))

        return run

    @property
    def _after(self) -> Activation:
        return ACTIVATIONS[self.activation] if self.activation else NOTHING

    def extra_repr(self) -> str:
        """Describe the convolution in the printed module."""
        made = f"weight={'x'.join(map(str, self.weight.shape))}, stride={self.call.stride}"
        made += f", groups={self.call.groups}" if self.call.groups > 1 else ""
        return made + (f", {self.activation}" if self.activation else "")


class _Kept(NamedTuple):
    """How a convolution with a packed weight runs, and what that was made from."""

    weight: Tensor
    version: int
    bias: Tensor | None
    way: Way
    run: _Run

    def is_of(self, weight: Tensor, bias: Tensor | None, way: Way) -> bool:
        same = self.weight is weight and self.bias is bias and self.way == way
        return same and self.version == _version(weight)


def may_pack(x: Tensor) -> bool:
    """Say whether oneDNN may see ``x``: on the CPU, and nobody asks for gradients or looks on."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype in PACKED_DTYPES
        and x.is_cpu
        and x.numel() > 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0  # whoever counts operations knows torch's only
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def own_weights(layer: TNConv, way: Contraction | None = None) -> list[Tensor]:
    """Return the weights of a layer's convolutions in the order in which they run, computed in float64."""
    merged, groups = (way or layer.contraction).merged, layer.geometry.groups
    factors = [factor.detach().double() for factor in layer.factors]
    held = merged_weights(factors, layer.stages, merged, groups)
    stages = merged_stages(layer.stages, merged)
    return [stage.weight(held[stage.factor], groups).to(layer.factors[0].dtype) for stage in stages]


class FrozenChain(nn.Module):
    """A layer for inference: convolutions one after another, the last with all that was folded into it."""

    def __init__(
        self,
        geometry: ConvGeometry,
        stages: Sequence[Stage],
        weights: Sequence[Tensor],
        bias: Tensor | None,
        activation: str | None = None,
        *,
        pack: bool = True,
    ) -> None:
        """Take the weight of each convolution that runs, as :func:`own_weights` gives them."""
        super().__init__()
        calls, last = chain_calls(geometry, stages), len(stages) - 1
        self.convolutions = nn.ModuleList(
            FrozenConv(
                weight,
                bias if k == last else None,
                call,
                activation if k == last else None,
                pack=pack,
            )
            for k, (weight, call) in enumerate(zip(weights, calls, strict=True))
        )

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        """Return the layer's output, plus ``other``, activated."""
        may, chain = may_pack(input), cast(Any, self.convolutions)
        *before, last = chain._modules.values()  # iterating over a ModuleList takes microseconds
        for convolution in before:
            input = convolution.run(input, None, may)
        return last.run(input, other, may)
