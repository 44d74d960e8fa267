"""The blocks of code on pages in Markdown: found; run, where they are Python; parsed, where commands."""

from __future__ import annotations

import doctest
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from tncompress.cli import app

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<kind>[\w-]*)\n(?P<text>.*?)^(?P=fence)\s*$", re.M | re.S)
NOTEBOOKS, MADE = "tutorials", "_build"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
HARMLESS = {"apt-get", "export", "git"}
"""Commands that are no business of ours."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the page and the line on which it begins."""

    kind: str
    text: str
    page: str
    line: int


def pages() -> list[Path]:
    """Return README.md and all pages of the site that are no notebooks."""
    docs = sorted(path for path in (ROOT / "docs").rglob("*.md"))
    kept = [path for path in docs if not {NOTEBOOKS, MADE} & set(path.relative_to(ROOT / "docs").parts)]
    return [ROOT / "README.md", *kept]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in their order; directives of MyST are none."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    return [
        Block(found["kind"], found["text"], name, text[: found.start()].count("\n") + 2)
        for found in FENCE.finditer(text)
    ]


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block in ``names``, as a doctest where it has prompts; ``# name.py`` on top writes that file."""
    if ">>>" in block.text:
        parse, start = doctest.DocTestParser().get_doctest, block.line - 1
        example = parse(block.text, names, block.page, block.page, start)
        told: list[str] = []
        runner = doctest.DocTestRunner(optionflags=FLAGS)
        runner.run(example, out=told.append, clear_globs=False)
        names |= example.globs
        assert not runner.failures, "".join(told)
        return
    if wanted := re.match(r"# (\w+\.py)\n", block.text):
        Path(wanted[1]).write_text(block.text)
        sys.modules.pop(Path(wanted[1]).stem, None)  # another page's
    exec(compile("\n" * (block.line - 1) + block.text, ROOT / block.page, "exec"), names)


# --- commands -----------------------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command in a block of console input, without settings of the environment."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and words[0] != "export" and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


def check_command(words: list[str]) -> None:
    """Raise an error unless the command could be given as it stands: its name and options exist."""
    name, *rest = Path(words[0]).name, *words[1:]
    if name in HARMLESS:
        return
    checks = {
        "tncompress": _check_ours,
        "make": _check_make,
        "pip": _check_pip,
        "python": _check_python,
        "torchrun": _check_torchrun,
        "accelerate": _check_accelerate,
        "ray": _check_ray,
    }
    assert name in checks, f"nothing is known of the command {name!r}"
    checks[name](rest)


def _check_ours(words: list[str]) -> None:
    """Have the real command parse its options, and go no further."""
    verb, *rest = words
    known = typer.main.get_command(app).commands
    assert verb in known, f"tncompress has no command {verb!r}"
    if "--help" not in rest:
        known[verb].make_context(verb, list(rest))


def _check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        assert "=" in word or word in targets, f"the Makefile has no target {word!r}"


def _check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for word in words[1:]:
        if found := re.fullmatch(r"(?:\.|tncompress)\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= set(extras), f"no extra {word}"
        elif word.startswith((".", "examples")):
            assert (ROOT / word / "pyproject.toml").is_file(), f"no package at {word}"


def _check_python(words: list[str]) -> None:
    if words[:1] == ["..."]:
        return
    if words[:2] == ["-m", "tncompress"]:
        return _check_ours(words[2:])
    script, *options = words
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    known = "".join(each.read_text() for each in path.parent.glob("*.py"))
    for option in options:
        if option.startswith("--"):
            assert f'"{option}"' in known, f"{script} knows no {option}"
    return None


def _check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    found = get_args_parser().parse_args(words)
    _check_launched(found.module, found.training_script, found.training_script_args)


def _check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    found = launch_command_parser().parse_args(words[1:])
    _check_launched(found.module, found.training_script, found.training_script_args)


def _check_launched(module: bool, script: str, words: list[str]) -> None:
    """Check what several processes run: this package, or a script that the same page shows."""
    if module:
        assert script == "tncompress"
        _check_ours(words)


def _check_ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    cli.commands[words[0]].make_context(words[0], words[1:])
