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
from shardyard_trainer.data.label_column import LabelColumn, Labels, Wanted
from shardyard_trainer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Problem, find_schema
from shardyard_trainer.tasks.ingredients import prepare


def column(labels: list[Any], problem: Problem = SINGLE_LABEL, given: tuple[str, ...] = (), **more: str) -> Labels:
    """What a column with these labels, from line 7 on, is understood as."""
    found = LabelColumn(Wanted(problem, given, **more))
    for number, label in enumerate(labels):
        found.add(Row("a.jsonl", 7 + number, "text", None, label))
    return found.finish()


def parsed(label: Any, problem: Problem = SINGLE_LABEL, given: tuple[str, ...] = ()) -> Any:
    """What a label says, in a column that has another as well."""
    found = column([label, "other"] if problem != REGRESSION else [label], problem, given)
    if problem == REGRESSION:
        return float(found.array[0])
    if problem == MULTI_LABEL:
        return tuple(name for name, bit in zip(found.schema.labels, found.array, strict=False) if bit)
    return found.schema.labels[found.array[0]]


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
    (["b", 1, True], MULTI_LABEL, ("1", "b", "true")),
    (1.8e19, REGRESSION, 1.8e19),
    ("-3", REGRESSION, -3.0),
]


@pytest.mark.parametrize(("label", "problem", "expected"), ACCEPTED)
def test_a_label_within_the_rules_is_taken(label: Any, problem: Problem, expected: Any) -> None:
    assert parsed(label, problem) == expected


@pytest.mark.parametrize("label", ["nan", "a\u200db", "x" * 1024])
def test_a_label_that_the_spec_names_is_taken_as_it_is(label: str) -> None:
    assert parsed(label, given=("other", label)) == label


def test_labels_that_are_too_large_together_are_refused_and_fewer_are_not() -> None:
    labels = {f"{at:04}" + "x" * 1000 for at in range(250)}
    with pytest.raises(DataError) as caught:
        find_schema(SINGLE_LABEL, (), labels)
    assert "250 different labels have 251,750 bytes together; at most 196,608" in caught.value.message
    assert find_schema(SINGLE_LABEL, (), set(sorted(labels)[:190])).num_outputs == 190
    assert find_schema(SINGLE_LABEL, (), {f"class {at}" for at in range(10_000)}).num_outputs == 10_000


def test_labels_are_numbers_only_if_each_is_one() -> None:
    assert find_schema(SINGLE_LABEL, (), {"10", "9", "-1"}).labels == ("-1", "9", "10")
    assert find_schema(SINGLE_LABEL, (), {"10", "9", "--1"}).labels == ("--1", "10", "9")


@pytest.mark.parametrize(
    ("label", "problem"),
    [("\ud800", SINGLE_LABEL), (["a", "\ud800"], MULTI_LABEL), ("x" * 100_000, SINGLE_LABEL), (1e300, REGRESSION)],
)
def test_data_with_such_a_label_is_refused(tmp_path: Path, label: Any, problem: Problem) -> None:
    good: Any = 1 if problem == REGRESSION else "good"
    rows = [{"text": text, "label": good} for text in sentences(3)] + [{"text": "x", "label": label}]
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    spec = classification_spec(data)
    spec.fine_tuning.text_classification.CopyFrom(spec_pb2.TextClassification(problem=problem))
    with pytest.raises(DataError) as caught:
        prepare(spec, locations(tmp_path))
    assert (caught.value.field, caught.value.file, caught.value.line) == ("spec.train_data", "a.jsonl", 4)


