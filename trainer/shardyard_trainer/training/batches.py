"""This rank's micro batches of every step, made one step before they are needed, in a separate thread.

They are a pure function of the step, so the thread only changes the time they take.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from shardyard_trainer.inputs.base import Samples
from shardyard_trainer.training.engine import PreparedMicroBatch
from shardyard_trainer.training.order import Order


@dataclass(frozen=True)
class RankBatch:
    """The micro batches of one rank in one step, and the counts of its real ones."""

    micros: list[PreparedMicroBatch]
    num_units: float
    num_tokens: int
    num_positions: int


class Batches:
    """The batches of one rank from `first_step` on; `taught` are the same samples as a teacher reads them."""

    def __init__(
        self,
        samples: Samples,
        order: Order,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        first_step: int,
        taught: Samples | None = None,
    ) -> None:
        self._samples = samples
        self._taught = taught
        self._order = order
        self._rank = rank
        self._world_size = world_size
        self._micro_batch_size = micro_batch_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._step = first_step
        self.waited_s = 0.0
        """Seconds that the last call of `next` waited for its batch."""
        self._next: Future[RankBatch] = self._thread.submit(self.make, first_step)

    def next(self) -> RankBatch:
        """The batch of the next step; errors in the data are raised here."""
        started_s = time.monotonic()
        batch = self._next.result()
        self.waited_s = time.monotonic() - started_s
        self._step += 1
        self._next = self._thread.submit(self.make, self._step)
        return batch

    def make(self, step: int) -> RankBatch:
        """The batch of a step."""
        micros = [
            PreparedMicroBatch(
                self._samples.micro_batch(micro.samples),
                micro.is_dummy,
                None if self._taught is None else self._taught.micro_batch(micro.samples),
            )
            for micro in self._order.rank_batches(
                step, rank=self._rank, world_size=self._world_size, micro_batch_size=self._micro_batch_size
            )
        ]
        real = [micro.batch for micro in micros if not micro.is_dummy]
        return RankBatch(
            micros,
            sum(batch.num_units for batch in real),
            sum(batch.num_tokens for batch in real),
            sum(batch.num_positions for batch in real),
        )

    def close(self) -> None:
        """Ends the thread that makes batches."""
        self._thread.shutdown(wait=True, cancel_futures=True)
