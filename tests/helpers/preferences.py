"""Preferences for tests: questions with a good answer and a bad one, specs that learn them, and plain losses of DPO."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from helpers.chats import ANSWERS, write_lines
from helpers.small_specs import parse
from shardyard.v1 import spec_pb2
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.tasks.module import ModuleOutput

BAD = ("I do not know.", "no", "Ask somebody else, please.")


def write_preferences(path: Path, times: int = 3) -> Path:
    """Each question with its answer, and with one that is worse."""
    rows = [
        {"prompt": question, "chosen": answer, "rejected": BAD[(place + turn) % len(BAD)]}
        for turn in range(times)
        for place, (question, answer) in enumerate(ANSWERS.items())
    ]
    return write_lines(path, rows)


def spec_of(train: Path, task: Mapping[str, Any] | None = None, **changes: Any) -> spec_pb2.JobSpec:
    """A spec that continues from the model `chat`."""
    spec: dict[str, Any] = {
        "fineTuning": {"preference": {"maxLength": 128, **(task or {})}},
        "model": {"model": "projects/default/models/chat"},
        "trainData": {"uri": str(train)},
        "evaluation": {"holdout": 0},
        "optimization": {"maxSteps": 4, "globalBatchSize": 4, "learningRate": 1e-3},
    }
    return parse({**spec, **changes})


class PlainPreference(torch.nn.Module):
    """DPO as its paper writes it: a model and a frozen copy of it, with all logits of transformers' own forward pass.

    It takes the micro batches of the task, of which it does not read `before`.
    """

    def __init__(self, model: torch.nn.Module, *, beta: float = 0.1) -> None:
        super().__init__()
        self.model = model
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        self.beta = beta

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, before: torch.Tensor) -> ModuleOutput:
        gains = self.log_probs(self.model, input_ids, labels) - self.log_probs(self.reference, input_ids, labels)
        margins = self.beta * (gains[0::2] - gains[1::2])
        return ModuleOutput(-torch.nn.functional.logsigmoid(margins).sum(), None)

    @staticmethod
    def log_probs(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The log-probability of each answer, [2 B]."""
        found = model(input_ids=input_ids).logits.log_softmax(-1)
        learnt = labels >= 0
        return (found.gather(2, labels.clamp(min=0)[..., None])[..., 0] * learnt).sum(1)


def rewards(module: Any, batch: MicroBatch) -> torch.Tensor:
    """The rewards of a micro batch, [B, 2]."""
    with torch.no_grad():
        found: torch.Tensor = module(**batch.inputs, return_outputs=True).outputs["rewards"]
    return found
