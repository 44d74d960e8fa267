"""Sums of squares ``X' X`` that are added up: only blocks on and above the diagonal are worked on."""

from __future__ import annotations

from torch import Tensor

BLOCK = 512
"""Rows of a matrix that are worked on at once, at most."""


def add_squares(total: Tensor, rows: Tensor, gap: Tensor, weight: float) -> None:
    """Add ``rows' rows + weight gap gap'`` to ``total``, on and above its diagonal blocks.

    Products are in the dtype of ``rows`` (groups, count, d), sums in that of ``total``.
    """
    d = total.shape[1]
    step = block_rows(d)
    for first in range(0, d, step):
        some = slice(first, first + step)
        part = total[:, some, first:]
        part += rows[..., some].mT @ rows[..., first:]
        if weight:
            part.baddbmm_(gap[:, some], gap[:, first:].mT, alpha=weight)


def block_rows(d: int) -> int:
    """Return how many rows of a matrix are worked on at once: an eighth, unless that is too few or many."""
    return min(BLOCK, max(64, -(-d // 8)))


def mirror(matrix: Tensor) -> None:
    """Fill the blocks below the diagonal with those above it, and make those on it symmetric."""
    step = block_rows(matrix.shape[1])
    for first in range(0, matrix.shape[1], step):
        last = first + step
        block = matrix[:, first:last, first:last]
        block.copy_((block + block.mT) / 2)
        matrix[:, last:, first:last] = matrix[:, first:last, last:].mT
