"""A tokenizer trained on the data knows the texts that its own task reads, whatever else read the same files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import chat
from helpers.small_specs import architecture, locations, parse
from shardyard_trainer.tasks.ingredients import prepare

CORPUS = "zebra"
QUESTION = {
    "question": "Who?", "context": "Anna waited", "answers": {"text": ["Anna"], "answer_start": [0]},
}  # fmt: skip
TASKS: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any], str]] = {
    "question_answering": ("bert", {"questionAnswering": {"maxLength": 16, "overlap": 4}}, QUESTION, "anna"),
    "token_classification": (
        "bert",
        {"tokenClassification": {"maxLength": 16}},
        {"tokens": ["Anna", "waited"], "tags": ["B-PER", "O"]},
        "anna",
    ),
    "preference": (
        "llama",
        {"preference": {"maxLength": 64}},
        {"prompt": "Who came here?", "chosen": "anna anna", "rejected": "no"},
        "Ġanna",
    ),
    "reranking": (
        "bert",
        {"reranking": {"maxLength": 16}},
        {"query": "Who?", "positives": ["Anna waited"], "negatives": "Nobody"},
        "anna",
    ),
    "instruction": ("llama", {"instruction": {"maxLength": 64}}, chat("Who came here?", "anna anna"), "Ġanna"),
}


def vocabulary(folder: Path, model: str, what: Mapping[str, Any]) -> set[str]:
    """The tokens of the tokenizer that a job trains on the folder's only file."""
    kind = {"algorithm": "ALGORITHM_WORDPIECE"} if model == "bert" else {}
    spec = parse(
        {
            **what,
            "model": architecture(model),
            "tokenizer": {"train": {"vocabSize": 300, **kind}},
            "trainData": {"uri": str(folder / "a.jsonl")},
            "optimization": {"maxSteps": 4, "globalBatchSize": 4},
            "evaluation": {"holdout": 0},
        }
    )
    return set(prepare(spec, locations(folder)).inputs.tokenizer.get_vocab())


@pytest.mark.parametrize("name", TASKS)
def test_a_trained_tokenizer_knows_the_texts_of_its_task_after_another_task_read_the_file(
    name: str, tmp_path: Path
) -> None:
    model, task, row, known = TASKS[name]
    row = {"content" if name == "instruction" else "text": " ".join([CORPUS] * 12), **row}
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 40)
    objective = {"maskedLm": {"sequenceLength": 32}} if model == "bert" else {"causalLm": {"sequenceLength": 32}}
    of_corpus = vocabulary(tmp_path, model, {"pretraining": objective})
    assert any(CORPUS in token for token in of_corpus) and known not in of_corpus
    own = vocabulary(tmp_path, model, {"fineTuning": task})
    assert known in own and not any(CORPUS in token for token in own)
