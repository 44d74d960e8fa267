"""``calibrate_machine``: the constants of the cost model, from convolutions run on this device."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tncompress.contraction import dense_stage
from tncompress.cost_model import in_turns
from tncompress.geometry import ConvGeometry
from tncompress.machine import Machine, Terms, keep_machine, terms
from tncompress.noise import Load, device_name
from tncompress.prepacked import FrozenChain, may_pack
from tncompress.tables import percent, watched
from tncompress.threads import with_threads

COUNT, HELD_OUT = 96, 4
"""How many convolutions are measured, and that every so manieth is kept from the fit, to judge it."""

WIDTHS = (16, 8, 32, 64, 4, 1)
"""Numbers of channels that may be computed at once; of equally good ones the first."""

LIMITS = {"cpu": (1e9, 2**23, 56, 8), "cuda": (2e11, 2**28, 112, 64)}
"""Of each convolution: operations, numbers read and written, image side, batch, at most."""

OUTLYING = 0.3
"""Relative error from which a time says nothing about the width any more."""

RANGE = 1e6
"""How many times larger or smaller than the built-in ones constants may be."""


@dataclass(frozen=True)
class Setting:
    """A convolution to be measured."""

    batch: int
    side: int
    into: int
    out: int
    kernel: tuple[int, int]
    depthwise: bool

    @property
    def terms(self) -> Terms:
        """What its seconds depend on."""
        pixels, window = self.batch * self.side**2, self.kernel[0] * self.kernel[1]
        groups, into, out = (self.out, 1, 1) if self.depthwise else (1, self.into, self.out)
        return terms(pixels=pixels, groups=groups, into=into, out=out, window=window)


@dataclass(frozen=True)
class Calibrated:
    """A fitted machine, and how far it is off on ``held_out`` convolutions that it was not fitted to.

    ``error`` is the median of their relative errors, ``error_90`` what nine tenths of them keep;
    ``built_in_error`` is the median for the constants that stand in without a fit.
    """

    machine: Machine
    device: str
    threads: int
    dtype: str
    fitted: int
    held_out: int
    error: float
    error_90: float
    built_in_error: float
    path: Path | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values: seconds, operations and bytes a second, fractions."""
        return asdict(self) | {"path": str(self.path) if self.path else None}

    def __str__(self) -> str:
        m = self.machine
        lines = [
            f"{self.device}, {self.threads} thread(s), {self.dtype}: {1e6 * m.start:.3g} us a call, "
            f"{m.products / 1e9:.4g} GFLOP/s, {m.memory / 1e9:.3g} GB/s, "
            f"depthwise {m.depthwise / 1e9:.3g} GB/s, channels in steps of {m.width}",
            f"off by {percent(self.error, 1)} (median) and {percent(self.error_90, 1)} (nine tenths) on "
            f"{self.held_out} convolutions that it was not fitted to; the built-in constants by "
            f"{percent(self.built_in_error, 1)}",
        ]
        lines += [f"warning: {words}" for words in self.warnings]
        return "\n".join(lines + ([f"kept in {self.path}"] if self.path else []))


