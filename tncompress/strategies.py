"""Ways to contract a layer's network with its input: which neighbouring cores are merged, or an einsum.

A chain of convolutions stays a chain when neighbours are merged into one convolution: every spatial axis
belongs to one stage, so that the kernel of two stages is a matrix product over the bond between them and an
outer product over their windows. Merging everything gives the dense layer, with its kernel rebuilt. What is
merged is made once and kept for as long as the factors are what they were; where gradients are wanted, or a
compiler looks on, it is part of every forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import opt_einsum
import torch
from torch import Tensor, nn

from tncompress.formats.base import Format, Stage
from tncompress.geometry import ConvGeometry
from tncompress.patches import patches

PIXELS, SAMPLE = 4096, 64
"""For how many pixels an einsum's path is searched, and how many entries of a factor are looked at again."""


@dataclass(frozen=True)
class Contraction:
    """How a layer runs: convolution number k stands for ``merged[k]`` neighbouring stages of the format.

    With ``einsum`` it is one einsum over patches of the input instead: slow, and right by definition.
    """

    merged: tuple[int, ...]
    einsum: bool = False

    @classmethod
    def of(cls, wanted: str | Sequence[int] | Contraction, stages: Sequence[Stage]) -> Contraction:
        """Return what ``"chain"``, ``"kernel"``, ``"einsum"`` or a count for each convolution stands for."""
        total, chain = len(stages), (1,) * len(stages)
        if isinstance(wanted, Contraction):
            wanted = wanted.merged if not wanted.einsum else "einsum"
        named = {"chain": cls(chain), "kernel": cls((total,)), "einsum": cls(chain, einsum=True)}
        if isinstance(wanted, str):
            if wanted not in named:
                raise ValueError(
                    f"wanted a contraction 'chain', 'kernel', 'einsum' or how many stages each convolution "
                    f"merges, got {wanted!r}"
                )
            return named[wanted]
        merged = tuple(wanted)
        if sum(merged) != total or min(merged) < 1:
            raise ValueError(
                f"wanted counts of merged stages that add up to the {total} of the layer, got {merged}"
            )
        return cls(merged)

    def __str__(self) -> str:
        if self.einsum:
            return "einsum"
        if len(self.merged) == 1:
            return "kernel"
        return "chain" if max(self.merged) == 1 else "+".join(map(str, self.merged))


def all_contractions(stages: Sequence[Stage]) -> list[Contraction]:
    """Return every way to merge neighbours, the whole chain first and the rebuilt kernel last."""
    total = len(stages)
    found = []
    for count in range(total - 1, -1, -1):
        for ends in combinations(range(1, total), count):
            bounds = (0, *ends, total)
            found.append(Contraction(tuple(b - a for a, b in pairwise(bounds))))
    return found


