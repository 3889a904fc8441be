"""What a task of the integration table learns from: a slice of real data, and how `Predict` is measured on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shardyard

SEED = 3
TINY_BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True)
class Story:
    """A job on real data, but for where it runs.

    `numbers` asks the model about the data of the evaluation, and computes metrics from the answers; None if answers
    cannot give them: then an evaluation of the model has to. The loss falls at least to the share `falls_to`.
    """

    spec: shardyard.JobSpec
    numbers: Callable[[shardyard.Model], Mapping[str, float]] | None = None
    falls_to: float = 0.9


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def steps(number: int, learning_rate: float, *, batch: int = 8) -> shardyard.Optimization:
    """A few steps at a constant rate, so that the loss has to fall at once."""
    return shardyard.Optimization(
        max_steps=number, learning_rate=learning_rate, global_batch_size=batch, schedule="constant", seed=SEED
    )
