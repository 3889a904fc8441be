"""Samples of data that is only imagined: its size and nothing else, for an estimate before there is any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from shardyard_trainer.data.stats import DataStats
from shardyard_trainer.inputs.base import MicroBatch, SampleRef

NUM_ITEMS = 10_000
"""Items of an imagined catalogue; embeddings and output layer of a recommender grow with it."""


class Longest(NamedTuple):
    """The tokens of the longest source and target."""

    source: int
    target: int


class ImaginedTokenizer:
    """All that a module asks of a tokenizer if nothing is read."""

    pad_token_id = 0


class ImaginedSamples:
    """Samples of one split, all alike; `tensors` are the inputs of one, on the meta device."""

    weights: ClassVar[None] = None
    is_scored: ClassVar[bool] = False
    has_negatives: ClassVar[bool] = False
    num_scored: ClassVar[int] = 0
    num_bytes: ClassVar[int] = 0

    def __init__(
        self, num_samples: int, length: int, tensors: Mapping[str, torch.Tensor], longest: Longest | None = None
    ) -> None:
        self.num_samples = num_samples
        self.longest = longest or Longest(length, 0)
        self._length = length
        self._tensors = dict(tensors)

    @property
    def num_tokens(self) -> int:
        """Tokens in all samples."""
        return self.num_samples * self._length

    @property
    def corpus(self) -> ImaginedSamples:
        """The texts of packed sequences, of which nothing is known."""
        return self

    def lengths(self) -> np.ndarray:
        """Positions of a sample, int32 [1]: one stands for all."""
        return np.asarray([self._length], np.int32)

    def stats(self) -> DataStats:
        """The size alone: nothing is cut or unknown."""
        return DataStats(self.num_samples, self.num_tokens, num_cut=0, num_words=self.num_tokens, num_unknown=0)

    def counts(self) -> np.ndarray:
        """No class is known to occur."""
        return np.zeros(0, np.int64)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """Tensors of one sample, without content."""
        return MicroBatch(self._tensors, len(samples), self._length, self._length)


@dataclass(frozen=True)
class Imagined:
    """The size of data that is imagined: training samples, and those that are held out."""

    num_samples: int
    num_held_out: int

    def splits(
        self, length: int, tensors: Mapping[str, torch.Tensor], longest: Longest | None = None
    ) -> tuple[Any, Any]:
        """Training and evaluation samples of `length` positions; None if nothing is evaluated."""
        train = ImaginedSamples(self.num_samples, length, tensors, longest)
        held_out = ImaginedSamples(self.num_held_out, length, tensors, longest)
        return train, held_out if self.num_held_out else None


def token_tensors(*shape: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Token ids, or masks of the same size, of one sample."""
    return {name: torch.empty(1, *shape, dtype=torch.int64, device="meta") for name in names}


def text_tensors(length: int, *, with_types: bool) -> dict[str, torch.Tensor]:
    """A text with its mask and a label, and types of its tokens if the model has them."""
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if with_types else [])]
    return token_tensors(length, names=names) | token_tensors(names=["labels"])


def number_tensors(*shape: int, name: str) -> dict[str, torch.Tensor]:
    """Numbers of one sample, fp32."""
    return {name: torch.empty(1, *shape, device="meta")}