def merged_stages(stages: Sequence[Stage], merged: Sequence[int]) -> tuple[Stage, ...]:
    """Return the chain with neighbours merged; number k takes weight number k."""
    if max(merged) == 1:
        return tuple(stages)
    made, start = [], 0
    for number, count in enumerate(merged):
        part = stages[start : start + count]
        groups = math.gcd(*(stage.groups for stage in part))
        channels_in = part[0].shape[1] * part[0].groups
        window = tuple(max(sizes) for sizes in zip(*(stage.shape[2:] for stage in part), strict=True))
        axes = tuple(sorted(axis for stage in part for axis in stage.axes))
        made.append(Stage(number, (part[-1].shape[0], channels_in // groups, *window), axes, groups))
        start += count
    return tuple(made)


def merged_weights(
    stored: Sequence[Tensor], stages: Sequence[Stage], merged: Sequence[int], groups: int = 1
) -> list[Tensor]:
    """Return the weights of :func:`merged_stages`, from the factors as a layer of ``groups`` holds them."""
    if max(merged) == 1:
        return list(stored)
    made, start = [], 0
    for count in merged:
        part = stages[start : start + count]
        common = groups * math.gcd(*(stage.groups for stage in part))
        weights = [
            in_groups(stage.weight(stored[stage.factor], groups), groups * stage.groups, common)
            for stage in part
        ]
        kernel = weights[0]
        for weight in weights[1:]:
            kernel = compose(kernel, weight)
        made.append(kernel.flatten(0, 1).contiguous())
        start += count
    return made


def in_groups(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """Return a weight (out, in / groups, ...) as blocks ``(fewer, out, in, ...)``, with zeros between."""
    out, into, *window = weight.shape
    factor = groups // fewer
    if factor == 1:
        return weight.reshape(groups, out // groups, into, *window)
    blocks = weight.reshape(fewer, factor, out // groups, 1, into, -1)
    eye = torch.eye(factor, dtype=weight.dtype, device=weight.device)
    spread = blocks * eye.reshape(1, factor, 1, factor, 1, 1)
    return spread.reshape(fewer, out // fewer, factor * into, *window)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Return the kernel ``(groups, out, in, *window)`` of one convolution after another, of disjoint axes."""
    groups, middle, into, *window = first.shape
    _, out, _, *other = second.shape
    rows = second.reshape(groups, out, middle, -1).transpose(2, 3).reshape(groups, -1, middle)
    product = (rows @ first.reshape(groups, middle, -1)).reshape(groups, out, *other, into, *window)
    ndim = len(window)
    axes = [axis for k in range(ndim) for axis in (2 + k, 3 + ndim + k)]
    sizes = [a * b for a, b in zip(other, window, strict=True)]
    return product.permute(0, 1, 2 + ndim, *axes).reshape(groups, out, into, *sizes)


class Kept:
    """What was made of some parameters, as long as these are what they were.

    A change is known by the parameter's version and by its storage, which is held, so that no other takes its
    address; for changes that leave both (through ``.data``, or in another process) some entries are looked
    at again. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._made: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()

    def get(self, key: Any, parameters: Sequence[Tensor], make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what ``make`` returned for these parameters and this key, made again after changes."""
        if self._made is not None:
            old_key, states, held, made = self._made
            if old_key == key and states == [_state(p) for p in parameters] and _same(parameters, held):
                return made
        with torch.inference_mode(False), torch.no_grad():
            made = make()
            held = [(p.detach(), _sample(p).clone()) for p in parameters]
        self._made = key, [_state(p) for p in parameters], held, made
        return made


def may_keep(parameters: Sequence[Tensor]) -> bool:
    """Say whether what is made of the parameters can be kept: no gradient is wanted, and changes are seen."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        return False
    return all(type(p) is nn.Parameter and not p.is_inference() and not p.is_meta for p in parameters)


def _state(parameter: Tensor) -> tuple[Any, ...]:
    return parameter._version, parameter.data_ptr(), parameter.dtype, parameter.device, parameter.shape


def _sample(parameter: Tensor) -> Tensor:
    """Return some of the entries, in whatever order memory has them."""
    flat, offset = parameter.detach(), parameter.storage_offset()
    held = parameter.untyped_storage().nbytes() // parameter.element_size() - offset
    step = (parameter.numel() // SAMPLE) | 1
    return flat.as_strided((-(-min(parameter.numel(), held) // step),), (step,), offset)


def _same(parameters: Sequence[Tensor], held: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(_sample(p), sample) for p, (_, sample) in zip(parameters, held, strict=True))


@dataclass(frozen=True)
class Einsum:
    """One einsum of a layer's patches and factors along a path that was searched once."""

    equation: str
    path: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, format: Format, geometry: ConvGeometry, ranks: tuple[int, ...]) -> Einsum:
        """Search the path for a layer of this format, with opt_einsum."""
        shape = geometry.kernel_shape
        terms, kernel = format.equation(shape).split("->")
        out, legs = kernel[0], kernel[1:]
        equation = ",".join([f"GZ{legs}", *(f"G{term}" for term in terms.split(","))]) + f"->GZ{out}"
        sizes = [(geometry.groups, PIXELS, *shape[1:])]
        sizes += [(geometry.groups, *size) for size in format.factor_shapes(shape, ranks)]
        path, _ = opt_einsum.contract_path(equation, *sizes, shapes=True, optimize="optimal")
        return cls(equation, tuple(tuple(pair) for pair in path))

    def __call__(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, geometry: ConvGeometry
    ) -> Tensor:
        """Return the layer's output for ``x``; ``factors`` have the legs of the network."""
        stacked = [f if geometry.groups > 1 else f[None] for f in factors]
        seen = patches(x, geometry).unflatten(2, geometry.kernel_shape[1:])
        out = contract_pairs(self.equation, self.path, [seen, *stacked])  # groups, pixels, out
        out = out.transpose(0, 1).flatten(1)
        out = out if bias is None else out + bias
        if geometry.ndim == 0:
            return out.reshape(*x.shape[:-1], -1)
        lengths = [geometry.output_length(n, axis) for axis, n in enumerate(x.shape[-geometry.ndim :])]
        batch = x.shape[:1] if x.ndim == geometry.ndim + 2 else ()
        return out.reshape(*batch, *lengths, geometry.out_channels).movedim(-1, len(batch))


def contract_pairs(equation: str, path: Sequence[Sequence[int]], operands: Sequence[Tensor]) -> Tensor:
    """Return the einsum of ``operands``, contracted along ``path`` (in opt_einsum's words)."""
    inputs, result = equation.split("->")
    terms, tensors = inputs.split(","), list(operands)
    for step in path:
        taken = sorted(step, reverse=True)
        now = [(terms.pop(i), tensors.pop(i)) for i in taken]
        kept = set(result).union(*terms)
        letters = dict.fromkeys("".join(term for term, _ in now))
        made = "".join(letter for letter in letters if letter in kept) if terms else result
        sides = ",".join(term for term, _ in now)
        terms.append(made)
        tensors.append(torch.einsum(f"{sides}->{made}", *(tensor for _, tensor in now)))
    return tensors[0]
