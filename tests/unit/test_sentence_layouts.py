"""Pairs, triplets and scored pairs in the layouts that people have: read as they are meant, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.pair_specs import prepared
from helpers.plan_requests import ask, filled
from helpers.sentence_specs import SCORED, embedding, rows_of, said
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.embedder import masked_cosines


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("sentences"))


LISTS = [
    {"query": "the dog runs", "pos": ["a cute dog", "my dog runs"], "neg": ["a cat", "a film"]},
    {"query": "a bad film", "pos": ["not a good film"], "neg": [], "pos_scores": [1.0], "neg_scores": [], "prompt": ""},
    {"query": "my cat", "pos": ["a cat"], "neg": ["the dog runs"]},
]
CELLS: dict[str, Any] = {
    "lists": list,
    "lists in text": lambda texts: "[" + ", ".join(map(repr, texts)) + "]",
    "records": lambda texts: [{"docid": "1", "text": text} for text in texts],
}


@pytest.mark.parametrize("kind", CELLS)
def test_each_positive_of_a_list_is_a_sample_with_the_negatives_of_its_row(root: Path, kind: str) -> None:
    rows = [{**row, "pos": CELLS[kind](row["pos"]), "neg": CELLS[kind](row["neg"])} for row in LISTS]
    task = prepared(root, embedding(root, rows, evaluation={"holdout": 0}))
    batch = task.train.micro_batch([SampleRef(0, at) for at in range(task.train.num_samples)])
    decode, ids = task.inputs.tokenizer.decode, batch.inputs["input_ids"].view(4, 4, -1)
    read = [[decode(text, skip_special_tokens=True) for text in sample] for sample in ids]
    assert read == [
        ["the dog runs", "a cute dog", "a cat", "a film"],
        ["the dog runs", "my dog runs", "a cat", "a film"],
        ["a bad film", "not a good film", "", ""],
        ["my cat", "a cat", "the dog runs", ""],
    ]
    # Nothing that is not there counts as a candidate: eight of the twelve are, one of them twice.
    vectors = torch.nn.functional.normalize(torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    right = masked_cosines(vectors, batch.inputs["keys"], slice(0, 4)).isinf()
    assert right[:, 4:].tolist()[2] == [False, False, True, False, False, False, True, True]
    assert right[:, :4].tolist()[0] == [False, True, False, False]


@pytest.mark.parametrize("names", [("neg1", "neg2"), ("negative_1", "negative_2"), ("hard_negative1", "Neg_2")])
def test_numbered_negatives_are_found_with_and_without_their_underscore(root: Path, names: tuple[str, ...]) -> None:
    rows = [{"query": f"dog {at}", "pos": f"cat {at}", names[0]: "a film", names[1]: "my dog"} for at in range(4)]
    task = prepared(root, embedding(root, rows, evaluation={"holdout": 0}))
    assert task.train.keys.shape == (4, 4)


@pytest.mark.parametrize("name", ["neg_0", "negative0", "negative_33"])
def test_a_negative_with_a_number_that_is_not_read_is_refused(root: Path, name: str) -> None:
    rows = [{**pair, "negative_1": "a film", name: "my dog"} for pair in rows_of("pairs", 4)]
    message = said(root, embedding(root, rows))
    assert f"the column '{name}' is not read" in message and "numbered from 1 to 32" in message


def test_a_missing_negative_is_none_as_in_reranking(root: Path) -> None:
    rows = [{"query": f"dog {at}", "pos": [f"cat {at}"], "neg": ["a film"] if at % 2 else None} for at in range(4)]
    task = prepared(root, embedding(root, rows, evaluation={"holdout": 0}))
    assert task.train.keys.shape == (4, 3)


JUDGED = [
    {"query": row["anchor"], "passage": row["positive"], "label": at % 2} for at, row in enumerate(rows_of("pairs", 9))
]


@pytest.mark.parametrize("name", ["label", "labels", "Score", "is_duplicate", "similarity"])
def test_pairs_with_a_column_that_judges_them_are_not_read_as_good_ones(root: Path, name: str) -> None:
    rows = [{"query": row["query"], "passage": row["passage"], name: row["label"]} for row in JUDGED]
    message = said(root, embedding(root, rows))
    assert f"the column '{name}' is not read beside anchor and positive" in message
    assert "map them in columns as text, text_pair and score" in message
    spec = embedding(root, rows)
    spec["train_data"]["columns"] = {"anchor": "query", "positive": "passage"}
    assert ask(root, spec).plan.metrics[1].name == "recall_1"
    spec["train_data"]["columns"] = {"text": "query", "text_pair": "passage", "score": name}
    assert ask(root, spec).plan.metrics[1].name == "pearson"


def test_a_number_beside_negatives_is_passed_over(root: Path) -> None:
    rows = [{**pair, "negative": "a film", "score": [0.9, 0.1]} for pair in rows_of("pairs", 9)]
    assert ask(root, embedding(root, rows)).plan.metrics[1].name == "recall_1"


def test_a_list_of_answers_with_labels_is_not_read_as_good_ones(root: Path) -> None:
    rows = [{"query": f"dog {at}", "answer": [f"cat {at}", "a film"], "labels": [1, 0]} for at in range(4)]
    assert "the column 'labels' is not read" in said(root, embedding(root, rows))


@pytest.mark.parametrize(
    ("classes", "wanted"),
    [
        (("entailment", "not_entailment"), "the scores are the classes entailment, not_entailment"),
        (("entailment", "neutral", "contradiction"), "the scores are the classes entailment, neutral"),
        (("not_equivalent", "equivalent"), [0, 1, 0, 1]),
        (("0", "1"), [0, 1, 0, 1]),
        (("1", "0"), [1, 0, 1, 0]),
    ],
)
def test_classes_are_scores_only_if_their_names_are(root: Path, classes: tuple[str, ...], wanted: Any) -> None:
    table = pa.table({"sentence1": ["a dog"] * 4, "sentence2": ["a cat"] * 4, "label": [0, 1, 0, 1]})
    named = {"info": {"features": {"label": {"names": list(classes), "_type": "ClassLabel"}}}}
    path = root / f"{'-'.join(classes)}.parquet"
    pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(named).encode()}), path)
    spec = embedding(root, [SCORED], evaluation={"holdout": 0}, train_data={"uri": str(path)})
    if isinstance(wanted, str):
        assert wanted in said(root, spec)
        return
    scores = prepared(root, spec).train.micro_batch([SampleRef(0, at) for at in range(4)]).inputs["cosines"]
    assert scores.tolist() == wanted


def test_a_message_names_the_column_of_the_file_too(root: Path) -> None:
    rows = [{"query": "a dog", "answer": "a cat"}, {"query": "a film", "answer": 7}]
    assert "the positive is '7', not a text; fill it in, or remove the row (the positive is the column 'answer')" in (
        said(root, embedding(root, rows))
    )


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (("sentence1", "sentence2"), "as score: NAME"),
        (("query", "other"), "as positive: NAME"),
        (("one", "other"), "as anchor: NAME, positive: NAME"),
        (("one", "other", "number"), "as text: NAME, text_pair: NAME, score: NAME"),
    ],
)
def test_the_hint_is_about_the_layout_that_a_file_is_nearest_to(root: Path, names: tuple[str, ...], hint: str) -> None:
    message = said(root, embedding(root, [dict.fromkeys(names, "a dog")] * 4))
    assert message.endswith(f"map them in columns, {hint}")


def test_a_file_whose_rows_have_no_negatives_is_one_of_pairs(root: Path) -> None:
    rows = [{"query": text, "pos": [f"{text} too"], "neg": []} for text in ("a dog", "a cat", "a film", "my dog")]
    task = prepared(root, embedding(root, rows))
    assert task.smallest_batch == 2 and task.train.keys.shape == (3, 2)
    many = [*rows, {"query": "a", "pos": ["b"], "neg": [f"dog {at}" for at in range(33)]}]
    assert "line 5: the row has 33 negatives; at most 32 are allowed" in said(root, embedding(root, many))


TEXTS = ("[2020]", "[1] a cat", "[", "['a' x]")


def test_a_text_that_begins_with_a_bracket_is_no_list(root: Path) -> None:
    rows = [
        {"anchor": f"dog {at}", "positive": text} for at, text in enumerate(("[2020]", "[1] a cat", "[", "['a' x]"))
    ]
    assert prepared(root, embedding(root, rows, evaluation={"holdout": 0})).train.keys.shape == (4, 2)
