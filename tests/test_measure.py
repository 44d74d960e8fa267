"""Figures against cases whose answer is known."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tncompress as tnc
from tncompress.measure import (
    bytes_on_disk,
    device_of,
    evaluate,
    latencies,
    macs,
    num_params,
    peak_memory,
    peak_training_memory,
    recovery,
)
from tncompress.running import call_model, eval_mode


def test_accuracy_and_loss_are_exact():
    model = nn.Identity()
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    labels = torch.tensor([0, 0, 0])
    loader = DataLoader(TensorDataset(logits, labels), batch_size=2)
    found = evaluate(model, loader)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    assert found.samples == 3


def test_no_images_and_no_labels_are_errors():
    with pytest.raises(ValueError, match="labelled batches"):
        evaluate(nn.Identity(), [])
    for unlabelled in (torch.randn(2, 3), [torch.randn(2, 3)], {"image": torch.randn(2, 3)}):
        with pytest.raises(ValueError, match=r"^wanted batches \(inputs, labels\) .* without labels$"):
            evaluate(nn.Identity(), [unlabelled])


def test_a_batch_may_be_a_mapping():
    logits, labels = torch.eye(3), torch.tensor([0, 1, 0])
    pairs, mappings = [(logits, labels)], [{"image": logits, "label": labels}]
    assert evaluate(nn.Identity(), mappings) == evaluate(nn.Identity(), pairs)


def test_evaluation_leaves_the_mode_alone():
    model = nn.Sequential(nn.Dropout(0.5), nn.Flatten())
    model[0].eval()
    model.train(True)
    model[0].eval()
    evaluate(model, [(torch.randn(2, 3), torch.tensor([0, 1]))])
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.9, 1.0), (0.5, 0.0), (0.7, 0.5), (0.4, -0.25)])
def test_recovery(accuracy, expected):
    assert recovery(accuracy, truncated=0.5, dense=0.9) == pytest.approx(expected)


def test_nothing_lost_has_no_recovery():
    assert recovery(0.9, truncated=0.9, dense=0.9) is None
    assert recovery(0.9, truncated=0.95, dense=0.9) is None


def test_macs_of_a_convolution_and_a_linear_layer():
    conv = nn.Conv2d(3, 8, 3, padding=1, stride=2, groups=1)
    assert macs(conv, torch.randn(2, 3, 8, 8)) == 2 * 4 * 4 * 8 * 27
    assert macs(nn.Linear(5, 7), torch.randn(4, 5)) == 4 * 35
    assert macs(nn.Conv2d(4, 8, 3, groups=2), torch.randn(1, 4, 5, 5)) == 9 * 8 * 2 * 9


def test_peak_memory_of_a_chain():
    pixels = 50 * 50
    chain = nn.Sequential(*[nn.Conv2d(4, 4, 1, bias=False) for _ in range(6)])
    assert peak_memory(chain, torch.randn(1, 4, 50, 50)) == 4 * (6 * 16 + 3 * 4 * pixels)
    wide = nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.Conv2d(16, 2, 1, bias=False))
    assert peak_memory(wide, torch.randn(1, 4, 50, 50)) == 4 * (64 + 32 + (4 + 16 + 2) * pixels)


def test_memory_that_is_given_back_is_not_counted_again():
    """Small tensors come and go before the large one, whose storage may stand where theirs did."""
    widths = [1, 1, 2, 1, 8, 32, 1]
    chain = nn.Sequential(
        *[nn.Conv2d(a, b, 1, bias=False) for a, b in zip([4, *widths], widths, strict=False)]
    )
    parameters = sum(p.numel() for p in chain.parameters())
    assert peak_memory(chain, torch.randn(1, 4, 50, 50)) == 4 * (parameters + (4 + 8 + 32) * 2500)
    again = nn.Sequential(*[nn.ReLU() for _ in range(9)])
    assert peak_memory(again, torch.randn(100)) == 3 * 400
    assert peak_memory(nn.Sequential(*[nn.ReLU(inplace=True) for _ in range(9)]), torch.randn(100)) == 400


def test_training_keeps_every_activation_until_its_backward_pass():
    def chain(depth):
        convs = [nn.Conv2d(4, 4, 1, bias=False) for _ in range(depth)]
        return nn.Sequential(*convs, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    x, y = torch.randn(2, 4, 50, 50), torch.tensor([0, 3])
    few, many = (peak_training_memory(chain(depth), x, y) for depth in (5, 15))
    activation = 4 * x.numel()
    assert 10 * activation <= many - few <= 10 * (activation + 2 * 4 * 16) + 1000
    assert few > peak_memory(chain(5), x) + 3 * activation
    model = chain(3)
    peak_training_memory(model, x, y)
    assert all(p.grad is None for p in model.parameters())
    assert not model[3].running_mean.any()


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_file(tmp_path, tied):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    if tied:
        model[2].weight = model[1].weight
    tnc.save_weights(model, tmp_path / "w.safetensors")
    assert bytes_on_disk(model) == (tmp_path / "w.safetensors").stat().st_size
    assert num_params(model) == sum(p.numel() for p in set(model.parameters()))


def test_a_slower_model_is_measured_slower():
    x = torch.randn(1, 16, 32, 32)
    fast = nn.Conv2d(16, 16, 1)
    slow = nn.Sequential(*[nn.Conv2d(16, 16, 5, padding=2) for _ in range(6)])
    found = latencies([fast, slow, fast], x, seconds=0.3)
    assert found[0].median * 3 < found[1].median
    assert 0.3 < found[0].median / found[2].median < 3
    assert all(latency.iqr >= 0 and latency.runs >= 10 for latency in found)


def test_measuring_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 6, 6)
    tnc.report(model, model, example_inputs=x, seconds=0.02)
    assert model.training
    assert model[1].training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inputs_are_a_tensor_a_tuple_or_a_mapping():
    class Sum(nn.Module):
        def forward(self, a, b=1):
            return a + b

    x = torch.ones(2)
    assert torch.equal(call_model(Sum(), x), x + 1)
    assert torch.equal(call_model(Sum(), (x, x)), x + x)
    assert torch.equal(call_model(Sum(), {"a": x, "b": 5}), x + 5)


def test_an_error_of_the_model_tells_the_inputs():
    model = nn.Conv2d(1, 4, 3)
    for inputs in (torch.zeros(2, 3, 8, 8), (torch.zeros(2, 3, 8, 8),), {"input": torch.zeros(2, 3, 8, 8)}):
        with pytest.raises(RuntimeError) as caught:
            call_model(model, inputs)
        assert caught.value.__notes__ == ["while Conv2d was run on torch.float32 (2, 3, 8, 8)"]


def test_eval_mode_ends_also_on_an_error():
    model = nn.Sequential(nn.Dropout())
    seen = []

    def fail():
        with eval_mode(model):
            seen.append((model[0].training, torch.is_grad_enabled()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [(False, False)]
    assert model[0].training
    assert torch.is_grad_enabled()


def test_the_device_is_that_of_the_parameters():
    assert device_of(nn.Identity()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
