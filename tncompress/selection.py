"""Which layers a spec leaves dense, and how errors speak of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tncompress.discovery import Layer
from tncompress.nearby import no_match
from tncompress.spec import KEEP_DENSE, Spec, matches_any


def kept_dense(spec: Spec, layers: list[Layer]) -> dict[str, str]:
    """Return why layers are kept dense by the spec, by name; check that every pattern matches something."""
    names = [name for layer in layers for name in layer.names]
    patterns = [rule.pattern for rule in spec.rules] + [p for p in spec.keep_dense if p not in KEEP_DENSE]
    for pattern in patterns:
        if not matches_any(pattern, names):
            raise ValueError(no_match(pattern, names))
    kept = {}
    for layer in layers:
        for pattern in spec.keep_dense:
            if pattern not in KEEP_DENSE and matches_any(pattern, layer.names):
                kept[layer.name] = f"kept dense by keep_dense: '{pattern}'"
    for word, layer in zip(KEEP_DENSE, (layers[0], layers[-1]) if layers else (), strict=False):
        if word in spec.keep_dense:
            end = "first" if word == "stem" else "last"
            kept.setdefault(layer.name, f"the {word} ({end} layer), kept dense by default")
    return kept


def check_weight(layer: Layer, *, needed: bool = False) -> str:
    """Return how errors speak of the layer; raise one for NaN, infinity, and lack of what is ``needed``."""
    weight = layer.weight()
    where = describe(layer.name, weight)
    if weight.is_meta and needed:
        raise ValueError(f"{where} is on the meta device, and a budget needs its weights: load them")
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where} holds NaN or infinity: mend the weights, or keep the layer dense")
    return where


def describe(name: str, weight: Tensor) -> str:
    """Return how errors speak of a layer."""
    return f"layer {name!r} with kernel {tuple(weight.shape)}"


@contextmanager
def memory_for(where: str) -> Iterator[None]:
    """Turn whatever torch raises where memory is short into a ``MemoryError`` that names the layer."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = "not enough memory", "out of memory", "can't allocate memory"
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        hint = "free memory, move the model to the CPU, or keep the layer dense by a rule"
        raise MemoryError(f"out of memory while decomposing {where}: {hint}") from error
