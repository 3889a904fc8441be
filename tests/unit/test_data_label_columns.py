"""One column for each class, and what of the labels and the texts a plan warns of, as a whole task has it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.small_specs import classification_spec, locations, sentences, write_labelled
from shardyard.v1 import plan_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.ingredients import prepare

MULTI = {"problem": "PROBLEM_MULTI_LABEL"}
HEADER = "id,comment,toxic,insult,year\n"


def table(folder: Path, *, name: str = "train.csv", header: str = HEADER, bits: Any = None) -> Path:
    rows = [f"x{i},{text},{i % 2},{int(i % 3 == 0)},{2000 + i}" for i, text in enumerate(sentences(40))]
    (folder / name).write_text(header + "\n".join(bits or rows) + "\n")
    return folder / name


def planned(folder: Path, train: Path, columns: dict[str, Any], **changes: Any) -> plan_pb2.JobPlan:
    classify = changes.pop("classify", MULTI)
    data = {"trainData": {"uri": str(train), "columns": columns}}
    spec = classification_spec(train, classify=classify, **{**data, **changes})
    found = worker_pb2.PlanResult.FromString(
        plan(worker_pb2.PlanRequest(spec=spec, locations=locations(folder)).SerializeToString())
    )
    assert not found.violations, found.violations
    return found.plan


def refused(folder: Path, train: Path, columns: dict[str, Any], classify: dict[str, Any] | None = None) -> SpecError:
    data = {"trainData": {"uri": str(train), "columns": columns}}
    with pytest.raises(SpecError) as caught:
        prepare(classification_spec(train, classify=MULTI if classify is None else classify, **data), locations(folder))
    return caught.value


def reasons(found: plan_pb2.JobPlan) -> list[str]:
    return [warning.reason for warning in found.warnings]


def test_mapped_label_columns_are_the_classes_in_their_order(tmp_path: Path) -> None:
    classify = {**MULTI, "labelColumns": ["insult", "toxic"]}
    found = planned(tmp_path, table(tmp_path), {"text": "comment"}, classify=classify, evaluation={"holdout": 0})
    assert list(found.labels) == ["insult", "toxic"]
    resolved = found.resolved_spec.fine_tuning.text_classification
    assert list(resolved.label_columns) == ["insult", "toxic"]
    assert "LABEL_COLUMNS_FOUND" not in reasons(found)
    task = prepare(found.resolved_spec, locations(tmp_path))
    rows = task.train._examples.store.arrays["labels"].reshape(-1, 2)  # type: ignore[attr-defined]
    assert rows.tolist() == [[int(i % 3 == 0), i % 2] for i in range(40)]


def test_columns_of_zeros_and_ones_are_found_and_named_in_a_warning(tmp_path: Path) -> None:
    found = planned(tmp_path, table(tmp_path), {"text": "comment"})
    assert list(found.labels) == ["toxic", "insult"]
    (warning,) = [each for each in found.warnings if each.reason == "LABEL_COLUMNS_FOUND"]
    assert "toxic, insult; set label_columns if not meant" in warning.message
    again = planned(tmp_path, table(tmp_path), {"text": "comment"}, classify={**MULTI, "labels": ["toxic", "insult"]})
    assert list(again.warnings) == list(found.warnings)


def test_given_labels_put_the_columns_into_their_order(tmp_path: Path) -> None:
    classify = {**MULTI, "labelColumns": ["insult", "toxic"], "labels": ["Toxic", "insult"]}
    found = planned(tmp_path, table(tmp_path), {"text": "comment"}, classify=classify)
    assert list(found.labels) == ["Toxic", "insult"]


def several(*names: str, **more: Any) -> dict[str, Any]:
    return {**MULTI, "labelColumns": names, **more}


COLUMNS_REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "another problem": (
        {},
        {"labelColumns": ["toxic"]},
        "text_classification.label_columns",
        "set it, or map one column in columns.label",
    ),
    "label as well": (
        {"label": "year"},
        several("toxic"),
        "text_classification.label_columns",
        "leave one of the two out",
    ),
    "missing": ({}, several("toxic", "insullt"), "text_classification.label_columns", "did you mean insult?"),
    "twice": ({}, several("toxic", "toxic"), "text_classification.label_columns", "'toxic' is mapped twice"),
    "the text": ({}, several("toxic", "comment"), "text_classification.label_columns", "'comment' is mapped twice"),
    "numbers": ({}, several("toxic", "year"), "train_data", "'year' is '2000'; write 0 or 1, leave the row out"),
    "other names": (
        {},
        several("toxic", "insult", labels=["toxic", "rude"]),
        "text_classification.labels",
        "the label columns are toxic, insult; name the same ones",
    ),
    "a role that is not there": (
        {"labels": "toxic"},
        MULTI,
        "train_data.columns",
        "'labels' (mapped to 'toxic'): text_classification has the roles text, text_pair, label; did you mean label?",
    ),
}


@pytest.mark.parametrize(("columns", "classify", "field", "words"), COLUMNS_REFUSED.values(), ids=COLUMNS_REFUSED)
def test_label_columns_that_cannot_be_are_refused(
    tmp_path: Path, columns: dict[str, Any], classify: dict[str, Any], field: str, words: str
) -> None:
    error = refused(tmp_path, table(tmp_path), {"text": "comment", **columns}, classify)
    assert error.field.endswith(field) and words in error.message, (error.field, error.message)


def test_more_texts_times_classes_than_a_table_takes_are_refused_with_both_numbers(tmp_path: Path) -> None:
    # A class for each of 10,000 texts, and 50,000 further texts.
    lines = (json.dumps({"text": "a dog", "label": [f"c{i % 10_000}"]}) + "\n" for i in range(60_000))
    (tmp_path / "wide.jsonl").write_text("".join(lines))
    error = refused(tmp_path, tmp_path / "wide.jsonl", {})
    assert "60,000 texts with a 0 or 1 for each of 10,000 classes are 600,000,000 numbers" in error.message
    assert error.field == "spec.train_data" and "join rare classes into one" in error.message


def test_evaluation_data_has_the_label_columns_of_the_training_data(tmp_path: Path) -> None:
    train, held = table(tmp_path), table(tmp_path, name="held.csv", header=HEADER.replace("insult", "rude"))
    columns = {"text": "comment"}
    spec = classification_spec(train, classify=MULTI, evalData={"uri": str(held), "columns": columns})
    spec.train_data.columns["text"] = "comment"
    with pytest.raises(SpecError, match="the label columns are toxic, rude, but those of the training data") as caught:
        prepare(spec, locations(tmp_path))
    assert caught.value.field == "spec.eval_data"


@pytest.mark.parametrize("bit", ["", "-1", "2", "yes", "0.5"])
def test_a_label_column_with_something_else_is_named_with_its_line(tmp_path: Path, bit: str) -> None:
    train = table(tmp_path, header="text,toxic,insult\n", bits=[*(["the fox,0,1"] * 300), f"a dog,1,{bit}"])
    error = refused(tmp_path, train, {})
    assert "the label column 'insult' is" in error.message and "name other columns in label_columns" in error.message
    assert (error.metadata["line"], error.metadata["file"], error.metadata["column"]) == ("302", "train.csv", "insult")


def test_the_ways_to_write_a_bit_are_all_known(tmp_path: Path) -> None:
    cells = ["0", "1", "0.0", "1.0", "true", "False", " 1", "TRUE"]
    train = table(tmp_path, header="text,toxic,insult\n", bits=[f"the fox,{cell},1" for cell in cells])
    task = prepare(classification_spec(train, classify=MULTI, evaluation={"holdout": 0}), locations(tmp_path))
    rows = task.train._examples.store.arrays["labels"].reshape(-1, 2)  # type: ignore[attr-defined]
    assert rows[:, 0].tolist() == [0, 1, 0, 1, 1, 0, 1, 1]


def test_a_separator_is_for_several_labels_only(tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "a.csv", [("the fox", "a/b"), ("a dog", "b")] * 9)
    assert list(planned(tmp_path, train, {}, classify={**MULTI, "labelSeparator": "/"}).labels) == ["a", "b"]
    error = refused(tmp_path, train, {}, {"labelSeparator": "/"})
    assert error.field.endswith("label_separator") and "set problem to multi_label" in error.message


def test_labels_are_spelled_in_the_evaluation_data_as_in_training_or_warned_of(tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "a.csv")
    held = write_labelled(tmp_path / "b.csv", [("the fox", "Good "), ("a dog", "bad")])
    found = planned(tmp_path, train, {}, classify={}, evalData={"uri": str(held)})
    (warning,) = [each for each in found.warnings if each.reason == "LOOKALIKE_LABELS"]
    assert warning.field == "spec.eval_data" and "'Good ' (1×) as 'good'" in warning.message


def test_two_files_that_write_labels_differently_have_the_same_classes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.csv").write_text("text,label\n" + "the fox,0\na dog,1\n" * 9)
    (folder / "b.csv").write_text("text,label\n" + "the fox,0.0\na dog,1.0\n" * 9)
    found = planned(tmp_path, folder, {}, classify={})
    assert list(found.labels) == ["0", "1"] and "LOOKALIKE_LABELS" in reasons(found)


def test_the_shares_of_cut_texts_and_unknown_tokens_are_in_the_plan(tmp_path: Path) -> None:
    known = [(text, "good" if i % 2 else "bad") for i, text in enumerate(sentences(100, least=4, most=6))]
    train = write_labelled(tmp_path / "a.csv", known)
    long = [(" ".join([text] * 9), label) for text, label in known[:50]] + known[50:]
    held = write_labelled(tmp_path / "b.csv", [(f"{text} 漢 字 漢 字", label) for text, label in long])
    found = planned(tmp_path, train, {}, classify={}, evalData={"uri": str(held)})
    assert (found.train_stats.num_samples, found.train_stats.num_tokens) == (100, found.num_train_tokens)
    assert (found.train_stats.cut_share, found.train_stats.unknown_share) == (0, 0)
    assert found.eval_stats.cut_share == 0.5
    assert 0.1 < found.eval_stats.unknown_share < 0.3
    warned = {warning.reason: warning for warning in found.warnings}
    assert "50% of the evaluation texts (50) are longer than 16 tokens" in warned["TEXTS_CUT"].message
    assert "evaluation data's tokens are the unknown token" in warned["UNKNOWN_TOKENS"].message
    assert warned["TEXTS_CUT"].field == "spec.fine_tuning.text_classification.max_length"
    assert warned["UNKNOWN_TOKENS"].field == "spec.tokenizer"


def test_a_packed_file_of_rows_is_planned_like_the_file(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(sentences(40))]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    plain = planned(tmp_path, tmp_path / "a.jsonl", {}, classify={})
    packed = planned(tmp_path, tmp_path / "b.jsonl.gz", {}, classify={})
    assert packed.train_stats == plain.train_stats and packed.labels == plain.labels
    assert packed.resolved_spec.train_data.format == plain.resolved_spec.train_data.format


NAMED_LABELS: dict[str, tuple[str, str, list[str]]] = {
    "lists of names": ("jsonl", '{{"id": {i}, "comment": "{text}", "labels": ["{a}", "{b}"]}}', ["x", "y", "z"]),
    "lists of numbers": ("jsonl", '{{"id": {i}, "text": "{text}", "labels": [{bit}, 7]}}', ["0", "1", "7"]),
    "vectors beside columns of bits": (
        "jsonl",
        '{{"text": "{text}", "rude": {bit}, "loud": {bit}, "labels": [{bit}, 1, 0]}}',
        ["0", "1", "2"],
    ),
    "joined": ("csv", 'x{i},"{text}","{a};{b}"', ["x", "y", "z"]),
    "lists as text": ("csv", "x{i},\"{text}\",\"['{a}', '{b}']\"", ["x", "y", "z"]),
}


@pytest.mark.parametrize(("ending", "row", "classes"), NAMED_LABELS.values(), ids=NAMED_LABELS)
def test_a_column_called_labels_is_taken_by_its_name(tmp_path: Path, ending: str, row: str, classes: list[str]) -> None:
    lines = [
        row.format(i=i, text=text, a="xy"[i % 2], b="yz"[i % 2], bit=i % 2) for i, text in enumerate(sentences(40))
    ]
    path = tmp_path / f"train.{ending}"
    path.write_text("\n".join([*(["id,comment,labels"] if ending == "csv" else []), *lines]) + "\n")
    columns = {} if '"text"' in row else {"text": "comment"}
    found = planned(tmp_path, path, columns)
    assert list(found.labels) == classes and found.num_train_samples + found.num_eval_samples == 40
    assert "LABEL_COLUMNS_FOUND" not in reasons(found)


def test_one_label_a_text_may_be_called_labels_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("labels,note,comment\n" + "".join(f"{i % 2},n,the dog {i}\n" for i in range(40)))
    found = planned(tmp_path, tmp_path / "a.csv", {"text": "comment"}, classify={})
    assert list(found.labels) == ["0", "1"]


def test_of_label_and_labels_the_first_is_one_label_and_several_have_to_be_named(tmp_path: Path) -> None:
    rows = "".join(f"the dog {i},{'ab'[i % 2]},c;d\n" for i in range(40))
    (tmp_path / "a.csv").write_text("text,label,labels\n" + rows)
    assert list(planned(tmp_path, tmp_path / "a.csv", {}, classify={}).labels) == ["a", "b"]
    error = refused(tmp_path, tmp_path / "a.csv", {})
    assert error.field == "spec.train_data.columns.label" and "name one in columns.label" in str(error)
    assert list(planned(tmp_path, tmp_path / "a.csv", {"label": "labels"}).labels) == ["c", "d"]
