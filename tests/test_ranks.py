"""What a policy promises holds for every format and every kind of kernel, and is not overdone."""

import math

import pytest
import torch
from conftest import choose, every_format_and_shape, every_tree_and_shape

from tncompress.cuts import effective_rank
from tncompress.formats import CP, MPS, SVD, Tucker
from tncompress.policies import EVBMF, Energy, Entropy, FixedRank, ParamsRatio, RankFraction, RelError
from tncompress.ranks import NoRanks, RankPath
from tncompress.spec import Settings
from tncompress.vbmf import evbmf_rank

ERRORS = [RelError(0.3), RelError(0.05), Energy(0.9), Energy(0.999)]
RATIOS = [ParamsRatio(0.5), ParamsRatio(0.9)]


def fading(shape, dtype=torch.float64):
    """A kernel whose spectra fall off along every leg, as those of trained kernels do."""
    kernel = torch.randn(shape, dtype=dtype)
    for mode, size in enumerate(shape):
        fall = 0.7 ** torch.arange(size, dtype=dtype)
        kernel = kernel * fall.reshape([-1 if axis == mode else 1 for axis in range(len(shape))])
    return kernel


def allowed(policy) -> float:
    return policy.error if isinstance(policy, RelError) else math.sqrt(1 - policy.kept)


def measured(format, fit, kernel) -> float:
    rebuilt = format.to_dense([factor.double() for factor in fit.factors], tuple(kernel.shape))
    return float((rebuilt - kernel).norm() / kernel.norm())


def size(fit) -> int:
    return sum(factor.numel() for factor in fit.factors)


def choose_or_refuse(kernel, settings):
    try:
        return choose(kernel, settings)
    except NoRanks as verdict:
        return verdict


def one_bond_larger(format, shape, ranks):
    """Every choice of ranks in which one bond has one more, and which the network can have."""
    for i, top in enumerate(format.max_ranks(shape)):
        raised = tuple(rank + (i == j) for j, rank in enumerate(ranks))
        if raised[i] <= top and format.feasible(shape, raised) == raised:
            yield raised


def some(policies, format):
    """CP has to be fitted to know its error: it is tried on the first policy only."""
    return policies[:1] if isinstance(format, CP) else policies


@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_an_allowed_error_is_kept(format, shape):
    kernel = fading(shape)
    for policy in some(ERRORS, format):
        ranks, fit = choose(kernel, Settings(format=format, rank=policy), allow_larger=True)
        assert [tuple(f.shape) for f in fit.factors] == list(format.factor_shapes(shape, ranks))
        assert fit.rel_error <= allowed(policy)
        assert measured(format, fit, kernel) <= allowed(policy) * (1 + 1e-9)


@every_tree_and_shape
def test_an_allowed_error_is_used_up(format, shape):
    """One bond: a rank less would not do. More: the tails of the ranks chosen are not far below."""
    kernel = fading(shape)
    for policy in ERRORS:
        ranks, _ = choose(kernel, Settings(format=format, rank=policy), allow_larger=True)
        if len(ranks) == 1 and ranks != (1,):
            assert format.fit(kernel, (ranks[0] - 1,)).rel_error > allowed(policy)
        fewer = [max(1, rank - 1) for rank in ranks]
        if fewer != list(ranks):
            tails = [s[rank:].square().sum() for s, rank in zip(format.spectra(kernel), fewer, strict=True)]
            assert math.sqrt(sum(tails)) > allowed(policy) * float(kernel.norm())


@every_tree_and_shape
def test_an_allowed_error_takes_no_more_parameters_than_its_fits_need(format, shape):
    kernel = fading(shape)
    for policy in ERRORS:
        settings = Settings(format=format, rank=policy)
        ranks, _ = choose(kernel, settings, allow_larger=True)
        most = 0.94 * format.num_params(shape, ranks)
        for path in RankPath(kernel[None], settings).with_variants():
            smaller = [path[i] for i in range(len(path)) if path.params(path[i]) < most]
            if smaller:
                assert format.fit(kernel, smaller[-1]).rel_error > allowed(policy)


