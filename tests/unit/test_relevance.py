"""Queries with passages as people write them, what is read of them, their loss, and the metrics of lists."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.chats import write_lines
from helpers.passages import PlainReranker, spec_of, write_passages
from helpers.small_specs import locations
from helpers.tiny_folders import save_folder
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.tasks.module import ModuleOutput

NAME = "projects/default/models/bert"
PAIRS = [
    ("this dog", "the dog runs", 1), ("this dog", "a cat", 0), ("this dog", "my film", 0),
    ("very bad film", "the film is bad", 1), ("very bad film", "hello", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model") / "bert", "BertForMaskedLM")


def planned(folder: Path, model: Path, spec: spec_pb2.JobSpec) -> worker_pb2.PlanResult:
    request = worker_pb2.PlanRequest(spec=spec, locations=locations(folder, **{NAME: model}))
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))


def lists() -> list[dict[str, Any]]:
    rows = [
        {"query": query, "passages": [row[1] for row in each], "labels": [row[2] for row in each]}
        for query, each in ((query, list(rows)) for query, rows in itertools.groupby(PAIRS, key=lambda row: row[0]))
    ]
    for row in rows:
        row["pos"], row["neg"] = row["passages"][:1], row["passages"][1:]
    return rows


def a_pair_a_row(folder: Path) -> Path:
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Query", "Passage", "Label"), *PAIRS])
    return folder / "a.csv"


def tab_separated(folder: Path) -> Path:
    rows = [("question", "document", "score"), *((query, text, f"{grade}.0") for query, text, grade in PAIRS)]
    (folder / "a.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return folder / "a.tsv"


def truths(folder: Path) -> Path:
    rows = [{"query": query, "text": text, "label": bool(grade)} for query, text, grade in PAIRS]
    return write_lines(folder / "a.jsonl", rows)


def groups(folder: Path) -> Path:
    return write_lines(folder / "a.jsonl", [{name: row[name] for name in ("query", "pos", "neg")} for row in lists()])


def groups_in_csv(folder: Path) -> Path:
    with (folder / "a.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["query", "positive", "negatives"])
        rows.writerows([(row["query"], row["pos"][0], json.dumps(row["neg"])) for row in lists()])
    return folder / "a.csv"


def tevatron(folder: Path) -> Path:
    rows = [
        {"query_id": "1", "query": row["query"], "positive_passages": [{"docid": "1", "text": row["pos"][0]}],
         "negative_passages": [{"docid": "2", "text": text} for text in row["neg"]]}
        for row in lists()
    ]  # fmt: skip
    return write_lines(folder / "a.jsonl", rows)


def answers(folder: Path) -> Path:
    rows = [{"question": query, "answer": text, "label": grade} for query, text, grade in PAIRS]
    return write_lines(folder / "a.jsonl", rows)


def truths_in_csv(folder: Path) -> Path:
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("query", "passage", "label"), *((*row[:2], bool(row[2])) for row in PAIRS)])
    return folder / "a.csv"


def numbered(folder: Path) -> Path:
    rows = [
        {"query": row["query"], "positive": row["pos"][0], "negative_1": row["neg"][0], "negative_2": row["neg"][1:]}
        for row in lists()
    ]
    return write_lines(folder / "a.jsonl", rows)


def queries_in_lists(folder: Path) -> Path:
    rows = [{"query": [row["query"]], "positive": row["pos"], "negative": row["neg"]} for row in lists()]
    return write_lines(folder / "a.jsonl", rows)


def listed(folder: Path) -> Path:
    rows = [{name: row[name] for name in ("query", "passages", "labels")} for row in lists()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def ms_marco(folder: Path) -> Path:
    rows = [
        {
            "query": row["query"],
            "passages": {"is_selected": row["labels"], "passage_text": row["passages"]},
            "answers": [],
        }
        for row in lists()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def with_labels(folder: Path) -> Path:
    rows = [
        {"query": row["query"], "documents": list(zip(row["passages"], row["labels"], strict=True))} for row in lists()
    ]
    return write_lines(folder / "a.jsonl", rows)


def mined_numbers(folder: Path) -> Path:
    """As sentence-transformers writes n-tuples of mined negatives."""
    rows = [{"query": row["query"], "answer": row["pos"][0], "neg1": row["neg"]} for row in lists()]
    return write_lines(folder / "a.jsonl", rows)


def mined_lists(folder: Path) -> Path:
    """As sentence-transformers writes labelled lists of mined negatives."""
    rows = [{"query": row["query"], "answer": row["passages"], "labels": row["labels"]} for row in lists()]
    return write_lines(folder / "a.jsonl", rows)


def mined_triplets(folder: Path) -> Path:
    rows = [{"question": row["query"], "passage": row["pos"], "negative": row["neg"]} for row in lists()]
    return write_lines(folder / "a.jsonl", rows)


def natural_questions(folder: Path) -> Path:
    """Tevatron's, where the answers are short texts beside the passages."""
    rows = [
        {"query": row["query"], "answers": ["yes"], "positive_passages": row["pos"], "negative_passages": row["neg"]}
        for row in lists()
    ]
    return write_lines(folder / "a.jsonl", rows)


