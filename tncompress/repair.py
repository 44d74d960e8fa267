"""Repair without labels or gradients: what unlabelled images alone bring back after truncation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tncompress.discovery import find_layers
from tncompress.layers import TNConv
from tncompress.running import copy_model, eval_mode, input_of_call, inputs_of

M = TypeVar("M", bound=nn.Module)


def repair(
    small: M,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    bias: bool = True,
    batchnorm: bool = True,
) -> M:
    """Return a copy of ``small`` repaired on ``batches`` of inputs: first biases, then BatchNorm statistics.

    ``dense`` is the model that ``small`` was made from. ``batches`` is gone through once for each repair, so
    it must be a loader or a list, not a generator; a batch is a tensor, or a tuple or mapping whose first
    item is the input. Labels are never looked at.
    """
    repaired = copy_model(small)
    if bias:
        correct_bias_(repaired, dense, batches)
    if batchnorm:
        reestimate_batchnorm_(repaired, batches)
    return repaired


def reestimate_batchnorm_(model: nn.Module, batches: Iterable[Any]) -> None:
    """Give every BatchNorm that the inputs reach the mean and variance of all of ``batches`` together.

    Truncation shifts the statistics of what the layers put out; much of the accuracy lost right after it
    comes back by this alone. Sums over batches are pooled, so that images weigh alike whatever the sizes of
    their batches. Meanwhile BatchNorm layers normalise by the batch at hand, as in training, and nothing
    else is in training mode: dropout stays off, unlike with ``torch.optim.swa_utils.update_bn``. After an
    error the old statistics stand.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    pools = {norm: _Pool() for norm in norms}
    with eval_mode(model):
        before = [copy.deepcopy(norm.state_dict()) for norm in norms]
        handles = [norm.register_forward_pre_hook(pool.add, with_kwargs=True) for norm, pool in pools.items()]
        try:
            for x in inputs_of(batches, model):
                model(x)
        except BaseException:
            pools.clear()
            raise
        finally:
            for handle in handles:
                handle.remove()
            for norm, state in zip(norms, before, strict=True):
                norm.load_state_dict(state)
            for norm, pool in pools.items():
                pool.write_to(norm)


class _Pool:
    """The mean and variance of each channel over all values seen, batch after batch (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.batches = self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, norm: nn.Module, args: Any, kwargs: Any) -> None:
        """Take in what ``norm`` is about to normalise, by its own statistics if it is more than one value."""
        values = input_of_call(args, kwargs).detach().movedim(1, 0).flatten(1)
        norm.train(values.shape[1] > 1)
        variance, mean = torch.var_mean(
            values.float() if values.dtype.itemsize < 4 else values, 1, correction=0
        )
        count, mean = values.shape[1], mean.double()
        if not self.batches:
            self.mean, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
        gap, total = mean - self.mean, self.count + count
        self.squares = self.squares + count * variance.double() + gap.square() * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.batches, self.count = self.batches + 1, total

    def write_to(self, norm: Any) -> None:
        """Make these the running statistics of ``norm``, if it has seen anything; unbiased."""
        if self.batches:
            norm.running_mean.copy_(self.mean)
            norm.running_var.copy_(self.squares / max(self.count - 1, 1))
            norm.num_batches_tracked.fill_(self.batches)


def correct_bias_(small: nn.Module, dense: nn.Module, batches: Iterable[Any]) -> None:
    """Add to each compressed layer's bias what makes its mean output that of the dense layer: (W - W') E[x].

    Both layers are given the dense model's input. Layers without a bias are passed over: a BatchNorm
    follows them as a rule, and takes the mean away again.
    """
    pairs = [
        (layer.module, dense.get_submodule(layer.name))
        for layer in find_layers(small)
        if isinstance(layer.module, TNConv) and layer.module.bias is not None
    ]
    if not pairs:
        return
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}
    with eval_mode(small), eval_mode(dense), _hooked(pairs, sums, counts):
        for x in inputs_of(batches, dense):
            dense(x)
    with torch.no_grad():
        for layer, total in sums.items():
            bias: Any = layer.bias
            bias += (total / counts[layer]).to(bias.dtype)


@contextmanager
def _hooked(
    pairs: list[tuple[TNConv, nn.Module]], sums: dict[nn.Module, Tensor], counts: dict[nn.Module, int]
) -> Iterator[None]:
    """Sum up, at each call of a dense layer, how far its compressed partner is off in each channel."""
    handles = []
    for layer, partner in pairs:

        def add(_: nn.Module, args: Any, kwargs: Any, output: Tensor, layer: TNConv = layer) -> None:
            gap = (output - layer(input_of_call(args, kwargs))).double()
            channel = gap.ndim - 1 - layer.geometry.ndim
            gap = gap.movedim(channel, -1).flatten(0, -2)
            sums[layer] = sums.get(layer, 0) + gap.sum(0)
            counts[layer] = counts.get(layer, 0) + len(gap)

        handles.append(partner.register_forward_hook(add, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
