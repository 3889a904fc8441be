"""Evaluation: all samples, or the longest few batches of them, shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np

from shardyard_trainer.inputs.base import MicroBatch, SampleRef, Samples
from shardyard_trainer.tasks.base import Metrics, Prepared, WriteBatch
from shardyard_trainer.tasks.module import ModuleOutput
from shardyard_trainer.training.context import Context


class Evaluator(Protocol):
    """Computes an evaluation's micro batches: the engine of a training, or a module alone."""

    @property
    def forwards_are_collective(self) -> bool:
        """Whether every rank has to call forward equally often."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Without dropout and gradients."""

    def evaluate(self, batch: MicroBatch) -> ModuleOutput:
        """One micro batch with its outputs, inside `evaluating`."""

    def generate(self, batch: MicroBatch, write: WriteBatch) -> Sequence[Sequence[int]]:
        """Generates sequences for a micro batch, inside `evaluating`."""

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
    on the number of ranks. With `max_batches` only that many micro batches a rank are taken; if these are not all, the
    metrics are reported as partial, and none are returned: they compare with no others.
    `between` is called on every rank after each turn, counted from 1; if it returns true, which it must do on all ranks
    together, the evaluation ends without metrics.
    """
    if task.eval is None:
        return {}
    context.phase("evaluating")
    num_samples = task.eval.num_samples
    most = None if max_batches is None else max_batches * context.gang.world_size * micro_batch_size
    order = evaluation_order(task.eval)[:most]
    metrics = measure(context, engine, task, order, micro_batch_size=micro_batch_size, between=between)
    if not metrics:
        return {}
    is_partial = len(order) < num_samples
    context.evaluated(step, metrics, num_samples=len(order), is_final=is_final, is_partial=is_partial)
    return {} if is_partial else metrics


def measure(
    context: Context,
    engine: Evaluator,
    task: Prepared,
    order: np.ndarray,
    *,
    micro_batch_size: int,
    between: Callable[[int], bool] = lambda turn: False,
) -> dict[str, float]:
    """The metrics of these samples of the evaluation data, on every rank; none if `between` ends it. A collective."""
    assert task.eval is not None
    gatherer = task.metrics()
    with engine.evaluating():
        for turn, chosen in enumerate(turns(context, engine, order, micro_batch_size), 1):
            if chosen is not None:
                batch = engine.to_device(task.eval.micro_batch(refs(chosen.samples)))
                output = _outputs(engine, batch, gatherer)
                if not chosen.is_dummy:
                    gatherer.update(batch, output)
            if between(turn):
                return {}
    return task.metrics().compute(context.gang.gather(gatherer.part()))


class Turn(NamedTuple):
    """The samples of one forward pass of this rank; a dummy's outputs do not count."""

    samples: np.ndarray
    is_dummy: bool


def turns(context: Context, engine: Evaluator, order: np.ndarray, micro_batch_size: int) -> Iterator[Turn | None]:
    """This rank's part of samples that the ranks take in turn, equally many turns on every rank.

    After its last micro batch a rank has none, or a dummy if every rank has to call forward equally often.
    """
    starts = range(0, len(order), micro_batch_size)
    mine = starts[context.gang.rank :: context.gang.world_size]
    for turn in range(-(-len(starts) // context.gang.world_size)):
        if turn < len(mine):
            yield Turn(order[mine[turn] : mine[turn] + micro_batch_size], is_dummy=False)
        else:
            yield Turn(order[:micro_batch_size], is_dummy=True) if engine.forwards_are_collective else None


def _outputs(engine: Evaluator, batch: MicroBatch, metrics: Metrics) -> ModuleOutput:
    output = engine.evaluate(batch)
    return output if metrics.write is None else output._replace(sequences=engine.generate(batch, metrics.write))


def evaluation_order(samples: Samples, chosen: np.ndarray | None = None) -> np.ndarray:
    """All samples once, or those `chosen`, the longest first, int64: micro batches are stretches of similar lengths."""
    lengths = samples.lengths()
    indices = np.arange(samples.num_samples) if chosen is None else chosen
    return indices if lengths is None else indices[np.lexsort((indices, -lengths[indices].astype(np.int64)))]


def evaluated_tokens(samples: Samples, most: int | None = None) -> float:
    """Tokens of an evaluation, or of the `most` samples that come first in it."""
    lengths = samples.lengths()
    if most is None or lengths is None:
        return samples.num_tokens * (1.0 if most is None else min(most / max(samples.num_samples, 1), 1.0))
    return float(lengths[evaluation_order(samples)[:most]].sum())


def refs(indices: np.ndarray) -> list[SampleRef]:
    """Evaluated samples as references."""
    return [SampleRef(0, index) for index in indices.tolist()]
