"""The gauge of factors: other factors, the same kernel; and a decay that does not see the difference."""

import copy

import pytest
import torch
from conftest import GEOMETRIES, every_format_and_geometry, every_tree_and_shape
from torch import nn
from torch.testing import assert_close

import tncompress as tnc
from tncompress import CP, MPS, SVD, ConvGeometry, TNConv, Tucker
from tncompress.finetune import train_
from tncompress.gauge import balance_, balanced_factors, frobenius_gradients, squared_norm


def uneven(format, geometry) -> TNConv:
    """A layer with random factors of about half the full ranks, of very different sizes."""
    made = ConvGeometry.of(geometry.layer())
    shape, groups = made.kernel_shape, made.groups
    ranks = format.feasible(shape, tuple(max(1, r // 2) for r in format.max_ranks(shape)))
    shapes = format.factor_shapes(shape, ranks, groups)
    factors = [10.0 ** (k % 3 - 1) * torch.randn(s, dtype=torch.float64) for k, s in enumerate(shapes)]
    return TNConv(format, made, factors)


@every_format_and_geometry
def test_balancing_changes_no_kernel(format, geometry):
    layer = uneven(format, geometry)
    before = layer.weight.detach().clone()
    held = nn.Sequential(layer)
    assert [id(factor) for factor in balance_(held)] == [id(factor) for factor in layer.factors]
    assert_close(layer.weight, before, rtol=1e-10, atol=1e-10 * float(before.abs().max()))
    single = copy.deepcopy(held).float()
    for factor in single[0].factors:
        factor.data.mul_(1.7)
    start = single[0].weight.detach().clone()
    balance_(single)
    assert float((single[0].weight.detach() - start).norm()) <= 1e-6 * float(start.norm())


def side_grams(network, factors, bond):
    """The Gram matrices of the two parts of a network that a bond holds together."""
    names = sorted({leg for legs in network for leg in legs})
    letter = {name: chr(ord("a") + k) for k, name in enumerate(names)}
    grams = []
    for end in (k for k, legs in enumerate(network) if bond in legs):
        part, waiting = {end}, [end]
        while waiting:
            legs = set(network[waiting.pop()])
            for k, others in enumerate(network):
                shared = {leg for leg in legs & set(others) if leg.startswith("r")} - {bond}
                if k not in part and shared:
                    part.add(k)
                    waiting.append(k)
        chosen = sorted(part)
        terms = ",".join("".join(letter[leg] for leg in network[k]) for k in chosen)
        kept = {letter[leg] for k in chosen for leg in network[k] if not leg.startswith("r")}
        merged = torch.einsum(
            f"{terms}->{letter[bond]}{''.join(sorted(kept))}", *(factors[k] for k in chosen)
        )
        rows = merged.flatten(1)
        grams.append(rows @ rows.T)
    return grams


@every_tree_and_shape
def test_both_sides_of_a_balanced_bond_carry_its_singular_values(format, shape):
    ranks = format.feasible(shape, tuple(max(1, r // 2) for r in format.max_ranks(shape)))
    factors = [
        3.0 ** (k % 3 - 1) * torch.randn(s, dtype=torch.float64)
        for k, s in enumerate(format.factor_shapes(shape, ranks))
    ]
    network = format.network(shape)
    balanced = balanced_factors(network, factors)
    for bond in (f"r{i}" for i in range(len(ranks))):
        left, right = side_grams(network, balanced, bond)
        values = left.diagonal().sort(descending=True).values
        # below a hundredth of the largest, bond_scale holds a side up
        assert_close(left[:1, :1], right[:1, :1])
        big = values > 0.011 * values[0]
        count = int(big.sum())
        assert_close(left[:count, :count], torch.diag(values[:count]), atol=1e-8, rtol=1e-8)
        assert_close(right[:count, :count], torch.diag(values[:count]), atol=1e-8, rtol=1e-8)


def test_the_vectors_of_a_term_get_equal_norms():
    shape = (5, 6, 3, 3)
    factors = [torch.randn(s, dtype=torch.float64) for s in CP().factor_shapes(shape, (4,))]
    factors[1][2] = 0.0  # a term that is zero
    network = CP().network(shape)
    balanced = balanced_factors(network, [5.0 * factors[0], *factors[1:]])
    norms = torch.stack(
        [
            t.movedim(legs.index("r0"), 0).flatten(1).norm(dim=1)
            for legs, t in zip(network, balanced, strict=True)
        ]
    )
    whole = [0, 1, 3]
    assert_close(norms[:, whole], norms[:1, whole].expand(4, -1))
    assert all(t.isfinite().all() for t in balanced)


def test_a_network_that_is_no_tree_and_frozen_factors_are_left_alone():
    ring = (("out", "r0", "r1"), ("r1", "in", "r2"), ("r2", "kh", "r0"))
    assert balanced_factors(ring, [torch.randn(2, 2, 2) for _ in ring]) is None
    layer = uneven(MPS(), GEOMETRIES["2d"])
    layer.factors[0].requires_grad_(False)
    before = [factor.detach().clone() for factor in layer.factors]
    assert balance_(nn.Sequential(layer)) == []
    assert all(torch.equal(a, b) for a, b in zip(before, layer.factors, strict=True))


@every_format_and_geometry
def test_the_norm_and_its_gradient_are_those_of_the_kernel(format, geometry):
    layer = uneven(format, geometry)
    norm = 0.5 * layer.weight.square().sum()
    expected = torch.autograd.grad(norm, list(layer.factors))
    assert_close(0.5 * squared_norm(layer), norm)
    found = frobenius_gradients([layer])
    assert [id(factor) for factor, _ in found] == [id(factor) for factor in layer.factors]
    for (_, gradient), wanted in zip(found, expected, strict=True):
        assert_close(gradient, wanted)
    assert all(factor.grad is None for factor in layer.factors)


def test_the_norm_is_had_without_the_kernel():
    """No tensor as large as the kernel is made on the way, where the ranks are small."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.size = max(self.size, made.numel())
            return made

    geometry = ConvGeometry.of(nn.Conv2d(64, 48, 3))
    for format in (MPS(), Tucker(), CP(), SVD("out kw|in kh")):
        ranks = tuple(min(4, r) for r in format.max_ranks(geometry.kernel_shape))
        layer = TNConv(
            format, geometry, [torch.randn(s) for s in format.factor_shapes(geometry.kernel_shape, ranks)]
        )
        with Largest() as seen:
            frobenius_gradients([layer])
        assert seen.size <= 2 * max(factor.numel() for factor in layer.factors)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frobenius_decay_at_full_ranks_decays_the_kernel_alone(optimizer):
    """One step on a loss without gradient takes from each factor the gradient of the kernel's norm."""

    class Still(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return 0.0 * self.layer(x).flatten(1)

    layer = uneven(MPS(), GEOMETRIES["2d"])
    before, gradients = (
        [f.detach().clone() for f in layer.factors],
        dict(enumerate(frobenius_gradients([layer]))),
    )
    data = [(torch.randn(2, 6, 7, 9, dtype=torch.float64), torch.tensor([0, 1]))]
    config = {"epochs": 1, "optimizer": optimizer, "lr": 0.1, "warmup": 0.0, "frobenius_decay": 1e-4}
    train_(Still(layer), data, config | {"momentum": 0.0, "clip_norm": None})
    for k, (factor, start) in enumerate(zip(layer.factors, before, strict=True)):
        assert_close(factor, start - 0.1 * 1e-4 * gradients[k][1], rtol=1e-9, atol=1e-12)
    assert gradients[0][1].norm() > 0


def test_decay_does_not_depend_on_the_gauge():
    """A function trained from two gauges with Frobenius decay starts along the same change of the kernel."""
    layer = uneven(SVD(), GEOMETRIES["2d"])
    other = copy.deepcopy(layer)
    balance_(nn.Sequential(other))
    norms = [float(squared_norm(each)) for each in (layer, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-10)
    sizes = [sum(float(f.square().sum()) for f in each.factors) for each in (layer, other)]
    assert sizes[1] < 0.9 * sizes[0]  # what plain weight decay would see


def test_training_with_balancing_says_so_and_starts_from_the_same_function():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 25, 3)
    )
    spec = {"default": {"format": "mps", "rank": {"params_ratio": 0.5}}, "keep_dense": ["0", "4"]}
    small = tnc.compress(model, spec)
    with torch.no_grad():
        small[2].factors[0].mul_(100.0)
        small[2].factors[1].div_(100.0)
    data = [(torch.randn(4, 1, 9, 9), torch.randint(3, (4,))) for _ in range(6)]
    history = tnc.finetune(small, data, {"epochs": 2, "rebalance_every": 4, "balance": True, "ema": 0.9})
    assert [epoch.rebalanced for epoch in history.epochs] == [1, 2]
    assert "bonds balanced 3 times, the momentum of factors begun anew each time" in " ".join(
        str(history).split()
    )
    still = tnc.finetune(small, data, {"epochs": 1, "balance": True, "lr": 1e-12})
    x = data[0][0]
    gap = (still.model(x) - small(x)).norm() / small(x).norm()
    assert float(gap) < 1e-6
    assert still.model[2].factors[0].norm() < 0.1 * small[2].factors[0].norm()
