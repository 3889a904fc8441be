"""What `bench/trainer.py` trains, the same for every side: data, sizes, threads."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workload:
    """One workload; paths are absolute. `data` is what a task has that is neither plain nor labelled text."""

    folder: Path
    text: Path
    labelled: Path
    model: Path
    tokenizer: Path
    sequence_length: int
    batch_size: int
    learning_rate: float
    threads: int
    workers: int = 1
    data: Path = Path()
    overrides: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Workload:
        """From what `to_dict` gave."""
        paths = ("folder", "text", "labelled", "model", "tokenizer", "data")
        return cls(**{name: Path(value) if name in paths else value for name, value in values.items()})


def token_blocks(tokenizer: Any, workload: Workload) -> list[list[int]]:
    """The text's lines with an end mark after each, joined and cut into blocks; a rest is dropped."""
    lines = workload.text.read_text(encoding="utf-8").splitlines()
    end = tokenizer.eos_token_id
    joined = [token for ids in tokenizer(lines)["input_ids"] for token in (*ids, end)]
    size = workload.sequence_length
    return [joined[start : start + size] for start in range(0, len(joined) - size + 1, size)]


def few_reviews(workload: Workload) -> tuple[list[str], list[int]]:
    """The labelled texts, `good` as 1."""
    with workload.labelled.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [int(row["label"] == "good") for row in rows]


def tagged_words(workload: Workload) -> list[tuple[list[str], list[str]]]:
    """The words of each text and their tags."""
    return [(row["tokens"], row["tags"]) for row in json_rows(workload)]


def json_rows(workload: Workload) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in workload.data.read_text(encoding="utf-8").splitlines()]


def pictures(workload: Workload) -> list[tuple[Path, int]]:
    """The files in the folders of their classes, and the number of each one's class."""
    classes = sorted(folder.name for folder in workload.data.iterdir())
    return [(path, classes.index(path.parent.name)) for path in sorted(workload.data.glob("*/*"))]
