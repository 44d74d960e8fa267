"""The page of commands, from what the commands say of themselves."""

from __future__ import annotations

import re

import typer

from tncompress.cli import app

PLACE = "<!-- commands -->"


def commands_page() -> str:
    """Return a section in Markdown for each command: what it does, an example, arguments and options."""
    group = typer.main.get_command(app)
    return "\n\n".join(_section(name, command) for name, command in group.commands.items())


def _section(name: str, command: typer.core.TyperCommand) -> str:
    usage = f"```console\ntncompress {name}{_arguments(command)} [OPTIONS]\n```"
    return f"## {name}\n\n{usage}\n\n{_prose(command.help)}\n\n{_table(command)}"


def _arguments(command) -> str:
    found = [p for p in command.params if p.param_type_name == "argument"]
    return "".join(f" {p.name.upper()}" if p.required else f" [{p.name.upper()}]" for p in found)


def _prose(text: str) -> str:
    """The help as Markdown, with its example as a block of console input."""
    return re.sub(r"Example: `(.*)`", r"```console\n\1\n```", text.strip())


def _table(command) -> str:
    rows = ["| option | what it says | default |", "| --- | --- | --- |"]
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        names = [parameter.name.upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
        told = (parameter.help or "").replace("|", r"\|").replace("*", r"\*")
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {told} | {_default(parameter)} |")
    return "\n".join(rows)


def _default(parameter) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    if default is None or default is False or default in ((), []) or callable(default):
        return ""
    return f"`{'yes' if default is True else default}`"


def fill(app_, name: str, source: list[str]) -> None:
    """Put the sections where a page leaves room for them."""
    if PLACE in source[0]:
        source[0] = source[0].replace(PLACE, commands_page())


def setup(sphinx):
    """Let Sphinx fill pages as it reads them."""
    sphinx.connect("source-read", fill)
    return {"parallel_read_safe": True}
