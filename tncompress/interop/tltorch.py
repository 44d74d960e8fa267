"""tensorly-torch: layers as its ``FactorizedConv``, and its layers, or whole models of them, as ours."""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tncompress.discovery import refuse_wrapped
from tncompress.formats import CP, MPS, Format, Tucker
from tncompress.formats.chain import IN, OUT
from tncompress.geometry import ConvGeometry
from tncompress.interop.matching import network_of
from tncompress.layers import TNConv
from tncompress.plan import Skip
from tncompress.running import copy_model
from tncompress.swap import adopt, replace_all_

Shape = tuple[int, ...]


def to_tltorch(layer: TNConv, *, implementation: str = "factorized") -> Any:
    """Return a ``tltorch.FactorizedConv`` with the same function, that holds copies of the factors.

    CP becomes its CP, Tucker its Tucker, and an MPS in the order in, spatial, out its TT; where tltorch wants
    a factor that ours has not (of a spatial leg of size 1, or one that is not compressed), it gets an
    identity, which is not trained. ``implementation`` is tltorch's: ``factorized``, ``reconstructed`` or,
    for CP, ``mobilenet``. A layer that tltorch would compute wrongly or not at all is a ``ValueError``:
    linear, grouped, transposed, padded by other values than zeros, padded unevenly.

    tltorch runs only while tensorly's backend is PyTorch, to which its first import switches every user of
    tensorly. Here the backend is put back: call ``tensorly.set_backend("pytorch")`` before you run the
    result, which takes inputs with a batch axis only.

    >>> import tncompress as tnc
    >>> layer = TNConv.from_dense(nn.Conv2d(8, 16, 3), tnc.Tucker(), ranks=(4, 6))
    >>> theirs = tnc.to_tltorch(layer)
    >>> torch.allclose(tnc.from_tltorch(theirs).weight, layer.weight, atol=1e-6)
    True
    """
    network_of(layer)
    if reason := _inexpressible(layer.geometry):
        raise ValueError(f"tltorch has no such layer: {reason}; keep it as it is, or merge it")
    if implementation not in ("factorized", "reconstructed", "mobilenet"):
        raise ValueError(
            f"wanted the implementation factorized, reconstructed or mobilenet, got {implementation!r}"
        )
    if implementation == "mobilenet" and not isinstance(layer.format, CP):
        raise ValueError(f"tltorch's implementation mobilenet is for CP, the layer is {layer.format}")
    tltorch = _tltorch()
    with torch.no_grad():
        geometry, shape = layer.geometry, layer.geometry.kernel_shape
        new = tltorch.FactorizedConv(
            geometry.in_channels,
            geometry.out_channels,
            geometry.kernel_size,
            stride=geometry.stride,
            padding=tuple(before for before, _ in geometry.padding),
            dilation=geometry.dilation,
            factorization=_factorization(tltorch, layer, shape),
            implementation=implementation,
        )
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
        return new.train(layer.training)


def from_tltorch(module: nn.Module) -> nn.Module:
    """Return a ``tltorch.FactorizedConv`` as a :class:`TNConv`, or a copy of a model with all of them so.

    The outputs are the same; factors are copied, a Tucker whose spatial factors are identities becomes
    ``tucker``, any other ``tucker(all)``. Training mode, ``requires_grad`` and, in a model, hooks and sharing
    are kept. Layers of tltorch that can't be converted stay, are listed as
    :class:`Skip` in ``tncompress_skipped`` of the copy, and named in a warning. A single layer that
    can't be, and a model without any layer of tltorch, is a ``ValueError``.
    """
    tltorch = _tltorch()
    with torch.no_grad():
        if isinstance(module, tltorch.FactorizedConv):
            made = _converted(tltorch, module)
            if isinstance(made, str):
                raise ValueError(f"this layer of tltorch can't be converted: {made}")
            return made
        refuse_wrapped(module)
        target = copy_model(module)
        names = _layers(target)
        if not names:
            raise ValueError(
                f"{type(module).__name__} holds no layer of tltorch: there is nothing to convert"
            )
        made_of = {layer: _converted(tltorch, layer) for layer in names}
        done = {layer: adopt(new, layer) for layer, new in made_of.items() if isinstance(new, TNConv)}
        replace_all_(target, {name: new for layer, new in done.items() for name in names[layer]})
    skipped = tuple(
        _skip(layer, names[layer], reason) for layer, reason in made_of.items() if isinstance(reason, str)
    )
    vars(target)["tncompress_skipped"] = skipped
    if skipped:
        listed = "; ".join(f"{skip.name!r}: {skip.reason}" for skip in skipped)
        warnings.warn(f"{len(skipped)} layers of tltorch stay as they are: {listed}", stacklevel=2)
    return target


