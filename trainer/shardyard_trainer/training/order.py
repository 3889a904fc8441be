"""Which samples make up each global batch, and which rank computes which of them.

Everything here is a pure function of (seed, data epoch, batch size): a run's position is its step, and nothing has to
be saved or restored. The global batch, its samples and their order, does not depend on the number of ranks.

The sample stream is one data epoch after the other; position s belongs to data epoch s // N. Batch k is the positions
[kB, (k+1)B), so a batch may span two data epochs. If samples differ in length, a data epoch is cut into windows
of up to 100 batches, aligned with the batches of the stream; a window is sorted by length, cut into batches, and its
batches are shuffled. Wide windows save padding; four of them at least keep a pass with few batches random. The head
and the tail of a data epoch, which share a batch with the neighbouring one, stay random.

A batch may be far larger than the data: it is kept as arrays, 16 bytes a sample, and becomes references to samples one
micro batch at a time.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shardyard_trainer.inputs.base import SampleRef, seed_for

WIDEST_WINDOW = 100
"""Batches. Of movie reviews in batches of 32, 7 % of the positions are padding with windows of 16, 2 % with 71."""

FEWEST_WINDOWS = 4
NARROWEST_WINDOW = 16
"""Batches: a pass that is shorter than four of these has fewer windows."""


@dataclass(frozen=True)
class Stretch:
    """Some samples in an order: data epochs and sample indices, int64 [n] each."""

    data_epochs: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, chosen: slice | np.ndarray) -> Stretch:
        """The samples at these places, in the order of the places."""
        return Stretch(self.data_epochs[chosen], self.samples[chosen])

    def refs(self) -> list[SampleRef]:
        """The samples as references, the form that a task takes."""
        return [SampleRef(*each) for each in zip(self.data_epochs.tolist(), self.samples.tolist(), strict=True)]


@dataclass(frozen=True)
class MicroSamples:
    """The samples of one micro batch; `is_dummy`: computed only so that every rank calls backward equally often."""

    stretch: Stretch
    is_dummy: bool

    @property
    def samples(self) -> list[SampleRef]:
        """Built on each access: a step may have many micro batches, and only one of them is needed at a time."""
        return self.stretch.refs()


class Order:
    """The order of the samples of one run.

    `lengths` are the tokens of each sample, int32 [num_samples], or None if all are equally long.
    """

    def __init__(self, *, num_samples: int, batch_size: int, seed: int, lengths: np.ndarray | None) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"{num_samples} samples in batches of {batch_size}: both must be at least 1")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = lengths
        # Two data epochs are in use if a batch spans them, and the prefetching thread may be one ahead.
        self._epoch = lru_cache(maxsize=4)(self._order_epoch)

    def global_batch(self, step: int) -> Stretch:
        """The samples of batch `step`, counted from 0, in their order."""
        data_epochs, samples = np.empty(self.batch_size, np.int64), np.empty(self.batch_size, np.int64)
        filled, position = 0, step * self.batch_size
        while filled < self.batch_size:
            data_epoch, start = divmod(position + filled, self.num_samples)
            taken = self._epoch(data_epoch)[start : start + self.batch_size - filled]
            samples[filled : filled + len(taken)] = taken
            data_epochs[filled : filled + len(taken)] = data_epoch
            filled += len(taken)
        return Stretch(data_epochs, samples)

    def rank_batches(self, step: int, *, rank: int, world_size: int, micro_batch_size: int) -> list[MicroSamples]:
        """The part of batch `step` that one rank computes: equally many micro batches on every rank."""
        shares = deal(self.global_batch(step), world_size, self.lengths)
        # ZeRO 2 and 3 reduce gradients inside backward: a rank that called it less often would let the others wait.
        num_micro = max(-(-len(share) // micro_batch_size) for share in shares)
        share = shares[rank]
        if not len(share):
            # Fewer samples than ranks: this one computes a sample of another rank, and counts nothing.
            filler = next(other for other in shares if len(other)).take(slice(0, 1))
            return [MicroSamples(filler, True)] * num_micro
        # Micro batches of equal size, not full ones and a rest: the largest decides how much memory a step takes.
        num_real = min(num_micro, len(share))
        bounds = [index * len(share) // num_real for index in range(num_real + 1)]
        micros = [MicroSamples(share.take(slice(start, end)), False) for start, end in itertools.pairwise(bounds)]
        return micros + [MicroSamples(share.take(slice(0, 1)), True)] * (num_micro - num_real)

    def _order_epoch(self, data_epoch: int) -> np.ndarray:
        """Sample indices of one data epoch in their order, int64 [num_samples]."""
        generator = np.random.Generator(np.random.Philox(seed_for("order", self.seed, data_epoch)))
        order = generator.permutation(self.num_samples)
        if self.lengths is None:
            return order
        batch = self.batch_size
        # Whole batches of the stream alone are sorted: the head and the tail share a batch with a neighbouring epoch.
        start = min(-data_epoch * self.num_samples % batch, self.num_samples)
        end = start + (self.num_samples - start) // batch * batch
        # Sorting saves the padding, and a window keeps it local: over a whole data epoch the same samples would always
        # meet. The batches are shuffled again because a window would otherwise go from short to long.
        for first, last in itertools.pairwise(_windows((end - start) // batch)):
            window = start + first * batch
            part = order[window : start + last * batch]
            part = part[np.argsort(self.lengths[part], kind="stable")].reshape(-1, batch)
            order[window : window + part.size] = part[generator.permutation(len(part))].reshape(-1)
        return order


def _windows(num_batches: int) -> list[int]:
    """Where the windows of a data epoch begin, in batches, and at the end where the last one ends: equally wide."""
    most = min(FEWEST_WINDOWS, -(-num_batches // NARROWEST_WINDOW))
    number = max(most, -(-num_batches // WIDEST_WINDOW), 1)
    return [index * num_batches // number for index in range(number + 1)]


def deal(batch: Stretch, world_size: int, lengths: np.ndarray | None) -> list[Stretch]:
    """Deals a global batch to the ranks: rank r gets floor((r+1)B/W) - floor(rB/W) samples.

    With lengths, the longest sample left goes to the rank with the fewest tokens that still has room, because a step
    lasts as long as its slowest rank. Each share is sorted by length, so that its micro batches have little padding.
    Without lengths, the shares are slices.
    """
    bounds = [rank * len(batch) // world_size for rank in range(world_size + 1)]
    if lengths is None:
        return [batch.take(slice(start, end)) for start, end in itertools.pairwise(bounds)]
    lengths_B = lengths[batch.samples].astype(np.int64)
    # Ties go by epoch and sample, so that each rank deals alike, whatever the order within the batch.
    longest_first = np.lexsort((batch.samples, batch.data_epochs, -lengths_B))
    room = [end - start for start, end in itertools.pairwise(bounds)]
    ranks_B = _balanced(lengths_B[longest_first], room)
    return [batch.take(longest_first[ranks_B == rank][::-1]) for rank in range(world_size)]


def _balanced(lengths_B: np.ndarray, room: list[int]) -> np.ndarray:
    """The rank of each sample, int32 [B]: the one with the fewest tokens so far, the lowest of equal ones."""
    ranks_B = np.zeros(len(lengths_B), np.int32)
    if len(room) == 1:
        return ranks_B
    left = list(room)
    waiting = [(0, rank) for rank, size in enumerate(room) if size]
    for place, length in enumerate(lengths_B):
        tokens, rank = heapq.heappop(waiting)
        ranks_B[place] = rank
        left[rank] -= 1
        if left[rank]:
            heapq.heappush(waiting, (tokens + int(length), rank))
    return ranks_B
