"""The gradient norm that stage 0 clips with."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from shardyard_trainer.training.engine import gradient_norm


def exact(gradients: list[torch.Tensor]) -> float:
    return float(torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt())


def test_the_norm_is_exact_for_gradients_whose_fp32_norm_is_not() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(30522, 384) * torch.rand(30522, 1) ** 8
    gradients = [embedding, torch.randn(7), torch.randn(1536, 384) * 1e-3, torch.randn(384, 32).t()]
    assert abs(gradient_norm(gradients) / exact(gradients) - 1) < 1e-7


def test_what_is_not_finite_is_not_finite() -> None:
    for value in (torch.nan, torch.inf):
        assert not torch.isfinite(torch.tensor(gradient_norm([torch.ones(5), torch.tensor([1.0, value])])))
