"""Random layers, inputs, formats and ranks, for the laws that hold for all of them."""

from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from tncompress.cuts import all_cuts, legs_of
from tncompress.formats import CP, MPS, SVD, Format, Tucker
from tncompress.geometry import ConvGeometry
from tncompress.layers import TNConv

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
KINDS = ("plain", "plain", "transposed", "linear")
MEMORIES = ("plain", "strided", "channels last")
FAMILIES = ("svd", "mps", "tucker", "cp")
TREES = FAMILIES[:-1]
"""The formats whose bonds are cuts: all but CP, whose one bond is shared by all factors."""


@dataclass(frozen=True)
class Drawn:
    """A layer, an input, a format that can cut its kernel, and ranks to ask for, feasible or not."""

    kind: str
    channels: tuple[int, int]
    kernel: tuple[int, ...]
    options: dict[str, Any]
    input_shape: tuple[int, ...]
    memory: str
    seed: int
    format: Format = field(default_factory=MPS)
    asked: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)

    @property
    def transposed(self) -> bool:
        return self.kind.startswith("ConvT")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel of one group."""
        inward, out = self.channels
        return (out // self.groups, inward // self.groups, *self.kernel)

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.format.feasible(self.shape, self.asked)

    @property
    def full(self) -> tuple[int, ...]:
        return self.format.max_ranks(self.shape)

    def dense(self, dtype=torch.float64) -> nn.Module:
        torch.manual_seed(self.seed)
        window = (self.kernel,) if self.kernel else ()
        layer = getattr(nn, self.kind)(*self.channels, *window, dtype=dtype, **self.options)
        if self.memory == "channels last":
            layer.to(memory_format=CHANNELS_LAST[layer.weight.ndim])
        if self.memory == "strided":
            layer.weight.data = layer.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
        return layer

    def input(self, dtype=torch.float64) -> torch.Tensor:
        torch.manual_seed(self.seed + 1)
        if self.memory == "strided":
            return torch.randn((*self.input_shape, 2), dtype=dtype)[..., 0]
        x = torch.randn(self.input_shape, dtype=dtype)
        batched = x.ndim == len(self.kernel) + 2
        last = self.memory == "channels last" and batched
        return x.contiguous(memory_format=CHANNELS_LAST[x.ndim]) if last else x

    def layer(self, dtype=torch.float64, ranks=None) -> TNConv:
        return TNConv.from_dense(self.dense(dtype), self.format, ranks or self.asked)

    def random_layer(self, dtype=torch.float64) -> TNConv:
        """Return a layer of random factors: any network will do where no fit is asked for."""
        dense = self.dense(dtype)
        sizes = self.format.factor_shapes(self.shape, self.ranks, self.groups)
        factors = [torch.randn(size, dtype=dtype) for size in sizes]
        return TNConv(self.format, ConvGeometry.of(dense), factors, dense.bias)


MODES = ("zeros", "zeros", "reflect", "replicate", "circular")


def _each(values, ndim):
    return st.one_of(values, st.tuples(*[values] * ndim))


def _spread(value, ndim) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else value


@st.composite
def _convolutions(draw, transposed: bool, groups):
    ndim = draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 3 if ndim == 3 else 4)] * ndim))
    groups = draw(st.sampled_from(groups))
    channels = [groups * draw(st.sampled_from((1, 2, 3, 4, 5)[: 6 - ndim])) for _ in range(2)]
    options = {
        "groups": groups,
        "bias": draw(st.booleans()),
        "dilation": draw(_each(st.integers(1, 3), ndim)),
    }
    spans = [d * (k - 1) for d, k in zip(_spread(options["dilation"], ndim), kernel, strict=True)]
    if transposed:
        lengths = _draw_transposed(draw, ndim, spans, options)
    else:
        lengths = _draw_plain(draw, ndim, spans, options)
    batch = draw(st.sampled_from(((2,), (1,), (3,), ())))
    kind = f"Conv{'Transpose' * transposed}{ndim}d"
    return kind, tuple(channels), kernel, options, (*batch, channels[0], *lengths)


def _draw_plain(draw, ndim, spans, options):
    mode = options["padding_mode"] = draw(st.sampled_from(MODES))
    padding = draw(st.one_of(st.sampled_from(("same", "valid")), _each(st.integers(0, 3), ndim)))
    options["padding"] = padding
    options["stride"] = 1 if padding == "same" else draw(_each(st.integers(1, 3), ndim))
    if padding == "same":
        return [1 + span + draw(st.integers(0, 3)) for span in spans]
    pads = _spread(0 if padding == "valid" else padding, ndim)
    room = {"reflect": 1, "circular": 0}.get(mode, -3)  # of the input beyond the padding
    least = [max(1, span + 1 - 2 * pad, pad + room) for span, pad in zip(spans, pads, strict=True)]
    return [length + draw(st.integers(0, 3)) for length in least]


def _draw_transposed(draw, ndim, spans, options):
    strides = options["stride"] = draw(st.tuples(*[st.integers(1, 3)] * ndim))
    pads = options["padding"] = draw(st.tuples(*[st.integers(0, 2)] * ndim))
    tops = [max(pair) - 1 for pair in zip(strides, _spread(options["dilation"], ndim), strict=True)]
    extras = options["output_padding"] = tuple(draw(st.integers(0, top)) for top in tops)
    lengths = []
    for span, stride, pad, extra in zip(spans, strides, pads, extras, strict=True):
        missing = 2 * pad - span - extra  # the length is at least 1 + missing / stride
        lengths.append(max(1, 1 - (-missing // stride)) + draw(st.integers(0, 2)))
    return lengths


@st.composite
def _linears(draw):
    channels = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    batch = draw(st.sampled_from(((3,), (), (2, 3), (2, 1, 2))))
    return "Linear", channels, (), {"bias": draw(st.booleans())}, (*batch, channels[0])


def _can_cut(format: SVD, shape) -> bool:
    """Say whether both sides of a cut hold more than legs of dimension 1, which all go with ``in``."""
    sizes = dict(zip(legs_of(len(shape)), shape, strict=True))
    sides = (part.split() for part in format.cut.split("|"))
    return all(any(leg in ("in", "out") or sizes[leg] > 1 for leg in side) for side in sides)


@st.composite
def _formats(draw, shape, families):
    family = draw(st.sampled_from(families))
    if family == "svd":
        cuts = [SVD(str(cut)) for cut in all_cuts(len(shape))]
        return draw(st.sampled_from([format for format in cuts if _can_cut(format, shape)]))
    if family == "mps":
        orders = [" ".join(legs) for legs in permutations(legs_of(len(shape)))]
        return MPS(draw(st.sampled_from(orders)))
    if family == "tucker":
        return Tucker(draw(st.sampled_from(("channels", "all"))))
    return CP(merged=draw(st.booleans()))


@st.composite
def drawn(draw, kinds=KINDS, families=FAMILIES, groups=(1, 1, 2, 3), memories=MEMORIES):
    kind = draw(st.sampled_from(kinds))
    layer = draw(_linears() if kind == "linear" else _convolutions(kind == "transposed", groups))
    possible = [m for m in memories if m != "channels last" or len(layer[2]) > 1] or ["plain"]
    case = Drawn(*layer, memory=draw(st.sampled_from(possible)), seed=draw(st.integers(0, 999)))
    case = replace(case, format=draw(_formats(case.shape, families)))
    return replace(case, asked=tuple(draw(st.integers(1, top)) for top in case.full))


def law(*draws, examples=100, shrink=True):
    """Return a decorator that tries a test on ``examples`` drawn values, the same in every run."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    fixed = settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=examples,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    quiet = pytest.mark.filterwarnings(
        "ignore:Do not use the `random` module",  # beartype draws which items of a list it checks
        "ignore:Using padding='same' with even kernel",
    )
    return lambda test: quiet(fixed(given(*draws)(test)))
