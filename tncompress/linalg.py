"""Matrices out of tensors, and the truncated singular value decomposition.

Everything here is a pure function on tensors. Accuracy is decided here once: decompositions run in
float64 whatever the kernel's dtype (:func:`working_copy`), so that a discarded weight which is reported
is the discarded weight that is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tncompress.products import product

GRAM_FLOOR = 1e-10
"""Smallest eigenvalue of a Gram matrix, over the largest, that is trusted: it has about six digits."""

SINGLE_SIDE, SINGLE_FLOOR, SINGLE_PEAKS = 48, 1e-4, (1e-15, 1e15)
"""Where float32 finds what to keep: the shortest side, the least relative loss, the bounds of entries."""

DEGREE, GROWTH = 3, 1e5
"""The degree of the polynomial of :func:`followed_vectors`, and how far it may lift a value over another."""

COLUMNS = 1024
"""How many columns at a time :func:`projected` takes to another precision."""

JOINT_PRECISION = 1e-7
"""How far off a value of :func:`joint_singular_values` may be, over the norm, where it is not ``exact``."""


def working_copy(tensor: Tensor, *, single: bool = False) -> Tensor:
    """Return ``tensor`` detached, in float64 and contiguous: the same factors for the same numbers.

    With ``single`` it is held in float32, half the memory, where :func:`single_suffices`.
    """
    dtype = torch.float32 if single else torch.float64
    return tensor.detach().to(dtype, memory_format=torch.contiguous_format).contiguous()


def unfold(tensor: Tensor, rows: Sequence[int]) -> Float[Tensor, "m n"]:
    """Return the matrix with the modes ``rows``, in that order, as its rows and the others as its columns."""
    columns = [mode for mode in range(tensor.ndim) if mode not in rows]
    height = math.prod(tensor.shape[mode] for mode in rows)
    return tensor.permute(*rows, *columns).reshape(height, -1)


def svd(
    matrix: Float[Tensor, "m n"],
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Return ``u, s, svh``: left singular vectors, singular values, and ``diag(s) @ vh``, with k = min(m, n).

    The eigenvectors of the Gram matrix of the short side are several times cheaper than a full SVD, but
    they lose singular values below about ``sqrt(GRAM_FLOOR)`` of the largest. Where there are such values
    the triangular factor of a QR decomposition is decomposed instead.
    ``u @ svh`` equals ``matrix`` to machine precision, and ``u`` has orthonormal columns, on both ways. (That
    is why a tall matrix is first reduced to its triangular factor: left vectors that are got by dividing by
    small singular values are not orthogonal.)
    """
    m, n = matrix.shape
    if m > n:
        q, r = torch.linalg.qr(matrix)
        u, s, svh = _svd_wide(r)
        return q @ u, s, svh
    return _svd_wide(matrix)


