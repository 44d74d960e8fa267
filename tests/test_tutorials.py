"""Every tutorial runs from top to bottom, in a process of its own, without notebooks or Sphinx."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from doc_blocks import blocks, check_command, commands

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"^(:[\w-]+:.*|\s*)$")
LIBRARIES = {"08-open-a-layer": ("quimb",)}
"""What a tutorial needs that is an extra of the package."""


def cells(page):
    """Return the code of each cell of a notebook in Markdown, without its options."""
    found = []
    for text in CELL.findall(page.read_text(encoding="utf-8")):
        lines = text.splitlines()
        while lines and OPTION.match(lines[0]):
            lines.pop(0)
        found.append("\n".join(lines))
    return found


def script(page):
    """Return all cells as one program; where it fails, the traceback names the cell and its line."""
    parts = [
        f"exec(compile({code!r}, '{page.stem}, cell {n}', 'exec'))" for n, code in enumerate(cells(page), 1)
    ]
    return "\n".join(parts) + "\n"


def test_there_are_nine():
    assert len(PAGES) == 9
    assert all(len(cells(page)) > 4 for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_tutorial_is_a_notebook(page):
    """Jupyter opens it, and it begins with what the reader will have at its end."""
    front, body = page.read_text(encoding="utf-8").removeprefix("---\n").split("---\n", 1)
    assert "format_name: myst" in front
    assert "name: python3" in front
    title, promise = body.strip().split("\n\n")[:2]
    assert title.startswith("# ")
    assert promise.startswith("**At the end you")
    for code in cells(page):
        compile(code, page.stem, "exec")
        assert not re.search(r"^\s*[%!]", code, re.MULTILINE), "cells are plain Python"


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_code_outside_of_the_cells_is_no_python(page, tmp_path):
    """Python stands in cells, which run; commands are parsed, settings are read."""
    rest = tmp_path / page.name
    rest.write_text(CELL.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")
    for block in blocks(rest):
        if block.kind == "console":
            for words in commands(block):
                check_command(words)
        else:
            assert block.kind == "toml", f"a block of {block.kind or 'nothing'}: {block.text}"
            assert tomllib.loads(block.text)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_tutorial_runs(page, tmp_path):
    for library in LIBRARIES.get(page.stem, ()):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    program = tmp_path / f"{page.stem}.py"
    program.write_text(script(page), encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    environment |= {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
