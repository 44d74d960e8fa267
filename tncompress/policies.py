"""Rank policies: how the ranks of a layer are chosen. A policy is always tagged, never a bare number.

In Python it is ``Energy(0.95)``, in a file ``{energy: 0.95}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

from tncompress.nearby import did_you_mean


class RankPolicy:
    """How the ranks of a layer are chosen; the subclasses are the policies."""

    tag: ClassVar[str]

    def to_value(self) -> Any:
        """Return the number or numbers behind the tag."""
        (field,) = fields(self)  # type: ignore[arg-type]
        value = getattr(self, field.name)
        return list(value) if isinstance(value, tuple) else value


class _Fraction(RankPolicy):
    """A policy with one number, above 0 and at most 1."""

    def __post_init__(self) -> None:
        value = self.to_value()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"{self.tag} is a number above 0 and at most 1, got {value!r}")


@dataclass(frozen=True)
class FixedRank(RankPolicy):
    """These ranks, one for each bond of the format; a single number is every bond's, or what it can have.

    Numbers below 1 and bare booleans are a ``ValueError``, as are, when a plan is made, ranks given one by
    one that a kernel can't have.
    """

    ranks: int | Sequence[int]
    tag: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        values = self.ranks if isinstance(self.ranks, list | tuple) else [self.ranks]
        if not values or any(not isinstance(r, int) or isinstance(r, bool) or r < 1 for r in values):
            raise ValueError(f"fixed ranks are whole numbers from 1 on, got {self.ranks!r}")
        if isinstance(self.ranks, list):
            object.__setattr__(self, "ranks", tuple(self.ranks))


@dataclass(frozen=True)
class RankFraction(_Fraction):
    """At each bond this part (above 0, at most 1) of the largest rank that it can have, rounded up."""

    fraction: int | float
    tag: ClassVar[str] = "rank_fraction"

    def of(self, full: int) -> int:
        """Return the rank of a bond whose largest is ``full``.

        >>> RankFraction(0.3).of(9), RankFraction(0.07).of(100), RankFraction(0.01).of(3)
        (3, 7, 1)
        """
        return max(1, math.ceil(self.fraction * full - 1e-9))


@dataclass(frozen=True)
class ParamsRatio(_Fraction):
    """The smallest error with at most ``ratio`` (above 0, at most 1) times the parameters of the kernel.

    Parameters are those of the layer's kernel and factors, without the bias. Error is that of the layer's
    output where there is a calibration, else the relative Frobenius error of the kernel.
    """

    ratio: float
    tag: ClassVar[str] = "params_ratio"


@dataclass(frozen=True)
class Energy(_Fraction):
    """The fewest parameters that keep ``kept`` of the kernel's squared norm: rel_error**2 <= 1 - kept.

    With a calibration the norm is that of the layer's output.

    >>> make_policy({"energy": 0.99})
    Energy(kept=0.99)
    """

    kept: float
    tag: ClassVar[str] = "energy"


@dataclass(frozen=True)
class RelError(_Fraction):
    """The fewest parameters with a relative Frobenius error of the kernel of at most ``error``.

    It is kept for certain: with several bonds the root of the sum of what they discard stands for the
    error, which is at most that. With a calibration the error is that of the layer's output, and is measured.
    """

    error: float
    tag: ClassVar[str] = "rel_error"


@dataclass(frozen=True)
class Entropy(RankPolicy):
    """At each bond ``factor`` times exp(S), rounded up, with S the correlation entropy across it.

    exp(S) is the number of equal singular values that would be as mixed (the effective rank). CP, whose one
    bond lies on every cut, takes the largest of the kernel's legs.
    """

    factor: int | float = 1.0
    tag: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        wanted = not isinstance(self.factor, bool) and isinstance(self.factor, int | float)
        if not wanted or not 0 < self.factor < math.inf:
            raise ValueError(f"entropy is a factor above 0, got {self.factor!r}")


@dataclass(frozen=True)
class EVBMF(_Fraction):
    """At each bond the rank that empirical variational Bayes tells from noise, blended with the full one.

    The rank is ``share`` of the estimate (Nakajima et al. 2013) and 1 - ``share`` of the full rank, rounded
    up. The estimate alone, ``share=1``, can fall to nothing on a kernel that looks like noise: ``min_rank``
    holds it. CP takes the largest of the kernel's legs.
    """

    share: int | float = 1.0
    tag: ClassVar[str] = "evbmf"


POLICIES: dict[str, type[RankPolicy]] = {
    policy.tag: policy for policy in (FixedRank, RankFraction, ParamsRatio, Energy, RelError, Entropy, EVBMF)
}


def make_policy(value: Any) -> RankPolicy:
    """Return the policy that ``value`` stands for: a policy, or a mapping with one tag.

    >>> make_policy({"energy": 0.95})
    Energy(kept=0.95)
    """
    if isinstance(value, RankPolicy):
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"a rank is one tagged policy, such as {_tagged(value)}, got {value!r}; {_tags()}")
    ((tag, number),) = value.items()
    if tag not in POLICIES:
        raise ValueError(f"unknown rank policy {tag!r}; {_tags()}{did_you_mean(tag, POLICIES)}")
    return POLICIES[tag](number)  # type: ignore[call-arg]


def _tagged(value: Any) -> str:
    """Return the policy that a bare number was probably meant for."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        return "{energy: 0.95}"
    whole = isinstance(value, int) or value > 1
    return f"{{fixed: {math.ceil(value)}}}" if whole else f"{{params_ratio: {value}}}"


def _tags() -> str:
    return f"the tags are {', '.join(POLICIES)}"


PolicyField = Annotated[
    InstanceOf[RankPolicy],
    BeforeValidator(make_policy),
    PlainSerializer(lambda policy: {policy.tag: policy.to_value()}),
]
