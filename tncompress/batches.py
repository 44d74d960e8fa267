"""Batches to train on: what a loader has to give, and how one batch is told from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tncompress.outputs import bytes_of


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return inputs and labels of a batch, a pair or a mapping; the labels are None where there are none.

    >>> import torch
    >>> x, y = split_batch({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1])})
    >>> x.shape, y
    (torch.Size([2, 3]), tensor([0, 1]))
    """
    items = list(batch.values()) if isinstance(batch, Mapping) else batch
    items = list(items) if isinstance(items, tuple | list) else [items]
    if not items or not isinstance(items[0], Tensor) or not items[0].ndim or not len(items[0]):
        came = type(items[0]).__name__ if items else "nothing"
        raise ValueError(f"wanted batches (inputs, labels) with at least one image, got {came}")
    y = items[1] if len(items) > 1 else None
    if y is not None and (not isinstance(y, Tensor) or y.shape[:1] != items[0].shape[:1]):
        raise ValueError(f"wanted one label for each of {len(items[0])} images, got {_described(y)}")
    return items[0], y


def _described(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def fingerprint(x: Tensor, y: Tensor | None) -> str:
    """Return what tells a batch from others."""
    found = hashlib.blake2b(bytes_of(x), digest_size=16)
    found.update(bytes_of(y) if y is not None else b"")
    return found.hexdigest()


def count_batches(loader: Iterable[Any]) -> int:
    """Return the length of a loader; one without a length, or with nothing in it, is an error."""
    try:
        count = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"wanted a loader with a length, such as a DataLoader, got {type(loader).__name__}"
        ) from None
    if count == 0:
        raise ValueError("wanted labelled batches to train on, got an empty loader")
    return count
