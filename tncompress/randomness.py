"""Random numbers of a training run: what a step draws depends on the seed and its number, on nothing else.

A run that goes on after a kill then draws what it would have drawn, without the state of any generator in
its checkpoint. What a loader draws while it makes batches is apart from what the model draws: all
processes see the same batches, each drops other units out.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

_DATA, _MODEL = 0, 1


class _State(NamedTuple):
    """The generators that code of any kind draws from, but those of GPUs."""

    torch: torch.Tensor
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> _State:
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())

    def put_back(self) -> None:
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Leave the global generators of torch, numpy and Python as they were, those of GPUs, too."""
    before = _State.now()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        before.put_back()


def seed_step(*key: int) -> None:
    """Seed all generators for what a model draws at the step that ``key`` (seed, step, process) names."""
    _seed(_MODEL, *key)


def batches_of(loader: Iterable[Any], seed: int, epoch: int) -> Iterator[Any]:
    """Yield the batches of one epoch (counted from 0), the same ones for the same loader, seed and epoch.

    A loader, or its sampler, that counts epochs (``set_epoch``) is told which it is; generators that a
    ``DataLoader`` holds are set for the length of the epoch, and everything drawn meanwhile is drawn apart.
    """
    held = _held_generators(loader)
    before = [generator.get_state() for generator in held]
    _seed(_DATA, seed, epoch)
    for number, generator in enumerate(held):
        generator.manual_seed(mixed(_DATA, seed, epoch, number, generator.initial_seed()))
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if callable(tell := getattr(part, "set_epoch", None)):
            tell(epoch)
    try:
        batches = iter(loader)
        state = _State.now()
        while True:
            state.put_back()
            try:
                batch = next(batches)
            except StopIteration:
                return
            state = _State.now()
            yield batch
    finally:
        for generator, own in zip(held, before, strict=True):
            generator.set_state(own)


def mixed(*key: int) -> int:
    """Return a seed that stands for all of ``key``."""
    return int(np.random.SeedSequence([part % 2**64 for part in key]).generate_state(1)[0])


def _seed(*key: int) -> None:
    seed = mixed(*key)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond where no GPU is in use
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)


def _held_generators(loader: Any) -> list[torch.Generator]:
    parts = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    parts.append(getattr(parts[2], "sampler", None))
    found = [getattr(part, "generator", None) for part in parts]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
