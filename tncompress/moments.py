"""What calibration data say of each layer's input: mean and covariance of its patches, kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tncompress.discovery import Layer, digest_of
from tncompress.manifest import checksum
from tncompress.metric import Metric
from tncompress.spec import explain
from tncompress.storage import new_file
from tncompress.textfiles import one_line, parse_json
from tncompress.weights import refuse_pickle

_HEADER = "tncompress.calibration"
_AGAIN = "calibrate again, or copy the file again"


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of the input patches of a layer, in float64.

    ``count`` patches were seen. ``mean`` is ``(groups, in, *kernel)``. The centred ``covariance`` is
    ``(groups, d, d)`` with d = in * prod(kernel); where that is too large, ``channels`` ``(groups, in, in)``
    and ``window`` ``(groups, k, k)`` take its place: their Kronecker product has the covariance's trace, and
    equals it if it is a product at all. ``gradient`` ``(groups, out, out)`` is the second moment of the
    loss's gradient with respect to the layer's output, where that was asked for.
    """

    count: int
    mean: Tensor
    covariance: Tensor | None = None
    channels: Tensor | None = None
    window: Tensor | None = None
    gradient: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mean.ndim < 2 or self.count < 1:
            raise ValueError(f"a mean of patches is (groups, in, *kernel), got {tuple(self.mean.shape)}")
        self.metric(centred=True)
        if self.gradient is not None and (
            self.gradient.ndim != 3 or self.gradient.shape[1:] != self.gradient.shape[:0:-1]
        ):
            raise ValueError(f"gradient moments are (groups, out, out), got {tuple(self.gradient.shape)}")
        if any(len(tensor) != len(self.mean) for tensor in self.tensors().values()):
            raise ValueError("moments of a layer have one entry a group each")

    @property
    def separable(self) -> bool:
        """Whether the covariance is a product of one of the channels and one of the window."""
        return self.covariance is None

    def tensors(self) -> dict[str, Tensor]:
        """Return those tensors that there are, by the names of their fields."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def metric(self, *, centred: bool) -> Metric:
        """Return the norm of a kernel in which its error is that of the output, about its mean or about 0."""
        patch = tuple(self.mean.shape[1:])
        if centred:
            return Metric(patch, self.covariance, self.channels, self.window)
        mean = self.mean.flatten(1)
        if self.covariance is not None:
            return Metric(patch, self.covariance + mean[:, :, None] * mean[:, None])
        assert self.channels is not None
        assert self.window is not None
        split = self.mean.flatten(2) if self.mean.ndim > 2 else self.mean[:, :, None]
        total = _trace(self.channels)
        return Metric(
            patch, None, *product(self.channels + split @ split.mT, total * self.window + split.mT @ split)
        )


def product(channels: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the product that has these partial traces; ``window`` has trace 1."""
    return channels, window / _trace(channels).clamp_min(torch.finfo(window.dtype).tiny)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The moments of a model's layers over ``images`` unlabelled images, by the first name of each layer.

    ``digests`` are of the weights that each layer had. ``biased`` layers have a bias; ``norms`` are the
    BatchNorms that take the output of a layer as it is: by either the mean of the output can be kept.
    Layers that no input reached are ``unreached``, those whose moments did not fit into memory ``left_out``.
    """

    layers: dict[str, Moments]
    images: int
    digests: dict[str, str]
    biased: tuple[str, ...] = ()
    norms: dict[str, str] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def separable(self) -> tuple[str, ...]:
        """The layers whose covariance was too large to be kept whole."""
        return tuple(name for name, moments in self.layers.items() if moments.separable)

    @property
    def num_bytes(self) -> int:
        """How much memory all moments take."""
        return sum(t.nbytes for moments in self.layers.values() for t in moments.tensors().values())

    def __repr__(self) -> str:
        words = f"{len(self.layers)} layers, {self.images} images, {self.num_bytes / 2**20:.1f} MiB"
        for what in ("separable", "left_out", "unreached"):
            if names := getattr(self, what):
                words += f", {what}: {', '.join(names)}"
        return f"Calibration({words})"

    def keeps_mean(self, name: str) -> bool:
        """Say whether the mean output of a layer can be kept, by its bias or by the BatchNorm behind it."""
        return name in self.biased or name in self.norms

    def metric(self, name: str) -> Metric | None:
        """Return the norm in which the kernel of a layer is to be fitted; None where there are no moments.

        It is about the mean of the patches where the mean of the output can be kept, else about zero.
        """
        moments = self.layers.get(name)
        return None if moments is None else moments.metric(centred=self.keeps_mean(name))

    def shift(self, name: str, error: Tensor) -> tuple[str | None, Tensor] | None:
        """Return ``(W - W') E[x]``, which keeps the mean output of a layer; None where nothing can take it.

        ``error`` is ``W - W'`` as a stack of kernels ``(groups, out, in, *spatial)``. The shift is to be
        added to the layer's bias, or taken from the running mean of the BatchNorm whose name comes with it.
        """
        if name not in self.layers or not self.keeps_mean(name):
            return None
        mean = self.layers[name].mean.flatten(1).to(error.device)
        norm = None if name in self.biased else self.norms[name]
        return norm, (error.double().flatten(2) @ mean[:, :, None]).flatten()

    def check(self, layers: Iterable[Layer]) -> None:
        """Raise a ``ValueError`` unless these are the layers, with the weights, of the calibrated model."""
        found = {layer.name: layer for layer in layers}
        for name, digest in self.digests.items():
            if name not in found:
                raise ValueError(
                    f"the moments are of another model: this one has no layer {name!r}; calibrate it"
                )
            weight = found[name].weight()
            if weight.is_meta or digest_of(weight) != digest:
                where = f"layer {name!r} with kernel {tuple(weight.shape)}"
                raise ValueError(f"the moments are of other weights of {where}: calibrate again")

    def notes(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return, for the plan, which of these layers have no moments or only separable ones, and why."""
        wanted = list(names)
        missing = [name for name in wanted if name not in self.layers and name not in self.left_out]
        parts = (
            ("by plain truncation, since the calibration data never reach them", missing),
            ("by plain truncation, since their moments exceed the memory limit", self.left_out),
            ("with separable moments, since whole ones exceed the memory limit", self.separable),
        )
        chosen = [(words, [name for name in some if name in wanted]) for words, some in parts]
        return tuple(f"planned {words}: {', '.join(some)}" for words, some in chosen if some)

    def save(self, path: str | Path) -> None:
        """Write the moments to ``path``, a ``.safetensors`` file, at once or not at all."""
        path = Path(path).expanduser()
        if path.suffix != ".safetensors":
            raise ValueError(
                f"moments are saved as safetensors: want a path that ends in .safetensors, got {path}"
            )
        tensors = {
            f"{place}.{kind}": value.detach().cpu().contiguous()
            for place, moments in enumerate(self.layers.values())
            for kind, value in moments.tensors().items()
        }
        described: dict[str, Any] = {
            "version": 1,
            "images": self.images,
            "layers": {name: moments.count for name, moments in self.layers.items()},
            "tensors": {key: digest_of(value) for key, value in tensors.items()},
            "digests": self.digests,
            "biased": self.biased,
            "norms": self.norms,
            "unreached": self.unreached,
            "left_out": self.left_out,
        }
        described["checksum"] = checksum(described)
        with new_file(path) as fresh:
            safetensors.torch.save_file(tensors, fresh, {_HEADER: json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Return what :meth:`save` wrote, exactly; a damaged or foreign file is an error of one line."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"no file of moments {path}" + (": it is a folder" if path.is_dir() else "")
            )
        refuse_pickle(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get(_HEADER)
            tensors = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({one_line(error)}); {_AGAIN}"
            ) from None
        if header is None:
            raise ValueError(f"{path} holds no moments: want a file that `tncompress calibrate` wrote")
        try:
            return _read(_described(header), tensors)
        except ValueError as error:
            raise ValueError(f"{path} holds damaged moments ({one_line(error)}); {_AGAIN}") from None


class _Header(BaseModel):
    """What a file of moments says of itself."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    images: int = Field(ge=1)
    layers: dict[str, int]
    tensors: dict[str, str]
    digests: dict[str, str]
    biased: tuple[str, ...]
    norms: dict[str, str]
    unreached: tuple[str, ...]
    left_out: tuple[str, ...]
    checksum: str


def _described(header: str) -> _Header:
    plain = parse_json(header)
    version = plain.get("version") if isinstance(plain, dict) else None
    if isinstance(version, int) and version > 1:
        raise ValueError(f"version {version}, this release reads 1: upgrade tncompress")
    try:
        described = _Header.model_validate(plain)
    except ValidationError as error:
        raise ValueError(explain(error, _Header)) from None
    if described.checksum != checksum(plain):
        raise ValueError("its checksum differs")
    return described


def _read(described: _Header, tensors: Mapping[str, Tensor]) -> Calibration:
    if set(tensors) != set(described.tensors):
        raise ValueError("its tensors are not those that it names")
    for key, value in tensors.items():
        if value.dtype != torch.float64 or digest_of(value) != described.tensors[key]:
            raise ValueError(f"the checksum of {key} differs")
    kinds = {f.name for f in fields(Moments)} - {"count"}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in described.layers}
    names = list(parts)
    for key, value in tensors.items():
        place, _, kind = key.partition(".")
        if not place.isdecimal() or int(place) >= len(names) or kind not in kinds:
            raise ValueError(f"it holds {key!r}, which is no moment of a layer")
        parts[names[int(place)]][kind] = value
    if lacking := [name for name, some in parts.items() if "mean" not in some]:
        raise ValueError(f"layer {lacking[0]!r} has no mean")
    layers = {name: Moments(described.layers[name], **some) for name, some in parts.items()}
    rest = described.model_dump(include={f.name for f in fields(Calibration)} - {"layers"})
    return Calibration(layers, **rest)


def num_bytes(groups: int, patch: tuple[int, ...], *, separable: bool) -> int:
    """Return the memory that the moments of such patches take."""
    d, window = math.prod(patch), math.prod(patch[1:])
    squares = patch[0] ** 2 + window**2 if separable else d**2
    return 8 * groups * (squares + d)
