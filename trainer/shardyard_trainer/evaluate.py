"""Evaluation: all samples, or the longest few batches of them, shared by the ranks."""

from __future__ import annotations

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.context import Context
from shardyard_trainer.engine import Engine
from shardyard_trainer.tasks.base import SampleRef, Samples, Task


def evaluate(
    context: Context,
    engine: Engine,
    task: Task,
    *,
    step: int,
    micro_batch_size: int,
    max_batches: int | None = None,
    is_final: bool = False,
) -> dict[str, float]:
    """The metrics of the evaluation data at `step`, on every rank; none where there is no such data. A collective.

    Samples are sorted by length, the longest first, and the ranks take micro batches in turn. The metrics do not depend
    on the number of ranks. With `max_batches` only so many micro batches a rank are taken; where these are not all, the
    metrics are reported as partial, and none are returned: they compare with no others.
    """
    if task.eval is None:
        return {}
    context.phase("evaluating")
    batches = evaluation_batches(task.eval, micro_batch_size)
    num_batches = len(batches)
    if max_batches is not None:
        batches = batches[: max_batches * context.gang.world_size]
    gatherer = task.metrics()
    mine = batches[context.gang.rank :: context.gang.world_size]
    with engine.evaluating():
        for samples in mine:
            batch = engine.to_device(task.eval.micro_batch(samples))
            gatherer.update(batch, engine.evaluate(batch))
        if engine.forwards_are_collective and len(mine) < -(-len(batches) // context.gang.world_size):
            engine.evaluate(engine.to_device(task.eval.micro_batch(batches[0])))
    parts = context.gang.gather(gatherer.part())
    metrics = task.metrics().compute(parts)
    event = job_pb2.Evaluation(
        step=step,
        metrics=metrics,
        num_samples=sum(len(batch) for batch in batches),
        is_final=is_final,
        is_partial=len(batches) < num_batches,
    )
    context.report(worker_pb2.WorkerEvent(evaluation=event))
    return {} if event.is_partial else metrics


def evaluation_batches(samples: Samples, micro_batch_size: int) -> list[list[SampleRef]]:
    """All samples once, in micro batches of similar lengths, the longest first."""
    indices = list(range(samples.num_samples))
    lengths = samples.lengths()
    if lengths is not None:
        indices.sort(key=lambda index: (-int(lengths[index]), index))
    return [
        [SampleRef(0, index) for index in indices[start : start + micro_batch_size]]
        for start in range(0, len(indices), micro_batch_size)
    ]
