"""Queries and passages for tests: questions with passages that answer them, specs that rank them, and their loss."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from helpers.chats import write_lines
from helpers.small_specs import parse
from shardyard.v1 import spec_pb2
from shardyard_trainer.tasks.module import ModuleOutput

ANSWERS = ("this {} is very good", "that {} is not bad", "the {} is cute", "my {} is good")
OTHERS = ("a {} runs", "my {} sleeps", "the {} eats", "hello, {}", "that {} runs")


def write_passages(path: Path, number: int = 24, seed: int = 1) -> list[dict[str, Any]]:
    """Questions about how something is, each with a passage that says it, and some that do not."""
    draw = random.Random(seed)
    rows = []
    for at in range(number):
        topic = draw.choice(["dog", "cat", "film"])
        query = (
            f"{draw.choice(['is', 'not'])} {draw.choice(['this', 'that', 'my'])} {topic} {'very ' * (at % 4)}good {at}"
        )
        negatives = [text.format(topic) for text in draw.sample(OTHERS, 3)]
        rows.append({"query": query, "positives": [draw.choice(ANSWERS).format(topic)], "negatives": negatives})
    write_lines(path, rows)
    return rows


def spec_of(train: Path, task: Mapping[str, Any] | None = None, **changes: Any) -> spec_pb2.JobSpec:
    """A spec that continues from the model `bert`."""
    spec: dict[str, Any] = {
        "fineTuning": {"reranking": {"maxLength": 24, **(task or {})}},
        "model": {"model": "projects/default/models/bert"},
        "trainData": {"uri": str(train)},
        "evaluation": {"holdout": 0},
        "optimization": {"maxSteps": 4, "globalBatchSize": 4},
    }
    return parse({**spec, **changes})


class PlainReranker(torch.nn.Module):
    """Binary cross-entropy, or squared error of grades, of transformers' own outputs."""

    def __init__(self, model: torch.nn.Module, *, graded: bool = False) -> None:
        super().__init__()
        self.model = model
        self.graded = graded

    def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> ModuleOutput:
        scores, wanted = self.model(**inputs).logits.flatten(), labels.flatten().float()
        if self.graded:
            return ModuleOutput((scores - wanted).square().sum(), None)
        return ModuleOutput(torch.nn.functional.binary_cross_entropy_with_logits(scores, wanted, reduction="sum"), None)
