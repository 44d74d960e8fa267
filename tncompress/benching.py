"""``bench``: a user's model, dense and compressed, run in several ways on several batch sizes, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tncompress.bench_table import Bench, Timing, Unmeasured
from tncompress.freezing import freeze
from tncompress.measure import device_of
from tncompress.noise import Load, hints, settings
from tncompress.report import environment
from tncompress.running import call_model, copy_model, kept_modes
from tncompress.tables import progress_bar
from tncompress.textfiles import one_line
from tncompress.threads import with_threads
from tncompress.timing import benchmark_clock, samples_in_turns

ROUNDS, FEWEST = 20, 5
"""In how many rounds the ways take turns; fewer, but no fewer than the second, where a call takes long."""

COMPILED = 64
"""How many variants of one ``forward`` are compiled at most: each model, way and batch size is one."""

DIFFERENT = 1e-3
"""Relative difference of outputs, above which the result warns that a way computes something else."""

WAYS = ("eager", "channels_last", "frozen", "compiled", "graphed")
"""How a model can be run: as it is; the same in torch's channels_last layout; as :func:`tncompress.freeze`
makes it; by ``torch.compile`` (with inductor's freezing on a CPU); the same with CUDA graphs, on a GPU."""


def bench(
    dense: nn.Module,
    compressed: nn.Module | Mapping[str, nn.Module] | None = None,
    *,
    example_inputs: Any,
    batch_sizes: Sequence[int] | None = None,
    ways: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = 1.0,
    progress: bool = False,
) -> Bench:
    """Return how long forward passes take: ``dense`` against one compressed model, or several by name.

    ``example_inputs`` are a tensor, a tuple of arguments or a mapping, on the models' device; for each of
    ``batch_sizes`` (default: that of the examples) the tensors whose first size is the examples' batch size
    are cut or repeated. ``ways`` are some of ``"eager"``, ``"channels_last"``, ``"frozen"``, ``"compiled"``
    and, on a GPU, ``"graphed"``; default: eager, frozen, compiled, and graphed where it exists. A way that
    can't be run, such as ``"compiled"`` without a compiler, is listed with the reason.

    All variants of one batch size are run in turns (torch.utils.benchmark), so that whatever else the
    machine does hits all alike, for about ``seconds`` each after what freezing and compiling take. Models
    are left as they are. The result warns where the machine was noisy.

    >>> import tncompress as tnc
    >>> model = tnc.build_model("zoo:cnn4").eval()
    >>> x = torch.randn(1, 1, 32, 32)
    >>> found = tnc.bench(model, example_inputs=x, ways=["eager"], batch_sizes=[1, 2], seconds=0.01)
    >>> [timing.batch for timing in found.timings]
    [1, 2]
    """
    benchmark_clock()  # before a compiler, which would say that there is no GPU
    models = _named(dense, compressed)
    device = device_of(dense)
    asked = _checked_ways(ways, device)
    batch = _batch_of(example_inputs)
    sizes = _checked_sizes(batch_sizes, batch)
    timings: list[Timing] = []
    unmeasured: list[Unmeasured] = []
    with with_threads(threads), _modes(models.values()):
        count = torch.get_num_threads()
        total = len(sizes) * (len(models) * len(asked) + 1)
        load = Load()
        with progress_bar(total, show=progress) as advance:
            for size in sizes:
                inputs = resized(example_inputs, batch, size)
                runs, missing = _prepare(models, asked, inputs, size, advance)
                unmeasured += missing
                advance(f"batch {size}: measuring")
                with load.watched():
                    timings += _timed(runs, size, seconds)
    spread = max((timing.spread for timing in timings), default=0.0)
    shapes = tuple(tuple(t.shape[1:]) for t in _tensors(example_inputs) if t.ndim and t.shape[0] == batch)
    return Bench(
        tuple(timings),
        tuple(unmeasured),
        reference=next(iter(models)),
        input_shapes=shapes,
        environment=environment(device) | {"threads": count},
        settings=settings(),
        load_before=load.before,
        others=load.others,
        warnings=(*load.warnings(spread), *_wrong(timings)),
        hints=tuple(hints(count, device)),
    )


@dataclass
class _Run:
    """One model, ready to be run in one way."""

    model: str
    way: str
    call: Callable[[], Any]
    rel_error: float = 0.0
    made: str = ""


def _prepare(
    models: Mapping[str, nn.Module],
    ways: Sequence[str],
    inputs: Any,
    size: int,
    advance: Callable[[str], None],
) -> tuple[list[_Run], list[Unmeasured]]:
    """Return every model made ready in every way, each called once, and what could not be."""
    runs, missing = [], []
    for name, model in models.items():
        try:
            with torch.no_grad():
                wanted = [t.clone() for t in _tensors(call_model(model, inputs))]
        except Exception as error:
            error.add_note(f"while running the {name} model on a batch of {size}")
            raise
        for way in ways:
            advance(f"batch {size}: {name}, {way}")
            try:
                run = MAKERS[way](model, inputs)
                with _compiling([way]):
                    run.model, run.rel_error = name, _difference(_once(run.call), wanted)
                runs.append(run)
            except Exception as error:  # whatever compilers and layouts raise: the other ways go on
                missing.append(Unmeasured(name, way, size, one_line(_reason(error), 160)))
    return runs, missing


def _eager(model: nn.Module, inputs: Any) -> _Run:
    return _Run("", "eager", lambda: call_model(model, inputs))


def _channels_last(model: nn.Module, inputs: Any) -> _Run:
    moved: nn.Module = copy_model(model).to(memory_format=torch.channels_last)

    def laid_out(value: Any) -> Any:
        four = isinstance(value, Tensor) and value.ndim == 4
        return value.contiguous(memory_format=torch.channels_last) if four else value

    return _Run("", "channels_last", lambda: call_model(moved, tree_map(laid_out, inputs)))


def _frozen(model: nn.Module, inputs: Any) -> _Run:
    frozen = freeze(model, inputs)
    return _Run("", "frozen", lambda: call_model(frozen, inputs), made=frozen.way)


def _compiled(model: nn.Module, inputs: Any) -> _Run:
    options: Any = {"freezing": True} if device_of(model).type == "cpu" else None
    made: Any = torch.compile(copy_model(model).requires_grad_(False), dynamic=False, options=options)
    return _Run("", "compiled", lambda: call_model(made, inputs))


def _graphed(model: nn.Module, inputs: Any) -> _Run:
    made: Any = torch.compile(copy_model(model).requires_grad_(False), dynamic=False, mode="reduce-overhead")
    return _Run("", "graphed", lambda: call_model(made, inputs))


MAKERS: dict[str, Callable[[nn.Module, Any], _Run]] = {
    "eager": _eager,
    "channels_last": _channels_last,
    "frozen": _frozen,
    "compiled": _compiled,
    "graphed": _graphed,
}


def _once(call: Callable[[], Any]) -> list[Tensor]:
    """Return what a first call gives, in which compilers do their work."""
    with torch.no_grad():
        call()
        return [t.clone() for t in _tensors(call())]


@contextmanager
def _compiling(ways: Iterable[str]) -> Iterator[None]:
    """Let one ``forward`` be compiled for many models; never run it uncompiled without a word."""
    if not {"compiled", "graphed"}.intersection(ways):
        yield
        return
    import torch._dynamo.config as config  # brings the compiler along

    with config.patch(recompile_limit=COMPILED, fail_on_recompile_limit_hit=True):
        yield


def _timed(runs: Sequence[_Run], size: int, seconds: float) -> list[Timing]:
    """Return the timings of all runs of one batch size, which take turns."""
    calls = [run.call for run in runs]
    with _compiling(run.way for run in runs), torch.no_grad():
        samples = samples_in_turns(calls, seconds=seconds, rounds=ROUNDS, fewest=FEWEST)
    return [_timing(run, size, found) for run, found in zip(runs, samples, strict=True)]


def _timing(run: _Run, size: int, samples: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(run.model, run.way, size, median, low, high, len(samples), run.rel_error, run.made)


def resized(example_inputs: Any, batch: int, size: int) -> Any:
    """Return the inputs with those tensors cut or repeated to ``size`` whose first size is ``batch``."""
    if size == batch:
        return example_inputs

    def taken(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch:
            return value
        return value[torch.arange(size, device=value.device) % batch]

    return tree_map(taken, example_inputs)


def _named(dense: nn.Module, compressed: nn.Module | Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    others = {"compressed": compressed} if isinstance(compressed, nn.Module) else dict(compressed or {})
    if "dense" in others:
        raise ValueError("the first model is called 'dense': give the compressed one another name")
    models = {"dense": dense, **others}
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"wanted a torch.nn.Module as the {name} model, got {type(model).__name__}")
        if device_of(model) != device_of(dense):
            raise ValueError(
                f"the {name} model is on {device_of(model)}, the dense one on {device_of(dense)}"
            )
    return models


def _checked_ways(ways: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    graphs = ("graphed",) if device.type == "cuda" else ()
    if ways is None:
        return ("eager", "frozen", "compiled", *graphs)
    unknown = [way for way in ways if way not in WAYS]
    if unknown or not ways:
        raise ValueError(f"the ways to run a model are {', '.join(WAYS)}, got {unknown or 'none'}")
    if "graphed" in ways and not graphs:
        raise ValueError(f"CUDA graphs take a GPU, and the model is on {device}: leave out 'graphed'")
    return tuple(dict.fromkeys(ways))


def _checked_sizes(sizes: Sequence[int] | None, batch: int) -> tuple[int, ...]:
    if sizes is None:
        return (batch,)
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"batch sizes are whole numbers from 1, got {list(sizes)}")
    return tuple(dict.fromkeys(sizes))


def _batch_of(example_inputs: Any) -> int:
    for value in _tensors(example_inputs):
        if value.ndim and value.shape[0]:
            return value.shape[0]
    raise ValueError("wanted example inputs with a tensor whose first size is the batch, got none")


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if [t.shape for t in found] != [t.shape for t in wanted]:
        raise ValueError(
            f"its outputs have shapes {[tuple(t.shape) for t in found]}, the model's own "
            f"{[tuple(t.shape) for t in wanted]}"
        )
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True) if b.is_floating_point()]
    gap = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    norm = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    return gap / norm if norm > 0 else gap


def _wrong(timings: Iterable[Timing]) -> list[str]:
    """Return a warning for every way in which a model computes something else."""
    return [
        f"{t.model}, {t.way}, batch {t.batch}: its outputs differ from the model's own by {t.rel_error:.1e}"
        for t in timings
        if not t.rel_error <= DIFFERENT
    ]


def _reason(error: BaseException) -> str:
    """Return an error's first line of words, without the advice that compilers add."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"


@contextmanager
def _modes(models: Iterable[nn.Module]) -> Iterator[None]:
    """Have all models in eval mode, and put every module back into its own mode afterwards."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(kept_modes(model))
            model.eval()
        yield
