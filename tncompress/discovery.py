"""The layers of a model: which there are, under which names, and which of them can be compressed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tncompress.geometry import DENSE_LAYERS, ConvGeometry
from tncompress.layers import TNConv
from tncompress.running import eval_mode

NORM_HOOKS = (WeightNorm, SpectralNorm)
_NORM_STATE = {"weight_g", "weight_v", "weight_orig", "weight_u"}
_OWN_ATTRIBUTES = {*vars(nn.Module()), "tncompress_plan"}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a model, with every name that it has there, first name first."""

    names: tuple[str, ...]
    module: Any  # nn.Conv2d and its like, nn.Linear, TNConv, a quantized layer
    obstacle: str | None

    @property
    def name(self) -> str:
        """The first of its names, in the order of registration."""
        return self.names[0]

    @property
    def kind(self) -> str:
        """The class name, such as ``Conv2d``."""
        return parametrize.type_before_parametrizations(self.module).__name__

    @property
    def geometry(self) -> ConvGeometry:
        """The geometry of the layer, dense or compressed."""
        return self.module.geometry if isinstance(self.module, TNConv) else ConvGeometry.of(self.module)

    @property
    def params(self) -> int:
        """The number of parameters that the weight takes now: entries, factors, or what it is made from."""
        held = [p for name, p in self.module.named_parameters() if name != "bias"]
        return sum(p.numel() for p in held) or self.geometry.num_weights

    @property
    def requires_grad(self) -> bool:
        """Whether what the weight is made from is trained."""
        return any(p.requires_grad for name, p in self.module.named_parameters() if name != "bias")

    def weight(self) -> Tensor:
        """Return the weight that a forward pass in eval mode would use, detached."""
        return _weight_of(self.module)


def _weight_of(module: Any) -> Tensor:
    with eval_mode(module):  # in which spectral norm stands still
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm) and hook.name == "weight":
                return hook.compute_weight(module).detach()
            if isinstance(hook, SpectralNorm) and hook.name == "weight":
                return hook.compute_weight(module, do_power_iteration=False).detach()
        weight = module.weight() if _is_quantized(module) else module.weight
        return weight.detach()


def digest_of(kernel: Tensor) -> str:
    """Return a fingerprint of the values, by which plans and moments know the weights they are of."""
    return hashlib.blake2b(_raw(kernel), digest_size=16).hexdigest()


def digest_of_model(model: nn.Module) -> str:
    """Return a fingerprint of the model's class, its structure, its parameters and its buffers."""
    structure = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(model).__module__} {model!r}")
    found = hashlib.blake2b(structure.encode(), digest_size=16)
    held = {**model.state_dict(keep_vars=True), **dict(model.named_buffers())}  # also those kept out of files
    for name, value in held.items():
        about = (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value
        found.update(f"{name} {about}".encode())
        if isinstance(value, Tensor):
            found.update(_raw(value))
    return found.hexdigest()


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def find_layers(model: nn.Module, include: Collection[str] = ()) -> list[Layer]:
    """Return the convolutions and linear layers of ``model`` in the order of registration.

    A module under several names is one layer. ``obstacle`` says why a layer can't be compressed, or is None;
    what ``include`` names (see :class:`~tncompress.spec.Spec`) is none.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (*DENSE_LAYERS, TNConv)) or _is_quantized(module):
            names.setdefault(module, []).append(name)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    held = _held_outside(model)
    layers = []
    for module, found in names.items():
        obstacle = _obstacle(module, found[0], include) or _shared(module, found[0], owners)
        if obstacle is None and module in held:
            obstacle = f"it is also held in {held[module]}, unknown to torch: there it would stay dense"
        layers.append(Layer(tuple(found), module, obstacle))
    return layers


def _obstacle(module: Any, name: str, include: Collection[str]) -> str | None:
    """Return what stands in the way of compressing ``module`` by itself."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        raise ValueError(
            f"layer {name!r} is lazy and has no weights yet: run the model once before compressing it"
        )
    if isinstance(module, TNConv):
        if "compressed" not in include:
            return "already compressed (left alone unless include names 'compressed')"
    elif _is_quantized(module):
        return "its weight is quantized: compress before quantizing"
    if not name:
        return "it is the model itself: put it in an nn.Sequential"
    if isinstance(module, TNConv):
        return None
    return _obstacle_of_class(module, include) or _obstacle_of_state(module, include)


