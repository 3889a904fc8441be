"""The learning rate of every step: a pure function of the step, so that a resume needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up to `peak`, then `kind` (`linear`, `cosine` or `constant`) down to `minimum`."""

    kind: str
    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """The rate of step `step`, counted from 0. No step has rate 0 but if `peak` is: none is wasted."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        left = (self.total_steps - step) / max(self.total_steps - self.warmup_steps, 1)
        if self.kind == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
        return self.minimum + (self.peak - self.minimum) * left
