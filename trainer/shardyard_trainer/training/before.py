"""What the model gave before training, for tasks that compare with it: measured once, by the engine that trains.

No second model is kept: memory and checkpoints are those of any other task, at every ZeRO stage and with adapters. The
job's folder keeps the numbers, so a resumed attempt compares with the same ones.
"""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from shardyard_trainer.inputs.base import ComparedSamples
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.training.config import TrainConfig
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.evaluate import Evaluator, evaluation_order, refs, turns
from shardyard_trainer.training.order import Order

FILE = "before-training.npz"
PHASE = "reference"
REPORT_S = 60.0
"""The longest time without a report: the service ends a start that says nothing for long."""


def compare_with_before(
    context: Context,
    engine: Evaluator,
    task: Prepared,
    order: Order,
    config: TrainConfig,
    *,
    entered: Callable[[str], None] = lambda phase: None,
) -> bool:
    """Gives a task's samples what the engine's model gives for them, or what the job's folder has. A collective.

    The engine has the weights that the training begins with. Of the training samples only those are measured that the
    run comes to. Nothing is done for a task that compares nothing. False if a directive stopped it; then nothing is
    kept, and a later attempt starts over. `entered` is called with the phase if there is something to measure.
    """
    splits = [each for each in (task.train, task.eval) if isinstance(each, ComparedSamples)]
    if not splits:
        return True
    path = Path(context.attempt.job_dir or context.attempt.attempt_dir, FILE)
    known = context.gang.from_chief(_read(path, splits) if context.gang.is_chief else None)
    if known is None:
        entered(PHASE)
        rows = [_used(order, config.total_steps), None]
        orders = [evaluation_order(samples, chosen) for samples, chosen in zip(splits, rows, strict=False)]
        measuring = _Measuring(context, engine, config.micro_batch_size, total=sum(map(len, orders)))
        known = []
        for samples, chosen in zip(splits, orders, strict=True):
            values = measuring.measure(samples, chosen)
            if values is None:
                return False
            known.append(values)
        if context.gang.is_chief:
            _write(path, known)
    for samples, values in zip(splits, known, strict=True):
        samples.take_before(values)
    return True


def _used(order: Order, total_steps: int) -> np.ndarray | None:
    """The training samples that a run comes to; None: all of them."""
    if total_steps * order.batch_size >= order.num_samples:
        return None
    return np.unique(np.concatenate([order.global_batch(step).samples for step in range(total_steps)]))


class _Measuring:
    """Measures splits one after the other; says how far it is, and ends early if a directive asks for it."""

    def __init__(self, context: Context, engine: Evaluator, micro_batch_size: int, *, total: int) -> None:
        self._context = context
        self._engine = engine
        self._micro_batch_size = micro_batch_size
        self._total = total
        self._made = 0
        self._report(0)

    def measure(self, samples: ComparedSamples, order: np.ndarray) -> np.ndarray | None:
        """The compared output of some samples, float32 [num_samples, n], NaN for the others; None if it is stopped."""
        engine, gang = self._engine, self._context.gang
        found: list[tuple[np.ndarray, np.ndarray]] = []
        with engine.evaluating():
            for made, turn in enumerate(turns(self._context, engine, order, self._micro_batch_size), 1):
                if turn is not None:
                    outputs = engine.evaluate(engine.to_device(samples.micro_batch(refs(turn.samples)))).outputs
                    assert outputs is not None
                    if not turn.is_dummy:
                        found.append((turn.samples, outputs[samples.compared].float().cpu().numpy()))
                # Only rank 0 knows the directive, so it decides for everyone.
                if gang.from_chief(self._context.directive):
                    return None
                if time.monotonic() - self._reported_s >= REPORT_S:
                    self._report(min(made * self._micro_batch_size * gang.world_size, len(order)))
        self._made += len(order)
        parts = [part for rank in gang.gather(found) for part in rank]
        values = np.full((samples.num_samples, parts[0][1].shape[1]), np.nan, np.float32)
        for rows, outputs in parts:
            values[rows] = outputs
        return values

    def _report(self, made: int) -> None:
        """Says how far it is, with so many samples of this split."""
        self._reported_s = time.monotonic()
        message = f"the model before training: {self._made + made:,} of {self._total:,} samples measured"
        self._context.phase(PHASE, message)


def _read(path: Path, splits: Sequence[ComparedSamples]) -> list[np.ndarray] | None:
    """What an earlier attempt of the job has written; None if there is nothing of the kind."""
    try:
        with np.load(path) as kept:
            found = [kept[f"arr_{place}"] for place in range(len(splits))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = all(len(values) == samples.num_samples for values, samples in zip(found, splits, strict=True))
    return found if fits else None


def _write(path: Path, values: Sequence[np.ndarray]) -> None:
    """Renamed into place, so that a killed attempt leaves all of it or nothing."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, *values)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
