"""What pages of HTML share: one style, tables, and a frame in which nothing but our own scripts can run.

Every value goes through templates that escape it. The page's own policy allows no request, and no script but
those whose checksum it names.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

__all__ = ["Markup", "document", "escape", "filled", "table"]


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("tncompress"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["breakable"] = breakable
    return made


def filled(template: str, **values: Any) -> Markup:
    """Return a template of this package with its values, each escaped unless it is markup already."""
    return Markup(_templates().get_template(template).render(**values))


def breakable(name: str) -> Markup:
    """Return a name that may be broken after its dots and underscores."""
    return Markup("<wbr>").join(part for part in re.split(r"(?<=[._])", name))


def source_of(template: str) -> Markup:
    """Return a style or a script of this package as it is."""
    loader, environment = _templates().loader, _templates()
    assert loader is not None
    return Markup(loader.get_source(environment, template)[0])


def document(title: str, body: Markup, *, styles: Sequence[str] = (), scripts: Iterable[str] = ()) -> str:
    """Return a whole page; of scripts in its body only ``scripts`` may run, and nothing may be fetched."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    return str(
        filled(
            "page.html.j2",
            title=title,
            body=body,
            style=Markup("\n").join(source_of(name) for name in ("page.css", *styles)),
            hashes=Markup(" ".join(f"'sha256-{value}'" for value in hashes)),
        )
    )


def table(
    caption: str, header: Sequence[str], body: Sequence[Sequence[str]], *, label: str = "table"
) -> Markup:
    """Return a table that scrolls by itself where it is wider than the page; ``label`` names it unseen."""
    return filled("table.html.j2", caption=caption, header=header, body=body, label=label)
