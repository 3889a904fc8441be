"""The loss of conversations: over the tokens of answers only, with the number of right ones.

Shape suffixes: B samples, T positions, N tokens that are learnt, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.tasks.causal_lm import CausalLmModule
from shardyard_trainer.tasks.losses import IGNORED, LOSS_CHUNK, LossLinear, chunked_cross_entropy
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import ModuleOutput

_LONGEST_EXPONENT = 700.0


class AnswerLinear(LossLinear):
    """An output layer that also counts the targets that are the likeliest token, in its forward pass."""

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None, counts: bool = False) -> Any:
        """As LossLinear; with `counts` the loss and the number of `targets` [N] that are the likeliest."""
        if targets is None or not counts:
            return super().forward(hidden, targets)
        parts = [slice(first, first + LOSS_CHUNK) for first in range(0, len(targets), LOSS_CHUNK)]
        right = [_num_right(F.linear(hidden[part], self.weight, self.bias), targets[part]) for part in parts]
        return chunked_cross_entropy(hidden, self.weight, self.bias, targets), torch.stack(right).sum()


class AnswerModule(CausalLmModule):
    """Next-token prediction of answers; logits are computed only where there is a label."""

    def __init__(self, model: Any, *, plain_output_layer: bool) -> None:
        super().__init__(model, plain_output_layer=plain_output_layer)
        if self._is_chunked:
            model.get_output_embeddings().__class__ = AnswerLinear

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        return_outputs: bool = False,
        return_scores: bool = False,
    ) -> ModuleOutput:
        """`labels` [B, T] are the next tokens, IGNORED where none is learnt. The outputs have `num_right`."""
        is_target_BT = labels != IGNORED
        targets_N = labels[is_target_BT]
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if return_scores:
            return self.compared(inputs, labels)
        if self._is_chunked:
            hidden_ND = self.backbone(**inputs).last_hidden_state[is_target_BT]
            layer = self.model.get_output_embeddings()
            if not return_outputs:
                return ModuleOutput(layer(hidden_ND, targets_N), None)
            loss, right = layer(hidden_ND, targets_N, counts=True)
        else:
            logits_NV = self.model(**inputs).logits[is_target_BT].float()
            loss = F.cross_entropy(logits_NV, targets_N, reduction="sum")
            right = _num_right(logits_NV, targets_N)
        return ModuleOutput(loss, {"num_right": right} if return_outputs else None)


def _num_right(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return (logits_NV.argmax(-1) == targets_N).sum()


class AnswerMetrics(LossSum):
    """`loss` (nats a token), `perplexity` and `token_accuracy`, over the tokens of answers."""

    def __init__(self) -> None:
        super().__init__()
        self._right: list[torch.Tensor] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        self._right.append(output.outputs["num_right"].detach())

    def part(self) -> Any:
        """Sums of the loss, of the tokens, and of those that are right."""
        return *super().part(), int(torch.stack(self._right).sum()) if self._right else 0

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        loss = self.mean(parts)
        accuracy = sum(part[2] for part in parts) / max(1, sum(part[1] for part in parts))
        return {"loss": loss, "perplexity": math.exp(min(loss, _LONGEST_EXPONENT)), "token_accuracy": accuracy}

    def directions(self) -> Mapping[str, int]:
        """Less loss or perplexity is better, and more right tokens."""
        return {**super().directions(), "perplexity": -1, "token_accuracy": 1}
