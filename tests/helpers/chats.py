"""Conversations for tests: questions with fixed answers, specs that learn them, and their plans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.small_specs import architecture, locations, parse
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.plan import plan

ANSWERS = {
    "Who are you?": "A small model.",
    "What is red?": "A rose is red.",
    "What is blue?": "The sky is blue.",
    "Count to three.": "one two three",
}


def chat(*said: str, system: str = "") -> dict[str, Any]:
    """A row of messages: user and assistant by turns."""
    turns = [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(said)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(path: Path, times: int = 4) -> Path:
    """Each question with its answer, and one of them after another."""
    rows = [chat(*pair) for pair in ANSWERS.items()]
    first, last = list(ANSWERS.items())[:2]
    return write_lines(path, [*rows, chat(*first, *last)] * times)


def spec_of(train: Path, task: Mapping[str, Any] | None = None, **changes: Any) -> spec_pb2.JobSpec:
    spec: dict[str, Any] = {
        "fineTuning": {"instruction": {"maxLength": 64, **(task or {})}},
        "model": {**architecture("llama"), "dropout": 0},
        "tokenizer": {"train": {"vocabSize": 300}},
        "trainData": {"uri": str(train)},
        "optimization": {"maxSteps": 4, "globalBatchSize": 4},
    }
    return parse({**spec, **changes})


def planned(folder: Path, spec: spec_pb2.JobSpec, **folders: Path) -> worker_pb2.PlanResult:
    request = worker_pb2.PlanRequest(spec=spec, locations=locations(folder, **folders))
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))
