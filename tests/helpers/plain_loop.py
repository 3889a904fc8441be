"""The training loop of transformers' own examples: AdamW, a linear schedule with warm-up, clipped gradients."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from transformers import get_linear_schedule_with_warmup

Row = TypeVar("Row")


def fit(
    net: torch.nn.Module,
    rows: Sequence[Row],
    loss_of: Callable[[list[Row]], torch.Tensor],
    *,
    epochs: int,
    learning_rate: float,
    batch: int,
    seed: int,
) -> None:
    """Trains a model on rows in random order; `loss_of` is the mean loss of some of them."""
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    steps = epochs * (len(rows) // batch)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    draw = random.Random(seed)
    net.train()
    for _ in range(epochs):
        order = draw.sample(range(len(rows)), len(rows))
        for start in range(0, len(rows) - batch + 1, batch):
            loss_of([rows[at] for at in order[start : start + batch]]).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    net.eval()