def calibrate_machine(
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    keep: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Calibrated:
    """Return the cost model of this device in this precision, fitted to convolutions that are run on it.

    With ``keep`` it is written to ``machines.json`` in the user's folder of caches, for this device, dtype
    and number of threads, and used from then on where contractions are chosen by the model, or shortlisted
    by it before they are measured. It takes some seconds; a machine that does nothing else is best. The
    result prints its constants (:class:`Machine`) and its errors; a device that is neither a CPU nor CUDA
    is a ``ValueError``.
    """
    device, load = torch.device(device), Load()
    if device.type not in LIMITS:
        raise ValueError(f"a cost model is fitted on cpu or cuda, got {device}")
    with with_threads(threads):
        chosen = settings(seed, device.type)
        with load.watched():
            seconds = [measured(s, device, dtype) for s in watched(chosen, "measuring", show=progress)]
        known = [setting.terms for setting in chosen]
        train = [k for k in range(len(chosen)) if k % HELD_OUT]
        test = [k for k in range(len(chosen)) if not k % HELD_OUT]
        itemsize = torch.empty((), dtype=dtype).element_size()
        machine = fit_machine([known[k] for k in train], [seconds[k] for k in train], itemsize=itemsize)
        held = [known[k] for k in test], [seconds[k] for k in test]
        errors = relative_errors(machine, *held)
        error = statistics.median(errors)
        path = keep_machine(machine, device, dtype, error) if keep else None
        return Calibrated(
            machine,
            device_name(device),
            torch.get_num_threads(),
            str(dtype).removeprefix("torch."),
            fitted=len(train),
            held_out=len(test),
            error=error,
            error_90=statistics.quantiles(errors, n=10, method="inclusive")[-1],
            built_in_error=statistics.median(relative_errors(Machine(), *held)),
            path=path,
            warnings=tuple(load.warnings(0.0)) if device.type == "cpu" else (),
        )


def settings(seed: int, kind: str, count: int = COUNT) -> list[Setting]:
    """Return random convolutions as they occur in chains: 1x1, 3x3, along one axis, and depthwise."""
    rng = random.Random(seed)
    found: list[Setting] = []
    operations, numbers, most_side, most_batch = LIMITS[kind]
    kernels = [(1, 1)] * 4 + [(3, 3)] * 3 + [(3, 1), (1, 3)] + [None] * 3
    while len(found) < count:
        kernel = rng.choice(kernels)
        into, out = (_channels(rng) for _ in range(2))
        batch, side = rng.choice([1, 2, 4, most_batch]), round(4 * (most_side / 4) ** rng.random())
        sizes = kernel or rng.choice([(3, 3), (3, 1), (1, 3)])
        setting = Setting(batch, side, into, out, sizes, depthwise=kernel is None)
        each = setting.terms
        if each.operations(1) <= operations and each.moved <= numbers:
            found.append(setting)
    return found


def _channels(rng: random.Random) -> int:
    channels = round(8 * 64 ** rng.random())
    return max(16, 16 * round(channels / 16)) if rng.random() < 0.5 else channels


def measured(setting: Setting, device: torch.device, dtype: torch.dtype) -> float:
    """Return the least seconds of a convolution as it runs within a frozen layer, of some runs."""
    into = setting.out if setting.depthwise else setting.into
    high, wide = setting.kernel
    groups = setting.out if setting.depthwise else 1
    conv = nn.Conv2d(into, setting.out, setting.kernel, padding=(high // 2, wide // 2), groups=groups)
    conv = conv.to(device, dtype)
    geometry = ConvGeometry.of(conv)
    with torch.no_grad():
        x = torch.randn(setting.batch, into, setting.side, setting.side, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        bias = conv.bias.detach() if conv.bias is not None else None
        chain: Any = FrozenChain(geometry, [dense_stage(geometry)], [conv.weight.detach()], bias)
        run, may = chain.convolutions[0].run, may_pack(x)
    return in_turns([lambda: run(x, None, may)])[0]


def fit_machine(known: Sequence[Terms], seconds: Sequence[float], *, itemsize: int = 4) -> Machine:
    """Return the machine with the least sum of absolute relative errors, which outliers hardly move.

    Seconds are linear in the start and in what the speeds are divided into, so that this is a linear program;
    it is solved for each width, of which the best is taken; errors above :data:`OUTLYING` count as that.
    """
    solved = [_fit(known, seconds, width, itemsize) for width in WIDTHS]

    def clipped(machine: Machine) -> float:
        return round(sum(min(error, OUTLYING) for error in relative_errors(machine, known, seconds)), 9)

    return min(solved, key=clipped)


def _fit(known: Sequence[Terms], seconds: Sequence[float], width: int, itemsize: int) -> Machine:
    from scipy import sparse  # takes its time to import
    from scipy.optimize import linprog

    usual = Machine(width=width, itemsize=itemsize)
    columns = np.array([_parts(usual, each) for each in known]) / np.array(seconds)[:, None]
    count, constants = columns.shape
    eye = sparse.identity(count)
    result = linprog(
        c=[0.0] * constants + [1.0] * count,
        A_ub=sparse.vstack([sparse.hstack([columns, -eye]), sparse.hstack([-columns, -eye])]),
        b_ub=[1.0] * count + [-1.0] * count,
        bounds=[(1 / RANGE, RANGE)] * constants + [(0, None)] * count,
        method="highs",
    )
    if not result.success:
        raise ValueError(f"no cost model fits what was measured: {result.message}")
    start, products, memory, depthwise = (float(value) for value in result.x[:constants])
    return Machine(
        start=usual.start * start,
        products=usual.products / products,
        memory=usual.memory / memory,
        depthwise=usual.depthwise / depthwise,
        width=width,
        itemsize=itemsize,
    )


def _parts(machine: Machine, each: Terms) -> list[float]:
    """Return the seconds of a convolution that each constant stands for."""
    memory = each.moved * machine.itemsize / machine.memory
    if each.is_depthwise:
        return [machine.start, 0.0, memory, 2 * each.written * machine.itemsize / machine.depthwise]
    return [machine.start, each.operations(machine.width) / machine.products, memory, 0.0]


def relative_errors(machine: Machine, known: Sequence[Terms], seconds: Sequence[float]) -> list[float]:
    """Return how far the machine is off for each of these convolutions, relative to what it took."""
    return [abs(machine.seconds(each) / taken - 1) for each, taken in zip(known, seconds, strict=True)]
