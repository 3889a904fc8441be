"""Which evaluation of a run is the best one, and whether training ends before its last step.

Its state is JSON and belongs in each checkpoint, so that a resumed run decides as an undisturbed one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class SelectionPolicy:
    """How evaluations are compared; the task says whether more (`direction` 1) or less (-1) of the metric is better.

    `patience` counts evaluations in a row without an improvement by more than `min_delta`; 0: never ends early.
    """

    metric: str = "loss"
    direction: int = -1
    select_best: bool = False
    patience: int = 0
    min_delta: float = 0.0


class Evaluated(NamedTuple):
    """All metrics of the weights after `step`."""

    step: int
    metrics: dict[str, float]


class Selection:
    """Takes the evaluations of all samples in the order of steps; partial evaluations are not comparable.

    `seen` is the newest evaluation, `best` the best one, and of equal ones the first; None before there is one.
    """

    def __init__(self, policy: SelectionPolicy, *, state: dict[str, Any]) -> None:
        self._policy = policy
        self._bar: float | None = state.get("bar")
        self._without_improvement: int = state.get("without_improvement", 0)
        self.seen: Evaluated | None = Evaluated(*state["seen"]) if state.get("seen") else None
        self.best: Evaluated | None = _read(state["best"], policy.metric) if state.get("best") else None
        self._best_before: Evaluated | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state that a resume needs: JSON values only, whose floats are restored exactly."""
        return {
            "bar": self._bar,
            "without_improvement": self._without_improvement,
            "seen": self.seen,
            "best": self.best,
        }

    def see(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the evaluation of the weights after `step`; no metrics: nothing was evaluated."""
        if not metrics:
            return
        self.seen = Evaluated(step, metrics)
        value = self._value(metrics)
        if math.isfinite(value) and (
            self.best is None or self._score(value) > self._score(self._value(self.best.metrics))
        ):
            self._best_before, self.best = self.best, self.seen
        # Compare with the last improvement, not with the best value: small steps then add up to an improvement.
        if math.isfinite(value) and (
            self._bar is None or self._score(value) > self._score(self._bar) + self._policy.min_delta
        ):
            self._bar, self._without_improvement = value, 0
        else:
            self._without_improvement += 1

    def needs_checkpoint(self, step: int) -> bool:
        """Whether the weights after `step` may be exported, or are the last ones."""
        is_best = self.best is not None and self.best.step == step
        return (self._policy.select_best and is_best) or self.is_over

    def lose(self, step: int) -> None:
        """Forgets the weights after `step`, which could not be kept: the best ones before them count again."""
        if self.best is not None and self.best.step == step:
            self.best = self._best_before

    @property
    def is_over(self) -> bool:
        """Whether the patience is used up, so that training ends."""
        return 0 < self._policy.patience <= self._without_improvement

    def why_over(self, total_steps: int) -> str:
        """The message about a run that ends early."""
        policy, number = self._policy, self._without_improvement
        evaluations = f"{number} evaluations" if number > 1 else "one evaluation"
        by = f" by more than {policy.min_delta:g}" if policy.min_delta else ""
        best = self.best
        reached = (
            f"its best value is {self._value(best.metrics):.6g}, of step {best.step}" if best else "it is not finite"
        )
        ended = self.seen.step if self.seen else 0
        return (
            f"{policy.metric} did not improve{by} in {evaluations}: {reached}; training ends after step "
            f"{ended} of {total_steps}"
        )

    def metrics_at(self, step: int) -> dict[str, float]:
        """The metrics of the weights after `step` if that is the newest evaluation; none: it is not."""
        return self.seen.metrics if self.seen and self.seen.step == step else {}

    def _value(self, metrics: Mapping[str, float]) -> float:
        return metrics[self._policy.metric]

    def _score(self, value: float) -> float:
        return self._policy.direction * value


def _read(best: Sequence[Any], metric: str) -> Evaluated:
    """The best evaluation of a checkpoint; an earlier version kept its value alone, not all metrics."""
    step, found = best
    return Evaluated(step, found if isinstance(found, dict) else {metric: found})
