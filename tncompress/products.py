"""Products of float32 matrices, by whichever of torch's two libraries is the faster on this processor.

torch multiplies by MKL, which on AMD's processors keeps to AVX2; oneDNN, which runs the convolutions, takes
AVX-512 wherever there is any, and is then the faster. On one machine the choice depends on the sizes
alone, so that the same numbers have the same product every time.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LEAST = 2**21
"""From how many multiplications on the start of oneDNN's call, some microseconds, is won back."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, rounded in another order; stacks of one matrix are taken as that matrix.

    >>> a, b = torch.ones(300, 200), torch.ones(200, 100)
    >>> torch.equal(product(a, b), a @ b)                      # small whole numbers are exact either way
    True
    """
    if a.ndim == b.ndim == 3 and len(a) == len(b) == 1:
        return product(a[0], b[0])[None]
    if not _suits(a, b):
        return a @ b
    if not (b.is_contiguous() or b.mT.is_contiguous()):  # for parts of rows it has but a loop without vectors
        b = b.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(a, b.mT, None, "none", [], "")


def _suits(a: Tensor, b: Tensor) -> bool:
    """Say whether oneDNN may multiply these: plain matrices on a CPU, of which nobody wants gradients."""
    return (
        a.ndim == b.ndim == 2
        and a.dtype == b.dtype == torch.float32
        and a.is_cpu
        and b.is_cpu
        and a.shape[0] * a.shape[1] * b.shape[1] >= LEAST
        and a.shape[1] == b.shape[0]
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and type(a) is type(b) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0  # whoever counts operations knows torch's only
        and _onednn_is_faster()
    )


@lru_cache(maxsize=1)
def _onednn_is_faster() -> bool:
    try:
        one = torch.ones(2, 2)
        torch.ops.mkldnn._linear_pointwise.default(one, one, None, "none", [], "")
    except (RuntimeError, AttributeError):  # a build of torch without it
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