LAYOUTS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "lists": ([["a", "b"], ["b"], []], {}, "ab b -"),
    "class ids": ([[0, 5], [5], [0]], {}, "05 5 0"),
    "one class": (["a", "", "a"], {}, "a - a"),
    "bars": (["a|b", "b", None], {}, "ab b -"),
    "bars with spaces": (["a | b", "b", " "], {}, "ab b -"),
    "semicolons": (["a;b", "b", ""], {}, "ab b -"),
    "lines": (["a\nb", "b", ""], {}, "ab b -"),
    "commas": (["a,b", "b, c", ""], {}, "ab bc -"),
    "of Python": (["['a', 'b']", "['b']", "[]"], {}, "ab b -"),
    "of JSON": (['["a", "b"]', '["b"]', "[]"], {}, "ab b -"),
    "of YAML": (["[a, b]", "[b]", "[]"], {}, "ab b -"),
    "of NumPy": (["['a' 'b']", "['b']", "[]"], {}, "ab b -"),
    "a set": (["{'a', 'b'}", "{'b'}", "{}"], {}, "ab b -"),
    "a tuple": (["('a', 'b')", "('b',)", "()"], {}, "ab b -"),
    "escapes": (['["\\u0061", "b"]', '["b"]', "[]"], {}, "ab b -"),
    "a separator": (["a / b", "b", ""], {"separator": "/"}, "ab b -"),
    "a separator that others are not": (["a,1|b,1", "b,1"], {"separator": "|"}, "a,1+b,1 b,1"),
    "commas in known names": (["a, x|b", "b"], {"given": ("a, x", "b")}, "a, x+b b"),
    "whole known names": (["a, x", "b"], {"given": ("a, x", "b")}, "a, x b"),
    "known parts": (["a,b", "c"], {"given": ("a", "b", "c")}, "ab c"),
    "as in the training data": (["a,b", "a"], {"given": ("a", "b", "a,b"), "like": "separator ,"}, "ab a"),
    "zeros and ones": ([[1, 1, 0], [0, 0, 0], [0, 1, 0]], {}, "01 - 1"),
    "of numbers": ([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], {}, "01 -"),
    "of truth values": ([[True, True, False], [False, False, False]], {}, "01 -"),
    "as text": (["[1, 1, 0]", "[0, 0, 0]"], {}, "01 -"),
    "as NumPy prints it": (["[1 1 0]", "[0 0 0]"], {}, "01 -"),
    "with spaces": (["1 1 0", "0 0 0"], {}, "01 -"),
    "with commas": (["1,1,0", "0,0,0"], {}, "01 -"),
    "named": ([[1, 1], [0, 1]], {"given": ("b", "a")}, "ba a"),
    "named, each once": ([[1, 0], [0, 1]], {"given": ("b", "a")}, "b a"),
    "of one class": (["1", "0"], {"given": ("toxic",)}, "toxic -"),
    "as in training": ([[1, 0], [0, 1]], {"given": ("0", "1"), "like": "vector"}, "0 1"),
    "classes called 0 and 1": ([["0"], ["1"], ["0", "1"]], {}, "0 1 01"),
}


