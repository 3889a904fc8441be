"""The chunked cross-entropy is the plain one, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shardyard_trainer.tasks.losses import IGNORED, LossLinear, chunked_cross_entropy


@pytest.mark.parametrize("num_tokens", [1, 255, 256, 700])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_chunked_loss_and_its_gradients_are_those_of_torch(num_tokens: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 97, bias=with_bias).double()
    hidden = torch.randn(num_tokens, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 97, (num_tokens,))
    targets[::5] = IGNORED
    expected = F.cross_entropy(layer(hidden), targets, ignore_index=IGNORED, reduction="sum")
    wanted = torch.autograd.grad(0.25 * expected, [hidden, *layer.parameters()])

    loss = chunked_cross_entropy(hidden, layer.weight, layer.bias, targets)
    found = torch.autograd.grad(0.25 * loss, [hidden, *layer.parameters()])

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_an_output_layer_gives_logits_without_targets_and_the_loss_with_them() -> None:
    layer = nn.Linear(8, 11, bias=False)
    names = list(dict(layer.named_parameters()))
    layer.__class__ = LossLinear
    hidden, targets = torch.randn(5, 8), torch.tensor([0, 1, 2, IGNORED, 10])

    assert layer(hidden).shape == (5, 11)
    expected = F.cross_entropy(layer(hidden), targets, ignore_index=IGNORED, reduction="sum")
    assert layer(hidden, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert list(dict(layer.named_parameters())) == names


def test_without_gradients_none_is_computed() -> None:
    weight = nn.Parameter(torch.randn(11, 8))
    with torch.no_grad():
        loss = chunked_cross_entropy(torch.randn(5, 8), weight, None, torch.arange(5))
    assert not loss.requires_grad


def test_positions_without_a_target_give_a_loss_of_zero() -> None:
    weight = nn.Parameter(torch.randn(11, 8))
    loss = chunked_cross_entropy(torch.randn(5, 8), weight, None, torch.full((5,), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None and not weight.grad.any()
