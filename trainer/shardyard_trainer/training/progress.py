"""The numbers of every step: kept on the device until a log line is due, then added up over the ranks and reported."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shardyard_trainer.training.checkpoint import RunState
from shardyard_trainer.training.context import Context, Point
from shardyard_trainer.training.engine import StepResult

METRICS = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "loader_wait_s")


@dataclass(frozen=True)
class StepCounts:
    """The counts of one step's global batch, over all ranks."""

    units: float
    tokens: float
    positions: float


class StepTimes(NamedTuple):
    """Seconds that a step took on this rank, and those of them that it waited for its batch."""

    duration_s: float
    waited_s: float


@dataclass(frozen=True)
class _Step:
    step: int
    loss_sum: torch.Tensor
    grad_norm: float
    learning_rate: float
    counts: StepCounts
    times: StepTimes
    time_ns: int


class StepLog:
    """Records steps, and reports them at each `flush`, which is a collective."""

    def __init__(
        self,
        context: Context,
        *,
        total_steps: int,
        epochs_per_step: float,
        see_loss: Callable[[int, float], None],
        left_s: Callable[[int], float],
    ) -> None:
        """Rank 0 calls `see_loss` with every step and its mean loss per unit, and `left_s` with the newest step."""
        self._context = context
        self._total_steps = total_steps
        self._epochs_per_step = epochs_per_step
        self._see_loss = see_loss
        self._left_s = left_s
        self._steps: list[_Step] = []
        self.last_flush_s = time.monotonic()

    def record(
        self, state: RunState, result: StepResult, learning_rate: float, counts: StepCounts, times: StepTimes
    ) -> None:
        """Takes the step that `state` has just counted."""
        self._steps.append(
            _Step(state.step, result.loss_sum, result.grad_norm, learning_rate, counts, times, time.time_ns())
        )

    def flush(self, state: RunState) -> None:
        """Reports everything recorded since the last time."""
        self.last_flush_s = time.monotonic()
        steps, self._steps = self._steps, []
        if not steps:
            return
        gang = self._context.gang
        peaks = torch.zeros(gang.world_size, dtype=torch.float64, device=gang.device)
        peaks[gang.rank] = _peak_memory_bytes(gang.device)
        losses = torch.stack([step.loss_sum for step in steps]).double()
        sums = gang.sum_tensor(torch.cat([losses, peaks])).tolist()
        if gang.is_chief:
            self._report(state, steps, sums[: len(steps)], max(sums[len(steps) :]))

    def _report(self, state: RunState, steps: list[_Step], loss_sums: list[float], peak_bytes: float) -> None:
        losses = [loss / step.counts.units for loss, step in zip(loss_sums, steps, strict=True)]
        values = {
            "loss": losses,
            "learning_rate": [step.learning_rate for step in steps],
            "grad_norm": [step.grad_norm for step in steps],
            "tokens_per_s": [step.counts.tokens / max(step.times.duration_s, 1e-9) for step in steps],
            "loader_wait_s": [step.times.waited_s for step in steps],
        }
        self._context.measured({name: _points(steps, values[name]) for name in METRICS})
        self._progress(state, steps, loss_sums, peak_bytes)
        for step, loss in zip(steps, losses, strict=True):
            self._see_loss(step.step, loss)

    def _progress(self, state: RunState, steps: list[_Step], loss_sums: list[float], peak_bytes: float) -> None:
        duration_s = max(sum(step.times.duration_s for step in steps), 1e-9)
        positions = sum(step.counts.positions for step in steps)
        tokens = sum(step.counts.tokens for step in steps)
        finite = [(loss, step.counts.units) for loss, step in zip(loss_sums, steps, strict=True) if math.isfinite(loss)]
        self._context.progressed(
            state.step,
            total_steps=self._total_steps,
            data_epoch=state.step * self._epochs_per_step,
            loss=sum(loss for loss, _ in finite) / sum(units for _, units in finite) if finite else math.nan,
            learning_rate=steps[-1].learning_rate,
            grad_norm=steps[-1].grad_norm,
            tokens=state.tokens,
            tokens_per_s=tokens / duration_s,
            padding_share=1 - tokens / positions if positions else 0.0,
            peak_memory_bytes=int(peak_bytes),
            eta_s=self._left_s(state.step),
        )


def _points(steps: list[_Step], values: list[float]) -> list[Point]:
    return [Point(step.step, value, step.time_ns) for step, value in zip(steps, values, strict=True)]


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
