"""Ranks among all items: as they are by hand, with ties against the target, and nothing seen or padded in the list."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shardyard_trainer.tasks.losses import LOSS_CHUNK
from shardyard_trainer.tasks.ranking import RankingLinear, ranks_of

NAN = math.nan
# Scores of the padding and four items, the target, what was seen, and the target's rank.
CASES = [
    ([9, 4, 3, 2, 1], 1, [], 1),
    ([9, 4, 3, 2, 1], 4, [], 4),
    ([9, 4, 3, 2, 1], 4, [1, 2], 2),
    ([9, 4, 3, 2, 1], 4, [1, 1, 0], 3),
    ([0, 2, 2, 2, 2], 3, [], 4),
    ([0, 2, 2, 2, 2], 3, [1], 3),
    ([9, 4, 3, 2, 1], 1, [1], 5),
    ([0, NAN, 3, 2, 1], 2, [], 2),
    ([0, NAN, NAN, NAN, NAN], 2, [], 5),
]


@pytest.mark.parametrize(("scores", "target", "seen", "rank"), CASES)
def test_a_target_has_its_place_among_all_items(scores: list[float], target: int, seen: list[int], rank: int) -> None:
    logits = torch.tensor([scores], dtype=torch.float32)
    found = ranks_of(logits, torch.tensor([target]), torch.tensor([seen], dtype=torch.long))
    assert found.tolist() == [rank]


def test_ranks_and_loss_of_many_targets_are_those_of_one_computation_of_all_logits() -> None:
    generator = torch.Generator().manual_seed(3)
    size, width, vocabulary = 2 * LOSS_CHUNK + 7, 8, 50
    layer = torch.nn.Linear(width, vocabulary)
    hidden = torch.randn(size, width, generator=generator)
    targets = torch.randint(1, vocabulary, (size,), generator=generator)
    seen = torch.randint(0, vocabulary, (size, 5), generator=generator)
    logits = layer(hidden)
    wanted_loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    by_hand = []
    for row, target, had in zip(logits.detach().numpy(), targets.tolist(), seen.tolist(), strict=True):
        free = [item for item in range(1, vocabulary) if item not in had]
        better = sum(row[item] >= row[target] for item in free)
        by_hand.append(better if target in free else vocabulary)
    layer.__class__ = RankingLinear
    with torch.no_grad():
        losses, ranks = layer(hidden, targets, seen)
    assert np.array_equal(ranks.numpy(), by_hand)
    assert float(losses.sum()) == pytest.approx(float(wanted_loss.detach()), rel=1e-5)
