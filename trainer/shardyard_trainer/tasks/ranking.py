"""Ranks of targets among all items, and hit rate, NDCG and MRR at 10; never over sampled negatives.

Shape suffixes: N targets, D width, V tokens (the padding and all items), S items seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.items import PADDING
from shardyard_trainer.inputs.next_items import TargetSamples
from shardyard_trainer.tasks.losses import LOSS_CHUNK, LossLinear
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import ModuleOutput

CUT = 10
"""The length of the list that the metrics look at."""


class RankingLinear(LossLinear):
    """An output layer that also computes the ranks of targets, in its forward pass like the loss."""

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, seen: torch.Tensor | None = None
    ) -> Any:
        """As LossLinear; with `seen` [N, S] losses and ranks [N] of `targets` [N]."""
        if targets is None or seen is None:
            return super().forward(hidden, targets)
        weights = (self.weight.float(), self.bias.float() if self.bias is not None else None)
        parts = [slice(first, first + LOSS_CHUNK) for first in range(0, len(targets), LOSS_CHUNK)]
        found = [
            # In fp32 whatever the training precision: in half precision, different scores would tie.
            losses_and_ranks(F.linear(hidden[part].float(), *weights), targets[part], seen[part])
            for part in parts
        ]
        return torch.cat([losses for losses, _ in found]), torch.cat([ranks for _, ranks in found])


def losses_and_ranks(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, seen_NS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy and the place of each target. Of the logits, in their memory, what was seen is lost."""
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    return losses_N, ranks_of(logits_NV, targets_N, seen_NS)


def ranks_of(logits_NV: torch.Tensor, targets_N: torch.Tensor, seen_NS: torch.Tensor) -> torch.Tensor:
    """The rank of each target, from 1: after every item with the same score, and last if it is among `seen`.

    The padding and the seen items have no rank.
    """
    logits_NV = without_seen(logits_NV, seen_NS)
    of_target_N1 = logits_NV.gather(1, targets_N[:, None])
    # Written as "not less", so that an item whose score is NaN ranks before the target.
    ranks_N = (~(logits_NV < of_target_N1)).sum(1)
    return torch.where(of_target_N1.squeeze(1) == -math.inf, logits_NV.shape[1], ranks_N)


def without_seen(logits_NV: torch.Tensor, seen_NS: torch.Tensor) -> torch.Tensor:
    """Excludes the padding and the tokens of `seen` from the logits, in place."""
    logits_NV[:, PADDING] = -math.inf
    return logits_NV.scatter_(1, seen_NS, -math.inf)


class RankingMetrics(LossSum):
    """`loss`, `hr_10`, `ndcg_10` and `mrr_10`, and the first two of the list of the most frequent items for all.

    `popular_ranks` returns the ranks of all targets in that list; it is called only when metrics are computed.
    `is_test` marks the targets of the test, whose metrics are separate, as `test_hr_10` and so on.
    """

    def __init__(
        self, targets: TargetSamples, popular_ranks: Callable[[], np.ndarray], *, is_test: np.ndarray | None = None
    ) -> None:
        super().__init__()
        self._targets = targets
        self._popular_ranks = popular_ranks
        self._is_test = is_test
        self._losses: list[torch.Tensor] = []
        self._ranks: list[torch.Tensor] = []
        self._samples: list[int] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        self._losses.append(output.outputs["losses"].detach())
        self._ranks.append(output.outputs["ranks"].detach())
        self._samples += batch.samples

    def part(self) -> Any:
        """Sums of loss and targets, the ranks and losses, and which targets they are of."""
        ranks = torch.cat(self._ranks).cpu().numpy() if self._ranks else np.zeros(0, np.int64)
        losses = torch.cat(self._losses).double().cpu().numpy() if self._losses else np.zeros(0)
        return *super().part(), ranks, losses, np.asarray(self._samples, np.int64)

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        ranks, losses, samples = (np.concatenate([part[at] for part in parts]) for at in (2, 3, 4))
        popular = self._popular_ranks()[samples]
        if self._is_test is None:
            # Items unknown to training are never recommended.
            total = len(ranks) + self._targets.num_unknown
            return {"loss": self.mean(parts), **_ranking(ranks, popular, total)}
        test = self._is_test[samples]
        of_test = _ranking(ranks[test], popular[test], int(test.sum()))
        return {
            "loss": float(losses[~test].sum() / max(int((~test).sum()), 1)),
            **_ranking(ranks[~test], popular[~test], int((~test).sum())),
            **{f"test_{name}": value for name, value in of_test.items()},
        }

    def directions(self) -> Mapping[str, int]:
        """The loss, and the metrics of ranks."""
        return {**super().directions(), "hr_10": 1, "ndcg_10": 1, "mrr_10": 1}


def _ranking(ranks: np.ndarray, popular: np.ndarray, total: int) -> dict[str, float]:
    """Of the model's ranks, and of those in one list for all."""
    of_popular = {f"popular_{name}": value for name, value in _at_cut(popular, total).items()}
    return {**_at_cut(ranks, total), "mrr_10": _mean(1 / ranks, ranks, total), **of_popular}


def _at_cut(ranks: np.ndarray, total: int) -> dict[str, float]:
    return {"hr_10": _mean(np.ones(len(ranks)), ranks, total), "ndcg_10": _mean(1 / np.log2(ranks + 1), ranks, total)}


def _mean(values: np.ndarray, ranks: np.ndarray, total: int) -> float:
    return float(values[ranks <= CUT].sum() / max(total, 1))


def is_no_better_than_popular(metrics: Mapping[str, float]) -> bool:
    """Whether one list for all users finds as many targets."""
    return "hr_10" in metrics and metrics["hr_10"] <= metrics["popular_hr_10"]