FORMATS = (
    mined_numbers, mined_lists, mined_triplets, natural_questions,
    a_pair_a_row, tab_separated, truths, truths_in_csv, answers, groups, groups_in_csv, numbered, queries_in_lists,
    tevatron, listed, ms_marco, with_labels,
)  # fmt: skip


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_each_format_is_the_same_pairs(write: Any, tmp_path: Path, model: Path) -> None:
    found = planned(tmp_path, model, spec_of(write(tmp_path)))
    assert not found.violations, found.violations
    assert planned(tmp_path, model, found.plan.resolved_spec).plan == found.plan
    assert found.plan.resolved_spec.fine_tuning.reranking.HasField("graded") and found.plan.train_stats.num_samples == 5
    prepared = prepare(found.plan.resolved_spec, locations(tmp_path, **{NAME: model}))
    decode, read = prepared.inputs.tokenizer.decode, []
    for at in range(prepared.train.num_samples):
        batch = prepared.train.micro_batch([SampleRef(0, at)])
        ids, types = batch.inputs["input_ids"][0], batch.inputs["token_type_ids"][0]
        query, passage = (decode(ids[types == kind], skip_special_tokens=True) for kind in (0, 1))
        read.append((query, passage, int(batch.inputs["labels"].item())))
    assert read == PAIRS
    assert prepared.train.queries.tolist() == [0, 0, 0, 1, 1]


