"""An atlas as one page of HTML that needs nothing else: figures are in it as data, styles, too."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tncompress.cut_atlas import CutAtlas
from tncompress.cut_rows import MEASURES, CutRow
from tncompress.tables import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; display: block; } figure { margin: 1rem 0; }
figcaption, caption { color: #444; font-size: .9rem; text-align: left; padding: .3rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #e2e2e2; white-space: nowrap; }
th { border-bottom: 2px solid #888; } td:first-child, th:first-child { text-align: left; }
summary { cursor: pointer; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 1rem; }
"""

_WORDS = (
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
_WORD_OF_DATA = (
    "norm of the output",
    "norms are those of the layer's output on the calibration images: exact across out|rest; across other "
    "cuts an estimate, unless the moments of the input are a product over the two sides",
)


def page(atlas: CutAtlas, title: str) -> str:
    """Return the page; names of layers are escaped."""
    parts = [f"<h1>{_text(title)}</h1>", f"<p>{_text(atlas.title())}.</p>"]
    for metric in atlas.metrics:
        parts += _section(atlas, metric)
    parts += ["<h2>Entropy over its largest value</h2>"]
    parts += [_table(caption, header, body) for caption, header, body in atlas.digests()]
    if atlas.skipped:
        items = "".join(f"<li><code>{_text(s.name)}</code>: {_text(s.reason)}</li>" for s in atlas.skipped)
        parts += ["<h2>Left out</h2>", f"<ul>{items}</ul>"]
    parts += ["<h2>All rows</h2>", *_all_rows(atlas), "<h2>Words</h2>", _words(atlas)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _section(atlas: CutAtlas, metric: str) -> Iterator[str]:
    """Yield the figures in one metric."""
    yield f"<h2>{'Norm of the kernel' if metric == 'norm' else 'Norm of the output'}</h2>"
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


def _image(figure: Figure, caption: str) -> str:
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI)
    data = base64.b64encode(raw.getvalue()).decode()
    width, height = (round(DPI * inches) for inches in figure.get_size_inches())
    size = f'width="{width}" height="{height}"'
    image = f'<img src="data:image/png;base64,{data}" {size} alt="{_text(caption)}">'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _all_rows(atlas: CutAtlas) -> Iterator[str]:
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
                table = _table("", (*header, *losses, *last), body)
                yield f"<details><summary>{_text(caption)}</summary>{table}</details>"


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


def _table(caption: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    lines = ("".join(f"<td>{_text(cell)}</td>" for cell in line) for line in body)
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    above = f"<caption>{_text(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{above}<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
    )


def _words(atlas: CutAtlas) -> str:
    words = [*_WORDS, *([_WORD_OF_DATA] if "data" in atlas.metrics else [])]
    return "<dl>" + "".join(f"<dt>{_text(a)}</dt><dd>{_text(b)}</dd>" for a, b in words) + "</dl>"


def _text(value: str) -> str:
    return html.escape(value)
