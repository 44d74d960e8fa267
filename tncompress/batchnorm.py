"""Statistics of BatchNorm layers, taken again from unlabelled images."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tncompress.running import eval_mode, input_of_call, inputs_of


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

    def add(self, norm: Any, args: Any, kwargs: Any) -> None:
        """Take in what ``norm`` is about to normalise, by its own statistics if it is more than one value."""
        values = input_of_call(args, kwargs).detach().movedim(1, 0).flatten(1)
        variance, mean = torch.var_mean(
            values.float() if values.dtype.itemsize < 4 else values, 1, correction=0
        )
        if values.shape[1] > 1:  # in training mode it would take them again
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
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
