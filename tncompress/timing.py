"""Seconds of several runs that take turns, so that noise and drift hit all alike.

Calls are timed by :class:`timeit.Timer` with the clock of ``torch.utils.benchmark``, which waits for a GPU.
"""

from __future__ import annotations

import logging
import math
import timeit
from collections.abc import Callable, Sequence
from typing import Any

ROUNDS = 10
"""Samples of each run, if nothing else is asked for."""

LONG = 0.05
"""Seconds from which on a call does not notice what ran before it; a shorter one is run once untimed."""


def samples_in_turns(
    runs: Sequence[Callable[[], Any]],
    *,
    seconds: float,
    rounds: int = ROUNDS,
    fewest: int | None = None,
    hopeless: float = math.inf,
    clock: Callable[[], float] | None = None,
) -> list[list[float]]:
    """Return for each of ``runs`` the seconds of one call, a sample for each of ``rounds`` rounds.

    About ``seconds`` go into each run: the calls of a sample are as many as fit, at least one. With
    ``fewest`` there are as few rounds as that where single calls take longer. What is ``hopeless`` times
    slower than the fastest after two rounds is not run any more. Each run was called before the first sample.
    ``clock`` counts something else than the time on the wall.
    """
    timers = [timeit.Timer(run, timer=clock or benchmark_clock()) for run in runs]
    for timer in timers:
        timer.timeit(1)
    once = [min(timer.repeat(2, 1)) for timer in timers]
    if fewest is not None:
        rounds = max(fewest, min(rounds, int(seconds / max([*once, 1e-9]))))
    counts = [max(1, int(seconds / rounds / max(each, 1e-9))) for each in once]
    found: list[list[float]] = [[] for _ in runs]
    least = list(once)
    for number in range(rounds):
        for k, timer in enumerate(timers):
            if number < 2 or least[k] < hopeless * min(least):
                if once[k] < LONG:
                    timer.timeit(1)
                found[k].append(timer.timeit(counts[k]) / counts[k])
                least[k] = min(least[k], found[k][-1])
    return found


def benchmark_clock() -> Callable[[], float]:
    """Import torch's clock without the word that is logged where CUDA is built for but absent."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    before, logger.disabled = logger.disabled, True
    try:
        from torch.utils.benchmark import timer
    finally:
        logger.disabled = before
    return timer