@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_a_ratio_is_kept_and_no_single_bond_can_be_raised_within_it(format, shape):
    kernel = fading(shape)
    for policy in some(RATIOS, format):
        most = policy.ratio * kernel.numel()
        found = choose_or_refuse(kernel, Settings(format=format, rank=policy))
        if isinstance(found, NoRanks):
            assert format.num_params(shape, (1,) * len(format.max_ranks(shape))) > most
            continue
        ranks, fit = found
        assert size(fit) == format.num_params(shape, ranks) <= most
        for raised in one_bond_larger(format, shape, ranks):
            assert format.num_params(shape, raised) > most, raised


@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_ranks_are_rounded_and_held_from_below(format, shape):
    kernel, top = fading(shape), format.max_ranks(shape)
    for least, multiple in ((3, 1), (1, 4), (3, 2)):
        settings = Settings(format=format, rank=RelError(0.3), min_rank=least, round_to=multiple)
        ranks, fit = choose(kernel, settings, allow_larger=True)
        wanted = tuple(
            rank if rank == full else -(-max(rank, least) // multiple) * multiple
            for rank, full in zip(ranks, top, strict=True)
        )
        assert format.feasible(shape, tuple(map(min, wanted, top))) == ranks
        assert fit.rel_error <= 0.3


@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_nothing_larger_than_dense_unless_it_is_allowed(format, shape):
    kernel, top = fading(shape), format.max_ranks(shape)
    full = format.num_params(shape, top)
    settings = Settings(format=format, rank=FixedRank(top))
    assert size(choose(kernel, settings, allow_larger=True)[1]) == full
    if full >= kernel.numel():
        with pytest.raises(NoRanks, match=f"would hold {full:,} parameters, now {kernel.numel():,}"):
            choose(kernel, settings)
    for policy in some([RelError(1e-6), Energy(1.0), RelError(0.2)], format):
        found = choose_or_refuse(kernel, Settings(format=format, rank=policy))
        if isinstance(found, NoRanks):
            assert "needs no fewer parameters than now" in str(found)
        else:
            assert size(found[1]) < kernel.numel()


@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_a_fixed_number_stands_for_every_bond(format, shape):
    kernel, bonds = fading(shape), len(format.max_ranks(shape))
    least = min(2, *format.max_ranks(shape), 2)
    one, fit = choose(kernel, Settings(format=format, rank=FixedRank(least)), allow_larger=True)
    many, _ = choose(kernel, Settings(format=format, rank=FixedRank((least,) * bonds)), allow_larger=True)
    assert one == many == format.feasible(shape, (least,) * bonds)
    assert [tuple(f.shape) for f in fit.factors] == list(format.factor_shapes(shape, one))


@every_format_and_shape
@pytest.mark.parametrize("fraction", [0.34, 1.0])
@pytest.mark.usefixtures("quick_cp")
def test_a_fraction_is_that_of_the_full_rank_of_every_bond(format, shape, fraction):
    settings = Settings(format=format, rank=RankFraction(fraction))
    ranks, _ = choose(torch.randn(shape, dtype=torch.float64), settings, allow_larger=True)
    asked = tuple(max(1, math.ceil(fraction * top)) for top in format.max_ranks(shape))
    assert ranks == format.feasible(shape, asked)


@pytest.mark.parametrize("policy", [*ERRORS, *RATIOS, FixedRank(2)], ids=str)
def test_a_zero_kernel_gets_the_smallest_ranks_that_there_are(policy):
    kernel = torch.zeros(8, 6, 3, 3)
    ranks, fit = choose(kernel, Settings(format=SVD(), rank=policy))
    assert fit.rel_error == 0
    if isinstance(policy, RelError | Energy):
        assert ranks == (1,)


@pytest.mark.parametrize("policy", [*ERRORS, *RATIOS, FixedRank(2)], ids=str)
def test_choosing_changes_no_kernel(policy):
    kernel = fading((8, 6, 3, 3), torch.float32)
    before = kernel.clone()
    choose(kernel, Settings(format=SVD(), rank=policy), allow_larger=True)
    assert torch.equal(kernel, before)


# --- ranks from a spectrum alone ----------------------------------------------------------------------------


@every_tree_and_shape
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_entropy_gives_each_bond_its_effective_rank(format, shape, factor):
    kernel = fading(shape)
    ranks, fit = choose(kernel, Settings(format=format, rank=Entropy(factor)), allow_larger=True)
    wanted = tuple(math.ceil(factor * effective_rank(s)) for s in format.spectra(kernel))
    tops = format.max_ranks(shape)
    assert ranks == format.feasible(shape, tuple(min(r, top) for r, top in zip(wanted, tops, strict=True)))
    assert measured(format, fit, kernel) == pytest.approx(fit.rel_error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("format", [SVD(), Tucker(), MPS(), CP()], ids=str)
def test_evbmf_tells_a_kernel_from_noise(format, rank):
    """The channel legs of the kernel have this rank; what lies below the noise is not counted."""
    out, inward = torch.randn(24, rank), torch.randn(20, rank)
    kernel = torch.einsum("ar,br,rcd->abcd", out, inward, torch.randn(rank, 3, 3)).double()
    noisy = kernel + 0.02 * kernel.std() * torch.randn_like(kernel)
    ranks, _ = choose(noisy, Settings(format=format, rank=EVBMF()), allow_larger=True)
    ends = ranks if isinstance(format, CP | SVD) else (ranks[0], ranks[-1])
    assert ends == (rank,) * len(ends)


def test_evbmf_is_blended_with_the_full_rank():
    kernel = torch.randn(16, 3, 3, 3, dtype=torch.float64)
    kernel[0] += 30
    ranks = [
        choose(kernel, Settings(format=SVD(), rank=EVBMF(share)), allow_larger=True)[0][0]
        for share in (1.0, 0.75, 0.5, 0.01)
    ]
    assert ranks == [1, 5, 9, 16]


@pytest.mark.parametrize("policy", [EVBMF(), Entropy(0.01)])
def test_no_bond_falls_to_nothing(policy):
    noise = torch.randn(16, 8, 3, 3, dtype=torch.float64)
    for least in (1, 6):
        ranks, _ = choose(noise, Settings(format=Tucker(), rank=policy, min_rank=least))
        assert min(ranks) >= least
    assert min(choose(0 * noise, Settings(format=Tucker(), rank=policy))[0]) == 1


def test_evbmf_does_not_depend_on_the_scale():
    s = torch.linalg.svdvals(torch.randn(20, 70, dtype=torch.float64) + 3)
    assert {evbmf_rank(scale * s, 70) for scale in (1e-30, 1.0, 1e30)} == {1}
    assert evbmf_rank(0 * s, 70) == 0
    with pytest.raises(ValueError, match="at least as many columns as singular values, 20, got 19"):
        evbmf_rank(s, 19)


@every_format_and_shape
@pytest.mark.usefixtures("quick_cp")
def test_chosen_ranks_keep_to_their_bounds_and_multiples(format, shape):
    kernel, tops = fading(shape), format.max_ranks(shape)
    for least, most, multiple in ((1, 3, 1), (2, 4, 2), (3, 7, 4), (1, 5, 3)):
        for policy in (ParamsRatio(0.9), RelError(0.4), Entropy(2.0), EVBMF(0.5)):
            bounds = {"min_rank": least, "max_rank": most, "round_to": multiple}
            settings = Settings(format=format, rank=policy, **bounds)
            found = choose_or_refuse(kernel, settings)
            if isinstance(found, NoRanks):
                continue
            for i, (rank, top) in enumerate(zip(found[0], tops, strict=True)):
                more = tuple(r + (i == j) for j, r in enumerate(found[0]))
                held_by_others = format.feasible(shape, more)[i] == rank
                on_the_grid = rank % multiple == 0 and rank >= least
                assert rank <= most
                assert on_the_grid or rank == min(top, most) or held_by_others
    with pytest.raises(NoRanks, match=r"needs larger ranks than allowed|would take|parameters"):
        choose(torch.randn(12, 12, 3, 3), Settings(format=Tucker(), rank=RelError(0.1), max_rank=2))


def test_bounds_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match="max_rank 3 is below min_rank 4"):
        Settings(min_rank=4, max_rank=3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("factor", [0, -1, math.inf, math.nan, True, "1"])
def test_a_factor_of_entropy_is_a_number_above_zero(factor):
    with pytest.raises(ValueError, match="entropy is a factor above 0"):
        Entropy(factor)
