"""An atlas as one page of HTML that needs nothing else: figures are in it as data, styles, too."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tncompress.cut_atlas import CutAtlas
from tncompress.cut_rows import MEASURES, CutRow
from tncompress.pages import Markup, document, table
from tncompress.tables import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120

WORDS = (
    ("cut", "a bipartition of the legs of a kernel (out, in, kh, kw ...): one side is the rows of a matrix, "
     "the other its columns"),
    ("weights", "the squares of the singular values of that matrix over their sum; a truncation to rank r "
     "discards all but the first r, and the square of its norm loss is the discarded weight"),
    ("entropy", "-Σ p log p of the weights p, in nats: 0 for a product across the cut, log(full rank) where "
     "all singular values are alike; effective rank: its exponential"),
    ("norm loss", "‖W − Wᵣ‖ / ‖W‖ of the best approximation of that rank"),
    ("random, shuffled", "controls of the same shape: as torch initialises the layer; the kernel's own "
     "entries in a random order"),
)  # fmt: skip
WORD_OF_DATA = (
    "norm of the output",
    "norms are those of the layer's output on the calibration images: exact across out|rest; across other "
    "cuts an estimate, unless the moments of the input are a product over the two sides",
)


def page(atlas: CutAtlas, title: str) -> str:
    """Return the page; names of layers are escaped."""
    parts = [_tag("h1", title), _tag("p", f"{atlas.title()}.")]
    for metric in atlas.metrics:
        parts += _section(atlas, metric)
    parts.append(_tag("h2", "Entropy over its largest value"))
    parts += [table(caption, header, body) for caption, header, body in atlas.digests()]
    if atlas.skipped:
        items = (Markup("<li><code>{}</code>: {}</li>").format(s.name, s.reason) for s in atlas.skipped)
        parts += [_tag("h2", "Left out"), Markup("<ul>{}</ul>").format(Markup().join(items))]
    parts += [_tag("h2", "All rows"), *_all_rows(atlas), _tag("h2", "Words"), _words(atlas)]
    return document(title, Markup("\n").join(parts))


def _section(atlas: CutAtlas, metric: str) -> Iterator[Markup]:
    """Yield the figures in one metric."""
    yield _tag("h2", "Norm of the kernel" if metric == "norm" else "Norm of the output")
    yield _image(
        atlas.plot_entropy(metric=metric), "Correlation entropy in nats by depth, a panel for each cut."
    )
    yield _image(
        atlas.plot_spectra(metric=metric),
        "Singular values over the largest by their place in the full rank, a panel for each cut.",
    )
    for measure, words in MEASURES.items():
        figure = atlas.plot_heatmap(measure, metric=metric)
        yield _image(figure, f"Layers x cuts: {words}. Lower is more compressible.")


def _image(figure: Figure, caption: str) -> Markup:
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI)
    data = base64.b64encode(raw.getvalue()).decode()
    width, height = (round(DPI * inches) for inches in figure.get_size_inches())
    return Markup(
        '<figure><img src="data:image/png;base64,{}" width="{}" height="{}" alt="{}">'
        "<figcaption>{}</figcaption></figure>"
    ).format(data, width, height, caption, caption)


def _all_rows(atlas: CutAtlas) -> Iterator[Markup]:
    """Yield a table that opens on request for each kernel and metric."""
    for metric in atlas.metrics:
        for kernel in atlas.kernels:
            rows = [row for row in atlas.rows if (row.metric, row.kernel) == (metric, kernel)]
            if rows:
                where = "" if metric == "norm" else ", in the norm of the output"
                caption = f"{kernel} kernels{where}: {len(rows)} rows"
                header = "layer", "depth", "kernel", "cut", "full rank", "entropy", "effective rank"
                losses = [f"rank for loss {loss:g}" for loss in atlas.losses]
                last = "loss at 1/4 rank", "loss at 1/4 parameters"
                body = [_cells(row, atlas.losses) for row in rows]
                rows_of = table("", (*header, *losses, *last), body, label=caption)
                yield Markup("<details><summary>{}</summary>{}</details>").format(caption, rows_of)


def _cells(row: CutRow, losses: Sequence[float]) -> tuple[str, ...]:
    groups = f" /{row.groups}" if row.groups > 1 else ""
    at_params = row.loss_at_params(0.25)
    return (
        row.layer,
        str(row.depth),
        "×".join(map(str, row.shape)) + groups,
        row.cut,
        str(row.full),
        f"{row.entropy:.3f}",
        count(row.effective_rank) if row.effective_rank >= 1000 else f"{row.effective_rank:.1f}",
        *(str(row.rank_for(loss)) for loss in losses),
        f"{row.loss_at_rank(0.25):.4f}",
        f"{at_params:.4f}" if at_params is not None else "-",
    )


def _words(atlas: CutAtlas) -> Markup:
    words = [*WORDS, *([WORD_OF_DATA] if "data" in atlas.metrics else [])]
    lines = (Markup("<dt>{}</dt><dd>{}</dd>").format(*pair) for pair in words)
    return Markup("<dl>{}</dl>").format(Markup().join(lines))


def _tag(name: str, text: str) -> Markup:
    return Markup("<{0}>{1}</{0}>").format(Markup(name), text)
