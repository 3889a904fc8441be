"""Rows that cannot be used: refused, or left out up to a share, counted and listed, for every reader alike."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from helpers.small_specs import architecture, locations, parse, sentences
from helpers.tagged import planned
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.tasks.ingredients import prepare

TEXTS = sentences(18)
CLASSES = {"fineTuning": {"textClassification": {"maxLength": 16}}}
TAGS = {"fineTuning": {"tokenClassification": {"maxLength": 16}}}
PLAIN = {"pretraining": {"causalLm": {"sequenceLength": 8}}}


def labelled(number: int) -> str:
    return json.dumps({"text": TEXTS[number], "label": ["good", "bad"][number % 2]})


def tagged(number: int) -> str:
    words = TEXTS[number].split()
    return json.dumps({"tokens": words, "tags": ["B-X", *["O"] * (len(words) - 1)]})


def conll(number: int) -> str:
    return "\n".join(f"{word} {'B-X' if at == 0 else 'O'}" for at, word in enumerate(TEXTS[number].split())) + "\n"


def rows_of_a_word(number: int) -> str:
    return "\n".join(f"{number},{word},{'B-X' if at == 0 else 'O'}" for at, word in enumerate(TEXTS[number].split()))


HEAD_OF_WORDS = "sentence_id,word,tag\n"
# What a file is called, its first line, a good row, two bad ones, and the task.
CASES: dict[str, tuple[str, str, Any, tuple[str, str], dict[str, Any]]] = {
    "not JSON": ("a.jsonl", "", labelled, ('{"text": "x", "label"', '["a"]'), CLASSES),
    "no label": ("a.jsonl", "", labelled, ('{"text": "x", "label": null}', '{"text": "y"}'), CLASSES),
    "no text": ("a.jsonl", "", labelled, ('{"text": null, "label": "good"}', '{"text": 3, "label": "bad"}'), CLASSES),
    "not a number": (
        "a.jsonl",
        "",
        lambda at: json.dumps({"text": TEXTS[at], "label": at}),
        ('{"text": "x", "label": "much"}', '{"text": "x", "label": null}'),
        {"fineTuning": {"textClassification": {"maxLength": 16, "problem": "PROBLEM_REGRESSION"}}},
    ),
    "unknown label": (
        "a.jsonl",
        "",
        labelled,
        ('{"text": "x", "label": "ugly"}', '{"text": "y", "label": "ugly"}'),
        {"fineTuning": {"textClassification": {"maxLength": 16, "labels": ["good", "bad"]}}},
    ),
    "too many values": ("a.csv", "text,label\n", lambda at: f"{TEXTS[at]},{at % 2}", ("a,b,1", "a"), CLASSES),
    "wrong quotes": ("a.csv", "text,label\n", lambda at: f"{TEXTS[at]},{at % 2}", ('"a" b,1', '"a"b,0'), CLASSES),
    "not UTF-8": ("a.tsv", "text\tlabel\n", lambda at: f"{TEXTS[at]}\t{at % 2}", ("Caf\udce9\t1", "\0\t1"), CLASSES),
    "text that is not UTF-8": ("a.txt", "", lambda at: TEXTS[at], ("Caf\udce9", "\0"), PLAIN),
    "unequal lists": (
        "a.jsonl",
        "",
        tagged,
        ('{"tokens": ["a", "b"], "tags": ["O"]}', '{"tokens": ["a"], "tags": [null]}'),
        TAGS,
    ),
    "a span of a part": (
        "a.jsonl",
        "",
        lambda at: json.dumps({"text": TEXTS[at], "spans": [[0, len(TEXTS[at].split()[0]), "X"]]}),
        ('{"text": "Berlins", "spans": [[0, 6, "X"]]}', '{"text": "a", "spans": [[0, 9, "X"]]}'),
        TAGS,
    ),
    "columns of words": ("a.conll", "", conll, ("a O\nb\n", "x y z\n\n"), TAGS),
    "a row of a text": (
        "a.csv",
        HEAD_OF_WORDS,
        rows_of_a_word,
        ("98,a,O\n98,b,\n98,c,O", "99,a,O\n99,b,O,O\n99,c,O"),
        TAGS,
    ),
}


def spec_of(path: Path, task: dict[str, Any], share: float) -> spec_pb2.JobSpec:
    spec: dict[str, Any] = {
        **task,
        "model": architecture("gpt2" if task is PLAIN else "bert"),
        "tokenizer": {"train": {"algorithm": "ALGORITHM_WORDPIECE", "vocabSize": 120}},
        "trainData": {"uri": str(path), "maxBadRowsShare": share},
        "optimization": {"maxSteps": 4, "globalBatchSize": 4},
    }
    if task is PLAIN:
        spec["tokenizer"] = {"train": {"algorithm": "ALGORITHM_BYTE_BPE", "vocabSize": 300}}
    return parse(spec)


@pytest.mark.parametrize("name", CASES)
def test_bad_rows_are_left_out_up_to_the_share_and_refused_above_it(name: str, tmp_path: Path) -> None:
    file, head, good, bad, task = CASES[name]
    rows = [good(at) for at in range(18)]
    clean, dirty = tmp_path / "clean" / file, tmp_path / file
    clean.parent.mkdir()
    clean.write_text(head + "\n".join(rows) + "\n")
    dirty.write_bytes(
        (head + "\n".join([*rows[:9], bad[0], *rows[9:], bad[1]]) + "\n").encode("utf-8", "surrogateescape")
    )
    for share in (0.0, 0.09):
        (violation,) = planned(tmp_path, spec_of(dirty, task, share)).violations
        assert violation.field.startswith("spec.train_data") and f"{file}, line " in violation.message
        counted = "2 of 20 rows cannot be used, more than the 0.09 of max_bad_rows_share"
        assert (counted in violation.message) == (share > 0), violation.message
    found, without = planned(tmp_path, spec_of(dirty, task, 0.1)), planned(tmp_path, spec_of(clean, task, 0.1))
    assert not found.violations and not without.violations, (found.violations, without.violations)
    (warning,) = [each for each in found.plan.warnings if each.reason == "BAD_ROWS_LEFT_OUT"]
    assert warning.field == "spec.train_data" and warning.message.count(f"{file}, line ") == 2
    assert warning.message.startswith("2 of 20 rows cannot be used and are left out: ")
    assert not [each for each in without.plan.warnings if each.reason == "BAD_ROWS_LEFT_OUT"]
    # What is left is what a file without them has, and the resolved spec says all of it again.
    assert found.plan.train_stats == without.plan.train_stats and found.plan.labels == without.plan.labels
    assert planned(tmp_path, found.plan.resolved_spec).plan == found.plan
    ours, theirs = (prepare(each.plan.resolved_spec, locations(tmp_path)).train for each in (found, without))
    assert ours.num_samples == theirs.num_samples and ours.num_tokens == theirs.num_tokens


def test_a_file_without_a_good_row_is_refused_by_its_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[1]\n[2]\n".replace("[", "{"))
    (violation,) = planned(tmp_path, spec_of(path, CLASSES, 0.9)).violations
    assert "a.jsonl, line 1: not JSON" in violation.message


@pytest.mark.parametrize(
    ("share", "num_bad", "num_rows"), [(0.29, 29, 100), (0.57, 57, 100), (0.1, 1, 10), (0.07, 7, 100)]
)
def test_exactly_the_share_of_bad_rows_is_allowed_and_one_more_is_refused(
    share: float, num_bad: int, num_rows: int
) -> None:
    for more in (0, 1):
        bad = BadRows(spec_pb2.DataSource(max_bad_rows_share=share))
        for line in range(num_bad + more):
            bad.skip(DataError("no label", file="a.csv", line=line + 1))
        with pytest.raises(DataError, match="more than") if more else nullcontext():
            bad.finish(num_rows - num_bad - more, "spec.train_data")


def test_vectors_are_of_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    spec = parse(
        {
            "featureExtraction": {"data": {"uri": str(path), "maxBadRowsShare": 0.1}},
            "model": {"uri": str(tmp_path)},
        }
    )
    found = {each.field: each.message for each in planned(tmp_path, spec).violations}
    assert "each row gets its vector" in found["spec.feature_extraction.data.max_bad_rows_share"]
