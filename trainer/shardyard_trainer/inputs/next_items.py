"""Samples of histories: sequences for learning the next item, and evaluation targets. B samples, T positions."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import cached_property

import numpy as np
import torch

from shardyard_trainer.data.stats import DataStats
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.histories import Histories
from shardyard_trainer.inputs.items import PADDING

IGNORED = -100
HELD_OUT_FROM = 3
"""The least interactions of a user for holding out the last one: with two, none would be left to learn from."""


class Held(Enum):
    """Which interactions are evaluated on."""

    NOTHING = "none"
    DATA = "eval_data"
    LAST = "leave_one_out"
    LATEST = "time"
    TWO = "leave_two_out"


def targets_of(histories: Histories, held: Held, share: float = 0.0) -> np.ndarray:
    """Which interactions are evaluated on: bool, one an interaction. `share` is that of the LATEST."""
    store = histories.store
    if held is Held.DATA:
        return store.arrays["held"] > 0
    found = np.zeros(len(store.tokens), bool)
    if held is Held.LAST:
        ends = store.offsets[1:][store.lengths() >= HELD_OUT_FROM]
        found[ends - 1] = True
    elif held is Held.TWO:
        ends = store.offsets[1:][store.lengths() >= HELD_OUT_FROM]
        found[ends - 1] = found[ends - 2] = True
    elif held is Held.LATEST:
        times = np.sort(store.arrays["times"])
        found = store.arrays["times"] >= times[min(round(len(times) * (1 - share)), len(times) - 1)]
    return found


class HistorySamples:
    """The latest items of each user with two or more; each is predicted from those before it."""

    def __init__(self, histories: Histories, is_target: np.ndarray, max_history: int) -> None:
        self._tokens = histories.store.tokens
        self._places = np.flatnonzero(~is_target)
        users = histories.users()[self._places]
        starts = np.flatnonzero(np.diff(users, prepend=-1))
        sizes = np.diff(np.append(starts, len(users)))
        self._starts, self._sizes = starts[sizes > 1], sizes[sizes > 1]
        self._max_history = max_history
        self._lengths: np.ndarray = np.minimum(self._sizes - 1, max_history).astype(np.int32)
        self.num_short = int((sizes < 2).sum())
        self.num_samples = len(self._starts)
        self.num_tokens = int(self._lengths.sum())

    @property
    def num_cut(self) -> int:
        """Users with more items than the model sees."""
        return int((self._sizes - 1 > self._max_history).sum())

    def lengths(self) -> np.ndarray:
        """The length of each sequence in items, int32."""
        return self._lengths

    def stats(self) -> DataStats:
        """Statistics of these sequences."""
        return DataStats(self.num_samples, self.num_tokens, self.num_cut, self.num_tokens, 0, warns_itself=True)

    def popularity(self, num_items: int) -> np.ndarray:
        """How often each token is in the training data, int64 [num_items + 1]."""
        return np.bincount(self._tokens[self._places], minlength=num_items + 1)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids` and `labels` (the next items), int64 [B, T], padded on the right."""
        chosen = [sample.sample for sample in samples]
        shape = (len(chosen), int(self._lengths[chosen].max()))
        ids, labels = np.full(shape, PADDING, np.int64), np.full(shape, IGNORED, np.int64)
        for row, sample in enumerate(chosen):
            end, length = self._starts[sample] + self._sizes[sample], self._lengths[sample]
            items = self._tokens[self._places[end - length - 1 : end]]
            ids[row, :length], labels[row, :length] = items[:-1], items[1:]
        inputs = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        num_tokens = int(self._lengths[chosen].sum())
        return MicroBatch(inputs, num_tokens, num_tokens, ids.size)


class TargetSamples:
    """Interactions to predict, each from all that its user had before, which a sample has in `seen`."""

    def __init__(self, histories: Histories, is_target: np.ndarray, max_history: int, *, exclude_seen: bool) -> None:
        store = histories.store
        self._tokens, self._max_history = store.tokens, max_history
        places = np.flatnonzero(is_target)
        starts = store.offsets[histories.users()[places]]
        known = np.concatenate([[0], np.cumsum(np.asarray(store.tokens) > PADDING)])
        before = known[places] - known[starts]
        is_known = np.asarray(store.tokens[places]) > PADDING
        self.num_unknown = int((~is_known & (before > 0)).sum())
        self.num_first = int((before == 0).sum())
        chosen = is_known & (before > 0)
        ends = store.offsets[1:][histories.users()[places]]
        self._places, self._starts, before = places[chosen], starts[chosen], before[chosen]
        self.is_last: np.ndarray = (places == ends - 1)[chosen]
        self._lengths: np.ndarray = np.minimum(before, max_history).astype(np.int32)
        self.exclude_seen = exclude_seen
        self.num_samples = len(self._places)
        self.num_tokens = int(self._lengths.sum())

    def lengths(self) -> np.ndarray:
        """The number of items that each target is predicted from, int32."""
        return self._lengths

    def stats(self) -> DataStats:
        """Statistics of these sequences."""
        return DataStats(self.num_samples, self.num_tokens, 0, self.num_tokens, 0, warns_itself=True)

    def history(self, sample: int) -> np.ndarray:
        """All tokens of the target's user before the target."""
        found = np.asarray(self._tokens[self._starts[sample] : self._places[sample]])
        return found[found > PADDING]

    @cached_property
    def num_repeated(self) -> int:
        """The number of targets that their user already had before."""
        return sum(self._tokens[place] in self.history(at) for at, place in enumerate(self._places))

    def ranks_by(self, popularity: np.ndarray) -> np.ndarray:
        """The place of each target in one list for all, the most frequent item first; int64 [num_samples]."""
        # Ties stay in the order of the catalogue.
        order = np.argsort(-popularity[1:], kind="stable") + 1
        place_of = np.empty(len(popularity), np.int64)
        place_of[order] = np.arange(1, len(popularity))
        ranks: np.ndarray = place_of[np.asarray(self._tokens[self._places])]
        if self.exclude_seen:
            for at, rank in enumerate(ranks.tolist()):
                seen = place_of[np.unique(self.history(at))]
                ranks[at] = len(popularity) if rank in seen else rank - int((seen < rank).sum())
        return ranks

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids` and `labels` (the target at the last item) [B, T], and if they are excluded what was `seen`
        [B, S]; int64, padded on the right.
        """
        chosen = [sample.sample for sample in samples]
        lengths = self._lengths[chosen]
        shape = (len(chosen), int(lengths.max()))
        ids, labels = np.full(shape, PADDING, np.int64), np.full(shape, IGNORED, np.int64)
        histories = [self.history(sample) for sample in chosen]
        for row, (sample, history, length) in enumerate(zip(chosen, histories, lengths, strict=True)):
            ids[row, :length] = history[-length:]
            labels[row, length - 1] = self._tokens[self._places[sample]]
        inputs = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        distinct = [np.unique(history) for history in histories] if self.exclude_seen else [np.zeros(0, np.int64)]
        seen = np.full((len(chosen), max(map(len, distinct))), PADDING, np.int64)
        for row, items in enumerate(distinct):
            seen[row, : len(items)] = items
        inputs["seen"] = torch.from_numpy(seen)
        return MicroBatch(inputs, len(chosen), int(lengths.sum()), ids.size, tuple(chosen))
