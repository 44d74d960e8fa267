import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.testing import assert_close

from tncompress import linalg
from tncompress.linalg import (
    bond_scale,
    followed_vectors,
    leading,
    orthonormalised,
    projected,
    singular_values,
    squared_norm,
    svd,
    tail_energies,
    truncated_svd,
    unfold,
    working_copy,
)

SHAPES = [(7, 7), (6, 20), (20, 6), (1, 9), (9, 1), (1, 1)]
SPECTRA = {
    "flat": lambda k: torch.ones(k),
    "slow": lambda k: 1 / torch.arange(1, k + 1),
    "steep": lambda k: torch.logspace(0, -4, k),
    "at-the-floor": lambda k: torch.logspace(0, -4.95, k),
    "below-the-floor": lambda k: torch.logspace(0, -8, k),
    "rank-2": lambda k: (torch.arange(k) < 2).double() * 3,
    "degenerate": lambda k: torch.cat([torch.ones(k - k // 2), torch.full((k // 2,), 1e-3)]),
    "zero": lambda k: torch.zeros(k),
    "tiny": lambda k: 1e-30 / torch.arange(1, k + 1),
    "huge": lambda k: 1e30 / torch.arange(1, k + 1),
}


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def with_spectrum(shape, make):
    """A random matrix with the singular values of ``make``, and those."""
    s = make(min(shape)).double()
    return orthonormal(shape[0], len(s)) * s @ orthonormal(shape[1], len(s)).mT, s


every_spectrum = pytest.mark.parametrize("make", SPECTRA.values(), ids=SPECTRA.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


# --- unfold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(0,), (2,), (0, 3), (3, 0), (1, 2, 3), (2, 0, 1)], ids=str)
def test_unfold_puts_every_entry_where_its_indices_say(rows):
    tensor = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).double()
    matrix = unfold(tensor, rows)
    columns = [mode for mode in range(4) if mode not in rows]

    def place(index, modes):
        position = 0
        for mode in modes:
            position = position * tensor.shape[mode] + index[mode]
        return position

    for index in torch.cartesian_prod(*map(torch.arange, tensor.shape)).tolist():
        assert matrix[place(index, rows), place(index, columns)] == tensor[tuple(index)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_working_copy_is_detached_and_in_float64(dtype):
    tensor = torch.randn(3, 4).to(dtype).requires_grad_()
    copy = working_copy(tensor)
    assert copy.dtype == torch.float64
    assert not copy.requires_grad
    assert_close(copy, tensor.detach().double(), rtol=0, atol=0)


# --- svd ----------------------------------------------------------------------------------------------------


@every_shape
@every_spectrum
def test_svd_is_one(shape, make):
    matrix, wanted = with_spectrum(shape, make)
    before = matrix.clone()
    u, s, svh = svd(matrix)
    k, size = min(shape), float(wanted.max())
    assert (u.shape, s.shape, svh.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert_close(u @ svh, matrix, rtol=0, atol=1e-14 * k * size)
    assert_close(u.mT @ u, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-13)
    assert_close(s, wanted.sort(descending=True).values, rtol=1e-6, atol=1e-13 * size)
    assert_close(svh @ svh.mT, torch.diag(s.square()), rtol=0, atol=1e-12 * size**2)
    assert_close(matrix, before, rtol=0, atol=0)


@every_shape
@every_spectrum
def test_singular_values_are_those_of_the_slow_way(shape, make):
    matrix, wanted = with_spectrum(shape, make)
    s = singular_values(matrix)
    assert_close(s, wanted.sort(descending=True).values, rtol=1e-6, atol=1e-13 * float(wanted.max()))
    assert bool((s[:-1] >= s[1:]).all())


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=str)
def test_the_gram_matrix_is_left_exactly_where_it_is_no_longer_trusted(shape, monkeypatch):
    calls = []
    svds, eighs = torch.linalg.svd, torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append("svd") or svds(*a, **k))
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a, **k: calls.append("eigh") or eighs(*a, **k))
    trusted = 0.5 * math.log10(linalg.GRAM_FLOOR)
    for decades, ways in ((trusted + 0.3, ["eigh"]), (trusted - 0.3, ["eigh", "svd"])):
        calls.clear()
        matrix, s = with_spectrum(shape, lambda k, d=decades: torch.logspace(0, d, k))
        assert_close(svd(matrix)[1], s, rtol=1e-5, atol=0)
        assert calls == ways


@every_shape
@every_spectrum
def test_the_discarded_weight_is_the_squared_error(shape, make):
    matrix, wanted = with_spectrum(shape, make)
    tails = tail_energies(singular_values(matrix))
    scale = float(wanted.square().sum()) or 1.0
    for rank in range(1, min(shape) + 1):
        u, s, svh = truncated_svd(matrix, rank)
        assert (u.shape[1], len(s), len(svh)) == (rank, rank, rank)
        error = (matrix - u @ svh).norm()
        assert_close(error, tails[rank].sqrt(), rtol=1e-6, atol=1e-13 * math.sqrt(scale))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_other_matrix_of_the_rank_is_nearer(shape, rank):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, svh = truncated_svd(matrix, rank)
    best = (matrix - u @ svh).norm()
    for _ in range(50):
        basis = orthonormal(shape[0], rank)
        assert (matrix - basis @ (basis.mT @ matrix)).norm() > best
        nudged = u + 0.01 * torch.randn_like(u)
        near = nudged @ torch.linalg.lstsq(nudged, matrix).solution
        assert (matrix - near).norm() >= best * (1 - 1e-12)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_that_a_matrix_cannot_have_is_an_error(rank):
    with pytest.raises(ValueError, match=rf"rank must be in \[1, 4\] for a \(6, 4\) matrix, got {rank}"):
        truncated_svd(torch.randn(6, 4), rank)


def test_a_tensor_that_is_no_matrix_is_refused():
    """This also shows that the signatures are enforced in these tests."""
    with pytest.raises(TypeCheckError, match="matrix"):
        svd(torch.randn(2, 3, 4))


# --- tails and gauges ---------------------------------------------------------------------------------------


def test_tail_energies_are_sums_of_what_is_cut_off():
    assert tail_energies(torch.tensor([3.0, 2.0, 1.0])).tolist() == [14, 5, 1, 0]


@pytest.mark.parametrize(
    ("s", "wanted"),
    [([4.0, 1.0], [2.0, 1.0]), ([4.0, 0.0], [2.0, 0.02]), ([0.0, 0.0], [1.0, 1.0]), ([1e-20], [1e-10])],
    ids=str,
)
def test_bond_scale_is_the_square_root_above_one_percent(s, wanted):
    assert_close(bond_scale(torch.tensor(s)), torch.tensor(wanted))


# --- leading ------------------------------------------------------------------------------------------------

LARGE = [(60, 60), (50, 200), (200, 50)]
DECAYS = {
    "flat": lambda k: torch.ones(k),
    "slow": lambda k: 1 / torch.arange(1, k + 1) ** 0.5,
    "steep": lambda k: torch.logspace(0, -4, k),
    "rank-2": SPECTRA["rank-2"],
    "zero": SPECTRA["zero"],
    "tiny": lambda k: 1e-14 / torch.arange(1, k + 1),
    "huge": lambda k: 1e14 / torch.arange(1, k + 1),
}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("rank", [1, 7, 40, 50])
@pytest.mark.parametrize("make", DECAYS.values(), ids=DECAYS.keys())
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_a_truncation_found_in_float32_is_as_good_as_the_best_and_told_exactly(shape, make, rank, single):
    matrix, _ = with_spectrum(shape, make)
    matrix = matrix.float().double()
    u, rest, discarded = leading(matrix, rank, single=single)
    total, best = squared_norm(matrix), float(tail_energies(torch.linalg.svdvals(matrix))[rank])
    assert_close(u.mT @ u, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(rest, u.mT @ matrix, rtol=0, atol=1e-13 * total**0.5)
    assert abs(squared_norm(matrix - u @ rest) - discarded) <= 1e-12 * total
    assert discarded**0.5 <= (1 + 1e-5) * best**0.5 + 1e-10 * total**0.5


@pytest.mark.parametrize("width", [50, 60, 2500])
def test_a_matrix_held_in_float32_is_projected_in_float64(width):
    matrix, basis = torch.randn(60, width), orthonormal(60, 8)
    for each in (matrix, matrix.mT.contiguous().mT):
        assert_close(projected(basis, each), basis.mT @ each.double(), rtol=0, atol=1e-13)
    held, whole = (leading(each, 5, single=True) for each in (matrix, matrix.double()))
    for part, other in zip(held, whole, strict=True):
        assert_close(part, other, rtol=1e-12, atol=1e-12)


def test_float32_is_not_used_where_it_would_be_rounded(monkeypatch):
    kernel = torch.randn(6, 5, 3, 3)
    assert all(linalg.single_suffices(each) for each in (kernel, kernel.half(), 1e12 * kernel))
    unfit = kernel.double(), kernel.to("meta"), 1e20 * kernel, 1e-20 * kernel, 0 * kernel
    assert not any(linalg.single_suffices(each) for each in unfit)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert not linalg.single_suffices(kernel)


def test_float32_is_not_used_where_little_is_discarded():
    nearly, s = with_spectrum((60, 80), lambda k: torch.where(torch.arange(k) < 9, 1.0, 1e-6))
    discarded = leading(nearly, 9, single=True)[2]
    assert discarded == pytest.approx(float(s[9:].square().sum()), rel=1e-6)


def test_columns_that_nearly_are_orthonormal_become_so():
    basis = orthonormal(30, 8)
    found = orthonormalised(basis + 1e-5 * torch.randn(30, 8, dtype=torch.float64))
    assert_close(found.mT @ found, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-14)
    assert_close(found, basis, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_squared_norm_is_added_up_in_float64(dtype):
    tensor = torch.randn(3, 400).to(dtype)
    assert squared_norm(tensor.mT) == pytest.approx(float(tensor.double().square().sum()), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (64, 64)])
def test_followed_vectors_come_nearer_and_stay_orthonormal(shape, decay, dtype):
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    scale = (1 + torch.arange(m, dtype=torch.float64)) ** -decay
    matrix = scale[:, None] * torch.randn(m, n, generator=generator, dtype=torch.float64)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    rank = 12
    near = torch.linalg.qr(
        u[:, :rank] + 0.05 * torch.randn(m, rank, generator=generator, dtype=torch.float64)
    ).Q
    matrix, basis = matrix.to(dtype), near.to(dtype)

    def discarded(basis):
        kept = (basis.double().mT @ matrix.double()).square().sum()
        return float((s.square().sum() - kept) / s[rank:].square().sum())

    found = followed_vectors(matrix, basis)
    eye = torch.eye(rank, dtype=torch.float64)
    assert_close(
        found.double().mT @ found.double(), eye, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )
    assert discarded(found) - 1 <= 0.3 * (discarded(basis) - 1)
    if dtype == torch.float64:
        assert (discarded(found) - 1) * s[rank:].square().sum() <= 1e-14 * s.square().sum()


def test_followed_vectors_of_nothing_are_a_basis():
    basis = torch.eye(50)[:, :5]
    found = followed_vectors(torch.zeros(50, 80), basis)
    assert_close(found.mT @ found, torch.eye(5))
