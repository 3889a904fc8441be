"""The interface of a modality: the samples of a split, tensors of some of them, and the files it saves.

One file a modality. A task says which one it reads; the loop, the planner and the answering side know only this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import torch

from shardyard_trainer.data.stats import DataStats
from shardyard_trainer.models.door import Folder
from shardyard_trainer.models.folder import ModelFolder

POSITIONS_AT_ONCE = 8192
"""Positions in one forward pass when answering: enough to keep the cores busy, few enough for the memory."""

INSTANCES_AT_ONCE = 64


def seed_for(*parts: int | str) -> int:
    """A seed of 63 bits from numbers and names, the same in every process and version of Python."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class SampleRef(NamedTuple):
    """One sample in one pass over the data; everything random about it is seeded by (seed, data_epoch, sample)."""

    data_epoch: int
    sample: int


@dataclass(frozen=True)
class MicroBatch:
    """Samples as tensors, and what they count.

    `inputs` are the keyword arguments of the module's forward pass. `num_units` is what the summed loss is divided by:
    how many tokens or samples it is of (never more than 2^53), or the sum of their weights. `num_tokens` are the real
    tokens, `num_positions` the positions computed, padding included.
    `samples` are the indices of the samples if the metrics join parts of one sample.
    """

    inputs: dict[str, torch.Tensor]
    num_units: float
    num_tokens: int
    num_positions: int
    samples: tuple[int, ...] = ()

    def on(self, device: torch.device) -> MicroBatch:
        """The micro batch on a device; itself on a CPU."""
        if device.type == "cpu":
            return self
        inputs = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs)


def sum_of(weights: np.ndarray | None, labels: np.ndarray) -> float:
    """The divisor of the loss over these classes: their number, or the sum of their weights."""
    return len(labels) if weights is None else float(weights[labels].sum(dtype=np.float64))


class Samples(Protocol):
    """The samples of one split, in the order of their indices.

    A task gives one for training and one for evaluation. Evaluation samples are always taken with data_epoch 0: what is
    random about them is then the same every time.
    """

    @property
    def num_samples(self) -> int:
        """The number of samples."""

    @property
    def num_tokens(self) -> int:
        """Real tokens in all samples, padding excluded."""

    def lengths(self) -> np.ndarray | None:
        """Tokens of each sample, int32 [num_samples]; None if all are equally long (packed sequences)."""

    def stats(self) -> DataStats:
        """Counts for the plan: tokens, and how many are cut or unknown."""

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """The samples (at least one) as tensors on the CPU."""


@runtime_checkable
class ComparedSamples(Samples, Protocol):
    """Samples that are learnt by comparison with the model as it was before training (`training/before.py`).

    Their micro batches have what that model gave for them, NaN until it is known: a loss that lacks it is none.
    """

    compared: str
    """The output of the module that is kept of each sample."""

    def take_before(self, values: np.ndarray) -> None:
        """Takes that output of the model before training, float32 [num_samples, n], NaN if it is never asked for."""


@runtime_checkable
class ComparableSamples(Samples, Protocol):
    """Samples whose inputs can be compared: whether evaluation data is in the training data too."""

    def digests(self) -> np.ndarray:
        """A hash of the input of each sample, without its label, uint64: equal inputs have equal hashes."""


@runtime_checkable
class CountedSamples(Samples, Protocol):
    """Samples with classes."""

    def counts(self) -> np.ndarray:
        """The number of samples (or words) of each class, int64 [C]; empty for numbers."""


class Encoded(Protocol):
    """One instance of a request, ready for the model."""

    @property
    def num_positions(self) -> int:
        """Its positions in a forward pass, without padding."""


def batches(encoded: Sequence[Encoded], *, unpadded: bool = False) -> Iterator[list[int]]:
    """Batches of indices of similar length, so that little is padding; `unpadded`: of equal length, without padding."""
    order = sorted(range(len(encoded)), key=lambda index: encoded[index].num_positions)
    batch: list[int] = []
    for index in order:
        # Sorted by length, so the newest is the longest and sets the width of the batch.
        length = encoded[index].num_positions
        is_full = len(batch) == INSTANCES_AT_ONCE or length * (len(batch) + 1) > POSITIONS_AT_ONCE
        if batch and (is_full or (unpadded and length != encoded[batch[0]].num_positions)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class Inputs(Protocol):
    """What turns raw inputs of one modality into what a model reads: a tokenizer, an image processor, an item list."""

    files: ClassVar[tuple[str, ...]]
    """Names of the files that `save` writes into every model folder."""

    @classmethod
    def load(cls, source: Folder, described: ModelFolder) -> Self:
        """Loads the inputs of a model folder. Raises FolderInvalid."""

    @staticmethod
    def refusal(config: Any) -> str:
        """Why a model of this configuration cannot read such inputs; empty if it can."""

    def save(self, folder: Path, config: Any) -> None:
        """Writes the files into the folder of a model with this configuration."""

    def generation(self, config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The generation_config.json of a generating model, from the settings at the start of training."""
