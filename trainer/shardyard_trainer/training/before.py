"""What the model gave before training, for tasks that compare with it: measured once, by the engine that trains.

No second model is kept: memory and checkpoints are those of any other task, at every ZeRO stage and with adapters. The
job's folder keeps the numbers, so a resumed attempt compares with the same ones.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shardyard_trainer.inputs.base import ComparedSamples
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.evaluate import Evaluator, evaluation_order, refs, turns
from shardyard_trainer.training.order import Order

FILE = "before-training.npz"
PHASE = "reference"


def compare_with_before(
    context: Context, engine: Evaluator, task: Prepared, order: Order, *, total_steps: int, micro_batch_size: int
) -> None:
    """Gives a task's samples what the engine's model gives for them, or what the job's folder has. A collective.

    The engine has the weights that the training begins with. Of the training samples only those are measured that the
    run comes to. Nothing is done for a task that compares nothing.
    """
    splits = [each for each in (task.train, task.eval) if isinstance(each, ComparedSamples)]
    if not splits:
        return
    path = Path(context.attempt.job_dir or context.attempt.attempt_dir, FILE)
    known = context.gang.from_chief(_read(path, splits) if context.gang.is_chief else None)
    if known is None:
        context.phase(PHASE, "the model before training")
        used = [_used(order, total_steps), None]
        known = [
            _measure(context, engine, samples, evaluation_order(samples, rows), micro_batch_size)
            for samples, rows in zip(splits, used, strict=False)
        ]
        if context.gang.is_chief:
            _write(path, known)
    for samples, values in zip(splits, known, strict=True):
        samples.take_before(values)


def _used(order: Order, total_steps: int) -> np.ndarray | None:
    """The training samples that a run comes to; None: all of them."""
    if total_steps * order.batch_size >= order.num_samples:
        return None
    return np.unique(np.concatenate([order.global_batch(step).samples for step in range(total_steps)]))


def _measure(
    context: Context, engine: Evaluator, samples: ComparedSamples, order: np.ndarray, micro_batch_size: int
) -> np.ndarray:
    """The compared output of some samples, float32 [num_samples, n], NaN for the others."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    with engine.evaluating():
        for turn in turns(context, engine, order, micro_batch_size):
            if turn is None:
                continue
            outputs = engine.evaluate(engine.to_device(samples.micro_batch(refs(turn.samples)))).outputs
            assert outputs is not None
            if not turn.is_dummy:
                found.append((turn.samples, outputs[samples.compared].float().cpu().numpy()))
    parts = [part for rank in context.gang.gather(found) for part in rank]
    values = np.full((samples.num_samples, parts[0][1].shape[1]), np.nan, np.float32)
    for rows, outputs in parts:
        values[rows] = outputs
    return values


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
