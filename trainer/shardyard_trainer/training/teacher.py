"""A trained model beside the one that is trained: it computes, and never changes.

It is not in checkpoints: each attempt loads it again, and the plan pins its files.
"""

from __future__ import annotations

import torch
from torch import nn

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.models.folder import TORCH_HUB_TYPES
from shardyard_trainer.tasks.distillation import Lesson
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput


class Teacher:
    """The teacher of a lesson on one rank, in evaluation mode. An engine places it on its device."""

    def __init__(self, lesson: Lesson) -> None:
        self.module: HuggingFaceModule = lesson.make_module()
        self._lesson = lesson
        self._columns = None if lesson.columns is None else torch.tensor(lesson.columns)
        self._placed: nn.Module = self.module

    def place(self, placed: nn.Module) -> None:
        """Takes the module as an engine has placed it; at ZeRO-3 every rank then calls `scores` equally often."""
        self._placed = placed
        if self._columns is not None:
            self._columns = self._columns.to(next(self.module.parameters()).device)

    def to_bf16(self) -> None:
        """Casts the weights as DeepSpeed casts those of the trained model, and leaves buffers in fp32: with the
        frequencies of rotary positions in bf16, a model would read its text at other places.
        """
        for parameter in self.module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
        if self.module.model.config.model_type in TORCH_HUB_TYPES:
            # Unlike transformers, such code adds its buffers as they are.
            self.module.to(torch.bfloat16)

    @torch.no_grad()
    def scores(self, batch: MicroBatch) -> torch.Tensor:
        """Its outputs [N, C] for the units of a micro batch as it reads them, fp32, in the student's order."""
        output: ModuleOutput = self._placed(**batch.inputs, return_scores=True)
        assert output.scores is not None
        logits_NC = output.scores.logits
        return logits_NC if self._columns is None else logits_NC[:, self._columns]

    def mix(self, output: ModuleOutput, wanted_NC: torch.Tensor) -> torch.Tensor:
        """The summed loss of a student's output, which is its own and how far its scores are from those `wanted`."""
        assert output.scores is not None
        logits_NC, distance, weights_N = output.scores
        distances_N = distance(logits_NC, wanted_NC, self._lesson.temperature)
        if weights_N is not None:
            distances_N = distances_N * weights_N
        weight = self._lesson.weight
        return (1 - weight) * output.loss_sum + weight * distances_N.sum()
