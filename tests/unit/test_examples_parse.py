"""Every spec file and program in `examples/` is one that the SDK reads."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

import shardyard
from shardyard.specfile import read_spec_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DATA = (
    "corpus.txt",
    "input.txt",
    "reviews.csv",
    "articles.jsonl",
    "sst2/train.tsv",
    "sst2/test.tsv",
    "stsb/train.csv",
    "stsb/test.csv",
    "train.jsonl",
    "interactions.csv",
    "questions.json",
    "chats.jsonl",
    "preferences.jsonl",
    "passages.jsonl",
    "pairs.jsonl",
    "summaries.jsonl",
    "flowers/train/rose/1.jpg",
    "flowers/test/rose/2.jpg",
)
TASKS = {
    "pretrain-gpt2": "pretraining",
    "pretrain-bert": "pretraining",
    "pretrain-t5": "pretraining",
    "tinyshakespeare": "pretraining",
    "masked-items": "pretraining",
    "masked-image": "pretraining",
    "sst2": "fine_tuning",
    "sst-regression": "fine_tuning",
    "multi-label": "fine_tuning",
    "ner": "fine_tuning",
    "tensorflow-bert": "fine_tuning",
    "lora": "fine_tuning",
    "recommendation": "fine_tuning",
    "question-answering": "fine_tuning",
    "instruction": "fine_tuning",
    "preference": "fine_tuning",
    "sentence-embedding": "fine_tuning",
    "reranking": "fine_tuning",
    "translation": "fine_tuning",
    "summarization": "fine_tuning",
    "flowers": "fine_tuning",
    "torch-hub": "fine_tuning",
    "features": "feature_extraction",
    "evaluation": "model_evaluation",
    "export": "model_export",
    "copy": "model_copy",
}


def test_there_is_a_spec_file_for_every_task() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(TASKS)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_spec_is_read_whole(path: Path, tmp_path: Path) -> None:
    for name in ("bert", "smollm2"):
        (tmp_path / name).mkdir()
    for name in DATA:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    shutil.copy(path, tmp_path)
    draft = read_spec_file(tmp_path / path.name).draft(project="default")
    assert draft.job_id == path.stem
    assert draft.job.spec.WhichOneof("task") == TASKS[path.stem]
    assert draft.uploads or path.stem == "copy", "an example names data that is sent"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_program_uses_names_that_exist(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "shardyard":
            assert hasattr(shardyard, node.attr), node.attr
