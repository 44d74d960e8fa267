"""Repair: the statistics are those of the data, the means those of the dense model."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.calibrate import correct_bias_, inputs_of, reestimate_batchnorm_


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
    seen = [small[1](small[0](x)) for x in batches]
    assert_close(small[2].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    variances = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in seen])
    assert_close(small[2].running_var, variances.mean(0))
    assert int(small[2].num_batches_tracked) == len(batches)


def test_equal_batches_may_be_cut_as_one_likes():
    """Means are those of all images, variances those within a batch: with one batch, those of all images."""
    _, small = pair()
    x = torch.randn(24, 3, 8, 8) + 1
    norms = {}
    for count in (1, 2, 4, 8):
        mended = copy.deepcopy(small)
        reestimate_batchnorm_(mended, x.chunk(count))
        norms[count] = mended[2]
    whole = small[1](small[0](x)).transpose(0, 1).flatten(1)
    assert_close(norms[1].running_var, whole.var(1))
    for norm in norms.values():
        assert_close(norm.running_mean, whole.mean(1))
    reestimate_batchnorm_(small, x.chunk(4)[::-1])
    assert_close(small[2].running_var, norms[4].running_var)


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


def test_no_batches_are_an_error():
    dense, small = pair()
    with pytest.raises(ValueError, match="at least one batch"):
        tnc.repair(small, dense, [])
    used_up = iter(images())
    list(used_up)
    with pytest.raises(ValueError, match="used up"):
        tnc.repair(small, dense, used_up)