def _obstacle_of_class(module: Any, include: Collection[str]) -> str | None:
    kind = parametrize.type_before_parametrizations(module)
    if kind not in DENSE_LAYERS:
        base = next(base for base in kind.__mro__ if base in DENSE_LAYERS)
        changed = [n for n in ("forward", "_conv_forward") if getattr(kind, n, 0) is not getattr(base, n, 0)]
        if changed:
            return f"a subclass of {base.__name__} with a {changed[0]} of its own, which would be lost"
        if "subclasses" not in include:
            return f"a subclass of {base.__name__} (left alone unless include names 'subclasses')"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, and would be lost"
    if ConvGeometry.of(module).depthwise and "depthwise" not in include:
        return "depthwise: no channels to cut between (left alone unless include names 'depthwise')"
    return None


def _obstacle_of_state(module: Any, include: Collection[str]) -> str | None:
    """Return which of the tensors of ``module`` can't be kept, if any."""
    own = {"weight", "bias"}
    if parametrize.is_parametrized(module):
        own |= {"parametrizations"}
    elif any(isinstance(hook, NORM_HOOKS) for hook in module._forward_pre_hooks.values()):
        own |= _NORM_STATE
    if len(own) > 2 and "parametrized" not in include:
        return "its weight is parametrized (left alone unless include names 'parametrized')"
    if len(own) == 2 and module._parameters.get("weight") is None:
        return "its weight is no plain parameter (pruning?): remove that first"
    held = [*module._parameters, *module._buffers, *module._modules]
    if extra := [key for key in held if key not in own]:
        return f"it holds {extra[0]!r} beside weight and bias, which would be lost"
    weight = _weight_of(module)
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}, no plain tensor: quantized, or distributed"
    if not weight.numel():
        return "its weight is empty"
    return None if weight.is_floating_point() else f"its weight has dtype {weight.dtype}"


def _shared(module: nn.Module, name: str, owners: Mapping[int, list[str]]) -> str | None:
    for own, parameter in module._parameters.items():
        if others := [owner for owner in owners.get(id(parameter), []) if owner != name]:
            return f"its {own} is shared with {others[0]!r}"
    return None


def _is_quantized(module: nn.Module) -> bool:
    """Say whether ``module`` is one of torch.ao's quantized convolutions or linear layers."""
    quantized = any(base.__name__ == "WeightedQuantizedModule" for base in type(module).__mro__)
    return quantized and callable(getattr(module, "weight", None))


def _held_outside(model: nn.Module) -> dict[nn.Module, str]:
    """Return where modules are held in plain attributes: lists, mappings, bound methods."""
    held: dict[nn.Module, str] = {}
    for name, owner in model.named_modules():
        for key, value in vars(owner).items():
            if key not in _OWN_ATTRIBUTES:
                for module in _modules_in(value):
                    held.setdefault(module, repr(f"{name}.{key}".lstrip(".")))
    return held


def _modules_in(value: Any, depth: int = 4) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    inner: Collection[Any] = ()
    if isinstance(value, Mapping):
        inner = (*value.keys(), *value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif isinstance(value, MethodType):
        inner = (value.__self__,)
    elif isinstance(value, partial):
        inner = (value.func, *value.args, *value.keywords.values())
    for item in inner if depth else ():
        yield from _modules_in(item, depth - 1)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise a ``ValueError`` for a model, or a part of one, that a compiler or a parallel wrapper holds.

    What is no model at all, such as its class or its weights, is a ``TypeError``.
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, type) and issubclass(model, nn.Module):
            raise TypeError(f"wanted a model, got the class {model.__name__}: make one, {model.__name__}()")
        hint = ": build the model and load_state_dict into it" if isinstance(model, Mapping) else ""
        raise TypeError(f"wanted a model, a torch.nn.Module, got {type(model).__name__}{hint}")
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if "_orig_mod" in module._modules:
            raise ValueError(f"{where} is wrapped by torch.compile: pass its _orig_mod, compile the result")
        kinds = {base.__name__ for base in type(module).__mro__}
        if parallel := kinds & {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}:
            raise ValueError(f"{where} is wrapped by {min(parallel)}: pass its module, wrap the result")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a TorchScript module: pass the model that it was made from")
