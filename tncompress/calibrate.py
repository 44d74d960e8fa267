"""Calibration: one pass over unlabelled data that measures what each layer is given."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tncompress.collector import Collector, Finite
from tncompress.discovery import Layer, digest_of, find_layers, refuse_wrapped
from tncompress.geometry import ConvGeometry
from tncompress.gradients import GradientMoments
from tncompress.moments import Calibration, Moments, num_bytes
from tncompress.patches import CHUNK
from tncompress.running import eval_mode, input_of_call
from tncompress.shifts import numbers_held
from tncompress.spec import Spec
from tncompress.squares import block_rows
from tncompress.tables import progress_bar
from tncompress.textfiles import one_line

__all__ = ["Calibration", "Moments", "calibrate"]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Collection[str] = (),
    memory_limit: int = 4 * 2**30,
    gradients: Literal["teacher", "labels"] | None = None,
    gradient_batches: int = 4,
    progress: bool = False,
) -> Calibration:
    """Return the moments of the input patches of every layer of ``model`` that can be compressed.

    ``batches`` is gone through once; a batch is a tensor, or a tuple or mapping whose first item is the
    input. How images are split into batches makes no difference. ``include`` is that of the spec
    (:class:`~tncompress.spec.Spec`). Moments and the working memory of their sums together take at most
    ``memory_limit`` bytes: where whole covariances exceed it, the largest give way to separable ones, and
    what exceeds it even then is left out.

    ``gradients`` also measures, on the first ``gradient_batches`` batches, the second moments of the gradient
    of the cross-entropy with respect to each layer's output: for labels drawn from the model's own
    predictions (``"teacher"``), or for the second item of each batch (``"labels"``).

    No batch, a batch that the model does not take, and NaN or infinity are a ``ValueError`` that names the
    batch and the layer. The model is left as it was, also after an error.

    >>> import tncompress as tnc
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    >>> tnc.calibrate(model, [torch.randn(16, 3, 8, 8)])
    Calibration(2 layers, 16 images, 0.0 MiB)
    """
    refuse_wrapped(model)
    if gradients not in (None, "teacher", "labels"):
        raise ValueError(f"gradients is 'teacher', 'labels' or None, got {gradients!r}")
    include = Spec.parse({"include": list(include)}).include
    layers = [layer for layer in find_layers(model, include) if layer.obstacle is None]
    if meta := [layer.name for layer in layers if layer.weight().is_meta]:
        raise ValueError(f"layer {meta[0]!r} is on the meta device: calibration runs it, so load its weights")
    watch = _Watch(model, layers, memory_limit, gradients=gradients is not None)
    slopes = GradientMoments(layers, gradients) if gradients is not None else None
    images = 0
    total = len(batches) if isinstance(batches, Sized) else 0
    bar = progress_bar(total, show=progress and total > 0)
    with torch.inference_mode(False), eval_mode(model), watch.hooks(), bar as step:
        for number, (x, y) in enumerate(_unpacked(batches, model), 1):
            watch.run(model, x, number)
            images += len(x)
            if slopes is not None and number <= gradient_batches:
                with watch.paused():
                    slopes.add(model, x, y, number)
            step("calibrating")
    if not images:
        raise ValueError("wanted at least one batch of inputs, got none (a generator that was used up?)")
    watch.complain()
    return watch.result(images, slopes)


def as_calibration(
    calibration: Calibration | Iterable[Any] | None,
    model: nn.Module,
    *,
    include: Collection[str],
    progress: bool = False,
) -> Calibration | None:
    """Return moments that are known to be of this model: those given, or those of the batches given."""
    if calibration is None:
        return None
    if not isinstance(calibration, Calibration):
        return calibrate(model, calibration, include=include, progress=progress)
    calibration.check(find_layers(model, include))
    return calibration


class _Watch:
    """The hooks of one pass, and what they gather of each layer."""

    def __init__(self, model: nn.Module, layers: list[Layer], limit: int, *, gradients: bool) -> None:
        self.layers, self.followers = layers, _Followers(model)
        self.number, self.on, self.inputs = 0, True, Finite()
        numbers = max(1, min(CHUNK, limit // 64))
        kinds = _allotted(layers, limit - _working_bytes(layers, numbers), gradients=gradients)
        self.collectors = {
            layer.name: Collector(layer, numbers, separable=kinds[layer.name] == "separable")
            for layer in layers
            if layer.name in kinds
        }
        self.reached: set[str] = set()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the layers and BatchNorms of the model while the block runs."""
        handles = []
        try:
            for layer in self.layers:

                def see(_: nn.Module, args: Any, kwargs: Any, output: Any, layer: Layer = layer) -> None:
                    if self.on:
                        self._see(layer, args, kwargs, output)

                handles.append(layer.module.register_forward_hook(see, with_kwargs=True))
            for norm in self.followers.norms:

                def take(norm: nn.Module, args: Any, kwargs: Any) -> None:
                    if self.on:
                        self.followers.take(norm, input_of_call(args, kwargs))

                handles.append(norm.register_forward_pre_hook(take, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away while the block runs."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def _see(self, layer: Layer, args: Any, kwargs: Any, output: Tensor) -> None:
        self.reached.add(layer.name)
        self.followers.put_out(layer.name, output)
        if layer.name in self.collectors:
            x = input_of_call(args, kwargs)
            self.collectors[layer.name].add(x, _geometry_of_call(layer, x, args, kwargs), self.number)

    def run(self, model: nn.Module, x: Tensor, number: int) -> None:
        """Run the model on batch ``number``; on a CPU, complain at once of what is not finite."""
        self.number = number
        self.inputs.look(x, number)
        if x.device.type == "cpu":
            self.complain()
        try:
            model(x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if "out of memory" in str(error) or "allocate memory" in str(error):
                raise MemoryError("out of memory while calibrating: give smaller batches") from error
            shape = tuple(x.shape)
            raise ValueError(
                f"the model can't be run on batch {number} {shape}: {one_line(error)}"
            ) from error
        self.followers.forget()
        if x.device.type == "cpu":
            self.complain()

    def complain(self) -> None:
        """Raise a ``ValueError`` if anything was not finite."""
        if (number := self.inputs.first_bad()) is not None:
            raise ValueError(f"batch {number} of the calibration data holds NaN or infinity")
        for name, collector in self.collectors.items():
            if (number := collector.finite.first_bad()) is not None:
                raise ValueError(
                    f"the input of layer {name!r} holds NaN or infinity in batch {number}, itself finite"
                )

    def result(self, images: int, slopes: GradientMoments | None) -> Calibration:
        """Return what was gathered."""
        reached = [layer for layer in self.layers if layer.name in self.reached]
        kept = [layer for layer in reached if layer.name in self.collectors]
        return Calibration(
            {
                layer.name: self.collectors[layer.name].finish(slopes.of(layer.name) if slopes else None)
                for layer in kept
            },
            images,
            {layer.name: digest_of(layer.weight()) for layer in self.layers},
            tuple(layer.name for layer in self.layers if layer.module.bias is not None),
            self.followers.found(),
            tuple(layer.name for layer in self.layers if layer.name not in self.reached),
            tuple(layer.name for layer in reached if layer.name not in self.collectors),
        )


class _Followers:
    """Which BatchNorm takes the output of a layer as it is: known by the identity of the tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.norms: dict[nn.Module, str] = {
            module: name
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }
        self.made: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self.open: dict[str, int] = {}
        self.takers: dict[str, set[str]] = {}
        self.sources: dict[str, set[str | None]] = {}

    def put_out(self, name: str, output: Tensor) -> None:
        """Take note of the output of a layer, without keeping it alive."""
        self.open[name] = self.open.get(name, 0) + 1
        self.made[id(output)] = weakref.ref(output), output._version, name

    def take(self, norm: nn.Module, x: Tensor) -> None:
        """Take note of what a BatchNorm is given; what was changed in place since is no layer's output."""
        kept, version, name = self.made.get(id(x), (None, 0, ""))
        taken = kept is not None and kept() is x and x._version == version
        self.sources.setdefault(self.norms[norm], set()).add(name if taken else None)
        if taken:
            self.open[name] -= 1
            self.takers.setdefault(name, set()).add(self.norms[norm])

    def forget(self) -> None:
        """Forget the tensors of a batch that was gone through."""
        self.made.clear()

    def found(self) -> dict[str, str]:
        """Return, by layer, the BatchNorm that takes all of its outputs and nothing else."""
        pairs = {name: next(iter(norms)) for name, norms in self.takers.items() if len(norms) == 1}
        return {n: norm for n, norm in pairs.items() if not self.open[n] and self.sources[norm] == {n}}


def _unpacked(batches: Iterable[Any], model: nn.Module) -> Iterator[tuple[Tensor, Any]]:
    """Yield the input of each batch on the model's device, and its second item if it has one."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for number, batch in enumerate(batches, 1):
        items = list(batch.values()) if isinstance(batch, Mapping) else batch
        items = list(items) if isinstance(items, tuple | list) else [items]
        x = items[0] if items else None
        if not isinstance(x, Tensor) or not x.numel():
            what = f"{tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"batch {number} of the calibration data is {what}: wanted a tensor of inputs")
        yield x.to(device), items[1] if len(items) > 1 else None


def _geometry_of_call(layer: Layer, x: Tensor, args: Any, kwargs: Any) -> ConvGeometry:
    """Return the geometry with the output size that a transposed convolution was called for."""
    geometry = layer.geometry
    size = kwargs.get("output_size", args[1] if len(args) > 1 else None)
    if size is None or not geometry.transposed:
        return geometry
    ndim = geometry.ndim
    extra = geometry.output_padding_for(x.shape[x.ndim - ndim :], size[len(size) - ndim :])
    return replace(geometry, output_padding=extra)


def _working_bytes(layers: list[Layer], numbers: int) -> int:
    """Return what the pass needs beside the moments: patches, centred patches, padded inputs, one product."""
    itemsize = max((max(4, layer.weight().dtype.itemsize) for layer in layers), default=4)
    widths = [math.prod(layer.geometry.kernel_shape[1:]) for layer in layers]
    products = [
        w * min(w, block_rows(w)) * layer.geometry.groups for w, layer in zip(widths, layers, strict=True)
    ]
    products += [held for layer in layers if (held := numbers_held(layer.geometry)) <= numbers]
    return itemsize * (3 * numbers + max(products, default=0))


def _allotted(layers: list[Layer], room: int, *, gradients: bool) -> dict[str, str]:
    """Return the kind of moments, whole or separable, of each layer that can have any within ``room`` bytes.

    The largest become separable first; if that is not enough, the largest are left out. What room is left
    then makes the smallest whole again.
    """
    whole, separable = {}, {}
    for layer in layers:
        groups, (out, *patch) = layer.geometry.groups, layer.geometry.kernel_shape
        extra = 8 * groups * out**2 if gradients else 0
        whole[layer.name] = num_bytes(groups, tuple(patch), separable=False) + extra
        separable[layer.name] = num_bytes(groups, tuple(patch), separable=True) + extra
    sizes, by_size = dict(whole), sorted(whole, key=whole.__getitem__, reverse=True)
    for name in by_size:
        if sum(sizes.values()) > room:
            sizes[name] = min(sizes[name], separable[name])
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if sum(sizes.values()) > room:
            del sizes[name]
    for name in reversed(by_size):
        if name in sizes and sum(sizes.values()) - sizes[name] + whole[name] <= room:
            sizes[name] = whole[name]
    return {name: "whole" if size == whole[name] else "separable" for name, size in sizes.items()}
