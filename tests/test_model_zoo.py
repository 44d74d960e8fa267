"""Models that nobody here wrote: every one of torchvision's, and one of each of timm's families."""

import math

import pytest
import torch
import zoo_table
from torch import nn

import tncompress as tnc
from tncompress.measure import num_params

MODELS = zoo_table.torchvision_models() + zoo_table.timm_models()
QUICK = {"resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1", "raft_small", "mnasnet0_5"}
EXACT = [
    ("classification", "resnet18"),
    ("classification", "shufflenet_v2_x0_5"),
    ("classification", "mobilenet_v3_small"),
    ("classification", "squeezenet1_1"),
    ("classification", "googlenet"),
    ("classification", "densenet121"),
    ("classification", "resnext50_32x4d"),
    ("classification", "regnet_y_400mf"),
    ("classification", "convnext_tiny"),
    ("classification", "swin_t"),
    ("segmentation", "lraspp_mobilenet_v3_large"),
    ("detection", "ssdlite320_mobilenet_v3_large"),
    ("video", "r3d_18"),
    ("video", "s3d"),
]
"""Compared at full rank: residuals, branches, groups, depthwise layers, subclasses, 3d, attention."""


def params(models):
    """The quick ones run with every `make test`, the others with `make test-all`."""
    mark = [[] if name in QUICK else [pytest.mark.zoo] for _, name in models]
    return [
        pytest.param(*model, id=zoo_table.label(*model), marks=marks)
        for model, marks in zip(models, mark, strict=True)
    ]


@pytest.fixture(autouse=True)
def _unchecked(unchecked):
    """Checking types on thousands of calls tells nothing new here."""


@pytest.mark.parametrize(("family", "name"), params(MODELS))
def test_every_layer_is_in_the_plan_of_every_format(family, name):
    model = zoo_table.build_meta(family, name)
    for plan in zoo_table.plans(model).values():
        assert plan.params_model == num_params(model)
        assert plan.params <= plan.params_model
        for layer in plan.compressed:
            weight = model.get_submodule(layer.name).weight
            assert layer.shape == tuple(weight.shape)
            assert 4 * layer.params <= layer.params_dense == weight.numel()


@pytest.mark.parametrize(("family", "name"), params(EXACT))
def test_at_full_rank_the_model_is_the_dense_one(family, name):
    torch.manual_seed(0)
    model = zoo_table.build(family, name).double()
    for module in model.modules():  # fresh running statistics let numbers grow from layer to layer
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.uniform_(0.5, 2)
    spec = {
        "default": {"format": "mps", "rank": {"energy": 1.0}},
        "keep_dense": [],
        "include": ["depthwise", "subclasses"],
        "allow_larger": True,
    }
    small = tnc.compress(model, spec)
    assert not small.tncompress_plan.skipped
    example = zoo_table.inputs(family, name, model, torch.float64)
    wanted, found = zoo_table.outputs(model, example), zoo_table.outputs(small, example)
    assert len(found) == len(wanted) > 0
    for got, right in zip(found, wanted, strict=True):
        assert got.shape == right.shape
        scale = float(right.double().abs().max()) if right.numel() else 0.0
        assert bool(((got - right).abs() <= 1e-8 * scale).all())


@pytest.mark.parametrize("format", zoo_table.FORMATS)
@pytest.mark.parametrize(("family", "name"), params(MODELS))
def test_every_model_is_compressed_and_runs(family, name, format, pytestconfig):
    largest = pytestconfig.getoption("--largest")
    if num_params(zoo_table.build_meta(family, name)) > 1e6 * largest:
        pytest.skip(f"more than {largest:g} million parameters")
    done = zoo_table.run(family, name, format)
    assert done["largest_term"] <= 10


@pytest.mark.zoo
def test_terms_of_cp_stay_small_on_every_kernel_of_the_zoo():
    """Random kernels of each shape at a quarter of the parameters, those of at most 12 million entries."""
    shapes = [shape for shape in zoo_table.kernel_shapes(MODELS) if math.prod(shape) <= 12e6]
    assert len(shapes) > 300
    for groups, *shape in shapes:
        rank = min(math.prod(shape) // (4 * sum(shape)), *tnc.CP().max_ranks(tuple(shape)))
        kernels = torch.randn(groups, *shape, generator=torch.Generator().manual_seed(0))
        fit = tnc.CP().fit_groups(kernels, (max(1, rank),))
        assert all(bool(factor.isfinite().all()) for factor in fit.factors)
        assert fit.rel_error <= 1
        assert zoo_table.largest_term(tnc.CP(), fit.factors, kernels) <= 10, (groups, *shape)
