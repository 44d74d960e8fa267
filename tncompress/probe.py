"""What one batch tells of a model: which layers it calls, what follows them, and how much memory it takes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tncompress.measure import peak_memory


@dataclass
class Probe:
    """What a forward pass did: ``calls`` of each layer, in the order of the first ones.

    ``norms`` names the BatchNorm that alone takes what a layer puts out, ``last`` the layer whose output is
    that of the model. ``activations`` is the peak of the bytes that inputs and activations took.
    """

    calls: dict[str, int] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    last: str | None = None
    activations: int = 0


def probe(model: nn.Module, layers: Mapping[str, nn.Module], x: Tensor) -> Probe:
    """Return what a forward pass of ``model`` on ``x`` does with ``layers``."""
    found, uses = Probe(), _Uses()
    outputs: dict[str, weakref.ref[Tensor]] = {}
    norm_calls: dict[str, int] = {}

    def called(name: str, output: Any) -> None:
        found.calls[name] = found.calls.get(name, 0) + 1
        if isinstance(output, Tensor):
            outputs[name] = weakref.ref(output)
            uses.watch(name, output)

    def normed(name: str, taken: Any) -> None:
        norm_calls[name] = norm_calls.get(name, 0) + 1
        uses.paused = True
        for layer, output in outputs.items():
            if output() is taken:
                found.norms[layer] = name

    def resumed() -> None:
        uses.paused = False

    def finished(output: Any) -> None:
        found.last = next((name for name, own in outputs.items() if own() is output), None)

    with ExitStack() as stack:
        hooks = [model.register_forward_hook(lambda _, args, out: finished(out))]
        for name, layer in layers.items():
            hooks.append(layer.register_forward_hook(lambda _, args, out, name=name: called(name, out)))
        for name, norm in model.named_modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                hooks.append(norm.register_forward_pre_hook(lambda _, args, name=name: normed(name, *args)))
                hooks.append(norm.register_forward_hook(lambda *_: resumed()))
        for hook in hooks:
            stack.callback(hook.remove)
        held = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
        held = torch.cuda.memory_allocated(x.device) if x.is_cuda else held
        with uses:
            found.activations = max(0, peak_memory(model, x) - held)
    alone = {layer for layer, calls in found.calls.items() if calls == 1 and not uses.counted.get(layer)}
    found.norms = {
        layer: norm for layer, norm in found.norms.items() if layer in alone and norm_calls[norm] == 1
    }
    return found


class _Uses(TorchDispatchMode):
    """Counts the operations that take a tensor which is watched, or a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.counted: dict[str, int] = {}
        self._watched: dict[int, str] = {}

    def watch(self, name: str, tensor: Tensor) -> None:
        """Count from now on the uses of ``tensor`` under ``name``, as long as its memory is its own."""
        storage = tensor.untyped_storage()
        self._watched[storage._cdata] = name
        weakref.finalize(storage, self._watched.pop, storage._cdata, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._watched and not self.paused:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    name = self._watched.get(tensor.untyped_storage()._cdata)
                    if name is not None:
                        self.counted[name] = self.counted.get(name, 0) + 1
        return func(*args, **(kwargs or {}))
