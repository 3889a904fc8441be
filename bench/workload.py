"""What `bench/trainer.py` trains, the same for every side: data, sizes, threads."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workload:
    """One workload; paths are absolute."""

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
    overrides: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Workload:
        """From what `to_dict` gave."""
        paths = ("folder", "text", "labelled", "model", "tokenizer")
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
