"""Detects a run that does not learn: its loss stays at the start, or at the level that frequencies alone give."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

FIRST_STEPS = 8
COUNTED_LABELS = 200_000
LEAST_STEPS = 40
MARGIN = 0.98


class LearningWatch:
    """Judges once, when half of the run and its warm-up are over. Its state is JSON and belongs in a checkpoint.

    `knows_labels`: the loss is that of the labels alone, and so compares with what their frequencies give.
    """

    def __init__(
        self, *, total_steps: int, warmup_steps: int, state: dict[str, Any], knows_labels: bool = True
    ) -> None:
        self._knows_labels = knows_labels
        self._judged_at = max(total_steps // 2, warmup_steps, LEAST_STEPS)
        self._window = max(FIRST_STEPS, total_steps // 20)
        self._first: list[float] = list(state.get("first", []))
        self._recent: list[float] = list(state.get("recent", []))
        self._labels: Counter[int] = Counter({int(label): count for label, count in state.get("labels", {}).items()})
        self._num_labels = sum(self._labels.values())
        self._is_judged = bool(state.get("judged", False))

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs to judge as an undisturbed one does; JSON values only."""
        return {
            "first": self._first,
            "recent": self._recent,
            "labels": {str(label): count for label, count in self._labels.items()},
            "judged": self._is_judged,
        }

    def see_labels(self, inputs: dict[str, torch.Tensor]) -> None:
        """Counts the labels of a micro batch, up to a number that is enough for their entropy."""
        labels = inputs.get("labels", inputs.get("targets"))
        if not self._knows_labels or self._is_judged or self._num_labels >= COUNTED_LABELS or labels is None or labels.is_floating_point():
            return
        values, counts = torch.unique(labels[labels >= 0], return_counts=True)
        self._labels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self._num_labels = self._labels.total()

    def see_loss(self, step: int, loss: float) -> str | None:
        """Takes the mean loss of step `step`, counted from 1; returns a sentence once the run does not learn."""
        if self._is_judged or not math.isfinite(loss):
            return None
        if len(self._first) < FIRST_STEPS:
            self._first.append(loss)
        self._recent = [*self._recent[-self._window + 1 :], loss]
        if step < self._judged_at or len(self._recent) < self._window:
            return None
        self._is_judged = True
        return self._verdict(sum(self._recent) / len(self._recent))

    def _verdict(self, recent: float) -> str | None:
        first = sum(self._first) / len(self._first)
        if recent > first * MARGIN:
            return f"the loss is {recent:.4g} after half of the run and was {first:.4g} at its start"
        frequencies = self._entropy()
        if frequencies and recent > frequencies * MARGIN:
            return f"the loss is {recent:.4g} after half of the run; label frequencies alone give {frequencies:.4g}"
        return None

    def _entropy(self) -> float | None:
        """The entropy of the labels in nats, with Miller and Madow's correction for the few that were counted."""
        if self._num_labels == 0:
            return None
        total = self._num_labels
        entropy = -sum(count / total * math.log(count / total) for count in self._labels.values())
        return entropy + (len(self._labels) - 1) / (2 * total)
