"""A layer as an einsum: the equation, the operands, and the path that opt_einsum found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tncompress.interop.matching import network_of
from tncompress.layers import TNConv
from tncompress.patches import patches


@dataclass(frozen=True)
class Einsum:
    """A contraction that is planned: call it to carry it out.

    ``path`` is opt_einsum's, pairs of operands by their places; ``macs`` counts the multiply-accumulates
    along it, and ``info`` is opt_einsum's printed report.
    """

    equation: str
    operands: tuple[Tensor, ...] = field(repr=False)
    path: tuple[tuple[int, ...], ...]
    macs: int
    info: str = field(repr=False)

    def __call__(self) -> Tensor:
        """Return the result: the kernel, of several groups a stack of kernels. Gradients flow."""
        terms, output = self.equation.split("->")
        inputs, held = terms.split(","), list(self.operands)
        for step in self.path:
            chosen = sorted(step, reverse=True)
            parts = [(inputs.pop(i), held.pop(i)) for i in chosen]
            kept = set(output).union(*inputs)
            made = "".join(dict.fromkeys(c for term, _ in parts for c in term if c in kept))
            made = made if inputs else output
            equation = f"{','.join(term for term, _ in parts)}->{made}"
            inputs.append(made)
            held.append(torch.einsum(equation, *(tensor for _, tensor in parts)))
        return held[0]


def to_einsum(layer: TNConv, input: Tensor | None = None) -> Einsum:
    """Return the einsum of a layer's factors that gives its kernel ``(out, in, *spatial)``.

    The groups of a layer are the first letter of every term and of the result, which is then a stack of
    kernels. The operands are the layer's own, with their gradients. With an ``input`` of the layer its
    :func:`~tncompress.patches.patches` are the first operand, and the result is the output without the bias,
    ``(pixels, out)``: that shows at which cost a contraction gets there that shares nothing between
    neighbouring pixels, as the layer's convolutions do (``tncompress.contraction.chain_macs``).

    >>> import tncompress as tnc
    >>> layer = TNConv.from_dense(torch.nn.Conv2d(8, 16, 3), tnc.MPS(), ranks=(6, 12, 10))
    >>> einsum = to_einsum(layer)
    >>> einsum
    Einsum(equation='eb,fec,gfd,ag->abcd', path=((0, 1), (0, 1), (0, 1)), macs=21312)
    >>> torch.allclose(einsum(), layer.weight, atol=1e-6)
    True
    """
    import opt_einsum

    network_of(layer)
    shape, groups = layer.geometry.kernel_shape, layer.geometry.groups
    operands = tuple(layer.tensors())
    terms, kernel = layer.format.equation(shape).split("->")
    inputs, pixel, batch = terms.split(","), _letter(terms, 1), _letter(terms, 2)
    if input is not None:
        seen = patches(input, layer.geometry).unflatten(2, shape[1:])
        operands = (seen if groups > 1 else seen[0], *operands)
        inputs, kernel = [pixel + kernel[1:], *inputs], pixel + kernel[0]
    if groups > 1:
        inputs, kernel = [batch + term for term in inputs], batch + kernel
    equation = f"{','.join(inputs)}->{kernel}"
    shapes = [tuple(operand.shape) for operand in operands]
    path, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    plain = tuple(tuple(int(i) for i in step) for step in path)
    return Einsum(equation, operands, plain, _macs(equation, shapes, plain), str(info))


def _letter(terms: str, number: int) -> str:
    """Return a letter that the equation does not have: the first behind all of them, or the second."""
    return chr(ord(max(terms)) + number)


def _macs(equation: str, shapes: list[tuple[int, ...]], path: tuple[tuple[int, ...], ...]) -> int:
    terms, output = equation.split("->")
    inputs, total = [set(term) for term in terms.split(",")], 0
    size = {
        c: n
        for term, shape in zip(terms.split(","), shapes, strict=True)
        for c, n in zip(term, shape, strict=True)
    }
    for step in path:
        parts = [inputs.pop(i) for i in sorted(step, reverse=True)]
        joined = set().union(*parts)
        total += math.prod(size[c] for c in joined)
        inputs.append(joined & set(output).union(*inputs))
    return total
