"""The evaluation of a model as a job: every rank holds the whole model, and the ranks share the samples.

Nothing is written: the metrics are the result. A stopped attempt starts over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import MicroBatch, Samples
from shardyard_trainer.tasks.base import Prepared, WriteBatch
from shardyard_trainer.tasks.module import ModuleOutput, TaskModule
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.evaluate import evaluate, evaluation_order
from shardyard_trainer.training.gang import Gang


class WholeModel:
    """An `Evaluator` around a module that each rank holds as a whole, without an optimizer."""

    forwards_are_collective = False

    def __init__(self, module: TaskModule, gang: Gang, *, in_halves: bool) -> None:
        self._gang = gang
        self._module = module.to(gang.device, torch.bfloat16 if in_halves else None).eval()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients."""
        with torch.no_grad():
            yield

    def evaluate(self, batch: MicroBatch) -> ModuleOutput:
        """Computes one micro batch with its outputs."""
        output: ModuleOutput = self._module(**batch.inputs, return_outputs=True)
        return output

    def generate(self, batch: MicroBatch, write: WriteBatch) -> Sequence[Sequence[int]]:
        """Writes the sequences of one micro batch."""
        return write(self._module, batch, bool)

    def to_device(self, batch: MicroBatch) -> MicroBatch:
        """Moves the micro batch to this rank's device."""
        return batch.on(self._gang.device)


def run(context: Context, task: Prepared, model: WholeModel, *, micro_batch_size: int) -> None:
    """One rank's part of the evaluation; ends early, without metrics, if a directive asks for it. A collective."""
    assert task.eval is not None
    meter = _Meter(context, task.eval, micro_batch_size)
    evaluate(
        context,
        model,
        task,
        step=meter.total,
        micro_batch_size=micro_batch_size,
        is_final=True,
        between=meter.stops_after,
    )
    if meter.is_stopped:
        context.stopped()
        return
    context.finished(meter.total)
    context.exported(worker_pb2.Exported())


class _Meter:
    """Progress of all ranks in micro batches, and whether a directive ends the evaluation."""

    def __init__(self, context: Context, samples: Samples, micro_batch_size: int) -> None:
        self._context = context
        self._micro_batch_size = micro_batch_size
        self._started_s = time.monotonic()
        lengths = samples.lengths()
        order = evaluation_order(samples)
        each = np.full(len(order), samples.num_tokens / max(len(order), 1)) if lengths is None else lengths[order]
        self._tokens = np.cumsum(each, dtype=np.float64)
        self.total = -(-len(order) // micro_batch_size)
        self.is_stopped = False

    def stops_after(self, turn: int) -> bool:
        """Reports the progress after this many turns of each rank; returns whether all ranks stop. A collective."""
        context = self._context
        made = min(turn * context.gang.world_size, self.total)
        tokens = int(self._tokens[min(made * self._micro_batch_size, len(self._tokens)) - 1])
        elapsed_s = max(time.monotonic() - self._started_s, 1e-6)
        context.progressed(made, total_steps=self.total, tokens=tokens, tokens_per_s=tokens / elapsed_s)
        if turn == 1:
            context.canary_passed(elapsed_s)
        # Only rank 0 knows the directive, so it decides for everyone.
        self.is_stopped = bool(context.gang.from_chief(context.directive)) and made < self.total
        return self.is_stopped