def _tltorch() -> ModuleType:
    """Import tltorch, and put back tensorly's backend, which its first import switches to PyTorch."""
    import tensorly

    before = tensorly.get_backend()
    try:
        import tltorch
    finally:
        if tensorly.get_backend() != before:
            tensorly.set_backend(before)
    return tltorch


def _inexpressible(geometry: ConvGeometry) -> str | None:
    """Return what of a geometry tltorch would compute wrongly or not at all."""
    if geometry.ndim == 0:
        return "its factorized convolutions have a spatial axis, this is a linear layer"
    if geometry.transposed:
        return "it has no transposed convolutions"
    if geometry.groups > 1:
        return f"it has no groups, this has {geometry.groups}"
    if any(before != after for before, after in geometry.padding):
        return f"it pads both sides alike, this pads {geometry.padding} ('same', with an even kernel)"
    if geometry.padding_mode != "zeros" and any(sum(pair) for pair in geometry.padding):
        return f"it pads with zeros whatever it is told, this pads by {geometry.padding_mode!r}"
    return None


# --- to tltorch ---------------------------------------------------------------------------------------------


def _factorization(tltorch: ModuleType, layer: TNConv, shape: Shape) -> Any:
    """Return the factors as tltorch's own kind of tensor."""
    kind, tensors = layer.format, layer.tensors()
    if isinstance(kind, CP) and all(len(group) == 1 for group in kind.modes(shape)[1:]):
        (rank,) = layer.ranks
        spatial = iter(tensors[1:-1])
        factors = [_held(tensors[-1]), _held(tensors[0].reshape(rank, -1).mT)]
        factors += [
            _held(next(spatial).mT) if n > 1 else _fixed(tensors[0].new_ones(1, rank)) for n in shape[2:]
        ]
        weights = _fixed(tensors[0].new_ones(rank))
        return tltorch.CPTensor(weights, factors, shape=shape, rank=rank)
    if isinstance(kind, Tucker):
        core, factors = _tucker(kind, tensors, shape)
        return tltorch.TuckerTensor(core, factors, shape=shape, rank=tuple(core.shape))
    if isinstance(kind, MPS) and kind.groups(shape) == _tt_groups(shape):
        cores = _tt(tensors, shape)
        ranks = (*(core.shape[0] for core in cores), 1)
        return tltorch.TTTensor(cores, shape=(*shape[1:], shape[0]), rank=ranks)
    raise ValueError(
        f"tltorch has no format like {kind} on a kernel {shape}: it has CP with a factor for each leg, "
        "Tucker, and TT in the order in, spatial, out; compress with cp, tucker or mps"
    )


def _held(factor: Tensor) -> nn.Parameter:
    return nn.Parameter(factor.detach().clone(memory_format=torch.contiguous_format), factor.requires_grad)


def _fixed(factor: Tensor) -> nn.Parameter:
    return nn.Parameter(factor, requires_grad=False)


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _tucker(kind: Tucker, tensors: list[Tensor], shape: Shape) -> tuple[nn.Parameter, list[nn.Parameter]]:
    first, *spatial, out = tensors
    modes, rank = kind.modes(shape), first.shape[0]
    if len(modes) == 1:  # a matrix: one bond, no core
        core = _fixed(_eye(rank, first).reshape(rank, rank, *[1] * len(shape[2:])))
    else:
        *spatial, kernel = spatial
        sizes = iter(kernel.shape[2:])
        core = _held(kernel.reshape(*kernel.shape[:2], *(1 if n == 1 else next(sizes) for n in shape[2:])))
    bonded = dict(zip(modes[1:-1], spatial, strict=True)) if len(modes) > 1 else {}
    legs = [
        _held(bonded[mode].mT) if mode in bonded else _fixed(_eye(shape[mode], first))
        for mode in range(2, len(shape))
    ]
    return core, [_held(out), _held(first.reshape(rank, -1).mT), *legs]


def _tt_groups(shape: Shape) -> tuple[Shape, ...]:
    """Return the kernel modes of the cores of tltorch's order, as :meth:`MPS.groups` gives them."""
    thin = tuple(mode for mode in range(2, len(shape)) if shape[mode] == 1)
    wide = tuple((mode,) for mode in range(2, len(shape)) if shape[mode] > 1)
    return ((IN, *thin), *wide, (OUT,))


def _tt(tensors: list[Tensor], shape: Shape) -> list[nn.Parameter]:
    first, *spatial, out = tensors
    bond = first.shape[0]
    cores, rest = [_held(first.reshape(1, bond, -1).mT)], iter(spatial)
    for size in shape[2:]:
        if size == 1:
            cores.append(_fixed(_eye(bond, first)[:, None]))
        else:
            core = next(rest)  # (r_k, r_k-1, k)
            cores.append(_held(core.permute(1, 2, 0)))
            bond = core.shape[0]
    return [*cores, _held(out.mT[..., None])]


