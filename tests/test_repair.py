"""Repair: the statistics are those of the data, the means those of the dense model."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.repair import correct_bias_, reestimate_batchnorm_
from tncompress.running import inputs_of


def net(norm: bool, bias: bool) -> nn.Sequential:
    middle = [nn.BatchNorm2d(12)] if norm else []
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias),
        nn.Conv2d(8, 12, 3, bias=bias),
        *middle,
        nn.Dropout(0.5),
        nn.Conv2d(12, 4, 1),
    ).eval()


def pair(norm=True, bias=True):
    dense = net(norm, bias)
    return dense, tnc.compress(dense, {"default": {"format": "tucker", "rank": {"fixed": [3, 4]}}})


def images(count=4, size=6):
    return [torch.randn(size, 3, 8, 8) + 1 for _ in range(count)]


def test_batchnorm_gets_the_statistics_of_the_data():
    _, small = pair()
    batches = images()
    reestimate_batchnorm_(small, batches)
    seen = small[1](small[0](torch.cat(batches))).transpose(0, 1).flatten(1)
    assert_close(small[2].running_mean, seen.mean(1))
    assert_close(small[2].running_var, seen.var(1))
    assert int(small[2].num_batches_tracked) == len(batches)


@pytest.mark.parametrize("sizes", [(24,), (8, 8, 8), (20, 3, 1), (1, 1, 22), (5, 19)])
def test_batches_may_be_cut_as_one_likes(sizes):
    """Also where they have different means: the spread between batches counts, and images weigh alike."""
    _, small = pair()
    x = (
        torch.randn(24, 3, 8, 8) * torch.linspace(0.1, 3, 24)[:, None, None, None]
        + torch.arange(24)[:, None, None, None]
    )
    reestimate_batchnorm_(small, x.split(sizes))
    whole = small[1](small[0](x)).transpose(0, 1).flatten(1)
    assert_close(small[2].running_mean, whole.mean(1), rtol=1e-4, atol=1e-4)
    assert_close(small[2].running_var, whole.var(1), rtol=1e-4, atol=1e-4)


def test_a_norm_that_no_input_reaches_keeps_its_statistics():
    _, small = pair()
    small.unused = nn.BatchNorm2d(3)
    small.unused.running_mean.fill_(5)
    small.forward = lambda x: nn.Sequential(*list(small)[:-1])(x)
    reestimate_batchnorm_(small, images())
    assert small.unused.running_mean.tolist() == [5, 5, 5]
    assert int(small[2].num_batches_tracked) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_taken_in_a_long_dtype(dtype):
    """Sums of thousands of bfloat16 values would stand still."""
    model = nn.Sequential(nn.BatchNorm1d(2)).to(dtype).eval()
    x = torch.randn(20_000, 2) * 0.5 + 3
    reestimate_batchnorm_(model, x.to(dtype).split(999))
    rounded = x.to(dtype).double()
    assert_close(model[0].running_mean.double(), rounded.mean(0), rtol=5e-3, atol=0)
    assert_close(model[0].running_var.double(), rounded.var(0), rtol=5e-3, atol=0)


def test_momentum_mode_and_dropout_are_left_alone():
    _, small = pair()
    small.train()
    small[1].eval()
    small[2].momentum = 0.37
    calls = []
    small[3].register_forward_hook(lambda module, *_: calls.append(module.training))
    modes = [module.training for module in small.modules()]
    reestimate_batchnorm_(small, images())
    assert [module.training for module in small.modules()] == modes
    assert small[2].momentum == 0.37
    assert calls == [False] * 4


def test_an_error_on_the_way_leaves_the_old_statistics():
    _, small = pair()
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(RuntimeError):
        reestimate_batchnorm_(small, [*images(2), torch.randn(2, 5, 8, 8)])
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())


@pytest.mark.parametrize("format", ["svd", "mps", "cp"])
def test_bias_correction_gives_the_dense_means(format):
    dense = net(norm=False, bias=True)
    small = tnc.compress(dense, {"default": {"format": format, "rank": {"params_ratio": 0.3}}})
    batches = images(3)
    correct_bias_(small, dense, batches)
    x = dense[0](torch.cat(batches))
    assert_close(small[1](x).mean((0, 2, 3)), dense[1](x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_bias_correction_weighs_every_image_alike():
    dense, small = pair(norm=False)
    other = copy.deepcopy(small)
    x = torch.randn(10, 3, 8, 8)
    correct_bias_(small, dense, [x])
    correct_bias_(other, dense, [x[:1], x[1:4], x[4:]])
    assert_close(small[1].bias, other[1].bias)


def test_layers_without_a_bias_do_not_grow_one():
    dense, small = pair(bias=False)
    count = sum(p.numel() for p in small.parameters())
    mended = tnc.repair(small, dense, images())
    assert sum(p.numel() for p in mended.parameters()) == count


def test_repair_changes_a_copy_and_each_part_can_be_switched_off():
    dense, small = pair()
    before, of_dense = copy.deepcopy(small.state_dict()), copy.deepcopy(dense.state_dict())
    mended = tnc.repair(small, dense, images())
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())
    assert all(torch.equal(of_dense[key], value) for key, value in dense.state_dict().items())
    assert not torch.equal(mended[1].bias, small[1].bias)
    assert not torch.equal(mended[2].running_mean, small[2].running_mean)
    no_bias = tnc.repair(small, dense, images(), bias=False)
    assert torch.equal(no_bias[1].bias, small[1].bias)
    no_norm = tnc.repair(small, dense, images(), batchnorm=False)
    assert torch.equal(no_norm[2].running_mean, small[2].running_mean)


@pytest.mark.parametrize(
    "batch", [lambda x: x, lambda x: (x, 3), lambda x: [x], lambda x: {"image": x, "y": 0}]
)
def test_a_batch_is_a_tensor_or_holds_one_first(batch):
    x = torch.randn(2, 3, 8, 8)
    (found,) = inputs_of([batch(x)], net(True, True))
    assert torch.equal(found, x)


def test_what_is_no_batch_says_what_is_wanted():
    with pytest.raises(ValueError, match="wanted batches that are tensors, or begin with one, got ndarray"):
        next(inputs_of([torch.randn(2, 3, 8, 8).numpy()], net(True, True)))


def test_models_the_wrong_way_round_are_an_error():
    dense, small = pair()
    with pytest.raises(ValueError, match="the compressed model comes first, got them swapped"):
        tnc.repair(dense, small, images())


def test_no_batches_are_an_error():
    dense, small = pair()
    with pytest.raises(ValueError, match="at least one batch"):
        tnc.repair(small, dense, [])
    used_up = iter(images())
    list(used_up)
    with pytest.raises(ValueError, match="used up"):
        tnc.repair(small, dense, used_up)


def test_a_last_batch_of_one_image_is_counted_too():
    """BatchNorm1d refuses to train on one value; the others are many."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    x = torch.randn(9, 4)
    reestimate_batchnorm_(model, x.split((5, 3, 1)))
    assert_close(model[1].running_mean, model[0](x).mean(0))
    assert_close(model[1].running_var, model[0](x).var(0))
