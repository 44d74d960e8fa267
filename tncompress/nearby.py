"""What a misspelt word may have meant, for messages."""

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return the end of a message that names the nearest of ``known``, empty where none is near.

    >>> did_you_mean("tuker", ["cp", "mps", "svd", "tucker"])
    "; did you mean 'tucker'?"
    >>> did_you_mean("ring", ["cp", "mps", "svd", "tucker"])
    ''
    """
    by_small = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), list(by_small), n=1, cutoff=0.7)
    return f"; did you mean {by_small[near[0]]!r}?" if near else ""


def no_match(pattern: str, names: Sequence[str]) -> str:
    """Return what is wrong with a pattern that matches none of the layers, and what may have been meant.

    >>> no_match("block", ["block.conv1", "block.conv2"])
    "the pattern 'block' matches no layer; the layers are block.conv1, block.conv2; for all in it: 'block.*'"
    """
    shown = ", ".join(names[:8]) + (f", ... ({len(names) - 8} more)" if len(names) > 8 else "")
    if any(name.startswith(f"{pattern}.") for name in names):
        hint = f"; for all in it: '{pattern}.*'"
    else:
        hint = did_you_mean(pattern, names)
    return f"the pattern {pattern!r} matches no layer; the layers are {shown or 'none'}{hint}"
