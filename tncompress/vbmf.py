"""The rank of a noisy matrix by empirical variational Bayes (EVBMF): the analytic global solution.

Nakajima, Sugiyama, Babacan and Tomioka, *Global analytic solution of fully-observed variational Bayesian
matrix factorization*, JMLR 14 (2013). Of an L x M matrix with L <= M and noise variance v, the components
above sqrt(M v x) are kept, where x depends on L / M alone; v minimises the free energy on an interval.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

NEAR_TAU = 2.5129
"""tau(alpha) of the paper is this times sqrt(alpha), to four digits."""


def evbmf_rank(s: Float[Tensor, " k"], columns: int) -> int:
    """Return how many singular values ``s`` (largest first) of a ``k x columns`` matrix are no noise.

    >>> import torch
    >>> noise = torch.randn(30, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> noise[0] += 40                                              # one strong component
    >>> evbmf_rank(torch.linalg.svdvals(noise), 90)
    1
    """
    from scipy.optimize import minimize_scalar

    s = s.double()
    rows = len(s)
    if columns < rows:
        raise ValueError(f"wanted at least as many columns as singular values, {rows}, got {columns}")
    if not bool(s[0] > 0):
        return 0
    squares = (s / s[0]).square()
    alpha = rows / columns
    tau = NEAR_TAU * math.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    most = max(0, min(math.ceil(rows / (1 + alpha)) - 1, rows) - 1)
    rest = squares[most + 1 :]
    lower = max(float(rest[0]) / (columns * threshold), float(rest.mean()) / columns) if len(rest) else 0.0
    upper = float(squares.sum()) / (rows * columns)
    lower = min(max(lower, 1e-12 * upper), upper)

    def free_energy(variance: float) -> float:
        x = squares / (columns * variance)
        noise, signal = x[x <= threshold].clamp_min(1e-300), x[x > threshold]
        shift = signal - (1 + alpha)
        kept = 0.5 * (shift + (shift.square() - 4 * alpha).clamp_min(0).sqrt())
        energy = (noise - noise.log()).sum() + (signal - kept).sum()
        return float(energy + ((kept + 1) / signal).log().sum() + alpha * (kept / alpha).log1p().sum())

    exact = {"xatol": 1e-6 * upper}
    found = minimize_scalar(free_energy, bounds=(lower, upper), method="bounded", options=exact)
    return int((squares > columns * found.x * threshold).sum())
