"""Questions as people have them: every format is read alike, and a bad row is refused with what is there instead."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.questions import asked, nested, planned, spec_of
from helpers.small_specs import architecture, locations
from helpers.tagged import write_lines
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.inputs.questions import IGNORED
from shardyard_trainer.tasks.ingredients import prepare

ROWS = asked(24, 1, unanswered=0.25)
Row = dict[str, Any]


def lines(folder: Path, rows: list[Row]) -> Path:
    return write_lines(folder / "a.jsonl", rows)


def one_list(folder: Path, rows: list[Row]) -> Path:
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    return folder / "a.json"


def squad(folder: Path, rows: list[Row], **settings: Any) -> Path:
    (folder / "a.json").write_text(json.dumps(nested(rows), **settings))
    return folder / "a.json"


def squad_over_lines(folder: Path, rows: list[Row]) -> Path:
    return squad(folder, rows, indent=2)


def squad_with_its_version_last(folder: Path, rows: list[Row]) -> Path:
    whole = nested(rows)
    (folder / "a.json").write_text("\ufeff" + json.dumps({"data": whole["data"], "version": 1.1}))
    return folder / "a.json"


def rows_below_data(folder: Path, rows: list[Row]) -> Path:
    (folder / "a.json").write_text(json.dumps({"version": 2.0, "title": "x", "data": rows}))
    return folder / "a.json"


def articles_alone(folder: Path, rows: list[Row]) -> Path:
    (folder / "a.json").write_text(json.dumps(nested(rows)["data"]))
    return folder / "a.json"


def described_before(folder: Path, rows: list[Row]) -> Path:
    whole = {"info": {"by": ["a", "b"], "version": 2}, "data": nested(rows)["data"], "end": [{}]}
    (folder / "a.json").write_text(json.dumps(whole, indent=1))
    return folder / "a.json"


def numbers_with_a_point(folder: Path, rows: list[Row]) -> Path:
    """As pandas writes whole numbers if some are missing; the lists are there for questions without an answer."""
    return delimited(
        folder, rows, lambda each: json.dumps({**each, "answer_start": [f"{at}.0" for at in each["answer_start"]]})
    )


def records(folder: Path, rows: list[Row]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def list_of_records(folder: Path, rows: list[Row]) -> Path:
    changed = [row | {"answers": nested([row])["data"][0]["paragraphs"][0]["qas"][0]["answers"]} for row in rows]
    kind = pa.list_(pa.struct([("text", pa.string()), ("answer_start", pa.int32())]))
    table = pa.Table.from_pylist([{key: row[key] for key in row if key != "answers"} for row in changed])
    answers = pa.array([row["answers"] for row in changed], kind)
    pq.write_table(table.append_column("answers", answers), folder / "a.parquet")
    return folder / "a.parquet"


def delimited(folder: Path, rows: list[Row], write: Callable[[Any], str]) -> Path:
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "context", "answers"])
        writer.writerows([row["id"], row["question"], row["context"], write(row["answers"])] for row in rows)
    return folder / "a.csv"


def json_in_csv(folder: Path, rows: list[Row]) -> Path:
    return delimited(folder, rows, json.dumps)


def python_in_csv(folder: Path, rows: list[Row]) -> Path:
    return delimited(folder, rows, repr)


def arrays_in_csv(folder: Path, rows: list[Row]) -> Path:
    """As pandas writes a data set that it has read from Parquet."""
    answers = [
        {"text": np.array(row["answers"]["text"], object), "answer_start": np.array(row["answers"]["answer_start"])}
        for row in rows
    ]
    pandas.DataFrame([row | {"answers": each} for row, each in zip(rows, answers, strict=True)]).to_csv(
        folder / "a.csv", index=False
    )
    return folder / "a.csv"


def columns_of_one_answer(folder: Path, rows: list[Row]) -> Path:
    flat = [
        {
            "Question": row["question"],
            "passage": row["context"],
            "answer_text": row["answers"]["text"][:1],
            "answer_start": row["answers"]["answer_start"][:1],
            "qid": row["id"],
        }
        for row in rows
    ]
    return write_lines(folder / "a.jsonl", flat)


FORMATS = {
    each.__name__: each
    for each in (
        lines,
        one_list,
        squad,
        squad_over_lines,
        squad_with_its_version_last,
        rows_below_data,
        articles_alone,
        described_before,
        numbers_with_a_point,
        records,
        list_of_records,
        json_in_csv,
        python_in_csv,
        arrays_in_csv,
        columns_of_one_answer,
    )
}


@pytest.mark.parametrize("name", FORMATS)
def test_questions_are_read_from_each_format(name: str, tmp_path: Path) -> None:
    found = planned(tmp_path, spec_of(FORMATS[name](tmp_path, ROWS), evaluation={"holdout": 0}))
    assert not found.violations, found.violations
    assert found.plan.num_train_samples == len(ROWS)
    resolved = found.plan.resolved_spec
    assert resolved.fine_tuning.question_answering.allow_no_answer
    data = prepare(resolved, locations(tmp_path)).train.data
    for at, row in enumerate(ROWS):
        assert data.context(at) == row["context"]
        assert [row["context"][start:end] for start, end in data.answers(at)] == row["answers"]["text"]
    assert planned(tmp_path, resolved).plan == found.plan


def test_a_windows_labels_are_the_answers_tokens_or_the_first_one(tmp_path: Path) -> None:
    rows = asked(40, 3, unanswered=0.3, filler=40)
    prepared = prepare(spec_of(lines(tmp_path, rows), evaluation={"holdout": 0}), locations(tmp_path))
    samples, tokenizer = prepared.train, prepared.inputs.tokenizer
    several = 0
    for at, row in enumerate(rows):
        batch = samples.micro_batch([SampleRef(0, at)])
        windows = len(batch.inputs["input_ids"])
        several += windows > 1
        assert batch.num_units == windows and batch.samples == (at,)
        found = [
            tokenizer.decode(ids[start : stop + 1])
            for ids, start, stop in zip(
                batch.inputs["input_ids"], batch.inputs["starts"], batch.inputs["stops"], strict=True
            )
        ]
        wanted = row["answers"]["text"][0].lower() if row["answers"]["text"] else "[CLS]"
        assert set(found) <= {wanted, "[CLS]"} and wanted in found, (row, found)
    assert several > 10
    # However samples are put together, a window is the same.
    together = samples.micro_batch([SampleRef(0, at) for at in range(len(rows))])
    assert together.num_units == samples.num_windows and together.num_tokens == samples.num_tokens


def refused(folder: Path, rows: list[Row], task: Row | None = None, **changes: Any) -> list[Any]:
    return list(planned(folder, spec_of(lines(folder, rows), task, **changes)).violations)


CONTEXT = "Zoë 😀 lives in the New  York of 1969."
BAD: dict[str, tuple[Row, str]] = {
    "elsewhere": ({"text": ["lives"], "answer_start": [9]}, "the context has 'es in' there; it begins at 6"),
    "bytes": ({"text": ["lives"], "answer_start": [10]}, "'lives' is not at answer_start 10"),
    "bytes of letters": ({"text": ["😀"], "answer_start": [5]}, "answer_start counts bytes; count characters: 4"),
    "utf-16": (
        {"text": ["1969"], "answer_start": [33]},
        "counts UTF-16 units, as JavaScript does; count code points: 32",
    ),
    "space before": ({"text": [" lives"], "answer_start": [7]}, "it begins at 5"),
    "space that is not there": ({"text": ["1969 "], "answer_start": [32]}, "without the white space around it"),
    "other space": ({"text": ["New York"], "answer_start": [20]}, "its white space is not that of the context"),
    "other case": ({"text": ["new  york"], "answer_start": [20]}, "its case is not that of the context"),
    "nowhere": ({"text": ["Paris"], "answer_start": [0]}, "the context does not have this text at all"),
    "behind the end": ({"text": ["1969"], "answer_start": [99]}, "the context has 37 characters; it begins at 32"),
    "negative": ({"text": ["1969"], "answer_start": [-1]}, "is not at answer_start -1"),
    "one start missing": ({"text": ["Zoë", "1969"], "answer_start": [0]}, "2 texts of answers, but 1 answer_start"),
    "no starts": ({"text": ["Zoë"]}, "the answers have no `answer_start`"),
    "a word for a start": ({"text": ["Zoë"], "answer_start": ["zero"]}, "give the number of its first character"),
    "empty": ({"text": [""], "answer_start": [0]}, "empty lists for a question without an answer"),
    "missing": (None, "the answers are missing"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_is_not_where_it_should_be_is_refused(name: str, tmp_path: Path) -> None:
    answers, message = BAD[name]
    rows = [*ROWS[:3], {"id": "bad", "question": "Who?", "context": CONTEXT, "answers": answers}, *ROWS[3:]]
    (violation,) = refused(tmp_path, rows)
    assert violation.reason == "DATA_INVALID" and violation.field == "spec.train_data"
    assert violation.message.startswith("a.jsonl, line 4: question 'bad': ") and message in violation.message
    # As one of 25 it may be left out.
    found = planned(
        tmp_path, spec_of(lines(tmp_path, rows), trainData={"uri": str(tmp_path / "a.jsonl"), "maxBadRowsShare": 0.05})
    )
    assert not found.violations
    assert "BAD_ROWS_LEFT_OUT" in {each.reason for each in found.plan.warnings}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"question": "  "}, "the question is empty"),
        ({"context": "\n\u00a0"}, "the context is empty"),
        ({"context": 3}, "the context is '3'; give a text"),
        ({"question": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_an_empty_question_or_context_is_refused(changed: Row, message: str, tmp_path: Path) -> None:
    (violation,) = refused(tmp_path, [*ROWS, ROWS[0] | changed])
    assert f"line {len(ROWS) + 1}" in violation.message and message in violation.message


NO_ANSWER = {"text": [], "answer_start": []}
FORMS_WITH_LINES = {"lines": lines, "squad": squad, "records": records}


@pytest.mark.parametrize("form", FORMS_WITH_LINES)
@pytest.mark.parametrize("number", [1, 3])
def test_a_context_without_tokens_is_refused_with_its_line_or_left_out_up_to_a_share(
    number: int, form: str, tmp_path: Path
) -> None:
    answerless = {"question": "Who?", "context": "\u200b", "answers": NO_ANSWER}
    rows = [*ROWS[:9], *(answerless | {"id": f"n{at}"} for at in range(number)), *ROWS[9:]]
    path = FORMS_WITH_LINES[form](tmp_path, rows)
    (violation,) = planned(tmp_path, spec_of(path)).violations
    assert violation.message.startswith(f"{path.name}, line 10: the context has no token"), violation
    assert (violation.field, violation.reason) == ("spec.train_data", "DATA_INVALID")
    lenient = {"uri": str(path), "maxBadRowsShare": number / len(rows)}
    found = planned(tmp_path, spec_of(path, trainData=lenient, evaluation={"holdout": 0}))
    assert not found.violations, found.violations
    (left_out,) = [each for each in found.plan.warnings if each.reason == "BAD_ROWS_LEFT_OUT"]
    assert f"{number} of {len(rows)} rows" in left_out.message and "line 10: the context has no" in left_out.message
    data = prepare(found.plan.resolved_spec, locations(tmp_path)).train.data
    assert [data.context(at) for at in range(data.num_questions)] == [row["context"] for row in ROWS]
    less = {"uri": str(path), "maxBadRowsShare": number / len(rows) - 0.01}
    (violation,) = planned(tmp_path, spec_of(path, trainData=less)).violations
    assert f"{number} of {len(rows)} rows cannot be used" in violation.message


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_contexts_that_all_have_no_tokens_are_refused(share: float, tmp_path: Path) -> None:
    path = lines(tmp_path, [ROWS[0] | {"context": "\u200b" * (at + 1), "answers": NO_ANSWER} for at in range(4)])
    vocabulary = {"train": {"algorithm": "ALGORITHM_WORDPIECE", "vocabSize": 120}}
    source = {"uri": str(path), "maxBadRowsShare": share}
    (violation,) = planned(tmp_path, spec_of(path, trainData=source, tokenizer=vocabulary)).violations
    assert violation.field == "spec.train_data" and violation.reason == "DATA_INVALID", violation


def test_what_follows_squads_own_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(nested(ROWS)) + "\n{}")
    (violation,) = planned(tmp_path, spec_of(tmp_path / "a.json")).violations
    assert "a.json, line 2: something follows the object's" in violation.message


def test_the_questions_of_squads_own_form_are_counted_and_named(tmp_path: Path) -> None:
    whole = nested(ROWS)
    whole["data"][0]["paragraphs"][5]["qas"][0]["answers"] = [{"text": "Paris", "answer_start": 3}]
    whole["data"][0]["paragraphs"][5]["qas"][0]["is_impossible"] = False
    (tmp_path / "a.json").write_text(json.dumps(whole))
    (violation,) = planned(tmp_path, spec_of(tmp_path / "a.json")).violations
    assert violation.message.startswith("a.json, line 6: question 'q5': the answer 'Paris' is not at answer_start 3")
    del whole["data"][0]["paragraphs"][2]["qas"]
    (tmp_path / "a.json").write_text(json.dumps(whole))
    (violation,) = planned(tmp_path, spec_of(tmp_path / "a.json")).violations
    assert "a paragraph after 2 questions has no list of objects as `qas`" in violation.message


ANSWERED = [row for row in ROWS if row["answers"]["text"]]
SPECS: dict[str, tuple[list[Row], Row, Row, str, str]] = {
    "stride": (ROWS, {"overlap": 32}, {}, "overlap", "windows of 32 tokens cannot share 32"),
    "none allowed": (
        ROWS,
        {"allowNoAnswer": False},
        {},
        "allow_no_answer",
        "questions have no answer, the first in a.jsonl",
    ),
    "no first token": (
        ROWS,
        {},
        {"model": architecture("gpt2")},
        "allow_no_answer",
        "has no token that sees the whole",
    ),
    "no head": (
        ANSWERED,
        {},
        {"model": {"architecture": {"modelType": "mamba", "overrides": {"hidden_size": 32}}}},
        "question_answering",
        "no head that finds answers for mamba",
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_that_does_not_go_with_its_data_is_refused(name: str, tmp_path: Path) -> None:
    rows, task, changes, field, message = SPECS[name]
    violations = refused(tmp_path, rows, task, **changes)
    assert any(each.field.endswith(field) and message in each.message for each in violations), violations


def test_the_plan_says_what_cannot_be_learnt(tmp_path: Path) -> None:
    long = " ".join(["rain"] * 12)
    rows = [
        *ANSWERED,
        {"id": "x", "question": "Who?", "context": f"a {long} b", "answers": {"text": [long], "answer_start": [2]}},
    ]
    rows += [row | {"question": "dog " * 40 + "?"} for row in ANSWERED[:3]]
    found = planned(
        tmp_path, spec_of(lines(tmp_path, rows), {"maxLength": 16, "overlap": 2}, evaluation={"holdout": 0})
    )
    assert not found.violations
    warnings = {each.reason: each.message for each in found.plan.warnings}
    assert warnings["ANSWERS_LOST"].startswith(f"1 of {len(rows)} answers are in no window as a whole")
    assert warnings["QUESTIONS_CUT"].startswith(f"3 of {len(rows) - 1} questions take more than half")
    assert found.plan.num_train_samples == len(rows) - 1
    (violation,) = refused(
        tmp_path, [rows[len(ANSWERED)]] * 3, {"maxLength": 16, "overlap": 2}, evaluation={"holdout": 0}
    )
    assert "none of 3 answers is in a window as a whole" in violation.message


def test_questions_of_one_context_are_held_out_together(tmp_path: Path) -> None:
    rows = [row | {"id": f"{row['id']}-{turn}"} for row in ANSWERED for turn in range(3)]
    prepared = prepare(spec_of(lines(tmp_path, rows), evaluation={"holdout": 0.3}), locations(tmp_path))
    contexts = [
        {samples.data.context(int(question)) for question in samples.questions}
        for samples in (prepared.train, prepared.eval)
    ]
    assert contexts[1] and not contexts[0] & contexts[1]


def test_a_model_without_a_first_token_learns_the_windows_that_have_the_answer(tmp_path: Path) -> None:
    rows = [row for row in asked(30, 3, filler=60) if row["answers"]["text"]]
    spec = spec_of(lines(tmp_path, rows), model=architecture("gpt2"), tokenizer={"train": {"vocabSize": 300}})
    found = planned(tmp_path, spec)
    assert not found.violations, found.violations
    samples = prepare(found.plan.resolved_spec, locations(tmp_path)).train
    batch = samples.micro_batch([SampleRef(0, at) for at in range(samples.num_samples)])
    learnt = batch.inputs["starts"] != IGNORED
    assert int(learnt.sum()) == batch.num_units < len(learnt) and batch.num_units >= samples.num_samples
