"""``freeze``: a model for inference, in which everything that can be done beforehand is done."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tncompress.cost_model import Packing, choose_packing_, fastest_chain, in_turns
from tncompress.discovery import refuse_wrapped
from tncompress.folding import fold, folded_weights, trace, units_of
from tncompress.layers import TNConv
from tncompress.prepacked import FrozenChain, may_pack
from tncompress.running import call_model, copy_model, input_shapes
from tncompress.strategies import Contraction
from tncompress.swap import replace_module_
from tncompress.tables import watched

TOLERANCE = 1e-4
"""Relative difference of the outputs in float32 at which a way of freezing is taken for wrong."""


@dataclass(frozen=True)
class FrozenLayer:
    """What became of one tensor-network layer: ``contraction`` ``"kernel"`` is the dense layer rebuilt.

    ``seconds`` are those of the layer by itself, those of the dense one beside them; None: not measured.
    """

    name: str
    contraction: str
    seconds: float | None = None
    dense_seconds: float | None = None


class Frozen(nn.Module):
    """A model for inference, with the inputs and outputs of the model that it was made from.

    ``layers`` says how each tensor-network layer runs, ``way`` which whole was the fastest, ``rel_error``
    how far its outputs on the example inputs are from the model's, relative to their norm.
    """

    def __init__(self, model: nn.Module, way: str, dtype: torch.dtype | None, channels_last: bool) -> None:
        super().__init__()
        self.model, self.way, self.dtype, self.channels_last = model, way, dtype, channels_last
        self.layers: tuple[FrozenLayer, ...] = ()
        self.rel_error, self.seconds = 0.0, dict[str, float]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns, in float32 also where it computes in half precision."""
        args, kwargs = tree_map(self._taken, (args, kwargs))
        with torch.no_grad() if self.way.startswith("compiled") else nullcontext():
            found = self.model(*args, **kwargs)
        return found if self.dtype is None else tree_map(_full, found)

    def _taken(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self.dtype is not None and value.is_floating_point():
            value = value.to(self.dtype)
        if self.channels_last and value.ndim == 4 and (may_pack(value) or value.is_cuda):
            value = value.contiguous(memory_format=torch.channels_last)
        return value

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode, or refuse: what was folded can't be trained."""
        if mode:
            raise ValueError("a frozen model is for inference: train the model that it was made from")
        return super().train(False)


def freeze(
    model: nn.Module,
    example_inputs: Any,
    *,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    seconds: float = 0.3,
    progress: bool = False,
) -> Frozen:
    """Return a copy of ``model``, dense or compressed, that computes the same in less time, for inference.

    Each tensor-network layer runs in the way that is measured to be the fastest on inputs like
    ``example_inputs`` (a tensor, a tuple of arguments or a mapping): the chain, with neighbouring cores
    merged, or dense again. BatchNorm is folded into the weights; additions and activations join the
    convolution or linear layer before them; weights are packed for the backend where that is measured to be
    faster. Whole models frozen so, with all weights packed (one layer by itself has its input in the cache,
    and may misjudge), without the backend's layout, and with every layer dense again, are run in turns, and
    the fastest is returned, so that it is none of these that would have been faster. ``seconds`` is the time
    for each of them. Weights that are packed are held twice.

    ``dtype=torch.bfloat16`` computes in that precision (about 1e-2 relative to the outputs), and takes and
    returns float32. ``compile`` adds what ``torch.compile`` makes of it, which takes minutes. Any
    batch size is taken; it is those of the examples that it is fast for. The model itself is untouched.

    >>> import tncompress as tnc
    >>> model = tnc.build_model("zoo:cnn4").eval()
    >>> x = torch.randn(2, 1, 32, 32)
    >>> frozen = tnc.freeze(model, x, seconds=0.01)
    >>> torch.allclose(frozen(x), model(x), rtol=1e-4, atol=1e-5)
    True
    """
    refuse_wrapped(model)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a model is frozen in float32, bfloat16 or float16, got {dtype}")
    maker = _Maker(model, example_inputs, dtype)
    maker.choose(progress)
    ways = [maker.make(way) for way in maker.ways(compile)]
    sound = [frozen for frozen in ways if maker.sound(frozen)]
    if not sound:
        sound = [maker.make("as it is")]
        maker.sound(sound[0])
    return maker.fastest(sound, seconds)


@dataclass
class _Maker:
    """A model to be frozen, and what is known of it."""

    model: nn.Module
    inputs: Any
    dtype: torch.dtype | None
    chosen: dict[str, FrozenLayer] = field(default_factory=dict)
    packing: Packing = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype == _dtype_of(self.model):
            self.dtype = None
        base = copy_model(self.model).eval().requires_grad_(False)
        layers = {name: m for name, m in base.named_modules() if isinstance(m, TNConv)}
        with torch.inference_mode():
            self.wanted = [t.clone() for t in _tensors(call_model(base, self.inputs))]
            found = input_shapes(base, layers, self.inputs)
        self.shapes = {name: sorted(set(shapes)) for name, shapes in found.items() if shapes}
        for name in layers:
            if name not in self.shapes:  # something else reads its weight, or nothing does
                replace_module_(base, name, layers[name].to_dense().requires_grad_(False))
        self.base = base
        self.traced = trace(base) is not None

    def choose(self, progress: bool) -> None:
        """Measure how each tensor-network layer runs best."""
        known: dict[Any, tuple[Contraction, float, float]] = {}
        layers = [(n, m) for n, m in self.base.named_modules() if isinstance(m, TNConv)]
        for name, layer in watched(layers, "measuring", show=progress):
            shapes = tuple(self.shapes[name])
            key = layer.geometry, layer.stages, shapes, self.dtype
            if key not in known:
                known[key] = fastest_chain(layer, shapes, dtype=self.dtype, packing=self.packing)
            way, time, dense = known[key]
            self.chosen[name] = FrozenLayer(name, str(way), time, dense)
            layer.contract(way)

    def ways(self, compile: bool) -> list[str]:
        """Return the names of the whole models to try."""
        if not self.traced:
            return ["as it is", "as it is, channels last"]
        found = ["packed", "all packed", "plain"]
        if any(layer.contraction != "kernel" for layer in self.chosen.values()):
            found.append("packed, dense")
        return [*found, "compiled"] if compile else found

    def make(self, way: str) -> Frozen:
        """Return the model frozen in one way."""
        target = copy_model(self.base)
        if way.endswith("dense"):
            for module in target.modules():
                if isinstance(module, TNConv):
                    module.contract("kernel")
        last = way.startswith(("packed", "all packed", "compiled")) or way.endswith("last")
        if way.startswith("as it is"):
            target = target.to(self.dtype) if self.dtype else target
            target = target.to(memory_format=torch.channels_last) if last else target
            frozen = Frozen(target, way, self.dtype, last)
        else:
            frozen = Frozen(self._frozen_graph(target, pack=last), way, self.dtype, last)
        kernel = "kernel" if way.endswith("dense") else None
        frozen.layers = tuple(
            FrozenLayer(c.name, kernel or c.contraction, c.seconds, c.dense_seconds)
            for c in self.chosen.values()
        )
        frozen.eval()
        if way == "compiled":
            frozen.model = cast(nn.Module, torch.compile(frozen.model, options={"freezing": True}))
        return frozen

    def _frozen_graph(self, target: nn.Module, *, pack: bool) -> nn.Module:
        graph = frozen_graph(target, pack=pack)
        assert graph is not None
        return graph.to(self.dtype) if self.dtype else graph

    def sound(self, frozen: Frozen) -> bool:
        """Say whether ``frozen`` computes what the model does, and note how nearly."""
        try:
            with torch.inference_mode():
                call_model(frozen, self.inputs)
        except Exception:  # a layout that some view of the model can't take
            if frozen.way.startswith("as it is"):
                raise
            return False
        with torch.inference_mode():
            if frozen.way.startswith("packed"):
                choose_packing_(frozen, lambda: call_model(frozen, self.inputs), self.packing)
            found = _tensors(call_model(frozen, self.inputs))
        if [t.shape for t in found] != [t.shape for t in self.wanted]:
            return False
        pairs = list(zip(found, self.wanted, strict=True))
        gap = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5
        norm = sum(float(b.double().square().sum()) for _, b in pairs) ** 0.5
        frozen.rel_error = gap / norm if norm > 0 else gap
        return self.dtype is not None or frozen.rel_error <= TOLERANCE

    def fastest(self, ways: Sequence[Frozen], seconds: float) -> Frozen:
        """Return that of the frozen models which is measured to be the fastest."""

        def runner(frozen: Frozen) -> Any:
            return lambda: call_model(frozen, self.inputs)

        times = in_turns([runner(frozen) for frozen in ways], seconds=seconds) if len(ways) > 1 else [0.0]
        best = ways[times.index(min(times))]
        best.seconds = {frozen.way: time for frozen, time in zip(ways, times, strict=True)}
        return best


def frozen_graph(model: nn.Module, *, pack: bool, fold_after: bool = True) -> nn.Module | None:
    """Return ``model``, which is in eval mode, as a graph of convolutions with fixed weights.

    The weights are merged as each layer's contraction says. With ``fold_after`` BatchNorm, additions and
    activations become part of the convolution before them. None where the model's Python can't be followed.
    """
    graph = trace(model)
    if graph is None:
        return None
    units = units_of(graph, linear=pack)
    for unit in units if fold_after else ():
        fold(graph, unit)
    for unit in units:
        weights, bias = folded_weights(unit)
        made = FrozenChain(unit.geometry, unit.stages, weights, bias, unit.activation, pack=pack)
        replace_module_(graph, unit.name, made)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _tensors(outputs: Any) -> list[Tensor]:
    return [value for value in tree_leaves(outputs) if isinstance(value, Tensor)]


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
