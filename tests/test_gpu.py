"""What holds on the CPU holds on a CUDA device; skipped where there is none."""

import pytest
import torch
from conftest import FORMATS
from torch import nn
from torch.testing import assert_close

import tncompress as tnc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 24, 3, padding=1, groups=2),
        nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1),
        nn.Conv2d(16, 4, 1),
    ).eval()


@pytest.mark.parametrize(
    "format", [f for n, f in FORMATS.items() if n != "svd-kw" and n != "svd-channels"], ids=str
)
def test_a_model_is_compressed_where_it_lies(format):
    model, x = net(), torch.randn(2, 3, 16, 16)
    settings = tnc.Settings(format=format, rank=tnc.ParamsRatio(0.4))
    spec = tnc.Spec(default=settings)
    here, there = tnc.compress(model, spec), tnc.compress(model.cuda(), spec)
    for ours, theirs in zip(here.tncompress_plan.layers, there.tncompress_plan.layers, strict=True):
        assert type(ours) is type(theirs)
        if ours in here.tncompress_plan.compressed:
            assert ours.ranks == theirs.ranks
            assert theirs.rel_error == pytest.approx(ours.rel_error, rel=0.02)
            assert there.get_submodule(ours.name).weight.is_cuda
    with torch.inference_mode():
        assert_close(there(x.cuda()), tnc.merge(there)(x.cuda()), rtol=1e-3, atol=1e-3)


def test_a_model_is_repaired_where_it_lies():
    dense = net().cuda()
    small = tnc.compress(dense, {"default": {"format": "mps", "rank": {"params_ratio": 0.4}}})
    mended = tnc.repair(small, dense, [torch.randn(8, 3, 16, 16) for _ in range(3)])
    assert all(tensor.is_cuda for tensor in mended.state_dict().values())
    assert mended(torch.randn(1, 3, 16, 16, device="cuda")).isfinite().all()


def test_a_model_is_calibrated_where_it_lies():
    model, batches = net(), [torch.randn(8, 3, 16, 16) for _ in range(3)]
    here, there = tnc.calibrate(model, batches), tnc.calibrate(model.cuda(), batches, gradients="teacher")
    assert here.norms == there.norms
    for name, moments in here.layers.items():
        theirs = there.layers[name]
        assert all(tensor.is_cuda for tensor in theirs.tensors().values())
        assert_close(theirs.covariance.cpu(), moments.covariance, rtol=1e-3, atol=1e-4)
        assert_close(theirs.mean.cpu(), moments.mean, rtol=1e-3, atol=1e-4)
    spec = {"default": {"format": "mps", "rank": {"params_ratio": 0.4}}}
    for made in (here, there):
        small = tnc.compress(model, spec, calibration=made)
        assert all(tensor.is_cuda for tensor in small.state_dict().values())
    with pytest.raises(ValueError, match="batch 2 of the calibration data holds NaN"):
        tnc.calibrate(model, [batches[0], batches[1] / 0])
