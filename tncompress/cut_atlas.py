"""The atlas as a value: the rows of a model, how they print, how they are saved, and frames of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tncompress.cut_rows import QUARTER, CutRow, RowFile, cut_order, measured
from tncompress.cuts import Cut
from tncompress.plan import Skip
from tncompress.spec import explain
from tncompress.storage import new_file
from tncompress.tables import markdown_table, render
from tncompress.textfiles import MAX_BYTES, one_line, parse_json, read_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group

_MOST_VALUES = MAX_BYTES // 8
"""How many numbers a file may hold: an atlas is mostly numbers, of some eighteen letters each."""


MEAN, FEW = "mean,", 8
"""How lines of means begin, and from how many layers on a table states a trend with depth."""


@dataclass(frozen=True)
class CutAtlas:
    """Every convolution of a model across every bipartition of its legs.

    ``rows`` come layer by layer, in the order of registration; for each the kernels and metrics in turn, for
    each of those all cuts. ``skipped`` are the layers that could not be read, with the reason. ``losses``
    are those for which :meth:`to_frame` and :meth:`to_dict` state ranks; ``seed`` that of the controls;
    ``images`` how many the data-weighted rows rest on.
    """

    rows: tuple[CutRow, ...]
    skipped: tuple[Skip, ...] = ()
    losses: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    seed: int = 0
    images: int | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that were read, in order."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts of all layers, those with one leg on a side first."""
        return tuple(sorted({row.cut for row in self.rows}, key=cut_order))

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that were looked at: ``trained``, and the controls that were asked for."""
        return tuple(dict.fromkeys(row.kernel for row in self.rows))

    @property
    def metrics(self) -> tuple[str, ...]:
        """``norm``, and ``data`` where there was a calibration."""
        return tuple(dict.fromkeys(row.metric for row in self.rows))

    def select(
        self,
        *,
        layer: str | None = None,
        cut: str | Cut | None = None,
        kernel: str | None = None,
        metric: str | None = None,
    ) -> tuple[CutRow, ...]:
        """Return the rows with these values; what there is no row of is a ``ValueError`` that lists what is.

        A cut may be written in any way that :class:`~tncompress.Cut` reads.
        """
        rows = self.rows
        for key, value in (("layer", layer), ("kernel", kernel), ("metric", metric)):
            if value is not None:
                known = dict.fromkeys(getattr(row, key) for row in self.rows)
                if value not in known:
                    raise ValueError(f"the atlas has no {key} {value!r}; it has {one_line(', '.join(known))}")
                rows = tuple(row for row in rows if getattr(row, key) == value)
        if cut is not None:
            wanted = Cut.of(cut)
            found = tuple(row for row in rows if _same(wanted, row))
            if not found:
                raise ValueError(f"the atlas has no cut '{wanted}' there; it has {', '.join(self.cuts)}")
            rows = found
        return rows

    def trend(
        self, cut: str | Cut, measure: str = "entropy", *, kernel: str = "trained", metric: str = "norm"
    ) -> float | None:
        """Return Spearman's correlation of a measure of the layers across ``cut`` with their depth.

        ``measure`` is one of :data:`MEASURES`. Negative means: the deeper, the more compressible. None
        for fewer than three layers, or where all are alike.
        """
        from scipy.stats import spearmanr  # takes longer to import than all else here

        rows = self.select(cut=cut, kernel=kernel, metric=metric)
        pairs = [(row.depth, value) for row in rows if (value := measured(row, measure)) is not None]
        if len(pairs) < 3 or len({value for _, value in pairs}) < 2:
            return None
        return float(spearmanr(*zip(*pairs, strict=True)).statistic)

    # --- as a file ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the atlas as plain values; rows name their spectrum by its place in ``spectra``."""
        places = {spectrum: n for n, spectrum in enumerate(dict.fromkeys(r.spectrum for r in self.rows))}
        return {
            "version": 1,
            "losses": list(self.losses),
            "seed": self.seed,
            "images": self.images,
            "rows": [row.to_dict(self.losses) | {"spectrum": places[row.spectrum]} for row in self.rows],
            "spectra": [list(spectrum) for spectrum in places],
            "skipped": [skip.to_dict() for skip in self.skipped],
        }

    @classmethod
    def from_dict(cls, fields: Any) -> CutAtlas:
        """Return the atlas that :meth:`to_dict` described; a ``ValueError`` where it is none."""
        version = fields.get("version", 1) if isinstance(fields, Mapping) else 1
        if isinstance(version, int) and version > 1:
            raise ValueError(f"the atlas has version {version}, this release reads 1: upgrade tncompress")
        try:
            read = _AtlasFile.model_validate(fields)
        except ValidationError as error:
            raise ValueError(f"this is no atlas: {explain(error, _AtlasFile)}") from None
        rows = tuple(row.made(read.spectra) for row in read.rows)
        return cls(rows, read.skipped, read.losses, read.seed, read.images)

    def save(self, path: str | Path, *, overwrite: bool = True) -> None:
        """Write the atlas as JSON."""
        text = json.dumps(self.to_dict(), indent=None, allow_nan=False) + "\n"
        if len(text) > MAX_BYTES:
            raise ValueError(f"the atlas takes more than {MAX_BYTES >> 20} MiB as JSON: take fewer layers")
        with new_file(path, overwrite=overwrite) as fresh:
            fresh.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CutAtlas:
        """Return the atlas that :meth:`save` wrote; errors are one line that names the file."""
        text = read_text(Path(path), "atlas")
        try:
            fields = parse_json(text, most_values=_MOST_VALUES)
        except ValueError as error:
            raise ValueError(f"atlas {path} is not valid JSON: {one_line(error)}") from None
        try:
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"atlas {path}: {error}") from None

    # --- as a table -----------------------------------------------------------------------------------------

    def to_frame(self, kind: Literal["pandas", "polars"] = "pandas", *, spectra: bool = False) -> Any:
        """Return the rows as a data frame; with ``spectra`` these are a column of lists.

        Losses are relative errors, entropies in nats; ``params_*`` is what the two factors hold, over what
        the kernel holds.
        """
        columns = self.columns(spectra=spectra)
        if kind not in ("pandas", "polars"):
            raise ValueError(f"a frame is of 'pandas' or 'polars', got {kind!r}")
        try:
            if kind == "pandas":
                import pandas as library
            else:
                import polars as library
        except ImportError:
            raise ImportError(
                f"a {kind} frame needs {kind}: pip install {kind} (or tncompress[frames])"
            ) from None
        return library.DataFrame(columns)

    def columns(self, *, spectra: bool = False) -> dict[str, list[Any]]:
        """Return the rows as columns by name, each a list with an entry for every row."""
        table: dict[str, list[Any]] = {
            name: [getattr(row, name) for row in self.rows]
            for name in ("layer", "depth", "kernel", "metric", "cut")
        }
        table["shape"] = ["x".join(map(str, row.shape)) for row in self.rows]
        table["groups"] = [row.groups for row in self.rows]
        table["rows"], table["columns"] = ([row.sides[i] for row in self.rows] for i in (0, 1))
        for name in ("full", "norm", "entropy", "relative_entropy", "effective_rank"):
            table[name] = [getattr(row, name) for row in self.rows]
        for loss in self.losses:
            table[f"rank_for_{loss:g}"] = ranks = [row.rank_for(loss) for row in self.rows]
            pairs = zip(self.rows, ranks, strict=True)
            table[f"params_for_{loss:g}"] = [row.params_ratio(rank) for row, rank in pairs]
        table["loss_at_quarter_rank"] = [row.loss_at_rank(QUARTER) for row in self.rows]
        table["loss_at_quarter_params"] = [row.loss_at_params(QUARTER) for row in self.rows]
        if spectra:
            table["spectrum"] = [list(row.spectrum) for row in self.rows]
        return table

    def to_markdown(self) -> str:
        """Return the digest as Markdown tables, with the layers that could not be read below."""
        lines = [f"{self.title()}.", ""]
        for caption, header, body in self.digests():
            lines += [f"{caption}:", "", markdown_table(header, body), ""]
        lines += [f"- `{skip.name}` left out: {skip.reason}" for skip in self.skipped]
        return "\n".join(lines).rstrip() + "\n"

    def title(self) -> str:
        """Return what the atlas is of, in a few words."""
        data = f", outputs on {self.images} images" if self.images else ""
        shown = " and ".join(name for name in self.kernels if name != "trained")
        controls = f", beside {shown} kernels" if shown else ""
        left = f", {len(self.skipped)} left out" if self.skipped else ""
        return f"{len(self.layers)} layers across {len(self.cuts)} cuts{data}{controls}{left}"

    def digests(self) -> Iterable[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """Yield a caption, a header and the lines of a table for each metric; the last lines sum up."""
        for metric in self.metrics:
            where = "" if metric == "norm" else ", in the norm of the output"
            rows = [row for row in self.rows if (row.metric, row.kernel) == (metric, "trained")]
            caption = f"Correlation entropy over its largest value, trained kernels{where}"
            yield caption, ("layer", "kernel", *self.cuts), [*_lines(rows, self.cuts), *self._sums(metric)]

    def _sums(self, metric: str) -> Iterator[tuple[str, ...]]:
        """Yield the means over the layers, those of the controls beside, and the trend with depth."""
        for kernel in self.kernels if len(self.layers) > 1 else ():
            means = []
            for cut in self.cuts:
                rows = [r for r in self.rows if (r.metric, r.kernel, r.cut) == (metric, kernel, cut)]
                values = [value for row in rows if (value := measured(row, "entropy")) is not None]
                means.append(f"{sum(values) / len(values):.3f}" if values else "")
            yield "", f"{MEAN} {kernel}", *means
        if len(self.layers) >= FEW:
            trends = [self.trend(cut, metric=metric) for cut in self.cuts]
            words = [f"{trend:+.2f}" if trend is not None else "" for trend in trends]
            yield "", "Spearman with depth", *words

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(self.title(), style="italic")]
        for caption, header, body in self.digests():
            table = Table(title=caption, title_justify="left")
            for number, column in enumerate(header):
                table.add_column(Text(column), justify="right" if number > 1 else "left", overflow="fold")
            for line in body:
                if line[1] == f"{MEAN} trained":
                    table.add_section()
                table.add_row(*map(Text, line))
            parts.append(table)
        parts += [Text(f"{skip.name}: {skip.reason}", style="italic") for skip in self.skipped]
        return Group(*parts)

    # --- as figures and a page ------------------------------------------------------------------------------

    def plot_spectra(self, *, metric: str = "norm") -> Figure:
        """Return a figure of the spectra: a panel for each cut, a line for each layer, coloured by depth."""
        from tncompress.atlas_plots import plot_spectra

        return plot_spectra(self, metric=metric)

    def plot_entropy(self, *, metric: str = "norm") -> Figure:
        """Return a figure of the entropy by depth, a panel for each cut, beside the controls taken."""
        from tncompress.atlas_plots import plot_entropy

        return plot_entropy(self, metric=metric)

    def plot_heatmap(
        self, measure: str = "entropy", *, kernel: str = "trained", metric: str = "norm"
    ) -> Figure:
        """Return a heat map, layers x cuts, of one of :data:`MEASURES`."""
        from tncompress.atlas_plots import plot_heatmap

        return plot_heatmap(self, measure, kernel=kernel, metric=metric)

    def to_html(self, title: str = "Cut atlas") -> str:
        """Return one self-contained page: the figures, the digest, and all rows."""
        from tncompress.atlas_page import page

        return page(self, title)

    def save_html(self, path: str | Path, title: str = "Cut atlas", *, overwrite: bool = True) -> None:
        """Write :meth:`to_html` to a file."""
        with new_file(path, overwrite=overwrite) as fresh:
            fresh.write_text(self.to_html(title), encoding="utf-8")


def _lines(rows: Iterable[CutRow], cuts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a line for each layer: name, kernel, and the relative entropy across each of ``cuts``."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        groups = f" /{row.groups}" if row.groups > 1 else ""
        key = row.layer, "x".join(map(str, row.shape)) + groups
        relative = row.relative_entropy
        cells.setdefault(key, {})[row.cut] = f"{relative:.3f}" if relative is not None else "-"
    return [(*key, *(own.get(cut, "") for cut in cuts)) for key, own in cells.items()]


def _same(cut: Cut, row: CutRow) -> bool:
    try:
        modes = cut.modes(len(row.shape))
    except ValueError:  # legs that this kernel does not have
        return False
    return set(modes) == set(Cut.parse(row.cut).modes(len(row.shape)))


class _AtlasFile(BaseModel):
    """What an atlas looks like in a file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    losses: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    seed: int
    images: int | None
    rows: tuple[RowFile, ...]
    spectra: tuple[tuple[Annotated[float, Field(ge=0)], ...], ...]
    skipped: tuple[Skip, ...]
