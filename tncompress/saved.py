"""What is in a saved model, by its manifest and the header of its weights, and the card beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tncompress.formats import make_format
from tncompress.geometry import ConvGeometry
from tncompress.manifest import MANIFEST, check_weights, read_manifest
from tncompress.tables import count, markdown_table, percent, ratio
from tncompress.textfiles import one_line

if TYPE_CHECKING:
    from rich.table import Table

CARD = "README.md"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
COLUMNS = ("layer", "format", "kernel", "ranks", "params", "dense", "", "rel error")


@dataclass(frozen=True)
class SavedLayer:
    """One compressed layer of a saved model; ``params`` are those of its factors."""

    names: tuple[str, ...]
    format: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    params: int
    params_dense: int
    rel_error: float | None

    def cells(self) -> tuple[str, ...]:
        """Return the layer's line of a table."""
        return (
            one_line(", ".join(self.names), 60),
            one_line(self.format, 40),
            "x".join(map(str, self.shape)),
            " ".join(map(str, self.ranks)),
            count(self.params),
            count(self.params_dense),
            ratio(self.params_dense, self.params),
            "-" if self.rel_error is None else f"{self.rel_error:.3f}",
        )


@dataclass(frozen=True)
class SavedModel:
    """What a folder of :func:`tncompress.save` holds. It prints as a table.

    ``params`` counts all numbers in the file, buffers, too, ``params_dense`` those of the dense model;
    ``bytes`` is the size of the weights on disk, ``bytes_dense`` about that of the dense model's.
    """

    folder: str
    model: str | None
    source: dict[str, Any] | None
    format_version: int
    versions: dict[str, str]
    input_shape: tuple[int, ...] | None
    bytes: int
    bytes_dense: int
    params: int
    params_dense: int
    dtypes: dict[str, int]
    layers: tuple[SavedLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self)

    def facts(self) -> list[tuple[str, str]]:
        """Return what holds of the whole model, a name and words for each."""
        source = self.source or {}
        kept = ", ".join(f"{key}={value}" for key, value in source.items() if key != "source" and value)
        built = source.get("source", "not recorded: pass model= to tnc.load") + (f" ({kept})" if kept else "")
        saved = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        shape = "x".join(map(str, self.input_shape)) if self.input_shape else "not recorded"
        facts = [
            ("model", str(self.model)),
            ("built by", built),
            ("one input", shape),
            ("numbers", f"{count(self.params)}, dense {count(self.params_dense)}"),
            ("size on disk", f"{count(self.bytes)}B, dense about {count(self.bytes_dense)}B"),
            ("stored as", ", ".join(f"{kind} ({count(number)})" for kind, number in self.dtypes.items())),
            ("compressed layers", str(len(self.layers))),
            ("saved by", saved or "not recorded"),
            ("file format", f"version {self.format_version}"),
        ]
        return [(name, one_line(words)) for name, words in facts]

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        caption = "\n".join(f"{name}: {words}" for name, words in self.facts())
        table = Table(title=escape(self.folder), caption=escape(caption), caption_justify="left")
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if number < 2 else "right")
        for layer in self.layers:
            table.add_row(*(escape(cell) for cell in layer.cells()))
        return table

    def __str__(self) -> str:
        from tncompress.tables import render

        return render(self)

    def to_markdown(self) -> str:
        """Return the facts and the layers as Markdown."""
        facts = markdown_table(("", ""), self.facts())
        layers = markdown_table(COLUMNS, (layer.cells() for layer in self.layers))
        return f"{facts}\n\n{layers}\n" if self.layers else f"{facts}\n"


def read_saved(directory: str | Path, *, check: bool = False) -> SavedModel:
    """Return what :func:`tncompress.save` wrote to ``directory``, without loading any weights.

    Only the manifest and the header of the weights are read: with ``check`` the file is read once, for its
    checksum. Damaged files are a ``ValueError``.
    """
    folder = Path(directory).expanduser()
    manifest = read_manifest(folder)
    return describe(folder, manifest, check_weights(folder, manifest, read=check))


