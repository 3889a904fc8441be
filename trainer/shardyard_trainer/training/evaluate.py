"""Evaluation: all samples, or the longest few batches of them, shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from shardyard_trainer.inputs.base import MicroBatch, SampleRef, Samples
from shardyard_trainer.tasks.base import Metrics, ModuleOutput, Prepared, WriteBatch
from shardyard_trainer.training.context import Context


class Evaluator(Protocol):
    """What computes an evaluation's micro batches: the engine of a training, or a module alone."""

    @property
    def forwards_are_collective(self) -> bool:
        """Whether every rank has to call forward equally often."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Without dropout and gradients."""

    def evaluate(self, batch: MicroBatch) -> ModuleOutput:
        """One micro batch with its outputs, inside `evaluating`."""

    def generate(self, batch: MicroBatch, write: WriteBatch) -> Sequence[Sequence[int]]:
        """What the model writes for a micro batch, inside `evaluating`."""

    def to_device(self, batch: MicroBatch) -> MicroBatch:
        """The micro batch on this rank's device."""


def evaluate(
    context: Context,
    engine: Evaluator,
    task: Prepared,
    *,
    step: int,
    micro_batch_size: int,
    max_batches: int | None = None,
    is_final: bool = False,
    between: Callable[[int], bool] = lambda turn: False,
) -> dict[str, float]:
    """The metrics of the evaluation data at `step`, on every rank; none if there is no such data. A collective.

    Samples are sorted by length, the longest first, and the ranks take micro batches in turn. The metrics do not depend
    on the number of ranks. With `max_batches` only so many micro batches a rank are taken; where these are not all, the
    metrics are reported as partial, and none are returned: they compare with no others.
    `between` is called on every rank after each turn, counted from 1; if it returns true, as on all ranks alike, the
    evaluation ends without numbers.
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
        for turn in range(-(-len(starts) // context.gang.world_size)):
            if turn < len(mine):
                chosen = order[mine[turn] : mine[turn] + micro_batch_size]
                batch = engine.to_device(task.eval.micro_batch(_refs(chosen)))
                gatherer.update(batch, _outputs(engine, batch, gatherer))
            elif engine.forwards_are_collective:
                _outputs(engine, engine.to_device(task.eval.micro_batch(_refs(order[:micro_batch_size]))), gatherer)
            if between(turn + 1):
                return {}
    parts = context.gang.gather(gatherer.part())
    metrics = task.metrics().compute(parts)
    is_partial = len(order) < num_samples
    context.evaluated(step, metrics, num_samples=len(order), is_final=is_final, is_partial=is_partial)
    return {} if is_partial else metrics


def _outputs(engine: Evaluator, batch: MicroBatch, metrics: Metrics) -> ModuleOutput:
    output = engine.evaluate(batch)
    return output if metrics.write is None else output._replace(sequences=engine.generate(batch, metrics.write))


def evaluation_order(samples: Samples) -> np.ndarray:
    """All samples once, the longest first, int64 [num_samples]: micro batches are stretches of similar lengths."""
    lengths = samples.lengths()
    indices = np.arange(samples.num_samples)
    return indices if lengths is None else np.lexsort((indices, -lengths.astype(np.int64)))


def _refs(indices: np.ndarray) -> list[SampleRef]:
    return [SampleRef(0, index) for index in indices.tolist()]
