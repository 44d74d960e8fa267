"""What the user asks for: which layers, in which format, at which ranks.

A :class:`Spec` is a frozen value that round-trips through JSON, YAML and TOML.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from tncompress.formats import MPS, Format, all_contenders, make_format
from tncompress.nearby import did_you_mean
from tncompress.policies import ParamsRatio, PolicyField
from tncompress.storage import new_file
from tncompress.textfiles import one_line, read_settings

KEEP_DENSE = ("stem", "classifier")
AUTO = "auto"
"""In place of a format: all of them compete for each layer, under a budget."""


def _one_line(format: Format | str) -> str | dict[str, Any]:
    if isinstance(format, str):
        return format
    described = format.to_dict()
    return described if len(described) > 1 else format.name


FormatField = Annotated[InstanceOf[Format], BeforeValidator(make_format), PlainSerializer(_one_line)]
FormatOrAuto = Annotated[
    InstanceOf[Format] | Literal["auto"],
    BeforeValidator(lambda value: value if isinstance(value, str) and value == AUTO else make_format(value)),
    PlainSerializer(_one_line),
]


class Settings(BaseModel):
    """Format and ranks of a layer.

    With the format ``auto``, under a budget, every format competes: those of
    :func:`tncompress.formats.all_contenders`.
    ``min_rank`` and ``max_rank`` bind the chosen ranks, ``round_to`` takes them to multiples (a bond whose
    maximum is smaller, or no multiple, may still be full); they do not touch a :class:`FixedRank` or a
    :class:`RankFraction`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: FormatOrAuto = MPS()
    rank: PolicyField = ParamsRatio(0.25)
    min_rank: int = Field(1, ge=1)
    max_rank: int | None = Field(None, ge=1)
    round_to: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> Settings:
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank {self.max_rank} is below min_rank {self.min_rank}")
        return self

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats that may be chosen: the one that is named, or all contenders."""
        return all_contenders() if isinstance(self.format, str) else (self.format,)

    @property
    def one_format(self) -> Format:
        """The format that is named; ``auto`` is none."""
        if isinstance(self.format, str):
            raise ValueError("format auto names no format: it is for layers under a budget")
        return self.format


class Rule(Settings):
    """Settings for the layers whose name matches ``pattern``.

    A pattern is a shell pattern on the module's dotted name (``layer[34].*``), or a regular expression that
    is searched in it after ``re:``. What the rule leaves out it takes from the spec's default. A pattern that
    matches no layer is a ``ValueError`` when a plan is made.

    >>> spec = Spec.parse({"rules": [{"pattern": "layer4.*", "rank": {"fixed": 8}}, {"pattern": "re:down"}]})
    >>> spec.rule_for(["layer4.0.conv1"]).rank, spec.rule_for(["layer1.0.conv1"]).rank
    (FixedRank(ranks=8), ParamsRatio(ratio=0.25))
    """

    pattern: str = Field(min_length=1)
    keep_dense: bool = False

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern


RESOURCES = ("params", "macs", "bytes", "latency")
"""What a budget can be on."""

Fraction = Annotated[float | None, Field(gt=0, le=1, strict=True)]


class Budget(BaseModel):
    """What the whole compressed model may take, each as a fraction of what the dense model takes.

    ``params`` counts all parameters, ``macs`` the multiply-accumulates of all convolutions and linear layers
    on the example inputs, ``bytes`` parameters and buffers in their dtypes, ``latency`` the time of a forward
    pass on the example inputs. Times are measured, layer by layer, or with ``latency_from="model"`` computed
    from a model of the machine, fitted once by ``tncompress bench --calibrate``. Formats and ranks are then
    chosen such that the losses of the layers sum up to the least.

    >>> Budget(params=0.25, macs=0.5).asked
    {'params': 0.25, 'macs': 0.5}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    params: Fraction = None
    macs: Fraction = None
    bytes: Fraction = None
    latency: Fraction = None
    latency_from: Literal["measurement", "model"] = "measurement"

    @model_validator(mode="after")
    def _asks_for_something(self) -> Budget:
        if not self.asked:
            raise ValueError(f"a budget is on one or more of {', '.join(RESOURCES)}, got none of them")
        return self

    @property
    def asked(self) -> dict[str, float]:
        """The fraction that is allowed of each resource that the budget is on."""
        given = {name: getattr(self, name) for name in RESOURCES}
        return {name: fraction for name, fraction in given.items() if fraction is not None}


