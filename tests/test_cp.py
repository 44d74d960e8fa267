"""What a CP fit promises for any kernel: finite, honest, no worse than nothing, of small terms."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tncompress.formats import CP, als, cp

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
every_cp = pytest.mark.parametrize("format", [CP(), CP(merged=True)], ids=str)
any_kernel = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def unit(generator, size):
    return torch.nn.functional.normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=-1)


def border(shape=(6, 5, 3, 3), seed=0, legs=3):
    """The tensor a⊗a⊗b + a⊗b⊗a + b⊗a⊗a on ``legs`` legs, times a: rank 3, yet a limit of rank 2."""
    generator = torch.Generator().manual_seed(seed)
    a, b = ([unit(generator, size) for size in shape] for _ in range(2))
    letters = "abcde"[: len(shape)]
    return sum(
        torch.einsum(
            f"{','.join(letters)}->{letters}", *(b[j] if i == j else a[j] for j in range(len(shape)))
        )
        for i in range(legs)
    )


def cancelling(eps, shape=(6, 5, 3, 3), rank=2, seed=0):
    """Matrices of terms that nearly cancel: each is far larger than their sum, of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    first = [torch.randn(rank, n, generator=generator, dtype=torch.float64) for n in shape]
    second = [m + eps * torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in first]
    second[0] = -second[0]
    both = [torch.cat(pair)[None, None] for pair in zip(first, second, strict=True)]
    scale = dense(both).norm() ** (1 / len(shape))
    return [matrix / scale for matrix in both]


def dense(matrices):
    """The tensor of one item, by the plain sum over its terms."""
    *_, rank, _ = matrices[0].shape
    letters = "abcde"[: len(matrices)]
    parts = (
        torch.einsum(f"{','.join(letters)}->{letters}", *(m[0, 0, r].double() for m in matrices))
        for r in range(rank)
    )
    return sum(parts)


def scaled(factors, kernel):
    """The factors and the kernel in float64, over the largest entry: their squares exist."""
    peak = float(kernel.double().abs().max()) or 1.0
    return [factor.double() / peak ** (1 / len(factors)) for factor in factors], kernel.double() / peak


def error_of(format, factors, kernel):
    factors, kernel = scaled(factors, kernel)
    rest = float((format.to_dense(factors, tuple(kernel.shape)) - kernel).norm())
    return rest / float(kernel.norm()) if rest else 0.0


def largest_term(format, factors, kernel):
    """The norm of the largest term over the norm of the kernel."""
    factors, kernel = scaled(factors, kernel)
    norms = 1.0
    for legs, factor in zip(format.network(tuple(kernel.shape)), factors, strict=True):
        norms = norms * factor.movedim(legs.index("r0"), 0).flatten(1).norm(dim=1)
    return float(norms.max()) / float(kernel.norm()) if float(norms.max()) else 0.0


def check_laws(format, kernel, rank):
    fit = format.fit(kernel, (rank,))
    assert all(bool(factor.isfinite().all()) for factor in fit.factors)
    assert fit.rel_error == pytest.approx(error_of(format, fit.factors, kernel), rel=1e-6, abs=1e-12)
    assert fit.rel_error <= 1 + 1e-12
    assert largest_term(format, fit.factors, kernel) <= 10
    return fit


