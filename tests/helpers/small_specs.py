"""Specs of small models on small data, written into a test's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.columns import Row, read_rows
from shardyard_trainer.data.sources import resolve_source

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "small",
    "grey",
    "birds",
    "sing",
    "in",
    "old",
    "green",
    "trees",
    "near",
    "home",
]

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32},
    "llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
    },
    "bert": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64},
}


def locations(tmp_path: Path, **folders: Path) -> worker_pb2.Locations:
    """Everything under the test's folder may be read."""
    return worker_pb2.Locations(
        data_roots=[str(tmp_path)],
        cache_dir=str(tmp_path / "cache"),
        folders={name: str(folder) for name, folder in folders.items()},
    )


def parse(spec: Mapping[str, Any]) -> spec_pb2.JobSpec:
    """A JobSpec from what its JSON would be."""
    return json_format.ParseDict(dict(spec), spec_pb2.JobSpec())


def sentences(number: int, *, least: int = 4, most: int = 14) -> list[str]:
    """Sentences of known words, different and always the same ones."""
    return [
        " ".join(WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(least + i % (most - least + 1)))
        for i in range(number)
    ]


def write_corpus(tmp_path: Path, number: int = 200) -> Path:
    """A text file, one document a line."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(sentences(number)) + "\n")
    return path


def write_labelled(path: Path, rows: Sequence[tuple[str, str]] | None = None) -> Path:
    """A CSV file with `text` and `label`; by default 60 rows, about half `bad`."""
    chosen = rows if rows is not None else [(s, "good" if i % 2 else "bad") for i, s in enumerate(sentences(60))]
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in chosen))
    return path


def architecture(model_type: str, **overrides: Any) -> dict[str, Any]:
    """A ModelSource of a tiny fresh model."""
    family = model_type if model_type in OVERRIDES else "bert"
    return {"architecture": {"modelType": model_type, "overrides": {**OVERRIDES[family], **overrides}}}


def causal_spec(corpus: Path, model_type: str = "gpt2", **changes: Any) -> spec_pb2.JobSpec:
    """Pretraining from scratch by next-token prediction."""
    return parse(
        {
            "pretraining": {"causalLm": {"sequenceLength": 32}},
            "model": architecture(model_type) | {"dropout": 0},
            "tokenizer": {"train": {"vocabSize": 300}},
            "trainData": {"uri": str(corpus)},
            "optimization": {"maxSteps": "10", "seed": "3"},
            **changes,
        }
    )


def masked_spec(corpus: Path, model_type: str = "bert", **changes: Any) -> spec_pb2.JobSpec:
    """Pretraining from scratch by predicting masked tokens."""
    return parse(
        {
            "pretraining": {"maskedLm": {"sequenceLength": 32}},
            "model": architecture(model_type) | {"dropout": 0},
            "tokenizer": {"train": {"vocabSize": 120, "algorithm": "ALGORITHM_WORDPIECE"}},
            "trainData": {"uri": str(corpus)},
            "optimization": {"maxSteps": "10", "seed": "3"},
            **changes,
        }
    )


def classification_spec(
    train: Path, model: Mapping[str, Any] | None = None, *, classify: Mapping[str, Any] | None = None, **changes: Any
) -> spec_pb2.JobSpec:
    """Fine-tuning for texts; by default a fresh BERT."""
    fresh = {"tokenizer": {"train": {"vocabSize": 120, "algorithm": "ALGORITHM_WORDPIECE"}}} if model is None else {}
    return parse(
        {
            "fineTuning": {"textClassification": {"maxLength": 16, **(classify or {})}},
            "model": model or architecture("bert"),
            "trainData": {"uri": str(train)},
            "optimization": {"maxSteps": "10"},
            **fresh,
            **changes,
        }
    )


def shared_data(name: str) -> Path:
    """A folder of real data outside the repository; the test is skipped if it is missing."""
    import pytest  # Only for this: what else is here runs on machines without it.

    root = Path(os.environ.get("SHARDYARD_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
    if not (root / name).is_dir():
        pytest.skip(f"no real data: {root / name} is not there (set SHARDYARD_TEST_DATA)")
    return root / name


def read_source(path: Path, *, with_label: bool = True, **source: Any) -> list[Row]:
    """All rows of a file or folder, read as a job reads them; `source` has fields of its DataSource."""
    message = json_format.ParseDict({"uri": str(path), **source}, spec_pb2.DataSource())
    files = resolve_source(message, locations(path if path.is_dir() else path.parent))
    return list(read_rows(files, message, with_label=with_label))
