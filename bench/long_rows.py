"""Data of which every batch reaches the longest length: then a plan, which is for that, and a run speak of the same.

Rows of real data are joined until each is at least as long, in words; tokens are more. And kinds of training that only
the planner is measured on.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from kinds import GPT2, KINDS, Kind, fill_bert, write_rows
from shardyard.v1 import spec_pb2
from workload import Workload, json_rows

ROWS, USERS, ITEMS = 256, 512, 1_000
TAUGHT = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}

_Row = TypeVar("_Row")


def joined(
    rows: Sequence[_Row], join: Callable[[_Row, _Row], _Row], words: Callable[[_Row], int], enough: int
) -> list[_Row]:
    """`ROWS` rows, each joined with those after it until it has `enough` words."""

    def made() -> Iterator[_Row]:
        at = 0
        for _ in range(ROWS):
            row = rows[at % len(rows)]
            while words(row) < enough:
                at += 1
                row = join(row, rows[at % len(rows)])
            at += 1
            yield row

    return list(made())


def texts(workload: Workload) -> Workload:
    """Reviews of one label each, joined."""
    with workload.labelled.open(encoding="utf-8", newline="") as file:
        rows = sorted(((row["label"], row["text"]) for row in csv.DictReader(file)), key=lambda row: row[0])
    halves = [rows[: len(rows) // 3], rows[-len(rows) // 3 :]]
    long = [
        row
        for half in halves
        for row in joined(
            half,
            lambda one, other: (one[0], f"{one[1]} {other[1]}"),
            lambda row: len(row[1].split()),
            workload.sequence_length,
        )
    ]
    path = workload.folder / "long.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *long])
    return replace(workload, labelled=path)


def words(workload: Workload) -> Workload:
    """Addresses one after the other."""
    rows = joined(
        json_rows(workload),
        lambda one, other: {name: [*one[name], *other[name]] for name in ("tokens", "tags")},
        lambda row: len(row["tokens"]),
        workload.sequence_length,
    )
    return replace(workload, data=write_rows(workload.folder / "long.jsonl", rows))


def contexts(workload: Workload) -> Workload:
    """Contexts with those of other questions after them, of several windows each."""
    rows = joined(
        json_rows(workload),
        lambda one, other: {**one, "context": f"{one['context']}; {other['context']}"},
        lambda row: len(row["context"].split()),
        3 * workload.sequence_length,
    )
    return replace(workload, data=write_rows(workload.folder / "long.jsonl", rows))


def pairs(workload: Workload) -> Workload:
    """Sources and targets one after the other."""
    rows = joined(
        json_rows(workload),
        lambda one, other: {name: f"{one[name]}; {other[name]}" for name in ("source", "target")},
        lambda row: min(len(row[name].split()) for name in ("source", "target")),
        workload.sequence_length,
    )
    return replace(workload, data=write_rows(workload.folder / "long.jsonl", rows))


def _after(kind: Kind, lengthen: Callable[[Workload], Workload]) -> Kind:
    return replace(kind, prepare=lambda workload: lengthen(kind.prepare(workload)))


def histories(workload: Workload) -> Workload:
    """Users with more items than a history has, drawn by a rule that a model can learn."""
    path = workload.folder / "interactions.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = (
            (user, (user * 7 + at * at) % ITEMS, at)
            for user in range(USERS)
            for at in range(workload.sequence_length + 8)
        )
        csv.writer(file).writerows([("user", "item", "time"), *rows])
    return replace(workload, data=path)


def fill_histories(spec: spec_pb2.JobSpec, workload: Workload) -> None:
    """A GPT-2 over items."""
    spec.fine_tuning.recommendation.max_history = workload.sequence_length
    spec.model.architecture.model_type = "gpt2"
    spec.model.architecture.overrides.update(GPT2)
    spec.train_data.uri = str(workload.data)


def taught(workload: Workload) -> Workload:
    """Long texts, and the pretrained BERT with a head of its own as the teacher."""
    import transformers

    teacher = workload.folder / "teacher"
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(workload.model, **labels)
    model.save_pretrained(teacher)
    transformers.AutoTokenizer.from_pretrained(workload.model).save_pretrained(teacher)
    return replace(texts(workload), data=teacher)


def fill_taught(spec: spec_pb2.JobSpec, workload: Workload) -> None:
    """A smaller BERT that learns from it."""
    fill_bert(spec, workload)
    spec.model.architecture.model_type = "bert"
    spec.model.architecture.overrides.update(TAUGHT)
    spec.tokenizer.uri = str(workload.data)
    spec.distillation.teacher.uri = str(workload.data)


LONG = {
    **KINDS,
    "bert": _after(KINDS["bert"], texts),
    "ner": _after(KINDS["ner"], words),
    "questions": _after(KINDS["questions"], contexts),
    "seq2seq": _after(KINDS["seq2seq"], pairs),
    "taught": Kind("A smaller BERT and its teacher", "tokens", False, taught, fill_taught),
    "histories": Kind("GPT-2 on items", "items", False, histories, fill_histories),
}
"""The kinds of `bench/trainer.py` with long rows, and further ones."""
