"""Evaluation: all samples, or the longest few batches of them, shared by the ranks."""

from __future__ import annotations

import numpy as np

from shardyard_trainer.inputs.base import SampleRef, Samples
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.engine import Engine


def evaluate(
    context: Context,
    engine: Engine,
    task: Prepared,
    *,
    step: int,
    micro_batch_size: int,
    max_batches: int | None = None,
    is_final: bool = False,
) -> dict[str, float]:
    """The metrics of the evaluation data at `step`, on every rank; none if there is no such data. A collective.

    Samples are sorted by length, the longest first, and the ranks take micro batches in turn. The metrics do not depend
    on the number of ranks. With `max_batches` only so many micro batches a rank are taken; where these are not all, the
    metrics are reported as partial, and none are returned: they compare with no others.
    """
    if task.eval is None:
        return {}
    context.phase("evaluating")
    order = evaluation_order(task.eval)
    num_samples = len(order)
    if max_batches is not None:
        order = order[: max_batches * context.gang.world_size * micro_batch_size]
    starts = range(0, len(order), micro_batch_size)
    gatherer = task.metrics()
    mine = starts[context.gang.rank :: context.gang.world_size]
    with engine.evaluating():
        for start in mine:
            batch = engine.to_device(task.eval.micro_batch(_refs(order[start : start + micro_batch_size])))
            gatherer.update(batch, engine.evaluate(batch))
        if engine.forwards_are_collective and len(mine) < -(-len(starts) // context.gang.world_size):
            engine.evaluate(engine.to_device(task.eval.micro_batch(_refs(order[:micro_batch_size]))))
    parts = context.gang.gather(gatherer.part())
    metrics = task.metrics().compute(parts)
    is_partial = len(order) < num_samples
    context.evaluated(step, metrics, num_samples=len(order), is_final=is_final, is_partial=is_partial)
    return {} if is_partial else metrics


def evaluation_order(samples: Samples) -> np.ndarray:
    """All samples once, the longest first, int64 [num_samples]: micro batches are stretches of similar lengths."""
    lengths = samples.lengths()
    indices = np.arange(samples.num_samples)
    return indices if lengths is None else np.lexsort((indices, -lengths.astype(np.int64)))


def _refs(indices: np.ndarray) -> list[SampleRef]:
    return [SampleRef(0, index) for index in indices.tolist()]
