"""Tagged words for tests: texts, files that hold them, specs, and their plans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.small_specs import architecture, locations, parse
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.plan import plan

TEXTS = [
    (["Anna", "met", "Bob", "Smith", "."], ["B-PER", "O", "B-PER", "I-PER", "O"]),
    (["Rome", "is", "far"], ["B-LOC", "O", "O"]),
] * 8
LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec_of(train: Path, task: Mapping[str, Any] | None = None, **changes: Any) -> spec_pb2.JobSpec:
    spec: dict[str, Any] = {
        "fineTuning": {"tokenClassification": {"maxLength": 16, **(task or {})}},
        "model": architecture("bert"),
        "tokenizer": {"train": {"algorithm": "ALGORITHM_WORDPIECE", "vocabSize": 80}},
        "trainData": {"uri": str(train)},
        "optimization": {"maxSteps": 4, "globalBatchSize": 4},
    }
    return parse({**spec, **changes})


def planned(folder: Path, spec: spec_pb2.JobSpec) -> worker_pb2.PlanResult:
    request = worker_pb2.PlanRequest(spec=spec, locations=locations(folder))
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))
