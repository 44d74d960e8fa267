"""Muon: steps along momenta made orthogonal, for factors and kernels; AdamW's steps for all else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the odd polynomial that is applied five times (Jordan et al. 2024): steep at 0, near 1 from there on."""
ROUNDS = 5
ADAMW_RMS = 0.2
"""The root mean square of AdamW's steps, over the rate: Muon's are made as large (Liu et al. 2025)."""


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``orthogonal=True`` are trained by Muon (Jordan et al. 2024; arXiv 2502.16982).

    A parameter of such a group is taken for a matrix (`as_matrix`), its momentum (of Nesterov, by the
    first of ``betas``) is made orthogonal, and scaled so that AdamW's learning rates will do: all
    directions of a matrix learn at the same pace, however uneven the gradient is. Turning a bond by an
    orthogonal matrix turns the step with it. Weight decay is apart from the gradient, as AdamW's.
    torch's own `torch.optim.Muon` takes matrices alone, and no others beside them.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__([{"orthogonal": False, **group} for group in groups], betas=betas)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    self._orthogonal_step(parameter, parameter.grad, group)
        return loss

    def _orthogonal_step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, keep = self.state[parameter], group["betas"][0]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - keep)
        matrix = as_matrix(gradient.lerp(state["momentum"], keep))
        direction = orthogonal(matrix).reshape(parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(direction, alpha=group["lr"] * ADAMW_RMS * math.sqrt(max(matrix.shape)))


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor cut into rows and columns where that comes nearest to a square; a vector is one row."""
    sizes = [math.prod(tensor.shape[:k]) for k in range(tensor.ndim)]
    rows = min(sizes, key=lambda rows: abs(math.log(rows * rows / tensor.numel())))
    return tensor.reshape(rows, -1)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return nearly the orthogonal factor of the polar decomposition: singular values around 1, 0.7 to 1.2.

    By Newton and Schulz's iteration with a polynomial of fifth degree. Directions whose singular values
    are less than about a thousandth of the norm stay smaller.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
    for _ in range(ROUNDS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