class Spec(BaseModel):
    """What to compress, how, and what to leave dense.

    ``keep_dense`` holds names, patterns, and the words ``stem`` and ``classifier`` for the first and the last
    layer. ``include`` says what of the following, which is left alone otherwise, is compressed, too:
    ``depthwise`` convolutions; ``subclasses`` of torch's layers that do not change its forward pass;
    ``parametrized`` layers (weight norm, spectral norm), whose weight is made plain; layers that are
    ``compressed`` already, again. ``allow_larger`` lets factors hold more parameters than the kernel.
    A ``budget`` takes the place of the default's rank policy: ranks are chosen for all layers together. A
    layer whose rule sets a ``rank`` keeps to that; what it takes counts.

    >>> from tncompress import Energy
    >>> spec = Spec(default=Settings(format="tucker", rank=Energy(0.9)))
    >>> Spec.parse(spec.to_dict()) == spec
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    default: Settings = Settings()
    rules: tuple[Rule, ...] = ()
    keep_dense: tuple[str, ...] = KEEP_DENSE
    include: tuple[Literal["depthwise", "subclasses", "parametrized", "compressed"], ...] = ()
    allow_larger: bool = False
    budget: Budget | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _names_resources(cls, budget: Any) -> Any:
        if budget is not None and not isinstance(budget, Budget | Mapping):
            raise ValueError(f"a budget is a mapping such as {{params: 0.25}}, got {budget!r}")
        return budget

    @model_validator(mode="after")
    def _budget_and_ranks_agree(self) -> Spec:
        if self.budget is None:
            if AUTO in (self.default.format, *(rule.format for rule in self.rules)):
                raise ValueError("format auto is chosen under a budget, got none: add one, or name a format")
            return self
        if "rank" in self.default.model_fields_set:
            raise ValueError("a budget chooses the ranks, got a rank in default, too: leave one of them out")
        for rule in self.rules:
            if "rank" in rule.model_fields_set and AUTO in (rule.format, self._inherited(rule)):
                raise ValueError(f"a rank needs a format, got auto in the rule {rule.pattern!r}: name one")
        return self

    def _inherited(self, rule: Rule) -> Format | str | None:
        return None if "format" in rule.model_fields_set else self.default.format

    @model_validator(mode="after")
    def _fill_rules(self) -> Spec:
        given = {name: getattr(self.default, name) for name in self.default.model_fields_set}
        rules = tuple(
            rule.model_copy(update={k: v for k, v in given.items() if k not in rule.model_fields_set})
            for rule in self.rules
        )
        object.__setattr__(self, "rules", rules)
        return self

    @classmethod
    def parse(cls, value: Spec | Mapping[str, Any] | str | Path) -> Spec:
        """Return the spec that ``value`` is, describes, or (as a path) holds; errors are one line."""
        if isinstance(value, Spec):
            return value
        if isinstance(value, str | Path):
            return cls._checked(read_settings(Path(value), "spec"), f"spec {value}")
        if not isinstance(value, Mapping):
            raise TypeError(f"a spec is a Spec, a mapping or a path to a file, got {type(value).__name__}")
        return cls._checked(value, "spec")

    @classmethod
    def _checked(cls, value: Any, source: str) -> Spec:
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"{source}: {explain(error, cls)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return what was given, as plain values that any of the file formats can hold."""
        return {"version": self.version} | self.model_dump(mode="json", exclude_unset=True)

    def save(self, path: str | Path) -> None:
        """Write the spec as JSON or YAML, by the file's suffix."""
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        elif path.suffix in (".yaml", ".yml"):
            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        else:
            raise ValueError(f"a spec is written as .json or .yaml, got {path.name}")
        with new_file(path) as fresh:
            fresh.write_text(text, encoding="utf-8")

    @property
    def formats(self) -> tuple[Format, ...]:
        """All formats that may be chosen for some layer."""
        open_to = (self.default, *(rule for rule in self.rules if not rule.keep_dense))
        return tuple(dict.fromkeys(format for settings in open_to for format in settings.formats))

    def rule_for(self, names: Sequence[str]) -> Rule | Settings:
        """Return the first rule that matches one of ``names``, else the default."""
        return next((rule for rule in self.rules if matches_any(rule.pattern, names)), self.default)


def matches_any(pattern: str, names: Sequence[str]) -> bool:
    """Return whether ``pattern`` matches one of the module names.

    >>> matches_any("layer[34].*", ["layer3.0.conv1"]), matches_any("re:conv[12]$", ["layer3.0.conv1"])
    (True, True)
    """
    if pattern.startswith("re:"):
        return any(re.search(pattern[3:], name) for name in names)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first problem of a validation error as one line that names the key and what is valid."""
    return one_line(_first_problem(error, model))


def _first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    place = ".".join(str(part) for part in first["loc"]) or "top level"
    if first["type"] == "extra_forbidden":
        valid = ", ".join(_keys_at(model, first["loc"][:-1]))
        return f"unknown key '{place}'; the keys there are {valid}{_meant(first['loc'], model)}"
    if first["type"] == "missing":
        return f"'{place}' is missing"
    message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    came = "" if ", got " in message or message.startswith("unknown ") else f", got {first['input']!r}"
    part = "budget" in first["loc"][:-1] and first["type"].startswith(("less", "greater"))
    hint = ": a budget is a part of what the dense model takes, such as 0.25" if part else ""
    return f"{place}: {message[:1].lower()}{message[1:]}{came}{hint}"


def _meant(location: Sequence[Any], model: type[BaseModel]) -> str:
    """Return what may have been meant by the last key of a place, to end a message with."""
    key = location[-1]
    if model is Spec and len(location) == 1 and key in Settings.model_fields:
        return f"; {key} is a key of default: {{default: {{{key}: ...}}}}"
    return did_you_mean(key, _keys_at(model, location[:-1]))


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    inner: dict[str, type[BaseModel]] = {"default": Settings, "rules": Rule, "budget": Budget}
    for part in location:
        model = inner.get(part, model) if isinstance(part, str) else model
    return list(model.model_fields)
