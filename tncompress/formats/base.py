"""What a tensor-network format is: a network of factors, and the convolutions that run it.

A format is a small frozen value (``MPS(order="in kh kw out")``). It says, for a kernel's shape, which
tensor network it stands for (:meth:`Format.network`), how large its bonds can be
(:meth:`Format.max_ranks`), how a kernel is fitted (:meth:`Format.fit`) and which chain of small
convolutions applies the factors (:meth:`Format.stages`). Everything else is derived from these here.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tncompress.cuts import legs_of
from tncompress.nearby import did_you_mean

Shape = tuple[int, ...]
Ranks = tuple[int, ...]

FORMATS: dict[str, type[Format]] = {}
GROUP = "tncompress.formats"
"""The group of entry points in which other packages offer formats of theirs, by name."""
_F = TypeVar("_F", bound="Format")


@dataclass(frozen=True)
class Stage:
    """One small convolution of the chain that runs a format.

    Its weight is factor number ``factor``, reshaped to ``shape`` = (out, in / groups, *spatial) after
    ``copies`` copies of it are stacked along the first axis. It contracts the kernel's spatial ``axes``,
    so stride, padding and dilation of these axes belong to it, and of no other.
    """

    factor: int
    shape: Shape
    axes: tuple[int, ...] = ()
    groups: int = 1
    copies: int = 1

    def stored_shape(self, groups: int = 1) -> Shape:
        """Return the shape in which a layer of ``groups`` groups holds the factor (no copies)."""
        channels, *window = self.shape
        return (groups * channels // self.copies, *window)

    def weight(self, stored: Tensor, groups: int = 1) -> Tensor:
        """Return the convolution weight of this stage: the ``stored`` factor itself unless it is copied."""
        if self.copies == 1:
            return stored
        single = stored.unflatten(0, (groups, 1, -1))
        return single.expand(-1, self.copies, *[-1] * (single.ndim - 2)).flatten(0, 2)


@dataclass(frozen=True)
class Fit:
    """Factors fitted to a kernel, in its dtype and on its device, with their ``rel_error``.

    ``output_error`` is the relative root mean square error of the layer's output, where data were at hand.
    """

    factors: tuple[Tensor, ...]
    rel_error: float
    output_error: float | None = None

    @property
    def loss(self) -> float:
        """The error that policies and budgets go by: of the output where it is known, else of the kernel."""
        return self.rel_error if self.output_error is None else self.output_error


def register_format(name: str):
    """Return a class decorator that makes a format known under ``name`` in specs and files.

    The class is a dataclass whose options all have defaults. A name that another class has is a
    ``ValueError``. A package of yours that names the class as an entry point in the group
    ``tncompress.formats`` is found without being imported: see ``examples/own_format``.
    """

    def register(cls: type[_F]) -> type[_F]:
        if not is_dataclass(cls):
            raise TypeError(f"format {name!r} is a frozen dataclass, {cls.__qualname__} is not: decorate it")
        known = FORMATS.get(name)
        if known is not None and _place(known) != _place(cls):
            raise ValueError(f"the format name {name!r} is taken by {_place(known)}: choose another")
        cls.name = name
        FORMATS[name] = cls
        return cls

    return register


class Format(ABC):
    """A tensor-network format for kernels ``(out, in, *spatial)``.

    Bonds are named ``r0``, ``r1``, ... in the order of the ranks; the other legs are the kernel's
    (:func:`tncompress.cuts.legs_of`). Spatial legs of dimension 1 carry no bond of their own.
    """

    name: ClassVar[str]

    @abstractmethod
    def network(self, shape: Shape) -> tuple[tuple[str, ...], ...]:
        """Return the legs of each factor, in the order of the factor's modes."""

    @abstractmethod
    def max_ranks(self, shape: Shape) -> Ranks:
        """Return the largest rank that each bond can have; at these the format is exact."""

    @abstractmethod
    def fit(self, kernel: Tensor, ranks: Ranks) -> Fit:
        """Return factors of the given ranks for ``kernel`` and their true relative error."""

    @abstractmethod
    def stages(self, shape: Shape, ranks: Ranks) -> tuple[Stage, ...]:
        """Return the chain of convolutions that applies the network to an input."""

    def spectra(self, kernel: Tensor) -> tuple[Tensor, ...] | None:
        """Return the singular values of ``kernel`` at each bond, or None where bonds have none (CP).

        The squared error of a fit is at most the sum of the squared tails of these spectra.
        """
        return None

    def feasible(self, shape: Shape, ranks: Ranks) -> Ranks:
        """Return the ranks that the network can really have when ``ranks`` are asked of it."""
        return ranks

    def fit_groups(self, kernels: Tensor, ranks: Ranks) -> Fit:
        """Return the fit of each kernel in a stack ``(groups, out, in, *spatial)``, all at the same ranks.

        Factors are stacked along a leading axis, unless there is one kernel only; ``rel_error`` is that of
        all kernels together.
        """
        if len(kernels) == 1:
            return self.fit(kernels[0], ranks)
        fits = [self.fit(kernel, ranks) for kernel in kernels]
        norms = kernels.detach().double().flatten(1).norm(dim=1).tolist()
        error = math.hypot(*(fit.rel_error * norm for fit, norm in zip(fits, norms, strict=True)))
        total = math.hypot(*norms)
        factors = (torch.stack(parts) for parts in zip(*(fit.factors for fit in fits), strict=True))
        return Fit(tuple(factors), error / total if total > 0 else 0.0)

    def draft(self, kernels: Tensor, ranks: Ranks) -> Fit:
        """Return a fit to a stack of kernels in less time, and no better, if there is a way."""
        return self.fit_groups(kernels, ranks)

    def estimate(self, kernels: Tensor, ranks: Ranks) -> float:
        """Return about the relative error of a fit to a stack of kernels, in less time if there is a way."""
        return self.fit_groups(kernels, ranks).rel_error

    def estimates(self, kernels: Tensor, several: Sequence[Ranks]) -> list[float]:
        """Return what :meth:`estimate` gives at each of several ranks."""
        return [self.estimate(kernels, ranks) for ranks in several]

    @classmethod
    def contenders(cls) -> tuple[Format, ...]:
        """Return the variants of the format that compete where a spec leaves the format open."""
        return (cls(),)

    # What follows is derived.

    def spectra_of_groups(self, kernels: Tensor) -> tuple[Tensor, ...] | None:
        """Return the spectra of a stack of kernels ``(groups, out, in, *spatial)`` at bonds of equal rank.

        Value number k is the root of the sum of squares of the kernels' own, so that tails are those of all.
        """
        spectra = [self.spectra(kernel) for kernel in kernels]
        found = [own for own in spectra if own is not None]
        if len(found) < len(spectra):
            return None
        return tuple(torch.stack(bond).square().sum(0).sqrt() for bond in zip(*found, strict=True))

    def as_fit(self, factors: Iterable[Tensor], kernel: Tensor, rel_error: float) -> Fit:
        """Return ``factors`` in the dtype of ``kernel``, with ``rel_error``, which they had before.

        In half precision rounding is part of the error, which is therefore measured again.
        """
        cast = tuple(factor.to(kernel.dtype).contiguous() for factor in factors)
        if torch.finfo(kernel.dtype).eps > 1e-4:
            rebuilt = self.to_dense([factor.double() for factor in cast], tuple(kernel.shape))
            wanted = kernel.detach().double()
            norm = float(wanted.norm())
            rel_error = float((wanted - rebuilt).norm()) / norm if norm > 0 else 0.0
        return Fit(cast, rel_error)

    def decompose(self, kernel: Tensor, ranks: Ranks) -> tuple[Tensor, ...]:
        """Return the factors of :meth:`fit` alone."""
        return self.fit(kernel, ranks).factors

    def factor_shapes(self, shape: Shape, ranks: Ranks, groups: int = 1) -> tuple[Shape, ...]:
        """Return the shape of each factor; those of several groups are stacked along a leading axis."""
        size = dict(zip(legs_of(len(shape)), shape, strict=True))
        size |= {f"r{i}": rank for i, rank in enumerate(ranks)}
        stack = (groups,) if groups > 1 else ()
        return tuple(stack + tuple(size[leg] for leg in legs) for legs in self.network(shape))

    def num_params(self, shape: Shape, ranks: Ranks, groups: int = 1) -> int:
        """Return how many numbers the factors hold."""
        return groups * sum(math.prod(factor) for factor in self.factor_shapes(shape, ranks))

    def equation(self, shape: Shape) -> str:
        """Return the einsum equation that contracts the factors to the kernel.

        >>> from tncompress import MPS
        >>> MPS().equation((8, 4, 3, 3))
        'eb,fec,gfd,ag->abcd'
        """
        network = self.network(shape)
        letters = {leg: chr(ord("a") + i) for i, leg in enumerate(legs_of(len(shape)))}
        for leg in (leg for legs in network for leg in legs):
            letters.setdefault(leg, chr(ord("a") + len(letters)))
        terms = ["".join(letters[leg] for leg in legs) for legs in network]
        return f"{','.join(terms)}->{''.join(letters[leg] for leg in legs_of(len(shape)))}"

    def to_dense(self, factors: Sequence[Tensor], shape: Shape) -> Tensor:
        """Return the kernel of shape ``shape`` that the factors stand for; stacked factors give a stack."""
        terms, kernel = self.equation(shape).split("->")
        stacked = ",".join(f"...{term}" for term in terms.split(","))
        return torch.einsum(f"{stacked}->...{kernel}", *factors)

    def check_ranks(self, shape: Shape, ranks: Sequence[int]) -> Ranks:
        """Return ``ranks`` as a tuple if the format can be given them, else raise ``ValueError``."""
        maximum = self.max_ranks(shape)
        takes = f"takes {len(maximum)} rank(s) of at most {maximum}"
        if isinstance(ranks, int):
            raise TypeError(f"{self} on a kernel {tuple(shape)} {takes}, got {ranks}: give one for each bond")
        wanted = f"{self} on a kernel {tuple(shape)} {takes}, got {tuple(ranks)}"
        if len(ranks) != len(maximum):
            raise ValueError(wanted)
        if any(not 1 <= rank <= top for rank, top in zip(ranks, maximum, strict=True)):
            raise ValueError(f"{wanted}; ranks start at 1")
        return tuple(ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return the name and those options that differ from the default, as plain values."""
        options = asdict(self)  # type: ignore[call-overload]
        defaults = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        return {"name": self.name} | {key: value for key, value in options.items() if value != defaults[key]}

    def __str__(self) -> str:
        options = {key: value for key, value in self.to_dict().items() if key != "name"}
        return f"{self.name}({', '.join(str(value) for value in options.values())})" if options else self.name


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _offered() -> dict[str, EntryPoint]:
    """Return the formats of other packages that are not loaded yet, by name; built-in ones go first."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in FORMATS}


def _load(point: EntryPoint) -> None:
    """Register the format that a package offers; whatever is wrong with it is a ``ValueError``."""
    package = point.dist.name if point.dist is not None else point.value
    try:
        found = point.load()
    except Exception as error:  # whatever a package raises when it is imported
        reason = " ".join(str(error).split())
        raise ValueError(f"format {point.name!r} of {package} can't be loaded: {reason}") from error
    if not (isinstance(found, type) and issubclass(found, Format)):
        raise ValueError(f"format {point.name!r} of {package} is no subclass of Format: {point.value}")
    if FORMATS.get(point.name) is not found:
        register_format(point.name)(found)


def all_contenders() -> tuple[Format, ...]:
    """Return what competes for a layer where a spec leaves the format open, of every format there is.

    Those of other packages compete, too; one that can't be loaded is left out, with a warning.
    """
    for point in _offered().values():
        try:
            _load(point)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    return tuple(format for kind in FORMATS.values() for format in kind.contenders())


def make_format(value: Any) -> Format:
    """Return the format that ``value`` names: a format, a name, or a mapping with options.

    >>> make_format({"name": "svd", "cut": "in|rest"})
    SVD(cut='in|rest')
    """
    if isinstance(value, Format):
        return value
    options = dict(value) if isinstance(value, dict) else {"name": value}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in FORMATS:
        offered = _offered()
        if not isinstance(name, str) or name not in offered:
            known = ", ".join(sorted({*FORMATS, *offered}))
            near = did_you_mean(name, {*FORMATS, *offered})
            raise ValueError(f"unknown format {name!r}; the formats are {known}{near}")
        _load(offered[name])
    defaults = {field.name: field.default for field in fields(FORMATS[name])}  # type: ignore[arg-type]
    for option, given in options.items():
        if option not in defaults:
            has = f"its options are {', '.join(defaults)}" if defaults else "it has none"
            raise ValueError(f"format {name!r} has no option {option!r}; {has}")
        if type(given) is not type(defaults[option]):
            raise ValueError(
                f"format {name!r}: option {option!r} is like {defaults[option]!r}, got {given!r}"
            )
    return FORMATS[name](**options)
