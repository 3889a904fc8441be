"""Cross-entropy over a large vocabulary that never holds all logits.

Shape suffixes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

IGNORED = -100
"""The target of positions without a label, as in torch's cross-entropy."""

LOSS_CHUNK = 256
"""The number of positions whose logits are in memory at once."""


class LossLinear(nn.Linear):
    """A language model's output layer that can also compute the loss.

    An instance of `nn.Linear` becomes one by setting its class: its parameters, names and hooks stay. The loss is made
    inside this layer's forward pass because ZeRO-3 gathers the weight only there.
    """

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits; or with `targets` [N] the sum of the cross-entropy, fp32, for `hidden` [N, D]."""
        if targets is None:
            return super().forward(hidden)
        return chunked_cross_entropy(hidden, self.weight, self.bias, targets)


class SmoothedLinear(LossLinear):
    """The same for encoder-decoders, some of which keep a bias apart, and with label smoothing."""

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """As above; `bias` [V] is the layer's if it has none, `smoothing` is as in `chunked_cross_entropy`."""
        if targets is None:
            return super().forward(hidden)
        own = bias if self.bias is None else self.bias
        return chunked_cross_entropy(hidden, self.weight, own, targets, smoothing)


def chunked_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Sum of the cross-entropy over positions whose target is not `IGNORED`, fp32.

    Logits are made for 256 positions at a time; the gradient is computed in the same pass, so that none is stored.
    `smoothing` is the probability spread evenly over the vocabulary, as in torch's own (Szegedy et al., 2016).
    """
    with_gradient = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets_N, with_gradient, smoothing
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes them by position
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        with_gradient: bool,
        smoothing: float,
    ) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        if with_gradient:
            grad_hidden = torch.empty_like(hidden_ND)
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            grad_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for first in range(0, len(targets_N), LOSS_CHUNK):
            part = slice(first, first + LOSS_CHUNK)
            hidden, targets = hidden_ND[part], targets_N[part]
            logits = F.linear(hidden, weight_VD, bias_V).float()
            counts, places = (targets != IGNORED)[:, None], targets.clamp(min=0)[:, None]
            wanted = (1 - smoothing) * logits.gather(1, places)
            if smoothing:
                wanted += smoothing * logits.mean(1, keepdim=True)
            # Both the loss and its gradient from one exp, in place: on a CPU that is what costs beside the products.
            largest = logits.amax(1, keepdim=True)
            exps = logits.sub_(largest).exp_()
            total = exps.sum(1, keepdim=True)
            loss += (total.log() + largest - wanted).mul(counts).sum()
            if with_gradient:
                # The gradient with respect to the logits: softmax minus the wanted probabilities.
                error = exps.div_(total)
                error.scatter_add_(1, places, torch.full_like(total, smoothing - 1.0))
                if smoothing:
                    error -= smoothing / error.shape[1]
                error = error.mul_(counts).to(weight_VD.dtype)
                grad_hidden[part] = error @ weight_VD
                _accumulate(grad_weight, error, hidden)
                if grad_bias is not None:
                    grad_bias += error.sum(0)
        if with_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype), grad_bias)
            ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        # In place: nothing else holds these tensors, and the weight's gradient is the largest of the step.
        bias = None if grad_bias is None else grad_bias.mul_(grad).to(ctx.bias_dtype)
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), bias, None, None, None


class TokenLossLinear(LossLinear):
    """The same with a loss for each token, for what is more than their sum."""

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits; or with `targets` [N] the cross-entropy of each of `hidden` [N, D], fp32."""
        if targets is None:
            return super().forward(hidden)
        losses: torch.Tensor = _ChunkedTokenLosses.apply(hidden, self.weight, self.bias, targets)  # type: ignore[no-untyped-call]
        return losses


class _ChunkedTokenLosses(torch.autograd.Function):
    """The cross-entropy of each token; the backward pass makes the logits again, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
    ) -> torch.Tensor:
        parts = _chunks(len(targets_N))
        losses = [
            F.cross_entropy(F.linear(hidden_ND[part], weight_VD, bias_V).float(), targets_N[part], reduction="none")
            for part in parts
        ]
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        return torch.cat(losses) if losses else hidden_ND.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        with_weight, with_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if with_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if with_bias else None
        for part in _chunks(len(targets_N)):
            # The gradient with respect to the logits: softmax minus the target's one.
            error = F.linear(hidden_ND[part], weight_VD, bias_V).float().softmax(-1)
            error.scatter_add_(1, targets_N[part, None], torch.full_like(error[:, :1], -1.0))
            error = error.mul_(grad_N[part, None]).to(weight_VD.dtype)
            grad_hidden[part] = error @ weight_VD
            if grad_weight is not None:
                _accumulate(grad_weight, error, hidden_ND[part])
            if grad_bias is not None:
                grad_bias += error.sum(0)
        weight = None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        return grad_hidden, weight, None if grad_bias is None else grad_bias.to(bias_V.dtype), None


def _chunks(number: int) -> list[slice]:
    return [slice(first, first + LOSS_CHUNK) for first in range(0, number, LOSS_CHUNK)]


def _accumulate(total_VD: torch.Tensor, error_NV: torch.Tensor, hidden_ND: torch.Tensor) -> None:
    if error_NV.dtype == torch.float32:
        total_VD.addmm_(error_NV.T, hidden_ND)
    else:
        total_VD += (error_NV.T @ hidden_ND).float()