def normal(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# --- any kernel ---------------------------------------------------------------------------------------------


@st.composite
def patterned(draw):
    """A kernel of few or many sizes, zeros and magnitudes, with a rank that it can be given."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5).map(tuple))
    kernel = normal(shape, seed=draw(st.integers(0, 99)))
    for mode, size in enumerate(shape):
        falls = draw(st.sampled_from([0, 0, 0, -1, -40, 20]))
        slope = torch.logspace(0, falls * (size > 1), size, dtype=torch.float64)
        kernel = kernel * slope.reshape([-1 if axis == mode else 1 for axis in range(len(shape))])
    kind = draw(st.sampled_from(["as is", "sparse", "signs", "repeated"]))
    if kind == "sparse":
        kernel = kernel * (normal(shape, seed=1) > 0.7)
    elif kind == "signs":
        kernel = kernel.sign()
    elif kind == "repeated":
        kernel = kernel[:1].expand(shape).clone()
    dtype = draw(st.sampled_from(FLOATS))
    low, high = math.log10(torch.finfo(dtype).tiny) - 2, math.log10(torch.finfo(dtype).max) - 0.01
    peak = float(kernel.abs().max()) or 1.0
    kernel = (kernel / peak * 10 ** draw(st.sampled_from([0.0, low, high]))).to(dtype)
    return kernel, draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])), CP(merged=draw(st.booleans()))


@any_kernel
@given(case=patterned())
@pytest.mark.usefixtures("quick_cp")
def test_a_fit_is_finite_honest_and_small_whatever_the_pattern(case):
    kernel, fraction, format = case
    (top,) = format.max_ranks(tuple(kernel.shape))
    fit = check_laws(format, kernel, max(1, round(fraction * top)))
    if fraction == 1 and kernel.dtype in (torch.float32, torch.float64):
        assert fit.rel_error <= 16 * torch.finfo(kernel.dtype).eps


@any_kernel
@given(
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=24, max_size=24),
    rank=st.integers(1, 6),
)
@pytest.mark.usefixtures("quick_cp")
def test_a_fit_is_finite_honest_and_small_whatever_the_numbers(numbers, rank):
    check_laws(CP(), torch.tensor(numbers, dtype=torch.float64).reshape(2, 3, 2, 2), rank)


def odd_kernels():
    shape = (6, 5, 3, 3)
    kernel = normal(shape)
    single, holes, tiny = torch.zeros_like(kernel), kernel.clone(), kernel.clone()
    single[2, 3, 1, 0] = -3
    holes[2] = holes[:, 1] = holes[:, :, 0] = 0
    tiny[0] = 5e-324
    return {
        "constant": torch.ones(shape),
        "zero": torch.zeros(shape),
        "one entry": single,
        "zero slices": holes,
        "subnormal slice": tiny,
        "all subnormal": torch.full(shape, 5e-324, dtype=torch.float64),
        "subnormal float32": torch.full(shape, 1e-45),
        "largest float64": torch.full(shape, 1.7e308, dtype=torch.float64),
        "largest float32": torch.full(shape, 3e38),
        "largest float16": torch.full(shape, 65504.0, dtype=torch.float16),
        "many magnitudes": kernel * torch.logspace(0, -300, 6, dtype=torch.float64)[:, None, None, None],
        "border": border(),
        "cancelling": dense(cancelling(1e-3)),
        "one in, one wide": normal((4, 1, 1, 3)),
        "a number": normal((1, 1, 1, 1)),
        "a matrix": border((5, 4), legs=2),
    } | {
        f"{scale} {dtype}": (scale * kernel).to(dtype)
        for dtype, scales in {torch.float32: (1e-20, 1e20), torch.float64: (1e-150, 1e150)}.items()
        for scale in scales
    }


@every_cp
@pytest.mark.parametrize("name", odd_kernels())
@pytest.mark.usefixtures("quick_cp")
def test_odd_kernels_are_fitted_by_the_same_laws(format, name):
    kernel = odd_kernels()[name]
    (top,) = format.max_ranks(tuple(kernel.shape))
    for rank in sorted({1, 1 + top // 4, top}):
        fit = check_laws(format, kernel, rank)
        if name in ("constant", "zero", "one entry") or name.startswith(("largest", "all sub")):
            rounding = 8 * torch.finfo(kernel.dtype).eps  # these have rank 1
            assert fit.rel_error <= rounding
    exact = 16 * torch.finfo(kernel.dtype).eps
    assert fit.rel_error <= exact


# --- terms that grow against each other ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 3, 3), (4, 4, 2, 2, 2)], ids=str)
@every_dtype
def test_a_tensor_without_a_best_fit_gets_a_good_one_of_small_terms(shape, dtype):
    """Two terms come as near as one likes to a tensor of border rank two, and grow without bound."""
    for seed in range(2):
        kernel = border(shape, seed).to(dtype)
        fit = check_laws(CP(), kernel, 2)
        assert fit.rel_error <= 0.01 + 4 * torch.finfo(dtype).eps


def test_nothing_but_the_last_correction_need_keep_terms_small(monkeypatch):
    """Without penalties on the way the terms do grow, and the bound holds all the same."""
    monkeypatch.setattr(als, "LOOSE", (1e-9, 0.0))
    monkeypatch.setattr(als, "STIFF", (1e-9, 0.0))
    monkeypatch.setattr(als, "TOLERANCE", 0.0)
    monkeypatch.setattr(cp, "SWEEPS", 2000)
    seen = []
    tame = als.tame

    def watched(work, matrices, error, limit):
        seen.append(float(als.term_norms(matrices).max()))
        return tame(work, matrices, error, limit)

    monkeypatch.setattr(als, "tame", watched)
    fit = check_laws(CP(), border((6, 6, 3)), 2)
    assert max(seen) > 10
    assert fit.rel_error < 0.01


@pytest.mark.parametrize("eps", [0.01, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("sweeps", [1, 60])
def test_terms_too_large_are_cut_down_and_the_error_is_the_true_one(eps, sweeps):
    matrices = cancelling(eps)
    work = dense(matrices)[None]
    assert float(als.term_norms(matrices).max()) > 10
    tamed, error = als.tame(work, matrices, torch.zeros(1, 1, dtype=torch.float64), sweeps)
    assert float(als.term_norms(tamed).max()) <= als.LARGEST_TERM
    assert float(error) == pytest.approx(float((dense(tamed) - work[0]).norm()), abs=2e-6)
    assert float(error) < 1


def test_a_correction_lowers_the_energy_of_the_terms_and_keeps_the_error():
    kernel = border()
    work = (kernel / kernel.norm())[None]
    start = als.slice_start(work, 2)[0]
    matrices, error = als.descend(work, start, 60, (1e-2, 0.0))
    before = als.term_norms(matrices)
    assert 1 < float(before.max()) <= als.LARGEST_TERM
    tamed, after = als.tame(work, matrices, error, 60)
    assert float((dense(tamed) - work[0]).norm()) <= 1.01 * float(error) * (1 + 1e-6)
    assert float(after) <= 1.01 * float(error) * (1 + 1e-6)
    assert float(als.term_norms(tamed).square().sum()) < 0.995 * float(before.square().sum())


def test_a_correction_leaves_small_terms_as_they_are():
    """In a stack, too: only the tensor with a large term is touched."""
    small = normal((6, 5, 3, 3))
    work = torch.stack([small / small.norm(), border() / border().norm()])
    matrices, error = als.descend(work, als.slice_start(work, 2)[0], 60, (1e-2, 0.0))
    norms = als.term_norms(matrices).amax((1, 2))
    assert norms[0] <= 1 < norms[1]
    tamed, after = als.tame(work, matrices, error, 60)
    assert all(torch.equal(new[0], old[0]) for new, old in zip(tamed, matrices, strict=True))
    assert not any(torch.equal(new[1], old[1]) for new, old in zip(tamed, matrices, strict=True))
    assert after[0] == error[0]


def test_a_fit_that_went_wrong_gives_way_to_its_start(monkeypatch):
    """Slices alone are a fit with terms no larger than the kernel: nothing worse is returned."""
    kernel = normal((6, 5, 3, 3))
    work = kernel.permute(0, 1, 2, 3)[None] / kernel.norm()
    _, left_out = als.slice_start(work, 7)
    for wrong in (math.nan, 1e3, 0.0):
        monkeypatch.setattr(als, "solve", lambda g, t, previous, *p, by=wrong: by * previous)
        assert check_laws(CP(), kernel, 7).rel_error == pytest.approx(float(left_out), rel=1e-9)


# --- least squares ------------------------------------------------------------------------------------------


def test_a_penalty_on_the_terms_multiplies_the_diagonal_of_the_gram_matrix():
    """Against the slow way: one row for every entry of the tensor and of every term."""
    rank, mu = 4, 0.3
    a, b, c = (normal((rank, n), seed=n) for n in (5, 6, 3))
    tensor = normal((5, 6, 3), seed=9)
    outer = torch.einsum("rb,rc->rbc", b, c).flatten(1)
    terms = torch.block_diag(*(math.sqrt(mu) * row[:, None] for row in outer))
    rows = torch.cat([outer.mT, terms])
    right = torch.cat([tensor.flatten(1).mT, torch.zeros(len(terms), 5, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, right).solution
    one = torch.ones(1, 1, dtype=torch.float64)
    found = als.solve(
        (outer @ outer.mT)[None, None],
        (outer @ tensor.flatten(1).mT)[None, None],
        a[None, None],
        0 * one,
        mu * one,
    )
    assert_close(found[0, 0], wanted, rtol=1e-9, atol=1e-11)


def test_a_system_that_cannot_be_solved_leaves_the_matrix_as_it_was():
    previous, target = normal((3, 1, 4, 5)), normal((3, 1, 4, 5), seed=1)
    gram = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1, 1)
    gram[0, 0, 1, 1], gram[1, 0, 2, 3] = -1, math.inf
    gram[1, 0, 3, 2] = math.inf
    none = torch.zeros(3, 1, dtype=torch.float64)
    solved = als.solve(gram, target, previous, none, none)
    assert torch.equal(solved[:2], previous[:2])
    assert_close(solved[2], target[2])


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 2), (4, 4, 2, 2, 2), (7, 2, 2)], ids=str)
def test_the_start_is_made_of_orthogonal_terms_and_knows_its_error(shape):
    work = normal((3, *shape))
    work = work / work.flatten(1).norm(dim=1).reshape(3, *[1] * len(shape))
    full = math.prod(shape[1:])
    before = None
    for rank in sorted({1, 2, full // 2, full - 1, full}):
        matrices, error = als.slice_start(work, rank)
        assert float(als.term_norms(matrices).max()) <= 1 + 1e-12
        for g in range(3):
            rest = float((dense([m[g : g + 1] for m in matrices]) - work[g]).norm())
            assert float(error[g]) == pytest.approx(rest, abs=1e-12)
        assert bool((error.square() <= 1 - rank / full + 1e-12).all())  # the strongest are kept
        assert before is None or bool((error <= before).all())
        before = error
    assert float(error.max()) < 1e-12


def test_estimates_at_several_ranks_are_those_at_each():
    kernels = torch.stack([normal((12, 10, 3, 3)), border().new_ones(12, 10, 3, 3)]).float()
    several = [(2,), (9,), (30,)]
    assert CP().estimates(kernels, several) == [CP().estimate(kernels, ranks) for ranks in several]
    assert CP().estimates(kernels, []) == []


def test_systems_under_a_strong_pull_are_solved_in_their_own_precision_and_well():
    gram = normal((1, 1, 20, 40)).float()
    gram = gram @ gram.mT
    target, previous = normal((1, 1, 20, 7), seed=1).float(), normal((1, 1, 20, 7), seed=2).float()
    pull, none = torch.full((1, 1), als.STEADY_ENOUGH, dtype=torch.float64), torch.zeros(1, 1)
    found = als.solve(gram, target, previous, pull, none)
    wanted = als.solve(gram.double(), target.double(), previous.double(), pull, none)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).norm() <= 1e-4 * wanted.norm()
    weak = als.solve(gram, target, previous, pull / 2, none)
    exact = als.solve(gram.double(), target.double(), previous.double(), pull / 2, none)
    assert torch.equal(weak, exact.float())


@pytest.mark.parametrize("kind", ["normal", "border", "cancelling"])
def test_the_error_does_not_rise_with_the_rank(kind):
    kernel = {"normal": normal((6, 5, 3, 3)), "border": border(), "cancelling": dense(cancelling(1e-3))}[kind]
    errors = [CP().fit(kernel, (rank,)).rel_error for rank in (1, 2, 3, 5, 8, 16, 30, 45)]
    assert errors[-1] < 1e-12
    for worse, better in pairwise(errors):
        assert better <= 1.02 * worse + 1e-4


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_kernel_of_known_factors_is_recovered(rank, dtype):
    kernels = torch.stack(
        [
            dense([normal((1, 1, rank, n), seed=10 * seed + i) for i, n in enumerate((8, 7, 3, 3))])
            for seed in range(4)
        ]
    ).to(dtype)
    assert CP().fit_groups(kernels, (rank,)).rel_error < 1e-4


@pytest.mark.parametrize(("sweeps", "restarts"), [(1, 0), (1, 1), (20, 0)])
def test_the_laws_hold_however_few_sweeps_and_starts_there_are(sweeps, restarts, monkeypatch):
    monkeypatch.setattr(cp, "SWEEPS", sweeps)
    monkeypatch.setattr(cp, "RESTARTS", restarts)
    for kernel in (normal((6, 5, 3, 3)), border()):
        check_laws(CP(), kernel, 4)


# --- half precision -----------------------------------------------------------------------------------------


@every_cp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peak", [6e4, 1.0, 1e-4])
@pytest.mark.usefixtures("quick_cp")
def test_terms_are_shared_so_evenly_that_no_factor_over_or_underflows(format, dtype, peak):
    kernel = normal((16, 12, 3, 3))
    kernel = (peak * kernel / kernel.abs().max()).to(dtype)
    fit, wanted = check_laws(format, kernel, 12), format.fit(kernel.double(), (12,))
    assert fit.rel_error == pytest.approx(wanted.rel_error, abs=0.01)
    norms = [
        factor.double().movedim(legs.index("r0"), 0).flatten(1).norm(dim=1)
        for legs, factor in zip(format.network(kernel.shape), fit.factors, strict=True)
    ]
    for norm in norms[1:]:
        assert_close(norm, norms[0], rtol=8 * torch.finfo(dtype).eps, atol=0)


# --- stacks -------------------------------------------------------------------------------------------------


def stack(shape=(6, 5, 3, 3), dtype=torch.float64):
    """Kernels as different as can be: some converge at once, some never, one is zero."""
    generator = torch.Generator().manual_seed(3)
    vectors = [unit(generator, size) for size in shape]
    letters = "abcde"[: len(shape)]
    one = torch.einsum(f"{','.join(letters)}->{letters}", *vectors)
    kernels = [normal(shape), border(shape, legs=len(shape)), one, 0 * one, normal(shape, seed=1), one + 1]
    scales = (1, 1e3, 1e-8, 1, 1e-3, 1e4)
    return torch.stack([scale * kernel for scale, kernel in zip(scales, kernels, strict=True)]).to(dtype)


@every_cp
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (6, 5, 3, 3), (5, 6, 1, 3), (4, 3, 2, 2, 2)], ids=str)
def test_a_kernel_is_fitted_in_a_stack_as_it_is_alone(format, shape):
    kernels = stack(shape)
    together = format.fit_groups(kernels, (3,))
    sizes = format.factor_shapes(shape, (3,))
    assert [tuple(factor.shape) for factor in together.factors] == [(6, *size) for size in sizes]
    assert all(factor.is_contiguous() for factor in together.factors)
    for i, kernel in enumerate(kernels):
        factors = [factor[i] for factor in together.factors]
        alone = format.fit(kernel, (3,)).rel_error
        assert error_of(format, factors, kernel) == pytest.approx(alone, rel=1e-6, abs=1e-9)
        assert largest_term(format, factors, kernel) <= 10


def test_the_same_stack_gives_the_same_factors_bit_for_bit():
    kernels = stack(dtype=torch.float32)
    first, second = (CP().fit_groups(kernels.clone(), (4,)) for _ in range(2))
    assert first.rel_error == second.rel_error
    assert all(torch.equal(a, b) for a, b in zip(first.factors, second.factors, strict=True))


def test_the_error_of_a_stack_is_that_of_all_kernels_together():
    for scale in (1e-200, 1.0, 1e200):
        kernels = scale * stack()
        fit = CP().fit_groups(kernels, (3,))
        rest, total = 0.0, 0.0
        for i, kernel in enumerate(kernels):
            norm = float((kernel / scale).norm())
            rest += (norm * error_of(CP(), [factor[i] for factor in fit.factors], kernel)) ** 2
            total += norm**2
        assert fit.rel_error == pytest.approx(math.sqrt(rest / total), rel=1e-6)
    assert CP().fit_groups(0 * kernels, (3,)).rel_error == 0


@pytest.mark.usefixtures("quick_cp")
def test_the_ranks_of_a_stack_are_checked_against_its_kernels():
    with pytest.raises(
        ValueError, match=r"on a kernel \(6, 5, 3, 3\) takes 1 rank\(s\) of at most \(45,\), got \(46,\)"
    ):
        CP().fit_groups(stack(), (46,))
    with pytest.raises(ValueError, match="ranks start at 1"):
        CP().fit_groups(stack(), (0,))


def test_cutting_a_stack_into_chunks_changes_nothing(monkeypatch):
    kernels = stack()
    whole = CP().fit_groups(kernels, (3,))
    seen = []
    fit = cp.cp_als

    def counted(work, *rest, **more):
        seen.append(len(work))
        return fit(work, *rest, **more)

    monkeypatch.setattr(cp, "cp_als", counted)
    monkeypatch.setattr(cp, "CHUNK", 4 * (270 + 3 * 5 * 3 * 45))
    chunked = CP().fit_groups(kernels, (3,))
    assert seen == [4, 2]
    assert chunked.rel_error == pytest.approx(whole.rel_error, rel=1e-6)
    for i, kernel in enumerate(kernels):
        errors = [error_of(CP(), [f[i] for f in fit.factors], kernel) for fit in (whole, chunked)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-6, abs=1e-9)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.entries = max(self.entries, size)
        return out


@pytest.mark.parametrize(
    ("shape", "rank"), [((64, 8, 8, 3, 3), 5), ((24, 48, 48, 3, 3), 60), ((1, 160, 128, 3, 3), 40)], ids=str
)
def test_no_tensor_in_work_is_larger_than_the_kernels_or_a_chunk(shape, rank, monkeypatch):
    monkeypatch.setattr(cp, "SWEEPS", 4)
    monkeypatch.setattr(cp, "FEWEST_SWEEPS", 4)
    kernels = normal(shape, torch.float32)
    with LargestTensor() as largest:
        CP().fit_groups(kernels, (rank,))
    assert largest.entries <= max(math.prod(shape), cp.CHUNK)


def test_a_stack_costs_hardly_more_sweeps_than_its_slowest_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(
        als, "sweep", lambda *args, sweep=als.sweep: calls.append(len(args[0])) or sweep(*args)
    )
    counts = []
    for part in (stack(), *stack().split(1)):
        calls.clear()
        CP().fit_groups(part, (3,))
        counts.append(len(calls))
    together, *alone = counts
    assert max(alone) <= together <= 1.2 * max(alone) < sum(alone)
