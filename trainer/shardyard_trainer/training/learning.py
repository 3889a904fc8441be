"""Detects a run that does not learn: its loss rises, or stays at the start or at what frequencies alone give."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

FIRST_STEPS = 8
COUNTED_LABELS = 200_000
LEAST_STEPS = 40
MARGIN = 0.98
RISE = 1.02
STILL = 0.995
"""A loss whose later half of a window is over this part of its earlier half does not fall."""

ERRORS = 3.0
"""Standard errors that a difference has to exceed, to be more than the noise of batches."""


class LearningWatch:
    """Judges when a tenth of the run is over, and again at its half; warm-up and first steps have to be over too.

    Early, only what is beyond doubt is said: a loss that rises, or one that no longer falls and is not under what
    frequencies give. It speaks once. Its state is JSON and belongs in a checkpoint.

    `knows_labels`: the loss is that of the labels alone, and so compares with what their frequencies give. `early` is
    the step of the first judgement.
    """

    def __init__(
        self, *, total_steps: int, warmup_steps: int, state: dict[str, Any], knows_labels: bool = True
    ) -> None:
        self.knows_labels = knows_labels
        self.early, half = (max(part, warmup_steps, LEAST_STEPS) for part in (total_steps // 10, total_steps // 2))
        self._judgements = ((self.early, self._early), (half, self._at_half))
        self._window = max(FIRST_STEPS, total_steps // 20)
        self._first: list[float] = list(state.get("first", []))
        self._recent: list[float] = list(state.get("recent", []))
        self._labels: Counter[int] = Counter({int(label): count for label, count in state.get("labels", {}).items()})
        self._num_labels = sum(self._labels.values())
        judged = state.get("judged", 0)
        # Of an earlier version: whether it had judged, which it did once.
        self._num_judged = len(self._judgements) * judged if isinstance(judged, bool) else int(judged)

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs to judge as an undisturbed one does; JSON values only."""
        return {
            "first": self._first,
            "recent": self._recent,
            "labels": {str(label): count for label, count in self._labels.items()},
            "judged": self._num_judged,
        }

    def see_labels(self, inputs: dict[str, torch.Tensor]) -> None:
        """Counts the labels of a micro batch, up to a number that is enough for their entropy."""
        labels = inputs.get("labels", inputs.get("targets"))
        if (
            not self.knows_labels
            or self._is_over
            or self._num_labels >= COUNTED_LABELS
            or labels is None
            or labels.is_floating_point()
        ):
            return
        values, counts = torch.unique(labels[labels >= 0], return_counts=True)
        self._labels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self._num_labels = self._labels.total()

    @property
    def _is_over(self) -> bool:
        return self._num_judged >= len(self._judgements)

    def see_loss(self, step: int, loss: float) -> str | None:
        """Takes the mean loss of step `step`, counted from 1; returns a sentence once the run does not learn."""
        if self._is_over or not math.isfinite(loss):
            return None
        if len(self._first) < FIRST_STEPS:
            self._first.append(loss)
        self._recent = [*self._recent[-self._window + 1 :], loss]
        due, judge = self._judgements[self._num_judged]
        if step < due or len(self._recent) < self._window:
            return None
        verdict = judge()
        self._num_judged = len(self._judgements) if verdict else self._num_judged + 1
        return verdict

    def see_answers(self, what: str, loss: float, num_samples: int) -> str | None:
        """Takes an early look at samples that were all answered alike, as `what` shows, and their mean loss."""
        frequencies = self._entropy()
        if self._is_over or not frequencies or not loss > frequencies * MARGIN:
            return None
        self._num_judged = len(self._judgements)
        return (
            f"after a tenth of the run it answers {num_samples} samples of the evaluation data alike ({what}), with a "
            f"loss of {loss:.4g}; label frequencies alone give {frequencies:.4g}"
        )

    def _early(self) -> str | None:
        first, recent = _mean(self._first), _mean(self._recent)
        if recent > RISE * first and recent - first > ERRORS * math.hypot(_error(self._first), _error(self._recent)):
            return f"the loss rises: it is {recent:.4g} after a tenth of the run and was {first:.4g} at its start"
        middle = len(self._recent) // 2
        falls = _mean(self._recent[middle:]) < STILL * _mean(self._recent[:middle])
        return None if falls else self._no_better_than_frequencies(recent, "a tenth")

    def _at_half(self) -> str | None:
        first, recent = _mean(self._first), _mean(self._recent)
        if recent > first * MARGIN:
            return f"the loss is {recent:.4g} after half of the run and was {first:.4g} at its start"
        return self._no_better_than_frequencies(recent, "half")

    def _no_better_than_frequencies(self, recent: float, part: str) -> str | None:
        frequencies = self._entropy()
        if not frequencies or recent <= frequencies * MARGIN:
            return None
        return f"the loss is {recent:.4g} after {part} of the run; label frequencies alone give {frequencies:.4g}"

    def _entropy(self) -> float | None:
        """The entropy of the labels in nats, with Miller and Madow's correction for the few that were counted."""
        if self._num_labels == 0:
            return None
        total = self._num_labels
        entropy = -sum(count / total * math.log(count / total) for count in self._labels.values())
        return entropy + (len(self._labels) - 1) / (2 * total)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _error(values: list[float]) -> float:
    """The standard error of the mean."""
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))
