"""Reading settings, plans and manifests from text that anyone may have written: values, or one clear line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

MAX_BYTES, MAX_DEPTH, MAX_VALUES, MAX_BITS = 2**26, 64, 10**6, 512
"""No settings are larger: a few letters of YAML, or a small hostile file, could otherwise fill the memory."""
_TOO_MANY = "it stands for more than {} values: are there aliases of aliases?"
_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"


def one_line(text: object, limit: int = 400) -> str:
    r"""Return ``text`` as one printable line, cut to ``limit`` characters.

    >>> one_line("two\nlines, and a \x1b escape")
    'two lines, and a \\x1b escape'
    """
    line = " ".join(str(text)[: 4 * limit].split())
    line = line if len(line) <= limit else f"{line[: limit - 4]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def read_settings(path: Path, what: str) -> Any:
    """Return what a JSON, YAML or TOML file holds; ``what`` names it in errors, which are one line."""
    readers: dict[str, Any] = {
        ".json": parse_json,
        ".toml": tomllib.loads,
        ".yaml": _parse_yaml,
        ".yml": _parse_yaml,
    }
    if path.suffix not in readers:
        raise ValueError(f"a {what} file ends in {', '.join(readers)}, got {path.name}")
    text = read_text(path, what)
    try:
        value = readers[path.suffix](text)
        check_extent(value)
    except Exception as error:  # PyYAML lets through what its constructors stumble over, such as a KeyError
        reason = _TOO_DEEP if isinstance(error, RecursionError) else one_line(error)
        raise ValueError(f"{what} {path} is not valid {path.suffix[1:].upper()}: {reason}") from None
    return value


def read_text(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark; errors are one line."""
    try:
        raw = bytearray()
        with path.open("rb") as file:
            while len(raw) <= MAX_BYTES and (piece := file.read(2**20)):  # no more memory than there is text
                raw += piece
        if len(raw) > MAX_BYTES:
            raise ValueError(f"{what} {path} is larger than {MAX_BYTES >> 20} MiB, which no {what} is")
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {what} file {path}") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise ValueError(f"{what} {path} is not a text file") from None


def parse_json(text: str, *, most_values: int = MAX_VALUES) -> Any:
    """Return what ``text`` stands for in strict JSON: no key twice, no NaN, not nested without end."""
    if sum(text.count(mark) for mark in ",:[{") > 2 * most_values:  # before anything is made of them
        raise ValueError(_TOO_MANY.format(most_values))
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check_extent(value, most_values)
    return value


def check_extent(value: Any, most_values: int = MAX_VALUES) -> None:
    """Raise ``ValueError`` where ``value`` is too deep or too large to be shown in an error message."""
    for number, _ in enumerate(_walk(value, ())):
        if number >= most_values:
            raise ValueError(_TOO_MANY.format(most_values))


def _walk(value: Any, above: tuple[int, ...]) -> Iterator[Any]:
    """Yield ``value`` and all in it, as ``repr`` would come to them: an alias counts each time."""
    yield value
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"it holds a whole number of more than {MAX_BITS} bits")
    if isinstance(value, yaml.Node):
        value = value.value
    if not isinstance(value, dict | list | tuple | set) or id(value) in above:
        return
    if len(above) >= MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    parts = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
    for part in parts:
        yield from _walk(part, (*above, id(value)))


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


class _Loader(yaml.SafeLoader):
    """The safe loader, which makes plain values only, without a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} is there twice, from line {node.start_mark.line + 1} on")
        return node


def _parse_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        check_extent(node)  # before aliases and merged keys (<<) are carried out
        return loader.construct_document(node)
    finally:
        loader.dispose()


def read_value(path: str | Path, what: str, make: Callable[[Any], T]) -> T:
    """Return what ``make`` makes of the JSON in a file; errors are one line that names the file."""
    text = read_text(Path(path), what)
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{what} {path} is not valid JSON: {one_line(error)}") from None
    try:
        return make(fields)
    except ValueError as error:
        raise ValueError(f"{what} {path}: {error}") from None
