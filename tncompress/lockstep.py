"""Two models run side by side, all batches level with each other, layer after layer.

A layer that is to be solved for on what a compressed network feeds it needs the inputs that come from the
layers solved before it, and the outputs of the dense network at the same place. Here every batch has a
forward pass through either model, which stands still at the layer until it is solved, then goes on: each pass
is made once, through residual connections, branches and whatever Python decides on the way, and only the
activations of the present depth are alive.

A pass that stands still keeps its Python stack, so each has a thread of its own. They hand one baton to
each other: at any time one of them runs, or the caller, never two, and the order is always the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.running import eval_mode, input_of_call

Visit = Callable[[str, list[Tensor], list[Tensor]], None]
"""Called with a layer's name, its inputs in the compressed network and the dense outputs, batch by batch."""

_here = threading.local()


class _Ended(BaseException):
    """Raised inside of a pass that is not to go on; no ``except Exception`` of a model's holds it up."""


class _Pass:
    """A forward pass in a thread of its own, which stands still where :meth:`pause` is called in it."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.at: str | None = None
        self.value: Tensor | None = None
        self._error: BaseException | None = None
        self._ending = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(model, x, _surroundings(x)), daemon=True)

    def advance(self) -> None:
        """Let the pass run to its next pause, or to its end, where ``at`` is None; raise what it raises."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def pause(self, name: str, value: Tensor) -> None:
        """Stand still (called in the pass's own thread) until the caller lets the pass go on."""
        if not self._ending:
            self.at, self.value = name, value
            del value
            self._back.release()
            self._go.acquire()
            self.at = self.value = None
        if self._ending:
            raise _Ended

    def end(self) -> None:
        """Make the pass stop where it stands, and wait until it is gone."""
        self._ending = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()

    def _run(self, model: nn.Module, x: Tensor, surroundings: list[AbstractContextManager[Any]]) -> None:
        _here.now = self
        try:
            with ExitStack() as stack:
                for context in surroundings:
                    stack.enter_context(context)
                model(x)
        except _Ended:
            pass
        except BaseException as error:  # raised again by the caller, to whom it belongs
            self._error = error
        finally:
            self.at = self.value = None
            self._back.release()


def _surroundings(x: Tensor) -> list[AbstractContextManager[Any]]:
    """Return what torch keeps for each thread apart, as the caller has it; gradients are off."""
    kind = x.device.type
    found: list[AbstractContextManager[Any]] = [torch.no_grad()]
    if torch.is_autocast_enabled(kind):
        found.append(torch.autocast(kind, dtype=torch.get_autocast_dtype(kind)))
    if x.is_cuda:
        found.append(torch.cuda.stream(torch.cuda.current_stream(x.device)))
    if (default := torch.get_default_device()).type != "cpu":
        found.append(default)
    return found


def in_lockstep(
    small: nn.Module,
    dense: nn.Module,
    layers: Mapping[str, tuple[nn.Module, nn.Module]],
    batches: Iterable[Tensor],
    visit: Visit,
) -> None:
    """Run both models on ``batches`` and call ``visit`` once for each layer that they reach, in that order.

    ``layers`` gives each layer of ``small`` and its partner in ``dense`` under a name. ``visit`` is called
    before the layer of ``small`` has run on any batch, and may change it; where a model chooses its way by
    what it sees, the batches that come by are those handed over, and of several layers at which
    batches wait it is the first of ``layers`` that is visited. A layer is visited at its first call only.
    Both models are in eval mode meanwhile. Whatever is raised, in a model or by ``visit``, is raised here,
    and leaves neither a thread nor a hook behind.
    """
    visited: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(eval_mode(small))
        stack.enter_context(eval_mode(dense))
        for name, (own, partner) in layers.items():
            stack.enter_context(_stop_before(own, name, visited))
            stack.enter_context(_stop_after(partner, name, visited))
        pairs = [_Pair(_Pass(small, x), _Pass(dense, x)) for x in batches]
        stack.callback(_end_all, pairs)
        for pair in pairs:
            pair.small.advance()
        while len(visited) < len(layers):
            waiting = {pair.small.at for pair in pairs}
            first = next((name for name in layers if name in waiting), None)
            if first is None:
                return
            here = [pair for pair in pairs if pair.small.at == first]
            _visit(first, here, visit)
            visited.add(first)
            for pair in here:
                pair.small.advance()


class _Pair:
    """The two passes of one batch."""

    def __init__(self, small: _Pass, dense: _Pass) -> None:
        self.small, self.dense = small, dense
        self._aside: dict[str, Tensor] = {}
        self._over = False

    def dense_output(self, name: str) -> Tensor | None:
        """Return the dense model's output of the layer ``name``; None if its pass does not come by."""
        if name in self._aside:
            return self._aside.pop(name)
        while not self._over:
            self.dense.advance()
            found, self.dense.value = self.dense.value, None
            if self.dense.at == name:
                return found
            if self.dense.at is None or found is None:
                self._over = True
            else:  # branches taken in another order than by the compressed network
                self._aside.setdefault(self.dense.at, found.clone())
        return None


def _visit(name: str, pairs: list[_Pair], visit: Visit) -> None:
    """Hand over what waits at a layer; nothing of it is kept."""
    inputs, outputs = [], []
    for pair in pairs:
        output = pair.dense_output(name)
        if output is not None and pair.small.value is not None:
            inputs.append(pair.small.value)
            outputs.append(output)
    if inputs:
        visit(name, inputs, outputs)


def _stop_before(layer: nn.Module, name: str, visited: set[str]) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in visited and (now := getattr(_here, "now", None)) is not None:
            now.pause(name, input_of_call(args, kwargs))

    return _Removed(layer.register_forward_pre_hook(hook, with_kwargs=True))


def _stop_after(layer: nn.Module, name: str, visited: set[str]) -> Any:
    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        if name not in visited and (now := getattr(_here, "now", None)) is not None:
            now.pause(name, output)

    return _Removed(layer.register_forward_hook(hook))


class _Removed:
    """A hook for the length of a block."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _end_all(pairs: list[_Pair]) -> None:
    for pair in pairs:
        pair.small.end()
        pair.dense.end()
