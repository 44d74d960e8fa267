"""Compressed layers as plain torch modules, for a process that does not have this library."""

from __future__ import annotations

import contextlib
import inspect
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tncompress.contraction import ConvCall, chain_calls
from tncompress.discovery import find_layers, refuse_wrapped
from tncompress.formats.base import Stage
from tncompress.geometry import CONVS, TRANSPOSED
from tncompress.layers import TNConv
from tncompress.running import copy_model
from tncompress.spec import matches_any
from tncompress.swap import adopt, replace_module_
from tncompress.textfiles import one_line

PADS: dict[str, tuple[type[nn.Module], ...]] = {
    "constant": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
_OWN = __name__.partition(".")[0]
_ATTRIBUTES = (
    "weight|bias|in_channels|out_channels|in_features|out_features|kernel_size|stride|padding|padding_mode|"
    "dilation|groups|transposed|output_padding"
)


def strip(model: nn.Module, *, dense: Sequence[str] = ()) -> nn.Module:
    """Return a copy of ``model`` that runs, pickles and loads without this library.

    Every :class:`TNConv` becomes an ``nn.Sequential`` of torch's own convolutions (of ``nn.Linear`` for a
    linear layer, of padding modules where one side is padded more than the other), with the same outputs. It
    holds the same parameters, of the same dtype, device, memory format and ``requires_grad``; training mode
    and hooks are kept, and what was shared stays so. A layer becomes the dense one that it stands for

    - if ``dense`` names it (names or patterns, as in a spec),
    - if the module that it is in reads more of it than its output (``self.fc.weight``), or gives it an
      ``output_size``,
    - if its chain, which holds a copy of a factor for every channel that shares it, were larger.

    ``tncompress_strip``, a plain dict on the result, says of each layer by name what it became, and why. A
    model of this library's own zoo, or from a file by ``build_model``, becomes an ``fx.GraphModule``. What
    else of the library the model holds is a ``ValueError``.

    >>> import tncompress as tnc
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 4, 1))
    >>> small = tnc.compress(model, {"default": {"format": "tucker", "rank": {"fixed": 8}}})
    >>> plain = tnc.strip(small)
    >>> plain[1]
    Sequential(
      (0): Conv2d(16, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)
      (1): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), bias=False)
      (2): Conv2d(8, 32, kernel_size=(1, 1), stride=(1, 1))
    )
    >>> plain.tncompress_strip
    {'1': 'tucker: a chain of 3'}
    """
    refuse_wrapped(model)
    target = copy_model(model)
    layers = [layer for layer in find_layers(target) if isinstance(layer.module, TNConv)]
    known = [name for layer in layers for name in layer.names]
    for pattern in dense:
        if not matches_any(pattern, known):
            raise ValueError(f"the pattern {pattern!r} matches no compressed layer; they are {known}")
    became: dict[str, str] = {}
    for layer in layers:
        matched = next((f"named by {p!r}" for p in dense if matches_any(p, layer.names)), None)
        reason = matched or _read_by_parent(target, layer.names) or _too_large(layer.module)
        new = layer.module.to_dense() if reason else _chain(layer.module)
        new = adopt(new, layer.module)
        if layer.name:
            for name in layer.names:
                replace_module_(target, name, new)
        else:
            target = new
        what = f"dense: {reason}" if reason else f"a chain of {len(layer.module.stages)}"
        became |= dict.fromkeys(layer.names, f"{layer.module.format}: {what}")
    target = _without_own_classes(target)
    vars(target)["tncompress_strip"] = became
    _refuse_remains(target)
    return target


def _chain(layer: TNConv) -> nn.Sequential:
    """Return the stages of ``layer`` as modules that hold its own parameters, not copies."""
    geometry, modules = layer.geometry, OrderedDict[str, nn.Module]()
    calls = chain_calls(geometry, layer.stages)
    for i, (stage, call) in enumerate(zip(layer.stages, calls, strict=True)):
        bias = layer.bias if i == len(layer.stages) - 1 else None
        before, before_and_after = call.pad[::2], call.pad[1::2]
        if before != before_and_after:
            modules[f"pad{i}"] = PADS[call.pad_mode][geometry.ndim - 1](call.pad)
        conv = _convolution(stage, call, geometry.groups)
        conv.weight = _weight(layer.factors[stage.factor], stage, call, geometry.groups)
        conv.bias = bias
        modules[str(i)] = conv
    return nn.Sequential(modules)


def _convolution(stage: Stage, call: ConvCall, groups: int) -> Any:
    """Return torch's layer of a stage, without parameters; uneven padding is left to another module."""
    out, inward, *window = (stage.shape[0] * groups, stage.shape[1] * call.groups, *stage.shape[2:])
    if not window:
        return nn.Linear(inward, out, bias=False, device="meta")
    arguments: dict[str, Any] = {
        "kernel_size": tuple(window),
        "stride": call.stride,
        "padding": call.padding,
        "dilation": call.dilation,
        "groups": call.groups,
    }
    if call.output_padding is not None:
        kind, arguments["output_padding"] = TRANSPOSED[len(window) - 1], call.output_padding
    else:
        kind = CONVS[len(window) - 1]
        if call.pad and call.pad[::2] == call.pad[1::2]:  # F.pad counts from the last axis
            arguments |= {"padding": call.pad[::-2], "padding_mode": call.pad_mode}
    return kind(inward, out, bias=False, device="meta", **arguments)


def _weight(held: nn.Parameter, stage: Stage, call: ConvCall, groups: int) -> nn.Parameter:
    if stage.copies == 1 and call.output_padding is None:
        return held
    weight = stage.weight(held.detach(), groups)
    if call.output_padding is not None:
        weight = weight.unflatten(0, (call.groups, -1)).transpose(1, 2).flatten(0, 1)
    return nn.Parameter(weight.clone(memory_format=torch.contiguous_format), held.requires_grad)


def _too_large(layer: TNConv) -> str | None:
    """Return why the chain is not worth it: copies of a factor, where the layer has it once."""
    if all(stage.copies == 1 for stage in layer.stages):
        return None
    held = sum(stage.copies * layer.factors[stage.factor].numel() for stage in layer.stages)
    if held <= layer.geometry.num_weights:
        return None
    return f"its chain would hold {held:,} weights, it has {layer.geometry.num_weights:,}"


def _read_by_parent(model: nn.Module, names: Sequence[str]) -> str | None:
    """Return which attribute of the layer the code of a module around it reads, if any."""
    for name in names:
        parent, _, child = name.rpartition(".")
        if not child.isidentifier():
            continue
        read = re.compile(rf"\.{child}\.(?P<what>{_ATTRIBUTES})\b|\.{child}\([^()]*\b(?P<size>output_size)\b")
        owner = model.get_submodule(parent)
        for source in _sources(type(owner)):
            if found := read.search(source):
                return f"{type(owner).__name__} uses its {found['what'] or found['size']}"
    return None


def _sources(kind: type) -> Iterator[str]:
    """Yield the code of the methods of a module's class that run after it is made."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not re.search("init|reset", name):
                try:
                    yield inspect.getsource(method)
                except (OSError, TypeError):  # made without a file
                    continue


def _without_own_classes(model: nn.Module) -> nn.Module:
    """Return ``model`` with modules of classes of this library traced to plain graphs, plans removed."""
    for module in model.modules():
        for key in [key for key in vars(module) if key.startswith(f"{_OWN}_")]:
            delattr(module, key)
    while found := next((pair for pair in _names(model) if _is_own(type(pair[1]))), None):
        name, module = found
        hooked = [n for n, inner in module.named_modules() if n and _is_inlined(inner) and _has_hooks(inner)]
        if hooked:
            raise ValueError(
                f"module {hooked[0]!r} in {type(module).__name__} has hooks, which would be lost: "
                "remove them before strip"
            )
        traced = adopt(_traced(module), module)
        for inner_name, inner in _names(traced):
            inner.training = module.get_submodule(inner_name).training
        if not name:
            return traced
        for other, same in list(_names(model)):
            if same is module:
                replace_module_(model, other, traced)
    return model


def _traced(module: nn.Module) -> fx.GraphModule:
    try:
        traced = fx.symbolic_trace(module)
    except Exception as error:  # whatever a user's forward raises on a proxy
        raise ValueError(
            f"{type(module).__name__} is of a class that only {_OWN} can load, and can't be traced "
            f"({one_line(error)}): build the model from a class that you import yourself"
        ) from error
    for node in traced.graph.nodes:
        node.type = None  # the shapes of jaxtyping, which pickle does not find
    traced.recompile()
    return traced


def _names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def _is_own(kind: Any) -> bool:
    """Say whether a class or function is of this library, or of a model file that it ran under its name."""
    package = str(getattr(kind, "__module__", "")).partition(".")[0]
    return package == _OWN or package.startswith(f"_{_OWN}")


def _is_inlined(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn")


def _has_hooks(module: nn.Module) -> bool:
    return any(value for key, value in vars(module).items() if key.endswith("_hooks") and "state" not in key)


class _Remains(pickle.Pickler):
    """What of this library a pickled object would need; tensors are passed over."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: list[str] = []

    def persistent_id(self, item: Any) -> str | None:
        return "tensor" if isinstance(item, Tensor) else None

    def reducer_override(self, item: Any) -> Any:
        kind = item if hasattr(item, "__qualname__") else type(item)
        if _is_own(kind):
            self.found.append(f"{kind.__module__}.{kind.__qualname__}")
        return NotImplemented


def _refuse_remains(model: nn.Module) -> None:
    """Raise ``ValueError`` if loading the pickled model would import this library."""
    remains = _Remains()
    with contextlib.suppress(Exception):  # what can't be pickled could not be before: still it runs here
        remains.dump(model)
    if remains.found:
        raise ValueError(
            f"the model holds a {remains.found[0]} in an attribute that torch does not know, and would not "
            f"load without {_OWN}: remove it, or register it as a submodule"
        )