# --- from tltorch -------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the layers of tltorch in a model, outermost ones only, with all their names."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        outer = any(name.startswith(f"{other}.") for names in found.values() for other in names)
        if not outer and any(base.__module__.startswith("tltorch.") for base in type(module).__mro__):
            found.setdefault(module, []).append(name)
    return found


def _converted(tltorch: ModuleType, layer: Any) -> TNConv | str:
    """Return the layer as ours, or why it can't be."""
    if type(layer) is not tltorch.FactorizedConv:
        return f"a {type(layer).__name__} is no plain FactorizedConv"
    if layer.n_layers != 1:
        return f"{layer.n_layers} convolutions share its factors"
    weight = layer.weight
    if weight._forward_hooks or weight._forward_pre_hooks:
        return "its factors have hooks, such as tensor dropout: remove them first"
    numbers = [tuple(map(int, getattr(layer, name))) for name in ("stride", "padding", "dilation")]
    stride, padding, dilation = numbers
    pairs = tuple((pad, pad) for pad in padding)
    geometry = ConvGeometry(
        layer.in_channels, layer.out_channels, tuple(layer.kernel_size), stride, pairs, dilation
    )
    try:
        format, factors = _factors(tltorch, weight, geometry.kernel_shape)
        bias = layer.bias.detach().clone() if layer.bias is not None else None
        new = TNConv(format, geometry, [factor.clone().contiguous() for factor in factors], bias)
        format.check_ranks(geometry.kernel_shape, new.ranks)
    except ValueError as error:
        return str(error)
    new.factors.requires_grad_(any(p.requires_grad for p in layer.weight.parameters()))
    if new.bias is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)
    return new.train(layer.training)


def _factors(tltorch: ModuleType, weight: Any, shape: Shape) -> tuple[Format, list[Tensor]]:
    """Return our format of a tensor of tltorch, and the factors with the legs of its network."""
    factors = [factor.detach() for factor in getattr(weight, "factors", ())]
    kind: Format
    if type(weight) is tltorch.CPTensor:
        out, inward, *spatial = factors
        scale = weight.weights.detach()
        for factor, size in zip(spatial, shape[2:], strict=True):
            scale = scale * factor[0] if size == 1 else scale
        wide = [factor.mT for factor in spatial if len(factor) > 1]
        kind, found = CP(), [inward.mT, *wide, out * scale]
    elif type(weight) is tltorch.TuckerTensor:
        kind, found = _from_tucker(weight.core.detach(), factors, shape)
    elif type(weight) is tltorch.TTTensor:
        kind, found = MPS(), _from_tt(factors, shape)
    else:
        raise ValueError(f"its factorization is {type(weight).__name__}, not CP, Tucker or TT")
    legs = kind.network(shape)
    missing = (len(names) - factor.ndim for names, factor in zip(legs, found, strict=True))
    return kind, [f.reshape(*f.shape, *[1] * more) for f, more in zip(found, missing, strict=True)]


def _from_tucker(core: Tensor, factors: list[Tensor], shape: Shape) -> tuple[Format, list[Tensor]]:
    out, inward, *spatial = factors
    for mode in reversed(range(2, len(shape))):
        if shape[mode] == 1:
            core = torch.tensordot(core, spatial.pop(mode - 2)[0], dims=([mode], [0]))
    if not spatial:
        exact = core.shape[0] == core.shape[1] and torch.equal(core, _eye(len(core), core))
        return Tucker(), [inward.mT if exact else core @ inward.mT, out]
    if all(f.shape[0] == f.shape[1] and torch.equal(f, _eye(len(f), f)) for f in spatial):
        return Tucker(), [inward.mT, core, out]
    return Tucker("all"), [inward.mT, *(factor.mT for factor in spatial), core, out]


def _from_tt(cores: list[Tensor], shape: Shape) -> list[Tensor]:
    first, *spatial, last = cores
    if first.shape[0] != 1 or last.shape[2] != 1:
        raise ValueError("its TT has bonds at its ends, as a tensor ring has")
    found, before = [first[0].mT], 0
    for core in spatial:
        if core.shape[1] == 1:
            found[before] = torch.tensordot(core[:, 0].mT, found[before], dims=1)
        else:
            found.append(core.permute(2, 0, 1))
            before += 1
    return [*found, last[..., 0].mT]


def _skip(layer: Any, names: list[str], reason: str) -> Skip:
    dense = getattr(layer, "kernel_shape", None) or getattr(layer, "weight_shape", None) or ()
    shape = tuple(map(int, dense))
    return Skip(tuple(names), type(layer).__name__, shape, reason, math.prod(shape), None)
