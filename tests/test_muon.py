"""Muon: what becomes of a gradient, beside torch's own, turned bonds, and everything that is no matrix."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress.finetune import FinetuneConfig
from tncompress.layers import TNConv
from tncompress.muon import ADAMW_RMS, Muon, as_matrix, orthogonal
from tncompress.recipe import make_optimizer

SHAPES = [(12, 30), (30, 12), (7, 7), (1, 9)]


def stepped(start, gradients, **group):
    """Return a parameter after a step along each gradient."""
    parameter = nn.Parameter(start.clone())
    optimizer = Muon([{"params": [parameter], "orthogonal": True, "lr": 0.01, "weight_decay": 0.1} | group])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_are_those_of_the_gradient_with_singular_values_around_one(shape):
    gradient = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    inside = u.mT @ orthogonal(gradient) @ vh.mT
    assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-10)
    plain = s > s[0] / 50
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.25))[plain].all()


def test_no_gradient_is_no_step_and_its_size_does_not_matter():
    start = torch.randn(8, 5, dtype=torch.float64)
    still = stepped(start, [torch.zeros_like(start)], weight_decay=0.0)
    assert torch.equal(still, start)
    gradient = torch.randn_like(start)
    ends = [stepped(start, [scale * gradient]) for scale in (1e-12, 1.0, 1e9)]
    assert_close(ends[0], ends[1], rtol=1e-9, atol=0)
    assert_close(ends[2], ends[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_turned_bond_turns_its_step(shape):
    """Training does not depend on which orthonormal basis a bond has; AdamW's does."""
    start, *gradients = torch.randn(4, *shape, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64))
    turned = stepped(start @ turn, [g @ turn for g in gradients])
    assert_close(turned, stepped(start, gradients) @ turn, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has none before 2.9")
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_go_where_torch_takes_them(shape):
    """Torch's Muon multiplies in bfloat16, which makes the last digits its own."""
    start, *gradients = torch.randn(6, *shape)
    theirs = nn.Parameter(start.clone())
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    optimizer = torch.optim.Muon([theirs], **options)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    ours = stepped(start, gradients)
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


@pytest.mark.parametrize("shape", [(64, 32), (16, 40, 3, 3), (5, 3, 7)])
def test_steps_are_as_large_as_those_of_adamw(shape):
    start, gradient = torch.randn(2, *shape)
    step = (stepped(start, [gradient], weight_decay=0.0) - start) / 0.01
    whole = ADAMW_RMS * math.sqrt(max(as_matrix(start).shape))
    assert torch.linalg.matrix_norm(as_matrix(step), 2) < 1.25 * whole
    assert 0.6 * ADAMW_RMS < step.square().mean().sqrt() < 1.25 * ADAMW_RMS


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((6,), (1, 6)),
        ((4, 9), (4, 9)),
        ((9, 4), (9, 4)),
        ((16, 16, 3, 3), (16, 144)),
        ((4, 3, 3, 50), (36, 50)),
    ],
)
def test_tensors_are_cut_where_they_are_nearly_square(shape, matrix):
    assert as_matrix(torch.zeros(shape)).shape == matrix


def test_factors_and_kernels_are_matrices_and_all_else_is_left_to_adamw():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    )
    small = tnc.compress(
        model, {"default": {"format": "mps", "rank": {"params_ratio": 0.5}}, "keep_dense": ["0", "4"]}
    )
    config = FinetuneConfig(optimizer="muon", lr_factors=5e-4, momentum=0.8)
    optimizer = make_optimizer(small, config)
    assert config.lr == FinetuneConfig(optimizer="adamw").lr
    named = {id(p): name for name, p in small.named_parameters()}
    told = {
        (group["orthogonal"], group["lr"], group["weight_decay"]): {named[id(p)] for p in group["params"]}
        for group in optimizer.param_groups
    }
    factors = {named[id(f)] for m in small.modules() if isinstance(m, TNConv) for f in m.factors}
    assert told.pop((True, 1e-3, 5e-4)) == {"0.weight"}
    assert told.pop((True, 5e-4, 0.0)) == factors
    assert told.pop((False, 1e-3, 5e-4)) == {"4.weight"}
    assert len(told.pop((False, 1e-3, 0.0))) == 5  # biases, BatchNorm's
    assert not told

    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    like = {name: nn.Parameter(p.clone()) for name, p in before.items()}
    plain = torch.optim.AdamW(
        [
            {"params": [like["4.weight"]], "weight_decay": 5e-4},
            {"params": [like["0.bias"], like["1.weight"]], "weight_decay": 0},
        ],
        betas=(0.8, 0.999),
    )
    for _ in range(3):
        for name, parameter in small.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            like[name].grad = parameter.grad.clone()
        optimizer.step()
        plain.step()
    now = dict(small.named_parameters())
    for name in ("4.weight", "0.bias", "1.weight"):
        assert torch.equal(now[name], like[name])
    assert all(not torch.equal(now[name], before[name]) for name in (*factors, "0.weight"))
