"""Questions for tests: who lives where, the files that hold them, specs, and their plans."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.small_specs import architecture, locations, parse
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.plan import plan

KINDS = {
    "Who came?": ["Anna", "Bob", "Clara Smith"],
    "Where was it?": ["Rome", "New York", "Oslo"],
    "When was it?": ["1969", "2001", "1812"],
}


def asked(number: int, seed: int, *, unanswered: float = 0.0, filler: int = 4) -> list[dict[str, Any]]:
    """Rows in SQuAD's flat form: contexts of a person, a place and a year among other words, and a question for one."""
    draw = random.Random(seed)
    rows = []
    for at in range(number):
        found = {question: draw.choice(answers) for question, answers in KINDS.items()}
        question = draw.choice(list(KINDS))
        words = [draw.choice(["the", "dog", "film", "rain"]) for _ in range(draw.randint(1, filler))]
        is_there = draw.random() >= unanswered
        parts = [answer for kind, answer in found.items() if kind != question or is_there] + words
        draw.shuffle(parts)
        answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
        if is_there:
            before = parts[: parts.index(found[question])]
            answers = {"text": [found[question]], "answer_start": [sum(len(part) + 1 for part in before)]}
        rows.append({"id": f"q{at}", "question": question, "context": " ".join(parts), "answers": answers})
    return rows


def nested(rows: Sequence[Mapping[str, Any]], version: str = "v2.0") -> dict[str, Any]:
    """The rows as SQuAD's own JSON."""
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "is_impossible": not row["answers"]["text"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                    ],
                }
            ],
        }
        for row in rows
    ]
    return {"version": version, "data": [{"title": "homes", "paragraphs": paragraphs}]}


def write_nested(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text(json.dumps(nested(rows)))
    return path


def spec_of(train: Path, task: Mapping[str, Any] | None = None, **changes: Any) -> spec_pb2.JobSpec:
    spec: dict[str, Any] = {
        "fineTuning": {"questionAnswering": {"maxLength": 32, "overlap": 8, **(task or {})}},
        "model": architecture("bert"),
        "tokenizer": {"train": {"algorithm": "ALGORITHM_WORDPIECE", "vocabSize": 120}},
        "trainData": {"uri": str(train)},
        "optimization": {"maxSteps": 4, "globalBatchSize": 4},
    }
    return parse({**spec, **changes})


def planned(folder: Path, spec: spec_pb2.JobSpec) -> worker_pb2.PlanResult:
    request = worker_pb2.PlanRequest(spec=spec, locations=locations(folder))
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))
