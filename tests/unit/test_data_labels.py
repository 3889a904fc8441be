"""Labels found in data: what is one, and what is refused with its file and line before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.small_specs import classification_spec, locations, sentences
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.columns import Row
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Problem, find_schema, parse_label
from shardyard_trainer.tasks.build import build_task


def parsed(label: Any, problem: Problem = SINGLE_LABEL, given: tuple[str, ...] = ()) -> Any:
    return parse_label(Row("a.jsonl", 7, "text", None, label), problem, given)


REFUSED: list[tuple[str, Any, Problem, tuple[str, ...]]] = [
    ("half a surrogate", "a\ud800", SINGLE_LABEL, ("half of a surrogate pair", "whole character")),
    ("half a surrogate among several", ["a", "\udfff"], MULTI_LABEL, ("half of a surrogate pair",)),
    ("half a surrogate in one string", "a|\udfff", MULTI_LABEL, ("half of a surrogate pair",)),
    ("NUL", "a\0b", SINGLE_LABEL, ("U+0000", "leave it out")),
    ("line break", "a\nb", SINGLE_LABEL, ("U+000A",)),
    ("direction of text", "a\u202eb", SINGLE_LABEL, ("U+202E",)),
    ("byte-order mark", "\ufeffa", SINGLE_LABEL, ("U+FEFF",)),
    ("long", "x" * 1025, SINGLE_LABEL, ("1,025 characters", "at most 1,024")),
    ("long among several", ["a", "x" * 100_000], MULTI_LABEL, ("100,000 characters",)),
    ("long number", 10**1024, SINGLE_LABEL, ("1,025 characters",)),
    ("empty among several", ["a", ""], MULTI_LABEL, ("missing",)),
    ("blank", "  ", SINGLE_LABEL, ("a word or a number",)),
    ("infinite square", 1e300, REGRESSION, ("fp32", "1.8e+19", "scale")),
    ("infinite square in words", "-1e300", REGRESSION, ("fp32",)),
    ("just over", 1.85e19, REGRESSION, ("fp32",)),
    ("no number at all", 10**400, REGRESSION, ("finite number",)),
]


@pytest.mark.parametrize(("label", "problem", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_label_that_cannot_be_one_is_refused_with_its_line(
    label: Any, problem: Problem, words: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        parsed(label, problem)
    error = caught.value
    assert (error.reason, error.file, error.line) == ("DATA_INVALID", "a.jsonl", 7)
    assert all(word in error.message for word in words), error.message
    error.message.encode()
    error.metadata.get("value", "").encode()
    assert len(error.message) < 300


ACCEPTED: list[tuple[Any, Problem, Any]] = [
    ("x" * 1024, SINGLE_LABEL, "x" * 1024),
    ("größe 😀", SINGLE_LABEL, "größe 😀"),
    ("می\u200cروم", SINGLE_LABEL, "می\u200cروم"),
    (" a ", SINGLE_LABEL, "a"),
    (["b", 1, True], MULTI_LABEL, ("b", "1", "true")),
    (1.8e19, REGRESSION, 1.8e19),
    ("-3", REGRESSION, -3.0),
]


@pytest.mark.parametrize(("label", "problem", "expected"), ACCEPTED)
def test_a_label_within_the_rules_is_taken(label: Any, problem: Problem, expected: Any) -> None:
    assert parsed(label, problem) == expected


@pytest.mark.parametrize("label", ["nan", "a\u200db", "x" * 2000])
def test_a_label_that_the_spec_names_is_taken_as_it_is(label: str) -> None:
    assert parsed(label, given=("a", label)) == label


def test_labels_that_are_too_large_together_are_refused_and_fewer_are_not() -> None:
    labels = {f"{at:04}" + "x" * 1000 for at in range(250)}
    with pytest.raises(DataError) as caught:
        find_schema(SINGLE_LABEL, (), labels)
    assert "250 different labels have 251,750 bytes together; at most 196,608" in caught.value.message
    assert find_schema(SINGLE_LABEL, (), set(sorted(labels)[:190])).num_outputs == 190
    assert find_schema(SINGLE_LABEL, (), {f"class {at}" for at in range(10_000)}).num_outputs == 10_000


def test_labels_are_numbers_only_where_each_is_one() -> None:
    assert find_schema(SINGLE_LABEL, (), {"10", "9", "-1"}).labels == ("-1", "9", "10")
    assert find_schema(SINGLE_LABEL, (), {"10", "9", "--1"}).labels == ("--1", "10", "9")


@pytest.mark.parametrize(
    ("label", "problem"),
    [("\ud800", SINGLE_LABEL), (["a", "\ud800"], MULTI_LABEL), ("x" * 100_000, SINGLE_LABEL), (1e300, REGRESSION)],
)
def test_data_with_such_a_label_is_no_task(tmp_path: Path, label: Any, problem: Problem) -> None:
    good: Any = 1 if problem == REGRESSION else "good"
    rows = [{"text": text, "label": good} for text in sentences(3)] + [{"text": "x", "label": label}]
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    spec = classification_spec(data)
    spec.fine_tuning.text_classification.CopyFrom(spec_pb2.TextClassification(problem=problem))
    with pytest.raises(DataError) as caught:
        build_task(spec, locations(tmp_path))
    assert (caught.value.field, caught.value.file, caught.value.line) == ("spec.train_data", "a.jsonl", 4)
