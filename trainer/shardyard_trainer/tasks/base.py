"""What the training loop asks of a task.

The loop knows samples only as `SampleRef`s in a fixed order and micro batches as tensors with their counts; a task
knows nothing of ranks, steps or DeepSpeed. Shape suffixes: B samples, T positions, D width, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from shardyard_trainer.data.stats import DataStats


class SampleRef(NamedTuple):
    """One sample in one pass over the data: everything random about it is seeded by (seed, data_epoch, sample)."""

    data_epoch: int
    sample: int


@dataclass(frozen=True)
class MicroBatch:
    """Samples as tensors, and what they count.

    `inputs` are the keyword arguments of the module's forward pass. `num_units` is how many tokens or samples the loss
    is summed over (never more than 2^53), `num_tokens` the real tokens, `num_positions` the positions computed,
    padding included.
    """

    inputs: dict[str, torch.Tensor]
    num_units: int
    num_tokens: int
    num_positions: int


class Samples(Protocol):
    """The samples of one split, in the order of their indices.

    A task gives one for training and one for evaluation. Evaluation samples are always taken with data_epoch 0: what is
    random about them is then the same every time.
    """

    @property
    def num_samples(self) -> int:
        """How many there are."""

    @property
    def num_tokens(self) -> int:
        """Real tokens in all of them."""

    def lengths(self) -> np.ndarray | None:
        """Tokens of each sample, int32 [num_samples]; None where all are equally long (packed sequences)."""

    def stats(self) -> DataStats:
        """What they hold, and what of it is cut or not known."""

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """The samples as tensors on the CPU; at least one sample."""


class TaskModule(nn.Module):
    """Model and head in one module, so that the engine's hooks see every parameter.

    `forward(**inputs)` returns a `ModuleOutput`: the loss summed (not averaged) over the batch's units, in fp32, and
    the head's raw outputs where they are asked for with `return_outputs=True` (evaluation, prediction), else None.
    """

    backbone: nn.Module


class ModuleOutput(NamedTuple):
    """The summed loss (a scalar, fp32), and the head's outputs or statistics for the metrics."""

    loss_sum: torch.Tensor
    outputs: dict[str, torch.Tensor] | None


class Metrics(Protocol):
    """Gathers what an evaluation needs on one rank; parts of all ranks are then put together."""

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch, evaluated with return_outputs=True."""

    def part(self) -> Any:
        """What this rank gathered: numpy arrays and numbers, for all_gather_object."""

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts, `loss` (mean a unit) among them."""


class Task(Protocol):
    """Everything that is particular to a task. Built by `tasks.build.build_task` from a resolved JobSpec."""

    name: str
    """Such as `causal_lm`; also the `task` of the exported model."""

    unit: str
    """`token` or `sample`: what the loss is averaged over."""

    tokenizer: Any
    """A transformers PreTrainedTokenizerFast without padding or truncation of its own."""

    train: Samples
    eval: Samples | None

    def metrics(self) -> Metrics:
        """A fresh gatherer."""

    def export_config(self) -> Mapping[str, Any]:
        """What `shardyard.json` says: task, labels, problem, pooling, max_length, head; JSON values only."""