@pytest.mark.parametrize(("labels", "more", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_several_labels_are_read_as_the_whole_column_has_them(
    labels: list[Any], more: dict[str, Any], expected: str
) -> None:
    found = column(labels, MULTI_LABEL, **more)
    names = found.schema.labels
    told = []
    for row in found.array.reshape(len(labels), len(names)):
        said = [name for name, bit in zip(names, row, strict=True) if bit]
        told.append(("+" if any(len(name) > 1 for name in said) else "").join(said) or "-")
    assert " ".join(told) == expected


TWO_READINGS: dict[str, tuple[list[Any], dict[str, Any], int, tuple[str, ...]]] = {
    "a comma in names": (
        ["Sports", "Food, Drink"],
        {},
        8,
        ("2 labels (Food and Drink)", "one label", "label_separator"),
    ),
    "two separators": (["a, b|c", "c"], {}, 7, ("(a, b and c)", "(a and b|c)", "give label_separator")),
    "parts and wholes": (["a,b", "a"], {"given": ("a", "b", "a,b")}, 7, ("2 labels", "one label (a,b)")),
    "lists and words": (["['a']", "b"], {}, 8, ("not a list, but line 7 has one", "give label_separator")),
    "cut lists": (["['a', 'b']", "['a', 'b"], {}, 8, ("not a list, but line 7",)),
    "one place": ([[0], [1]], {}, 7, ("one class by place, or the names", "list the classes in labels")),
    "two places": ([[0, 1], [1, 0]], {}, 7, ("2 classes by place, or the names", "quotes")),
    "two places in words": (["0,1", "1,0"], {}, 7, ("2 classes by place, or the names",)),
    "joined digits": (["010", "110"], {}, 7, ("a 0 or 1 for each of 3 classes, or one class", "`0,1,0`")),
    "vectors of two sizes": ([[1, 1, 0], [1, 1]], {}, 8, ("not as many as in line 7",)),
    "vectors of another size": ([[1, 1, 0]], {"given": ("a", "b")}, 7, ("3 classes, but labels has 2",)),
    "a strange list": (["['a' b]", "['b']"], {}, 7, ("write it as JSON",)),
    "lists in lists": ([["a", ["b"]]], {}, 7, ("words or numbers",)),
    "objects": ([{"a": 1}], {}, 7, ("words or numbers",)),
    "not known": (["a|z"], {"given": ("a", "b")}, 7, ("'z' is none of: a, b",)),
    "a page of text": (["a" * 2**17], {}, 7, ("131,072 characters; map the column",)),
    "cut texts": (['["a", "' + '\\"' * 2**14 + "]", '["a"]'], {}, 7, ("write it as JSON",)),
}


@pytest.mark.parametrize("case", TWO_READINGS.values(), ids=TWO_READINGS)
def test_labels_that_fit_two_readings_or_none_are_refused(
    case: tuple[list[Any], dict[str, Any], int, tuple[str, ...]],
) -> None:
    labels, more, line, words = case
    with pytest.raises(DataError) as caught:
        column(labels, MULTI_LABEL, **more)
    assert caught.value.line == line
    assert all(word in caught.value.message for word in words), caught.value.message


def test_rows_that_never_have_two_labels_are_warned_of_and_so_are_classes_without_names() -> None:
    assert [reason for reason, _ in column(["a", "b", ""], MULTI_LABEL).notes] == ["NO_TEXT_HAS_TWO_LABELS"]
    assert column(["a", ""], MULTI_LABEL).notes == []
    assert column(["a|b", ""], MULTI_LABEL).notes == []
    assert [reason for reason, _ in column([[1, 1, 0]], MULTI_LABEL).notes] == ["UNNAMED_LABELS"]
    assert column([[1, 1]], MULTI_LABEL, ("x", "y")).notes == []


LOOKALIKES: dict[str, tuple[list[Any], tuple[str, ...], tuple[str, ...], list[int]]] = {
    "numbers of pandas": (["0", "1", "0.0", "1.0"], (), ("0", "1"), [0, 1, 0, 1]),
    "kinds of numbers": ([0, 1.0, "0.0", "1"], (), ("0", "1"), [0, 1, 0, 1]),
    "truth": ([True, False, "True", "FALSE"], (), ("false", "true"), [1, 0, 1, 0]),
    "case and spaces": (["Positive", "negative", "positive", "Negative "], (), ("Positive", "negative"), [0, 1, 0, 1]),
    "the most frequent": (["pos", "Pos", "Pos", "neg"], (), ("Pos", "neg"), [0, 0, 0, 1]),
    "composed letters": (["café", "cafe\u0301", "x"], (), ("café", "x"), [0, 0, 1]),
    "width": (["AB", "ＡＢ", "x"], (), ("AB", "x"), [0, 0, 1]),
    "inner spaces": (["a b", "a\u00a0b", "a  b", "x"], (), ("a b", "x"), [0, 0, 0, 1]),
    "those of the spec": (["Good ", "bad", "BAD"], ("bad", "good"), ("bad", "good"), [1, 0, 0]),
    "numbers of the spec": (["1.0", "0.0"], ("0", "1"), ("0", "1"), [1, 0]),
}


@pytest.mark.parametrize("case", LOOKALIKES.values(), ids=LOOKALIKES)
def test_labels_that_look_alike_are_one_and_named_in_a_warning(
    case: tuple[list[Any], tuple[str, ...], tuple[str, ...], list[int]],
) -> None:
    labels, given, expected, classes = case
    found = column(labels, given=given)
    assert (found.schema.labels, found.array.tolist()) == (expected, classes)
    ((reason, message),) = found.notes
    assert reason == "LOOKALIKE_LABELS" and "write each label in one way" in message
    odd = [label for label in labels if isinstance(label, str) and label.strip() not in expected]
    assert all(f"'{label}'".replace("\u00a0", "\\xa0") in message for label in odd), message
    # A resolved spec names these labels, and gives the same plan.
    again = column(labels, given=expected)
    assert (again.schema, again.array.tolist(), again.notes) == (found.schema, classes, found.notes)


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        (["A", "a", "A"], ("A", "a"), [0, 1, 0]),
        (["3.1", "3.10", "3.1"], (), [0, 1, 0]),
        (["007", "7", "007"], (), [0, 1, 0]),
        ([" a", " b", " a"], (), [0, 1, 0]),
    ],
)
def test_labels_that_are_different_stay_so(labels: list[Any], given: tuple[str, ...], expected: list[int]) -> None:
    found = column(labels, given=given)
    assert (found.array.tolist(), found.notes) == (expected, [])


NOTATIONS = [
    ("1,5", "write it as 1.5"),
    ("1.000,5", "write it as 1000.5"),
    ("1,234.5", "write it as 1234.5"),
    ("1 000,5", "write it as 1000.5"),
    ("1'000", "write it as 1000"),
    ("1_000", "write it as 1000"),
    ("½", "write it as 0.5"),
    ("−3", "write it as -3"),
    ("３，５", "write it as 3.5"),
    ("1,234", "write digits with a point"),
    ("5 %", "write digits with a point"),
    ("4 stars", "for classes set problem to single_label"),
    ("1½", "write digits with a point"),
    (True, "write digits with a point"),
    ([1], "write digits with a point"),
    ("inf", "remove the row"),
    ("NaN", "fill it in, or remove the row"),
    ("", "fill it in, or remove the row"),
    (None, "fill it in, or remove the row"),
]


@pytest.mark.parametrize(("label", "advice"), NOTATIONS)
def test_a_number_in_another_notation_is_refused_with_how_to_write_it(label: Any, advice: str) -> None:
    with pytest.raises(DataError) as caught:
        column([label], REGRESSION)
    assert "a regression needs a finite number" in caught.value.message and advice in caught.value.message
    assert (caught.value.file, caught.value.line) == ("a.jsonl", 7)


def test_numbers_that_are_written_otherwise_but_clearly_are_taken() -> None:
    assert column(["1e5", " 3", "３", "+2", ".5"], REGRESSION).array.tolist() == [1e5, 3, 3, 2, 0.5]
