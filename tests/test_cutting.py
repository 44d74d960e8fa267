"""Truncation along cuts, dense in and dense out: what was promised is what is there, on every kernel."""

import copy
import json
import math
from itertools import combinations

import pytest
import torch
from conftest import SHAPES, every_geometry
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.cuts import Cut, all_cuts, rel_error, spectrum, truncate
from tncompress.unfolded import Unfolded, alternating


def holding(layer):
    """Return a model whose layer '0' is a convolution of another kind than it, and '1' this one."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), layer)


def kernels_of(layer):
    return tnc.ConvGeometry.of(layer).kernels(layer.weight.detach())


@every_geometry
def test_one_cut_gives_the_best_kernel_of_its_rank(geometry):
    layer = geometry.layer()
    before = kernels_of(layer)
    for cut in all_cuts(before.ndim - 1):
        full = Unfolded.of(before, cut).full
        for rank in {1, (full + 1) // 2, full}:
            found = tnc.truncate(holding(layer), cut, tnc.FixedRank(rank), layers=["1"], linear=True)
            after = kernels_of(found.model[1])
            assert_close(after, torch.stack([truncate(kernel, cut, rank) for kernel in before]))
            (made,) = found.layers
            (achieved,) = made.cuts
            assert (achieved.asked, achieved.full, achieved.excess) == (rank, full, 0.0)
            assert achieved.rank == max(int(torch.linalg.matrix_rank(unfolded(k, cut))) for k in after)
            assert math.isclose(made.rel_error, float((after - before).norm() / before.norm()), abs_tol=1e-12)
            assert math.isclose(found.rel_error, made.rel_error, abs_tol=1e-12)


def unfolded(kernel, cut):
    left, right = cut.modes(kernel.ndim)
    return kernel.permute(*left, *right).reshape(math.prod(kernel.shape[mode] for mode in left), -1)


def pairs(crossing: bool):
    found = []
    for name, shape in SHAPES.items():
        for one, other in combinations(all_cuts(len(shape)), 2):
            if one.crosses(other, len(shape)) is crossing:
                found.append(pytest.param(shape, one, other, id=f"{name}-{one}-{other}"))
    return pytest.mark.parametrize(("shape", "one", "other"), found)


@pairs(crossing=False)
def test_cuts_that_do_not_cross_keep_their_ranks_and_their_discarded_weights_add(shape, one, other):
    """The second truncation projects on legs that the first cut leaves alone: the errors are orthogonal."""
    kernel = torch.randn(shape, dtype=torch.float64)
    ranks = [max(1, min(unfolded(kernel, cut).shape) // 2) for cut in (one, other)]
    first = truncate(kernel, one, ranks[0])
    second = truncate(first, other, ranks[1])
    lost = (kernel - first).square().sum() + (first - second).square().sum()
    assert_close((kernel - second).square().sum(), lost)
    for cut, rank in zip((one, other), ranks, strict=True):
        assert torch.linalg.matrix_rank(unfolded(second, cut)) <= rank


@pairs(crossing=True)
def test_ranks_across_cuts_that_cross_are_measured(shape, one, other):
    kernel = torch.randn(shape, dtype=torch.float64)
    layer = layer_of(kernel)
    found = tnc.truncate(holding(layer), [one, other], tnc.RankFraction(0.4), layers=["1"], linear=True)
    after = kernels_of(found.model[1])[0]
    for achieved, cut in zip(found.layers[0].cuts, (one, other), strict=True):
        assert achieved.rank == int(torch.linalg.matrix_rank(unfolded(after, cut), rtol=1e-6))
        assert achieved.kept == (achieved.rank <= achieved.asked)
        lost = rel_error(spectrum(after, cut), achieved.asked) * float(after.norm() / kernel.norm())
        assert math.isclose(achieved.excess, lost, abs_tol=1e-9)


def layer_of(kernel):
    """Return a convolution with this kernel."""
    ndim = kernel.ndim - 2
    if ndim == 0:
        layer = nn.Linear(kernel.shape[1], kernel.shape[0], dtype=kernel.dtype)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
        layer = kind(kernel.shape[1], kernel.shape[0], kernel.shape[2:], dtype=kernel.dtype)
    layer.weight.data.copy_(kernel)
    return layer


def test_alternating_comes_near_to_both_ranks_where_one_round_does_not():
    layer, cuts = nn.Conv2d(12, 10, 3), ["out kw|in kh", "out kh|in kw"]
    once, round_by_round = (
        tnc.truncate(holding(layer), cuts, tnc.RankFraction(0.5), layers=["1"], crossing=crossing)
        for crossing in ("measure", "alternate")
    )
    assert once.layers[0].cuts[0].rank > once.layers[0].cuts[0].asked
    assert once.layers[0].cuts[0].excess > 0.05
    assert round_by_round.layers[0].cuts[0].excess < 2e-3
    assert round_by_round.layers[0].rel_error > once.layers[0].rel_error


def test_a_kernel_that_has_both_ranks_is_left_alone_by_alternating():
    """A product of four vectors has rank 1 across every cut."""
    one, other = Cut.parse("out kw|in kh"), Cut.parse("out kh|in kw")
    legs = [torch.randn(size, dtype=torch.float64) for size in (6, 5, 3, 3)]
    kernel = torch.einsum("o,i,h,w->oihw", *legs)[None]
    assert_close(alternating(kernel, [one, other], [1, 1], float(kernel.norm())), kernel)


@pytest.mark.parametrize(
    ("policy", "holds"),
    [
        (tnc.RelError(0.4), lambda s, r, m, n: rel_error(s, r) <= 0.4 < rel_error(s, r - 1)),
        (tnc.Energy(0.7), lambda s, r, m, n: rel_error(s, r) ** 2 <= 0.3 < rel_error(s, r - 1) ** 2),
        (tnc.RankFraction(0.3), lambda s, r, m, n: r == math.ceil(0.3 * len(s))),
        (tnc.FixedRank(4), lambda s, r, m, n: r == 4),
        (tnc.FixedRank(400), lambda s, r, m, n: r == len(s)),
        (tnc.ParamsRatio(0.5), lambda s, r, m, n: r * (m + n) <= 0.5 * m * n < (r + 1) * (m + n)),
        (tnc.Entropy(0.5), lambda s, r, m, n: r == math.ceil(0.5 * tnc.cuts.effective_rank(s))),
        (tnc.EVBMF(0.5), lambda s, r, m, n: len(s) / 2 <= r <= len(s)),
    ],
)
def test_each_policy_says_the_rank(policy, holds):
    layer, cut = nn.Conv2d(9, 16, 3, dtype=torch.float64), Cut.parse("out kw|in kh")
    found = tnc.truncate(holding(layer), cut, policy, layers=["1"]).layers[0].cuts[0]
    kernel = layer.weight.detach()
    assert found.rank == found.asked
    assert holds(spectrum(kernel, cut), found.rank, *unfolded(kernel, cut).shape)


def test_errors_are_relative_to_the_whole_kernel_for_each_cut_by_itself():
    layer = nn.Conv2d(12, 14, 3, dtype=torch.float64)
    found = tnc.truncate(holding(layer), ["out|rest", "in|rest"], tnc.RelError(0.3), layers=["1"])
    assert 0.3 < found.layers[0].rel_error <= 0.3 * math.sqrt(2)


def test_a_mapping_gives_each_cut_its_own_policy():
    wanted = {"out|rest": {"fixed": 5}, "kh|rest": tnc.FixedRank(2)}
    cuts = tnc.truncate(holding(nn.Conv2d(6, 8, 3)), wanted, layers=["1"]).layers[0].cuts
    assert [(cut.cut, cut.rank) for cut in cuts] == [("out|rest", 5), ("kh|rest", 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ranks_and_errors_are_those_of_the_stored_kernel(dtype):
    layer = nn.Conv2d(24, 32, 3, dtype=dtype)
    found = tnc.truncate(holding(layer), "out|rest", tnc.FixedRank(12), layers=["1"])
    before, after = layer.weight.detach().double(), found.model[1].weight.detach()
    assert after.dtype == dtype
    (made,) = found.layers
    assert made.cuts[0].rank == 12
    assert math.isclose(made.rel_error, float((after.double() - before).norm() / before.norm()), rel_tol=1e-9)


def test_all_else_of_the_model_is_as_it_was():
    model = tnc.build_model("zoo:resnet20").to(memory_format=torch.channels_last)
    model.layer2[0].conv1.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    found = tnc.truncate(model, "out|rest", tnc.RankFraction(0.5), layers=["layer2.*"])
    assert type(found.model) is type(model)
    touched = {f"{layer.name}.weight" for layer in found.layers}
    assert touched == {name for name in state if name.startswith("layer2") and ".conv" in name}
    for name, value in found.model.state_dict().items():
        assert_close(model.state_dict()[name], state[name], rtol=0, atol=0)
        assert bool((value != state[name]).any()) == (name in touched), name
    for name, parameter in found.model.named_parameters():
        assert parameter.requires_grad == model.get_parameter(name).requires_grad
        assert parameter.stride() == model.get_parameter(name).stride()


def test_a_shared_layer_is_truncated_once_and_stays_shared():
    layer = nn.Conv2d(8, 8, 3)
    found = tnc.truncate(nn.Sequential(layer, nn.ReLU(), layer), "out|rest", tnc.FixedRank(2))
    assert len(found.layers) == 1
    assert found.model[0] is found.model[2]


def test_full_ranks_leave_every_bit():
    model = holding(nn.Conv2d(6, 8, 3))
    found = tnc.truncate(model, [str(cut) for cut in all_cuts(4)], tnc.RankFraction(1.0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.model.parameters(), strict=True))
    assert found.rel_error == 0


def test_a_zero_kernel_has_rank_zero_and_no_error():
    layer = nn.Conv2d(6, 8, 3)
    nn.init.zeros_(layer.weight)
    found = tnc.truncate(holding(layer), "out|rest", tnc.RelError(0.1), layers=["1"])
    assert (found.layers[0].cuts[0].rank, found.rel_error) == (0, 0.0)


def test_what_can_not_be_truncated_is_listed_with_its_reason():
    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    one, other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    other.weight = one.weight
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), weighted, one, other)
    found = tnc.truncate(model, "kh|rest", tnc.FixedRank(1))
    assert [layer.name for layer in found.layers] == ["1"]
    reasons = {skip.name: skip.reason for skip in found.skipped}
    assert "'kh|rest'" in reasons["0"]
    assert "made from other parameters" in reasons["2"]
    assert "shared" in reasons["3"]
    assert "kh|rest" in str(found)
    assert "shared" in str(found)
    small = tnc.compress(tnc.build_model("zoo:cnn4"), {"default": {"rank": {"params_ratio": 0.5}}})
    again = tnc.truncate(small, "out|rest", tnc.FixedRank(3))
    assert {skip.name for skip in again.skipped} == {"conv2", "conv3", "conv4"}


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("out|rest",), {}, "how far"),
        (({"out|rest": tnc.FixedRank(2)}, tnc.FixedRank(2)), {}, "not both"),
        (([], tnc.FixedRank(2)), {}, "at least one cut"),
        (("out", tnc.FixedRank(2)), {}, "written 'legs|legs'"),
        (("out|rest", tnc.FixedRank([2, 3])), {}, "has one rank"),
        (("out|rest", {"rank": 3}), {}, "unknown rank policy"),
        (("out|rest", 0.5), {}, "tagged policy"),
        (("out|rest", tnc.FixedRank(2)), {"layers": ["conv9"]}, "'conv9' matches no layer"),
        (("out|rest", tnc.FixedRank(2)), {"crossing": "both"}, "'measure' or 'alternate'"),
        (("kd|rest", tnc.FixedRank(2)), {}, "no layer to truncate"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_was_wanted_wrongly_is_said_in_a_line(arguments, options, words):
    with pytest.raises(ValueError, match=words.replace("|", r"\|")) as caught:
        tnc.truncate(tnc.build_model("zoo:cnn4"), *arguments, **options)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_refused_by_name():
    model = tnc.build_model("zoo:cnn4")
    with torch.no_grad():
        model.conv3.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'conv3'.*NaN"):
        tnc.truncate(model, "out|rest", tnc.FixedRank(2))
    with torch.device("meta"):
        empty = tnc.build_model("zoo:cnn4")
    with pytest.raises(ValueError, match=r"'conv1'.*meta"):
        tnc.truncate(empty, "out|rest", tnc.FixedRank(2))
    with pytest.raises(ValueError, match="no convolution"):
        tnc.truncate(nn.Sequential(nn.Linear(3, 3)), "out|rest", tnc.FixedRank(2))


def test_what_came_of_it_is_saved_as_json(tmp_path):
    found = tnc.truncate(tnc.build_model("zoo:cnn4"), "out|rest", tnc.RankFraction(0.5))
    found.save(tmp_path / "cut.json")
    read = json.loads((tmp_path / "cut.json").read_text())
    assert read["rel_error"] == found.rel_error
    assert [layer["name"] for layer in read["layers"]] == ["conv1", "conv2", "conv3", "conv4"]
