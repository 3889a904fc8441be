"""Samples of histories with masks: items to learn from both sides, and targets after a user's whole history.

B samples, T positions, M masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.histories import Histories
from shardyard_trainer.inputs.items import PADDING
from shardyard_trainer.inputs.next_items import IGNORED, HistorySamples, TargetSamples

LAST_ALONE = 0.1
"""How often only the last item is masked, as in recommending."""

_STREAM = 0x17E3


class MaskedHistories(HistorySamples):
    """The latest items of each user with two or more; some are masked, different ones in each pass over the data."""

    def __init__(
        self, histories: Histories, is_target: np.ndarray, max_history: int, *, seed: int, probability: float
    ) -> None:
        super().__init__(histories, is_target, max_history)
        self._seed, self._probability = seed, probability
        self._mask = len(histories.items) + 1
        # One more than the model sees of a history: the position of the mask is learnt too.
        self._lengths = np.minimum(self._sizes, max_history + 1).astype(np.int32)
        self.num_tokens = int(self._lengths.sum())

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids` and `attention_mask` [B, T], padded on the right, `masked_places` in [B·T] and `targets` [M]."""
        lengths = self._lengths[[sample.sample for sample in samples]]
        shape = (len(samples), int(lengths.max()))
        ids, places, targets = np.full(shape, PADDING, np.int64), [], []
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            end = self._starts[sample.sample] + self._sizes[sample.sample]
            items = np.asarray(self._tokens[self._places[end - length : end]], np.int64)
            masked = self._masked(sample, int(length))
            places.append(row * shape[1] + masked)
            targets.append(items[masked])
            items[masked] = self._mask
            ids[row, :length] = items
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy((np.arange(shape[1]) < lengths[:, None]).astype(np.int64)),
            "masked_places": torch.from_numpy(np.concatenate(places)),
            "targets": torch.from_numpy(np.concatenate(targets)),
        }
        return MicroBatch(inputs, len(inputs["targets"]), int(lengths.sum()), ids.size)

    def _masked(self, sample: SampleRef, length: int) -> np.ndarray:
        """The masked positions of a history, at least one."""
        draw = np.random.default_rng([self._seed, _STREAM, sample.data_epoch, sample.sample])
        if draw.random() < LAST_ALONE:
            return np.asarray([length - 1])
        found = np.flatnonzero(draw.random(length) < self._probability)
        return found if len(found) else np.asarray([draw.integers(length)])


class MaskedTargets(TargetSamples):
    """Interactions to predict, each as a mask after the user's earlier items."""

    def __init__(self, histories: Histories, is_target: np.ndarray, max_history: int, *, exclude_seen: bool) -> None:
        super().__init__(histories, is_target, max_history, exclude_seen=exclude_seen)
        self._mask = len(histories.items) + 1

    def lengths(self) -> np.ndarray:
        """The number of positions of each sample, int32."""
        return super().lengths() + 1

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """As MaskedHistories has it, with one mask a sample, and what was `seen` [B, S]."""
        found = super().micro_batch(samples)
        labels = found.inputs["labels"]
        rows, last = (labels != IGNORED).nonzero(as_tuple=True)
        ids, mask = with_mask(found.inputs["input_ids"], last + 1, self._mask)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "masked_places": rows * ids.shape[1] + last + 1,
            "targets": labels[rows, last],
            "seen": found.inputs["seen"],
        }
        num_tokens = found.num_tokens + len(rows)
        return dataclasses.replace(found, inputs=inputs, num_tokens=num_tokens, num_positions=ids.numel())


def with_mask(ids_BT: torch.Tensor, lengths_B: torch.Tensor, mask: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends the token `mask` to each history; returns the ids and their attention mask, both one longer."""
    ids = F.pad(ids_BT, (0, 1), value=PADDING)
    ids[torch.arange(len(ids)), lengths_B] = mask
    return ids, (torch.arange(ids.shape[1]) <= lengths_B[:, None]).long()