def _svd_wide(matrix: Float[Tensor, "m n"]) -> tuple[Tensor, Tensor, Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    eigenvalues, u = eigenvalues.flip(0), vectors.flip(1)
    if bool(eigenvalues[-1] <= GRAM_FLOOR * eigenvalues[0]):
        q, r = torch.linalg.qr(matrix.mT)
        u, s, vh = torch.linalg.svd(r.mT, full_matrices=False)
        return u, s, s[:, None] * (vh @ q.mT)
    return u, eigenvalues.sqrt(), u.mT @ matrix


def single_suffices(kernel: Tensor) -> bool:
    """Say whether what to keep of ``kernel`` may be looked for in float32: it has no more digits itself.

    Not on other devices than a CPU, nor where torch is allowed to round float32 products (TF32, bfloat16),
    nor where squares of the entries could leave float32's range.
    """
    if kernel.dtype == torch.float64 or kernel.device.type != "cpu":
        return False
    peak = float(torch.linalg.vector_norm(kernel.detach().float(), math.inf))
    return torch.get_float32_matmul_precision() == "highest" and SINGLE_PEAKS[0] < peak < SINGLE_PEAKS[1]


def leading(
    matrix: Float[Tensor, "m n"], rank: int, *, single: bool = False
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"], float]:
    """Return ``u, rest, discarded``: the matrix truncated to ``rank`` is ``u @ rest``.

    ``rest`` is ``u.T @ matrix``, ``u`` has orthonormal columns, and ``discarded`` is the squared error.
    All are in float64. With ``single`` they are looked for in float32, where :func:`single_suffices`: as a
    discarded weight is stationary at the best ``u``, it grows by about a millionth. Where so little is
    discarded that this counts, it is float64.
    """
    short = min(matrix.shape)
    if rank >= short:  # nothing is discarded, and any basis will do
        matrix = matrix.double()
        if len(matrix) == short:
            return torch.eye(short, dtype=matrix.dtype, device=matrix.device), matrix, 0.0
        q, r = torch.linalg.qr(matrix)
        return q, r, 0.0
    if single and short >= SINGLE_SIDE:
        total = squared_norm(matrix)
        u = orthonormalised(leading_vectors(matrix.float(), rank).double())
        rest = projected(u, matrix)
        discarded = total - squared_norm(rest)
        if discarded > SINGLE_FLOOR * total:
            return u, rest, discarded
    u, s, svh = svd(matrix.double())
    return u[:, :rank], svh[:rank], float(tail_energies(s)[rank])


def leading_vectors(matrix: Float[Tensor, "m n"], rank: int) -> Float[Tensor, "m r"]:
    """Return the leading left singular vectors to the precision of the matrix's dtype: float32 is quick."""
    if matrix.dtype == torch.float64:
        return svd(matrix)[0][:, :rank]
    m, n = matrix.shape
    gram = product(matrix, matrix.mT) if m <= n else product(matrix.mT, matrix)
    if m <= n:
        del matrix  # its memory is wanted for what follows
        return _eigenvectors(gram)[:, -rank:].flip(1)
    return torch.linalg.qr(product(matrix, _eigenvectors(gram)[:, -rank:].flip(1))).Q


def followed_vectors(matrix: Float[Tensor, "m n"], basis: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    """Return a basis, orthonormal, that is nearer to the leading left singular vectors than ``basis``.

    In float32 it takes a Chebyshev polynomial of the Gram matrix (Zhou, Saad, Tiago, Chelikowsky 2006), which
    lifts all above the least Ritz value over what lies below, in less time than eigenvectors. Where it would
    lift the largest so far that float32 loses the others, of few rows, and in float64, it is eigenvectors.
    """
    m, n = matrix.shape
    rank = basis.shape[1]
    if matrix.dtype == torch.float64 or m > n or m < SINGLE_SIDE:
        return leading_vectors(matrix, rank)
    gram = product(matrix, matrix.mT)
    image = product(gram, basis)
    ritz = torch.linalg.eigvalsh(product(basis.mT, image))
    least, most = float(ritz[0]), float(ritz[-1])
    if not 0 < 2 * most - least <= least * GROWTH ** (1 / DEGREE):
        return _eigenvectors(gram)[:, -rank:].flip(1)
    before, lifted = basis, (2 / least) * image - basis
    for _ in range(DEGREE - 1):
        before, lifted = lifted, (4 / least) * product(gram, lifted) - 2 * lifted - before
    return torch.linalg.qr(lifted).Q


def _eigenvectors(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the eigenvectors of a Gram matrix, of ascending values, on a CPU in the memory of the matrix."""
    if gram.device.type != "cpu":
        return torch.linalg.eigh(gram)[1]
    over = gram.mT  # LAPACK's order of columns; the matrix is symmetric
    return torch.linalg.eigh(over, out=(gram.new_empty(len(gram)), over))[1]


def squared_norm(tensor: Tensor) -> float:
    """Return the sum of the squares of all entries, added up in float64, without a copy of them."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def orthonormalised(basis: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    """Return the nearest matrix with orthonormal columns to one whose columns nearly are.

    Each step of Newton and Schulz squares how far off they are.
    """
    eye = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    for _ in range(2):
        basis = basis @ (1.5 * eye - 0.5 * (basis.mT @ basis))
    return basis


def projected(basis: Float[Tensor, "m r"], matrix: Float[Tensor, "m n"]) -> Float[Tensor, "r n"]:
    """Return ``basis.T @ matrix`` in the basis's dtype, without a copy of the whole matrix in it."""
    if matrix.dtype == basis.dtype:
        return product(basis.mT, matrix)
    made = basis.new_empty(basis.shape[1], matrix.shape[1])
    for piece, part in zip(made.split(COLUMNS, 1), matrix.split(COLUMNS, 1), strict=True):
        torch.mm(basis.mT, part.to(basis.dtype), out=piece)
    return made


def singular_values(matrix: Float[Tensor, "m n"]) -> Float[Tensor, " k"]:
    """Return the singular values of ``matrix``, largest first, in its own dtype.

    A matrix without values, on the meta device, counts as having equal ones, and norm 1.
    """
    if matrix.is_meta:
        k = min(matrix.shape)
        return torch.full((k,), k**-0.5, dtype=matrix.dtype, device="cpu")
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    eigenvalues = torch.linalg.eigvalsh(short @ short.mT).flip(0)
    if bool(eigenvalues[-1] <= GRAM_FLOOR * eigenvalues[0]):
        return torch.linalg.svdvals(torch.linalg.qr(short.mT, mode="r").R)
    return eigenvalues.sqrt()


def joint_singular_values(
    matrices: Float[Tensor, "groups m n"], *, exact: bool | None = None
) -> Float[Tensor, " k"]:
    """Return the joint singular values of a stack of matrices, largest first, in float64 on their device.

    Value number k is the root of the sum of the squares of the k-th values of all, so that tails are those of
    all matrices truncated to one rank. Where it is to be ``exact`` matrices are decomposed by
    :func:`singular_values`. Else the eigenvalues of the Gram matrix of the short side are taken as they are,
    and values are right to ``JOINT_PRECISION`` of the norm: the default for less than float64, whose entries
    are rounded at 6e-8. Products are made in float64, out of the reach of TF32. No scale is too large or
    too small.
    """
    work = working_copy(matrices)
    peak = work.abs().amax() if matrices.dtype == torch.float64 else work.new_ones(())
    if not bool(peak > 0):
        return work.new_zeros(min(matrices.shape[1:]))
    if matrices.dtype == torch.float64:  # squares of other numbers are no trouble
        work = work / peak
    if 1 in matrices.shape[1:]:
        return peak * torch.linalg.vector_norm(work).reshape(1)
    if matrices.dtype == torch.float64 if exact is None else exact:
        squares = torch.stack([singular_values(matrix).square() for matrix in work])
    else:
        short = work if matrices.shape[1] <= matrices.shape[2] else work.mT
        squares = torch.linalg.eigvalsh(short @ short.mT).flip(1).clamp_min(0.0)
    return peak * squares.sum(0).sqrt()


def truncated_svd(
    matrix: Float[Tensor, "m n"], rank: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Return ``u, s, svh`` of the best rank-``rank`` approximation ``u @ svh`` (Eckart-Young).

    >>> matrix = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    >>> u, s, svh = truncated_svd(matrix, 2)          # this matrix has rank 2
    >>> torch.allclose(u @ svh, matrix)
    True
    """
    full = min(matrix.shape)
    if not 1 <= rank <= full:
        raise ValueError(f"rank must be in [1, {full}] for a {tuple(matrix.shape)} matrix, got {rank}")
    u, s, svh = svd(matrix)
    return u[:, :rank], s[:rank], svh[:rank]


def tail_energies(s: Float[Tensor, " k"]) -> Float[Tensor, " k+1"]:
    """Return t with t[r] = sum of s[r:]**2: the squared error of a truncation to rank r, for r = 0..k."""
    tails = s.square().flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


def bond_scale(s: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Return sqrt(s), with entries held above 1% of the largest: a gauge that splits a bond evenly.

    One side of a bond is multiplied by it, the other divided. The floor keeps the division harmless where
    a kernel has a lower rank than the bond.
    """
    top = s.max()
    if not bool(top > 0):
        return torch.ones_like(s)
    return torch.maximum(s, 1e-4 * top).sqrt()
