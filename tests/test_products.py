"""Products of float32 matrices: those of torch, by another library where that is faster."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tncompress import products
from tncompress.products import product

LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def either(request, monkeypatch):
    """Each test runs with oneDNN where there is one, whatever the processor, and without."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(products, "LEAST", 1)


def matrices(m, k, n, turned=(False, False), dtype=torch.float32):
    generator = torch.Generator().manual_seed(m + k + n)
    a, b = (torch.randn(*size, generator=generator, dtype=dtype) for size in ((m, k), (k, n)))
    return tuple(x.mT.contiguous().mT if turn else x for x, turn in zip((a, b), turned, strict=True))


@pytest.mark.parametrize("turned", LAYOUTS)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 500, 7), (70, 40, 1), (1, 64, 200), (130, 257, 65), (5, 0, 4)]
)
def test_it_is_the_product_in_every_layout(sizes, turned, either):
    a, b = matrices(*sizes, turned)
    found, exact = product(a, b), a.double() @ b.double()
    assert found.shape == exact.shape
    assert (found.double() - exact).norm() <= 1e-6 * float(a.norm() * b.norm())


@pytest.mark.parametrize("turned", LAYOUTS)
def test_parts_of_matrices_are_made_whole_for_the_other_library(turned, either, monkeypatch):
    a, b = (x[3:40, 5:42] for x in matrices(50, 50, 50, turned))
    seen = []
    real = torch.ops.mkldnn._linear_pointwise.default

    def spy(x, weight, *rest):
        seen.append(weight.is_contiguous() or weight.mT.is_contiguous())
        return real(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", spy)
    assert_close(product(a, b), a @ b, rtol=1e-4, atol=1e-4)
    assert all(seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_torchs_own(dtype, either):
    a, b = matrices(20, 30, 40, dtype=dtype)
    assert torch.equal(product(a, b), a @ b)


def test_a_long_sum_loses_no_more_than_torchs_own(either):
    a = torch.rand(16, 200_000)
    exact = a.double() @ a.double().mT
    assert (product(a, a.mT).double() - exact).norm() <= 2e-6 * exact.norm()


def test_stacks_and_vectors_are_taken_as_torch_takes_them(either):
    a, b = torch.randn(3, 5, 6), torch.randn(3, 6, 4)
    assert_close(product(a, b), a @ b)
    assert_close(product(a[:1], b[:1]), a[:1] @ b[:1])
    assert_close(product(a, b[0]), a @ b[0])
    assert_close(product(a[0], b[0, :, 0]), a[0] @ b[0, :, 0])


def test_gradients_pass_and_operations_are_counted(either):
    a, b = (x.requires_grad_() for x in matrices(20, 30, 40))
    product(a, b).sum().backward()
    assert_close(a.grad, b.detach().sum(1).expand(20, 30))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        product(a, b)
    assert counter.get_total_flops() == 2 * 20 * 30 * 40


def test_sizes_that_do_not_fit_are_torchs_error(either):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        product(torch.randn(4, 5), torch.randn(6, 4))


def test_without_the_other_library_it_is_torchs(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operator")

    products._onednn_is_faster.cache_clear()
    monkeypatch.setattr("torch.ops.mkldnn._linear_pointwise", missing, raising=False)
    try:
        assert not products._onednn_is_faster()
        a, b = matrices(200, 200, 200)
        assert torch.equal(product(a, b), a @ b)
    finally:
        products._onednn_is_faster.cache_clear()
