"""What all tasks have: the model that was chosen, the tokenizer, and what is to be warned of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from shardyard_trainer.data.errors import SpecError, listed
from shardyard_trainer.models import weight_heads
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import MicroBatch, ModuleOutput, Task
from shardyard_trainer.tasks.modules import HuggingFaceModule


class TaskWarning(NamedTuple):
    """Something to know that stops nothing: reason (such as `NEW_HEAD`), message, and the spec's field."""

    reason: str
    message: str
    field: str = ""


class TrainableTask(Task, Protocol):
    """A task as it is built here: it also says what it found, and makes its module."""

    choice: ModelChoice
    warnings: Sequence[TaskWarning]
    length: int
    """Tokens in a packed sequence, or the longest text."""

    def make_module(self, *, meta: bool) -> HuggingFaceModule:
        """The module, drawn with torch's current generator; `meta`: without weights."""


def accept_weights(choice: ModelChoice, task: str) -> tuple[ModelChoice, list[TaskWarning]]:
    """The choice as its weights really are, and what of them is not as its config.json says.

    `task` names the class that reads them, empty for the backbone alone. Raises SpecError for weights of another model.
    """
    if choice.folder is None:
        return choice, []
    try:
        report = weight_heads.look(choice.folder, task)
    except FolderInvalid as error:
        raise SpecError(choice.field, error.reason, str(error), error.metadata) from None
    warnings = []
    if report.lacking:
        found = report.reshaped or f"the weights lack {listed(report.lacking, most=2)} of the {task} head"
        message = f"{found}: a new head is started"
        warnings.append(TaskWarning("NEW_HEAD", message, choice.field))
    if report.unread:
        message = f"{len(report.unread)} tensors of the weights are not read: {listed(report.unread, most=3)}"
        warnings.append(TaskWarning("UNREAD_TENSORS", message, choice.field))
    if report.untied:
        message = "config.json ties the output layer to the embeddings, but the weights have another one: it is kept"
        warnings.append(TaskWarning("OUTPUT_LAYER_UNTIED", message, choice.field))
        choice = dataclasses.replace(choice, config=copy.deepcopy(choice.config))
        choice.config.tie_word_embeddings = False
    return choice, warnings


class LossSum:
    """Sums the loss and its units; the base of the language models' metrics."""

    def __init__(self) -> None:
        self._loss: list[torch.Tensor] = []
        self._units = 0

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        # Kept on the device: reading it would wait for the batch.
        self._loss.append(output.loss_sum.detach().double())
        self._units += batch.num_units

    def part(self) -> Any:
        """Sum of the loss, and of the units."""
        return float(torch.stack(self._loss).sum()) if self._loss else 0.0, self._units

    @staticmethod
    def mean(parts: Sequence[Any]) -> float:
        """The mean loss of a unit over all ranks."""
        return float(sum(part[0] for part in parts) / max(1, sum(part[1] for part in parts)))


def positions_from(starts: np.ndarray) -> np.ndarray:
    """Positions that restart at every start, from booleans [T] of which the first is true."""
    index = np.arange(len(starts))
    return index - np.maximum.accumulate(np.where(starts, index, 0))
