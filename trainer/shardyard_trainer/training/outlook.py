"""How long a run still takes: from what its steps, evaluations, checkpoints and trial export have taken so far.

Kept on rank 0, whose clock decides.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_REMEMBERED_STEPS = 50
_EVALUATED_PART = 1 / 3
"""What evaluating a token costs of training on it, before that was measured: forward alone."""


@dataclass(frozen=True)
class Course:
    """What a run does: its steps, those between two evaluations, and the tokens of the evaluation data (0: none).

    `checkpoint_every` 0: after each tenth, but `apart_s` seconds apart.
    """

    total_steps: int
    evaluate_every: int
    evaluation_tokens: float
    checkpoint_every: int
    apart_s: float


class Outlook:
    """Takes durations in seconds, and says what is left."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._steps: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED_STEPS)
        self._has_warmed_up = False
        self._evaluation: tuple[float, float] | None = None
        self._checkpoint_s = 0.0
        self._export_s = 0.0

    def stepped(self, seconds: float, tokens: float) -> None:
        """One training step on that many tokens; what the first one of a process takes besides, no other takes."""
        if not self._has_warmed_up and self._steps:
            self._has_warmed_up = True
            self._steps.clear()
        self._steps.append((seconds, tokens))

    def evaluated(self, seconds: float, tokens: float) -> None:
        """An evaluation, of all samples or a part of them."""
        if tokens > 0:
            self._evaluation = (seconds, tokens)

    def saved(self, seconds: float) -> None:
        """A checkpoint."""
        self._checkpoint_s = seconds

    def exported(self, seconds: float) -> None:
        """The trial of the export."""
        self._export_s = seconds

    def left_s(self, step: int) -> float:
        """Seconds from after `step` to the end, the export included; 0 before any step."""
        if not self._steps:
            return 0.0
        trained_s = sum(seconds for seconds, _ in self._steps)
        tokens = sum(tokens for _, tokens in self._steps)
        steps_s = (self._course.total_steps - step) * trained_s / len(self._steps)
        spent_s, evaluated = self._evaluation or (_EVALUATED_PART * trained_s, max(tokens, 1.0))
        evaluations_s = self._evaluations_left(step) * spent_s / evaluated * self._course.evaluation_tokens
        return steps_s + evaluations_s + self._checkpoints_left(step, steps_s) * self._checkpoint_s + self._export_s

    def _evaluations_left(self, step: int) -> int:
        """Those at boundaries before the last step, and the final one."""
        every = self._course.evaluate_every
        return max((self._course.total_steps - 1) // every - step // every, 0) + 1 if every else 1

    def _checkpoints_left(self, step: int, steps_s: float) -> float:
        course = self._course
        left = course.total_steps - step
        if course.checkpoint_every:
            return left // course.checkpoint_every + 1
        return min(10 * left / course.total_steps, steps_s / course.apart_s) + 1
