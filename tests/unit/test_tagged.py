"""Tagged words as people have them: lists, numbers, text, CoNLL columns, spans; and what is refused by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.small_specs import locations
from helpers.tagged import LABELS, TEXTS, planned, spec_of, write_lines
from helpers.tiny_folders import save_folder
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard_trainer.data.budget import BUDGET_VARIABLE
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare


def lists(folder: Path, tokens: str = "tokens", tags: str = "tags") -> Path:
    return write_lines(folder / "a.jsonl", [{tokens: words, tags: marks, "id": 3} for words, marks in TEXTS])


def numbers(folder: Path) -> Path:
    table = {
        "tokens": [words for words, _ in TEXTS],
        "ner_tags": [[LABELS.index(m) for m in marks] for _, marks in TEXTS],
    }
    pq.write_table(pa.table(table), folder / "a.parquet")
    return folder / "a.parquet"


def as_text(folder: Path) -> Path:
    rows = ["tokens,tags", *(f'"{words}","{" ".join(marks)}"' for words, marks in TEXTS)]
    (folder / "a.csv").write_text("\n".join(rows) + "\n")
    return folder / "a.csv"


def columns_of_words(folder: Path) -> Path:
    texts = ("\n".join(f"{word} NN {mark}" for word, mark in zip(*text, strict=True)) for text in TEXTS)
    (folder / "a.conll").write_text("-DOCSTART- -X- O\n\n" + "\n\n".join(texts) + "\n")
    return folder / "a.conll"


def spans(folder: Path) -> Path:
    anna = [{"start": 0, "end": 4, "label": "PER"}, {"start": 9, "end": 18, "label": "PER"}]
    rows = [{"text": "Anna met Bob Smith.", "spans": anna}, {"text": "Rome is far", "spans": [[0, 4, "LOC"]]}] * 8
    return write_lines(folder / "a.jsonl", rows)


FORMATS = {
    "lists": (lists, {}),
    "other names": (lambda folder: lists(folder, "words", "ner_tags"), {}),
    "numbers": (numbers, {"labels": LABELS}),
    "as text": (as_text, {}),
    "columns": (columns_of_words, {}),
    "spans": (spans, {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_words_and_tags_are_read_from_each_format(name: str, tmp_path: Path) -> None:
    write, task = FORMATS[name]
    found = planned(tmp_path, spec_of(write(tmp_path), task))
    assert not found.violations, found.violations
    assert list(found.plan.labels) == LABELS and found.plan.output == plan_pb2.JOB_OUTPUT_MODEL
    resolved = found.plan.resolved_spec
    assert resolved.fine_tuning.token_classification.scheme == spec_pb2.TokenClassification.SCHEME_BIO
    prepared = prepare(resolved, locations(tmp_path))
    batch = prepared.train.micro_batch([SampleRef(0, at) for at in range(prepared.train.num_samples)])
    answered = batch.inputs["labels"][batch.inputs["labels"] >= 0]
    # Each text has a word of each kind in the same place.
    counts = torch.bincount(answered, minlength=5)
    assert counts[3] == 2 * counts[4] and counts[2] == 0 and batch.num_units == len(answered)
    assert planned(tmp_path, resolved).plan == found.plan
    # Once for all of them: the rank reads what the plan has left.
    assert len(left_in(tmp_path, "tagged")) == 1


def left_in(folder: Path, kind: str) -> list[Path]:
    cache = Path(locations(folder).cache_dir)
    return [path for path in (cache / kind).iterdir() if not path.name.startswith(".")]


def test_a_tokenizer_is_trained_on_the_words_of_the_mapped_column(tmp_path: Path) -> None:
    rows = [{"german": ["Rom"], "english": ["Rome"], "tags": ["B-LOC"]}] * 8
    train = write_lines(tmp_path / "a.jsonl", rows)
    vocabularies = []
    for column in ("german", "english"):
        source = {"uri": str(train), "columns": {"tokens": column}}
        found = planned(tmp_path, spec_of(train, trainData=source))
        assert not found.violations, found.violations
        vocabularies.append(prepare(found.plan.resolved_spec, locations(tmp_path)).inputs.tokenizer.get_vocab())
    german, english = vocabularies
    assert "##e" in english and "##e" not in german


def test_tagged_words_are_given_up_under_the_budget_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUDGET_VARIABLE, "1")
    old = Path(locations(tmp_path).cache_dir) / "tagged" / "old"
    old.mkdir(parents=True)
    (old / "tokens.bin").write_bytes(b"x" * 1000)
    found = planned(tmp_path, spec_of(lists(tmp_path)))
    assert not found.violations, found.violations
    assert not old.exists() and len(left_in(tmp_path, "tagged")) == 1


ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "unequal": ([{"tokens": ["a", "b"], "tags": ["O"]}], {}, "2 tokens, but 1 tags"),
    "no list": ([{"tokens": 3, "tags": ["O"]}], {}, "tokens is '3'; give a list"),
    "numbers without names": ([{"tokens": ["a"], "tags": [1]}], {}, "say which tags they are in labels"),
    "a number too large": ([{"tokens": ["a"], "tags": [7]}], {"labels": LABELS}, "the tag 7, but labels has 5 names"),
    "numbers and names": ([{"tokens": ["a", "b"], "tags": [1, "O"]}], {"labels": LABELS}, "write all as one of them"),
    "unknown": ([{"tokens": ["a"], "tags": ["B-ORG"]}], {"labels": LABELS}, "'B-ORG' is none of labels"),
    "outside of the text": ([{"text": "Rome", "spans": [[0, 9, "LOC"]]}], {}, "not inside the text's 4 characters"),
    "no word": ([{"text": "a  b", "spans": [[1, 3, "LOC"]]}], {}, "covers no word"),
    "overlap": ([{"text": "New York", "spans": [[0, 8, "LOC"], [4, 8, "LOC"]]}], {}, "overlaps with another"),
    "no span": ([{"text": "Rome", "spans": [{"from": 0}]}], {}, "start and end are whole numbers"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    bad, task, message = ROWS[name]
    good = [{"tokens": ["x", "Rome"], "tags": ["O", "B-LOC"]}]
    if "text" in bad[0]:
        good = [{"text": "in Rome", "spans": [[3, 7, "LOC"]]}]
    if "labels" in task and not isinstance(bad[0]["tags"][0], str):
        good = [{"tokens": ["x", "Rome"], "tags": [0, 1]}]
    (violation,) = planned(tmp_path, spec_of(write_lines(tmp_path / "a.jsonl", [*good * 6, *bad]), task)).violations
    assert violation.field == "spec.train_data" and message in violation.message
    assert "a.jsonl, line 7" in violation.message


def test_what_else_does_not_fit_is_refused_by_its_field(tmp_path: Path) -> None:
    train = lists(tmp_path)
    other = write_lines(tmp_path / "b.jsonl", [{"tokens": ["x"], "tags": ["B-ORG"]}])
    two = write_lines(tmp_path / "two.jsonl", [{"tokens": ["x"], "ner_tags": ["O"], "pos_tags": ["NN"]}])
    (tmp_path / "odd.conll").write_text("Rome B-LOC\nis\n")
    for spec, field, message in (
        (
            spec_of(train, evalData={"uri": str(other)}),
            "spec.eval_data",
            "line 1: the tag 'B-ORG' is none of labels: O, B-LOC",
        ),
        (spec_of(two), "spec.train_data.columns", "ner_tags, pos_tags may each be the tags"),
        (spec_of(tmp_path / "odd.conll"), "spec.train_data", "odd.conll, line 2"),
        (spec_of(train, trainData={"uri": str(train), "columns": {"label": "x"}}), "spec.train_data.columns", "roles"),
        (
            spec_of(train, model={"architecture": {"modelType": "t5"}}),
            "spec.fine_tuning.token_classification",
            "use one such as bert",
        ),
    ):
        found = {each.field: each.message for each in planned(tmp_path, spec).violations}
        assert message in found.get(field, ""), found


def test_tags_without_a_kind_are_plain_labels_and_the_plan_warns(tmp_path: Path) -> None:
    bare = [{"tokens": words, "tags": [mark[0] for mark in marks]} for words, marks in TEXTS]
    found = planned(tmp_path, spec_of(write_lines(tmp_path / "bare.jsonl", bare)))
    assert list(found.plan.labels) == ["B", "I", "O"]
    assert found.plan.resolved_spec.fine_tuning.token_classification.scheme == spec_pb2.TokenClassification.SCHEME_PLAIN
    (warning,) = [each for each in found.plan.warnings if each.reason == "BARE_TAGS"]
    assert "no entities are found" in warning.message and "B-NAME and I-NAME" in warning.message
    speech = [{"tokens": words, "tags": ["NOUN" if mark == "O" else "I" for mark in marks]} for words, marks in TEXTS]
    found = planned(tmp_path, spec_of(write_lines(tmp_path / "speech.jsonl", speech)))
    assert "BARE_TAGS" not in [each.reason for each in found.plan.warnings]


def test_a_head_with_the_same_labels_is_kept_in_its_own_order_and_another_is_replaced(tmp_path: Path) -> None:
    train = lists(tmp_path)
    order = ["I-PER", "O", "B-PER", "B-LOC", "I-LOC"]
    for labels, reasons in ((order, []), (["O", "B-ORG", "I-ORG"], ["NEW_HEAD"])):
        folder = tmp_path / "-".join(labels)
        names = dict(enumerate(labels))
        save_folder(folder, "BertForTokenClassification", id2label=names, label2id={n: k for k, n in names.items()})
        spec = spec_of(train, model={"uri": str(folder)}, tokenizer={})
        found = planned(tmp_path, spec)
        assert not found.violations, found.violations
        assert [warning.reason for warning in found.plan.warnings if warning.reason == "NEW_HEAD"] == reasons
        assert list(found.plan.labels) == (order if not reasons else LABELS)
        prepared = prepare(found.plan.resolved_spec, locations(tmp_path))
        weights = build_module(prepared, spec).model.classifier.weight
        assert weights.shape == (5, 16) and np.isfinite(weights.detach().numpy()).all()