def describe(folder: Path, manifest: Mapping[str, Any], weights: Path) -> SavedModel:
    """Return what is in a folder whose manifest is ``manifest``, from the header of its ``weights``."""
    header = _header(weights)
    layers, sizes = [], Counter[str]()
    saved_bytes = 0
    for fields in manifest["layers"]:
        layer, size = _layer(fields, header, folder)
        layers.append(layer)
        saved_bytes += (layer.params_dense - layer.params) * size
    for kind, shape in header.values():
        sizes[kind] += math.prod(shape)
    saved = sum(layer.params_dense - layer.params for layer in layers)
    stored = weights.stat().st_size
    return SavedModel(
        folder=str(folder),
        model=manifest.get("class"),
        source=manifest["source"],
        format_version=manifest["format_version"],
        versions=dict(manifest.get("versions", {})),
        input_shape=tuple(manifest["input_shape"]) if manifest.get("input_shape") else None,
        bytes=stored,
        bytes_dense=stored + saved_bytes,
        params=sizes.total(),
        params_dense=sizes.total() + saved,
        dtypes=dict(sizes.most_common()),
        layers=tuple(layers),
    )


def write_card(folder: Path, name: str, manifest: Mapping[str, Any], measured: Sequence[str]) -> None:
    """Write the card of a model saved as ``name``: what it is, how it is loaded, what was measured of it."""
    found = describe(folder, manifest, folder / manifest["weights"])
    call = f'tnc.load("{name}")'
    if not found.source:
        call = f'tnc.load("{name}", model)  # the dense architecture, or a function that makes it'
    lines = [
        "# A compressed model",
        "",
        f"{one_line(found.model or 'A model')}, with {len(found.layers)} layers held as tensor networks: "
        f"{ratio(found.params_dense, found.params)} fewer numbers than the dense model.",
        "",
        "```python",
        "import tncompress as tnc",
        "",
        f"model = {call}",
        "```",
        "",
        found.to_markdown(),
    ]
    lines += ["## Measured", "", *(f"- {line}" for line in measured), ""] if measured else []
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def measured_in(history: Mapping[str, Any] | None) -> list[str]:
    """Return what a training history, as a mapping, says of accuracies."""
    names = {
        "accuracy_dense": "accuracy of the dense model",
        "accuracy_start": "accuracy before fine-tuning",
        "accuracy": "accuracy after fine-tuning",
    }
    found = {name: (history or {}).get(name) for name in names}
    return [
        f"{words}: {percent(value)}"
        for name, words in names.items()
        if isinstance(value := found[name], int | float)
    ]


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor in a safetensors file."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except Exception as error:  # the library's own, and what a hostile header makes of others
        raise ValueError(f"{path} is not a whole safetensors file ({one_line(error)})") from None


def _layer(
    fields: Mapping[str, Any], header: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path
) -> tuple[SavedLayer, int]:
    """Return a layer of the manifest, and the bytes of one of its numbers."""
    names = tuple(fields["names"])
    try:
        geometry = ConvGeometry.from_dict(fields["geometry"])
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"{folder / MANIFEST} has no geometry of layer {names[0]!r}: {one_line(error)}"
        ) from None
    held = [header[key] for key in header if any(key.startswith(f"{name}.factors.") for name in names)]
    params = sum(math.prod(shape) for _, shape in held)
    layer = SavedLayer(
        names=names,
        format=_named(fields["format"]),
        shape=geometry.weight_shape,
        ranks=tuple(fields["ranks"]),
        params=params,
        params_dense=geometry.num_weights,
        rel_error=fields["rel_error"],
    )
    return layer, BYTES.get(held[0][0], 4) if held else 4


def _named(format: Any) -> str:
    """Return how a format prints; one that is not installed here, as it is recorded."""
    try:
        return str(make_format(format))
    except ValueError:
        name = format.get("name") if isinstance(format, dict) else format
        return f"{one_line(name)} (not installed here)"