GOOD = {"query": "dog", "positives": ["the dog"], "negatives": ["a cat"]}
PAIR = {"query": "dog", "passage": "the dog", "label": 1}
LIST = {"query": "dog", "passages": ["the dog", "a cat"], "labels": [1, 0]}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "a blank query": (PAIR, {"query": " "}, "query", "'query' is blank; write a text"),
    "no query": (GOOD, {"query": None}, "query", "'query' is missing"),
    "a blank passage": (PAIR, {"passage": ""}, "passage", "'passage' is blank"),
    "a blank passage in a list": (GOOD, {"negatives": ["a cat", ""]}, "negatives", "'negatives' is blank"),
    "a passage that is a number": (GOOD, {"positives": [7]}, "positives", "'positives' is '7'; write a text"),
    "no label": (PAIR, {"label": None}, "label", "'label' is missing; write 0"),
    "a word": (PAIR, {"label": "relevant"}, "label", "'label' is 'relevant'; write 0"),
    "less than nothing": (PAIR, {"label": -1}, "label", "'label' is '-1'; write 0"),
    "not a number": (PAIR, {"label": "nan"}, "label", "'label' is 'nan'"),
    "no passages": (GOOD, {"positives": [], "negatives": None}, "positives", "the query has no passages"),
    "both": (GOOD, {"negatives": [" the dog"]}, "negatives", "'the dog' is a positive of the query and a negative"),
    "a label too few": (LIST, {"labels": [1]}, "labels", "the query has 2 passages and 1 labels"),
    "labels that are a text": (LIST, {"labels": "many"}, "labels", "2 passages and 'many' labels"),
    "half a character": (PAIR, {"query": "\ud83d"}, "query", "'query' has half of a surrogate pair"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_row_is_refused_with_row_and_column_or_skipped(name: str, tmp_path: Path, model: Path) -> None:
    good, change, column, message = REFUSED[name]
    more = [good] * 3 if good is not PAIR else [good, {**PAIR, "passage": "a cat", "label": 0}, good]
    path = write_lines(tmp_path / "a.jsonl", [good, {**good, **change}, *more])
    (violation,) = planned(tmp_path, model, spec_of(path)).violations
    assert message in violation.message and violation.field == "spec.train_data", violation
    assert (violation.metadata["line"], violation.metadata["column"]) == ("2", column), violation
    lenient = {"uri": str(path), "maxBadRowsShare": 0.2}
    found = planned(tmp_path, model, spec_of(path, trainData=lenient))
    (left_out,) = [each for each in found.plan.warnings if each.reason == "BAD_ROWS_LEFT_OUT"]
    assert "1 of 5 rows" in left_out.message and not found.violations


WHOLE: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str, str]] = {
    "one label": ([PAIR] * 4, {}, "train_data", "all 4 labels are 1, so there is nothing to tell apart"),
    "no labels": ([{"query": "dog", "passages": ["the dog"]}], {}, "train_data", "the passages have no labels"),
    "grades, though 0 or 1": (
        [{**PAIR, "label": grade} for grade in (0, 3)],
        {"graded": False},
        "train_data",
        "graded",
    ),
    "no negatives": ([{"query": "dog", "pos": ["the dog"]}], {}, "train_data.columns", "there are: query, pos"),
    "a column too few": ([{"query": "dog", "passage": "the dog"}], {}, "train_data.columns", "`positives`"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_data_from_which_nothing_can_be_learnt_is_refused(name: str, tmp_path: Path, model: Path) -> None:
    rows, task, field, message = WHOLE[name]
    (violation,) = planned(tmp_path, model, spec_of(write_lines(tmp_path / "a.jsonl", rows), task)).violations
    assert violation.field == f"spec.{field}" and message in violation.message, violation


def test_grades_from_1_to_5_are_told_apart(tmp_path: Path, model: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", [{"query": "dog", "documents": [["the dog", 5], ["my dog", 3], ["a cat", 1]]}]
    )
    found = planned(tmp_path, model, spec_of(path))
    assert found.plan.resolved_spec.fine_tuning.reranking.graded
    assert not [each for each in found.plan.warnings if each.reason == "QUERIES_ONE_SIDED"]


def test_queries_that_nothing_is_ranked_in_are_counted(tmp_path: Path, model: Path) -> None:
    rows = [
        GOOD,
        {"query": "cat", "positives": ["a cat"], "negatives": []},
        {"query": "bad", "positives": None, "negatives": ["a"]},
    ]
    path = write_lines(tmp_path / "a.jsonl", [*rows, {**GOOD, "query": "my film"}])
    found = planned(tmp_path, model, spec_of(path))
    (warning,) = [each for each in found.plan.warnings if each.reason == "QUERIES_ONE_SIDED"]
    assert "of 4 training queries, 1 have relevant passages only and 1 none" in warning.message


def test_the_pairs_of_a_query_are_held_out_together(tmp_path: Path, model: Path) -> None:
    rows = [{"query": f"dog {at % 8} ", "passage": "the dog", "label": at % 2} for at in range(24)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    spec = spec_of(path, evaluation={"holdout": 0.25})
    prepared = prepare(spec, locations(tmp_path, **{NAME: model}))
    assert prepared.eval is not None and prepared.eval.num_samples == 6 and prepared.train.num_samples == 18
    assert not set(prepared.eval.queries) & set(prepared.train.queries)


@pytest.mark.parametrize("graded", [False, True])
def test_the_loss_is_that_of_transformers_own_outputs(graded: bool, tmp_path: Path, model: Path) -> None:
    rows = [{"query": query, "passage": text, "label": grade * (2 + graded) / 2} for query, text, grade in PAIRS]
    path = write_lines(tmp_path / "a.jsonl", rows if graded else [{**row, "label": int(row["label"])} for row in rows])
    spec = spec_of(path)
    spec.model.dropout = 0
    prepared = prepare(spec, locations(tmp_path, **{NAME: model}))
    module = build_module(prepared, spec)
    batch = prepared.train.micro_batch([SampleRef(0, at) for at in range(5)])
    plain = PlainReranker(module.model, graded=graded)(**batch.inputs)
    assert batch.num_units == 5
    assert float(module(**batch.inputs).loss_sum) == pytest.approx(float(plain.loss_sum), rel=1e-6)


def test_the_metrics_are_those_of_their_definitions(tmp_path: Path, model: Path) -> None:
    draw = np.random.default_rng(3)
    rows = [
        {"query": f"dog {query}", "passage": f"cat {at}", "label": int(draw.integers(0, 4) * (draw.random() < 0.4))}
        for query in range(9)
        for at in range(query % 4 + 3)
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    prepared = prepare(spec_of(path), locations(tmp_path, **{NAME: model}))
    scores = draw.integers(0, 5, len(rows)).astype(np.float32)
    whole, parts = prepared.metrics(), [prepared.metrics(), prepared.metrics()]
    for at, score in enumerate(scores):
        batch = prepared.train.micro_batch([SampleRef(0, at)])
        output = ModuleOutput(torch.tensor(1.0), {"logits": torch.tensor([[score]])})
        whole.update(batch, output)
        parts[at % 2].update(batch, output)
    numbers = whole.compute([whole.part()])
    assert parts[0].compute([part.part() for part in parts]) == pytest.approx(numbers)
    expected = by_definition(rows, scores)
    assert numbers == pytest.approx({"loss": 1.0, **expected}) and set(whole.directions()) <= set(numbers)


def by_definition(rows: list[dict[str, Any]], scores: np.ndarray) -> dict[str, float]:
    """The metrics of each query in the worst order of equal scores, and over all its orders."""
    found = []
    for _, each in itertools.groupby(range(len(rows)), key=lambda at: rows[at]["query"]):
        grades = {at: rows[at]["label"] for at in each}
        if len(set(grades.values())) == 1:
            continue
        ours = sorted(grades, key=lambda at: (-scores[at], grades[at]))
        every = [of([grades[at] for at in order]) for order in itertools.permutations(grades)]
        found.append((*of([grades[at] for at in ours]), *np.mean(every, axis=0)))
    names = ("mrr_10", "ndcg_10", "random_mrr_10", "random_ndcg_10")
    return dict(zip(names, np.mean(found, axis=0), strict=True))


def of(grades: list[float]) -> tuple[float, float]:
    gains = [grade / np.log2(place + 2) for place, grade in enumerate(grades[:10])]
    best = [grade / np.log2(place + 2) for place, grade in enumerate(sorted(grades, reverse=True)[:10])]
    return max((1 / (1 + place) for place, grade in enumerate(grades) if grade), default=0), sum(gains) / sum(best)


def test_a_published_cross_encoder_keeps_its_head(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "cross", "BertForSequenceClassification", num_labels=1)
    write_passages(tmp_path / "a.jsonl")
    for new_head in (False, True):
        found = planned(tmp_path, folder, spec_of(tmp_path / "a.jsonl", {"newHead": new_head}))
        assert ("NEW_HEAD" in {each.reason for each in found.plan.warnings}) == new_head
