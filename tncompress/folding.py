"""What comes after a convolution in a traced model, made part of it: BatchNorm, addition, activation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tncompress.contraction import dense_stage
from tncompress.formats.base import Stage
from tncompress.geometry import CONVS, TRANSPOSED, ConvGeometry
from tncompress.layers import TNConv
from tncompress.prepacked import own_weights

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
FUNCTIONS = {F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6", F.silu: "silu"}
FUNCTIONS |= {F.hardswish: "hardswish", F.gelu: "gelu"}
GELU = {"none": "gelu", "tanh": "gelu tanh"}
METHODS = {"relu": "relu", "relu_": "relu"}
ADDITIONS = (operator.add, torch.add)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Tracer(fx.Tracer):
    """Torch's own layers, ours, and whatever has hooks, stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, TNConv) or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)


def has_hooks(module: nn.Module) -> bool:
    """Say whether someone listens in on a module, who would miss what is folded."""
    return any(getattr(module, name) for name in _HOOKS)


def trace(model: nn.Module) -> fx.GraphModule | None:
    """Return ``model`` as a graph over the same layers, or None where its Python can't be followed."""
    if has_hooks(model):
        return None
    try:
        tracer = _Tracer()
        graph = fx.GraphModule(model, tracer.trace(model))
    except Exception:  # whatever a model's own Python raises when it is given no numbers
        return None
    return graph


@dataclass
class Unit:
    """A convolution of a graph that can be frozen, with what was folded into it."""

    name: str
    module: Any
    nodes: list[fx.Node]
    norm: Any = None
    activation: str | None = None

    @property
    def geometry(self) -> ConvGeometry:
        """The geometry of the layer."""
        return self.module.geometry if isinstance(self.module, TNConv) else ConvGeometry.of(self.module)

    @property
    def stages(self) -> Sequence[Stage]:
        """The convolutions that the layer runs."""
        return self.module.running if isinstance(self.module, TNConv) else (dense_stage(self.geometry),)


def units_of(graph: fx.GraphModule, *, linear: bool = False) -> list[Unit]:
    """Return the convolutions and tensor-network layers that are only ever called on one input.

    With ``linear`` torch's linear layers are among them.
    """
    kinds = (*CONVS, *TRANSPOSED, TNConv, *([nn.Linear] if linear else []))
    modules = dict(graph.named_modules())
    names: dict[nn.Module, str] = {}
    nodes: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            node.target = names.setdefault(module, node.target)
            nodes.setdefault(module, []).append(node)
    read = {str(node.target).rpartition(".")[0] for node in graph.graph.nodes if node.op == "get_attr"}
    units = []
    for module, found in nodes.items():
        plain = type(module) in kinds and "forward" not in vars(module)
        calls = all(len(node.args) == 1 and not node.kwargs for node in found)
        inside = any(name == names[module] or name.startswith(f"{names[module]}.") for name in read)
        if plain and calls and not inside and not has_hooks(module):
            units.append(Unit(names[module], module, found))
    return units


def fold(graph: fx.GraphModule, unit: Unit) -> None:
    """Make what follows the only call of ``unit`` part of it, and take it out of the graph."""
    if len(unit.nodes) != 1:
        return
    modules, start = dict(graph.named_modules()), unit.nodes[0]
    path, added, other = [start], None, None
    while len(path[-1].users) == 1:
        last, (user,) = path[-1], path[-1].users
        if unit.norm is None and added is None and _is_norm(user, last, modules, unit.geometry.ndim):
            unit.norm = modules[str(user.target)]
        elif added is None and (found := _other_side(user, last, start)) is not None:
            added, other = user, found
        else:
            unit.activation = _activation(user, last, modules)
            path += [user] if unit.activation else []
            break
        path.append(user)
    if len(path) == 1:
        return
    with graph.graph.inserting_before(added or start):
        inputs = (start.args[0],) if added is None else (start.args[0], other)
        node = graph.graph.call_module(unit.name, inputs)
    path[-1].replace_all_uses_with(node)
    for folded in reversed(path):
        graph.graph.erase_node(folded)
    unit.nodes = [node]


def folded_weights(unit: Unit) -> tuple[list[Tensor], Tensor | None]:
    """Return the weights of the unit's convolutions and its bias, with BatchNorm folded into the last one."""
    module, geometry = unit.module, unit.geometry
    with torch.no_grad():
        if isinstance(module, TNConv):
            weights = own_weights(module)
        else:
            weights = [geometry.kernels(module.weight.detach()).flatten(0, 1)]
        dtype = weights[-1].dtype
        bias = None if module.bias is None else module.bias.detach().double()
        if unit.norm is not None:
            scale, shift = _affine(unit.norm)
            weights[-1] = weights[-1].double() * scale.reshape(-1, *[1] * (weights[-1].ndim - 1))
            bias = shift if bias is None else bias * scale + shift
        return [w.to(dtype) for w in weights], None if bias is None else bias.to(dtype)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm in eval mode."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _is_norm(user: fx.Node, last: fx.Node, modules: dict[str, nn.Module], ndim: int) -> bool:
    if user.op != "call_module" or user.args != (last,) or user.kwargs:
        return False
    norm: Any = modules[str(user.target)]
    return (
        type(norm) is NORMS.get(ndim)
        and norm.running_mean is not None
        and norm.running_var is not None
        and not norm.training
        and not has_hooks(norm)
    )


def _activation(user: fx.Node, last: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if user.args[:1] != (last,) or user.all_input_nodes != [last]:
        return None
    if user.op == "call_module":
        module = modules[str(user.target)]
        if has_hooks(module):
            return None
        return GELU[module.approximate] if type(module) is nn.GELU else MODULES.get(type(module))
    if user.op == "call_function" and len(user.args) == 1 and set(user.kwargs) <= {"inplace"}:
        return FUNCTIONS.get(user.target)  # type: ignore[arg-type]
    if user.op == "call_method" and len(user.args) == 1:
        return METHODS.get(str(user.target))
    return None


def _other_side(user: fx.Node, last: fx.Node, start: fx.Node) -> fx.Node | None:
    """Return what ``user`` adds to ``last``, if it is an addition that the convolution can make by itself.

    It is then made where the addition was, so that nothing in between may write on the convolution's input.
    """
    if user.op != "call_function" or user.target not in ADDITIONS or user.kwargs or len(user.args) != 2:
        return None
    left, right = user.args
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or left is right:
        return None
    other = right if left is last else left
    node, source = start.next, start.args[0]
    while node is not user:
        if source in node.all_input_nodes and _may_write(node):
            return None
        node = node.next
    return other


def _may_write(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    in_place = (
        name in vars(operator) and name.startswith("i") and name not in ("is_", "is_not", "index", "inv")
    )
    return in_place or name.endswith("_") or bool(node.kwargs.get("inplace"))
