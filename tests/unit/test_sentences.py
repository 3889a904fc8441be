"""Texts whose vectors are learnt: what a plan says of data and settings, what counts as wrong, what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.pair_specs import prepared
from helpers.plan_requests import ask, filled
from helpers.sentence_specs import KINDS, PAIR, SCORED, PlainEmbedder, embedding, rows_of, said, write_rows
from helpers.tiny_folders import save_folder
from shardyard.v1 import model_service_pb2 as pb
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.data.sentence_rows import ScoreRange
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.models.door import open_folder
from shardyard_trainer.models.sentence import read_sentence
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.embedder import PairLoss, masked_cosines, own_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("sentences"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{**PAIR, "positive": " "}], ", line 2: the positive is empty; fill it in, or remove the row"),
        ([{**PAIR, "anchor": None}], ", line 2: the anchor is missing, not a text"),
        ([{**PAIR, "anchor": 7}], ", line 2: the anchor is '7', not a text"),
        ([{**PAIR, "anchor": ["one", "two"]}], ", line 2: the anchor is a list of 2 texts; give one"),
        ([{**PAIR, "positive": []}], ", line 2: the positive is an empty list; give a text"),
        ([{**PAIR, "positive": ["one", ""]}], ", line 2: the positive is empty; fill it in"),
        ([{**PAIR, "positive": "a\0b"}], ", line 2: the positive has a NUL character"),
        ([{**PAIR, "negative": "a  cute dog"}], ", line 2: the negative is the positive"),
    ],
)
def test_a_bad_pair_is_refused_with_file_and_line(root: Path, rows: list[dict[str, Any]], words: str) -> None:
    message = said(root, embedding(root, [PAIR, *rows]))
    assert message.startswith("spec.train_data") and words in message and "rows-" in message


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("3,5", "the score is '3,5', not a number; write it as 3.5"),
        (None, "the score is missing, not a number; fill it in"),
        ("nan", "not a number"),
        (True, "the score is 'True', not a number"),
        (4.5, "the score 4.5 is not a cosine, -1 to 1: set lowest_score and highest_score"),
    ],
)
def test_a_bad_score_is_refused_with_file_and_line(root: Path, score: Any, words: str) -> None:
    message = said(root, embedding(root, [SCORED, {**SCORED, "score": score}]))
    assert message.startswith("spec.train_data: rows-") and ", line 2: " in message and words in message


def test_bad_rows_are_left_out_up_to_a_share_and_counted(root: Path) -> None:
    rows = [*rows_of("pairs", 20), {**PAIR, "positive": ""}]
    spec = embedding(root, rows)
    spec["train_data"]["max_bad_rows_share"] = 0.1
    plan = ask(root, spec).plan
    assert plan.num_train_samples + plan.num_eval_samples == 20
    assert [each.reason for each in plan.warnings if "BAD" in each.reason] == ["BAD_ROWS_LEFT_OUT"]


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([SCORED] * 9, {"settings": {"temperature": 0.1}}, "sentence_embedding.temperature: 0.1 is for pairs without"),
        ([PAIR, *rows_of("pairs", 9)], {"settings": {"lowest_score": 0, "highest_score": 5}}, "the data has no scores"),
        ([SCORED] * 9, {"settings": {"lowest_score": 0}}, "highest_score: lowest_score is given alone"),
        ([SCORED] * 9, {"settings": {"lowest_score": 5, "highest_score": 5}}, "5 is not less than the highest_score"),
        ([SCORED] * 9, {"settings": {"lowest_score": 1, "highest_score": 5}}, "line 1: the score 0.5 is not within"),
        ([PAIR] * 9, {}, "all 8 positives are the same text"),
        ([{"sentence1": "a", "sentence2": "b"}] * 9, {}, "no columns `anchor` and `positive` or `text`"),
        ([{**PAIR, "negative_1": "a", "neg_2": "a cute dog"}] * 9, {}, "line 1: the negative_2 is the positive"),
        ([{**PAIR, **SCORED}] * 9, {}, "it may be read by its columns `anchor` and `positive` or `text` and"),
        (rows_of("pairs", 9), {"optimization": {"max_steps": 1, "global_batch_size": 1}}, "give at least 2"),
        (rows_of("pairs", 9), {"train_data": {"columns": {"label": "x"}}}, "sentence_embedding has the roles anchor,"),
        (rows_of("pairs", 9), {"settings": {"max_length": 999}}, "999 is more than the 32 tokens"),
    ],
)
def test_what_cannot_be_learnt_is_refused(
    root: Path, rows: list[dict[str, Any]], changes: dict[str, Any], words: str
) -> None:
    spec = embedding(root, rows, changes.get("settings"))
    spec["train_data"] |= changes.get("train_data", {})
    spec["optimization"] |= changes.get("optimization", {})
    assert words in said(root, spec)


def test_a_triplet_learns_alone_and_files_of_two_kinds_are_refused(root: Path) -> None:
    spec = embedding(root, rows_of("triplets", 9), optimization={"max_steps": 1, "global_batch_size": 1})
    assert not said(root, spec)
    both = root / "both"
    both.mkdir()
    write_rows(both / "a.jsonl", rows_of("pairs", 5))
    write_rows(both / "b.jsonl", rows_of("triplets", 5))
    assert "triplets, but a.jsonl has pairs" in said(root, {**spec, "train_data": {"uri": str(both)}})


def test_repeated_pairs_are_warned_of_and_defaults_are_filled_in(root: Path) -> None:
    plan = ask(root, embedding(root, rows_of("pairs", 20) * 2)).plan
    assert "REPEATED_PAIRS" in [each.reason for each in plan.warnings]
    found = plan.resolved_spec.fine_tuning.sentence_embedding
    assert (found.temperature, found.max_length, found.pooling) == (0.05, 32, 1)
    assert not found.HasField("lowest_score")
    assert {each.name for each in plan.metrics} == {"loss", "recall_1", "mrr"}


def test_scored_data_evaluates_what_pairs_have_taught(root: Path) -> None:
    held = write_rows(root / "held.jsonl", rows_of("scored", 12))
    spec = embedding(root, rows_of("pairs", 30), {"lowest_score": 0, "highest_score": 5}, eval_data={"uri": str(held)})
    plan = ask(root, spec).plan
    assert {each.name for each in plan.metrics} == {"loss", "pearson", "spearman", "mse"}
    task = prepared(root, spec)
    scores = task.eval.micro_batch([SampleRef(0, at) for at in range(6)]).inputs["cosines"]
    assert scores.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_headerless_scores_are_read_by_the_columns_that_are_mapped(root: Path) -> None:
    (root / "stsb.csv").write_text("".join(f'"the dog, {at}",a cat,{at % 6}\n' for at in range(12)))
    spec = embedding(root, [SCORED], {"lowest_score": 0, "highest_score": 5})
    columns = {"text": "column_1", "text_pair": "column_2", "score": "column_3"}
    spec["train_data"] = {"uri": "ROOT/stsb.csv", "columns": columns, "header": False}
    assert ask(root, spec).plan.num_train_samples == 11


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("question1", "question2", "is_duplicate"), "scored"),
        (("Sentence1", "Sentence2", "Label"), "scored"),
        (("query", "answer"), "pairs"),
        (("Query", "pos", "neg"), "pairs"),
        (("question", "answer", "negative_1"), "pairs"),
    ],
)
def test_columns_are_found_by_the_names_of_public_data_sets(root: Path, names: tuple[str, ...], kind: str) -> None:
    rows = [
        dict(zip(names, ("the dog", f"{word} cat", 1 if kind == "scored" else "not this"), strict=False))
        for word in ("my", "bad", "good", "that")
    ]
    plan = ask(root, embedding(root, rows)).plan
    assert (plan.num_train_samples, plan.metrics[1].name) == (3, "pearson" if kind == "scored" else "recall_1")


def test_other_right_answers_of_a_batch_are_not_wrong_ones() -> None:
    # Anchors 0 and 2 are the same text; the negative of 2 is the positive of 0; 0 and 1 have the same negative.
    keys = torch.tensor([[1, 4, 7], [2, 1, 7], [1, 5, 4]])
    vectors = torch.nn.functional.normalize(torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    right = masked_cosines(vectors, keys, slice(0, 3)).isinf()
    #                          positives 4, 1, 5     negatives 7, 7, 4
    assert right.tolist() == [
        [False, True, True, False, False, True],
        [False, False, False, False, False, False],
        [True, True, False, False, False, True],
    ]
    every = PairLoss(0.5)(vectors, keys, slice(0, 3)).tolist()
    alone = [PairLoss(0.5)(vectors, keys, slice(at, at + 1)).item() for at in range(3)]
    assert alone == pytest.approx(every, abs=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "several"])
def test_the_loss_of_a_batch_is_that_of_a_loop_over_its_anchors(root: Path, kind: str) -> None:
    settings = {"temperature": 0.1} if kind != "scored" else {"lowest_score": 0, "highest_score": 5}
    task = prepared(root, embedding(root, rows_of(kind, 20), {"max_length": 24, **settings}))
    module = build_module(task, spec_pb2.JobSpec()).eval()
    batch = task.train.micro_batch([SampleRef(0, at) for at in range(task.train.num_samples)])
    assert batch.inputs["keys"].shape[1] == {"triplets": 3, "several": 5}.get(kind, 2)
    plain = PlainEmbedder(module.model)(**batch.inputs).loss_sum
    assert module(**batch.inputs).loss_sum.item() == pytest.approx(plain.item(), rel=1e-5)


def test_a_model_that_makes_one_vector_of_all_finds_nothing_first() -> None:
    vectors = torch.ones(6, 2, 4) / 2
    keys = torch.arange(12).reshape(6, 2)
    assert own_ranks(vectors, keys).tolist() == [6] * 6
    assert own_ranks(torch.eye(6)[:, None].expand(6, 2, 6), keys).tolist() == [1] * 6
    assert own_ranks(vectors * torch.nan, keys).tolist() == [6] * 6


def test_a_text_that_answers_several_questions_is_one_wrong_answer_of_another() -> None:
    keys = torch.tensor([[1, 7], [2, 7], [3, 7], [4, 8], [5, 7]])
    one, other = [1.0, 0.0], [0.0, 1.0]
    vectors = torch.tensor([[one, one]] * 3 + [[one, other]] + [[other, one]])
    assert own_ranks(vectors, keys).tolist() == [1, 1, 1, 2, 2]


def test_a_sample_counts_the_positions_that_it_takes(root: Path) -> None:
    task = prepared(root, embedding(root, rows_of("triplets", 30)))
    for at in range(5):
        batch = task.train.micro_batch([SampleRef(0, at)])
        assert batch.num_positions == task.train.lengths()[at] and batch.inputs["keys"].shape == (1, 3)
    assert task.train.num_tokens == sum(task.train.micro_batch([SampleRef(0, at)]).num_tokens for at in range(27))
    assert np.array_equal(task.train.keys[:1], task.train.micro_batch([SampleRef(0, 0)]).inputs["keys"])


@pytest.mark.parametrize("pooling", ["POOLING_MEAN", "POOLING_CLS", "POOLING_MAX", "POOLING_LAST"])
def test_what_is_saved_is_a_sentence_transformers_folder_with_the_same_vectors(
    root: Path, pooling: str, tmp_path: Path
) -> None:
    task = prepared(root, embedding(root, rows_of("pairs", 9), {"pooling": pooling, "max_length": 9}))
    task.inputs.save(tmp_path, task.choice.config)
    found = read_sentence(open_folder(tmp_path))
    assert found is not None and (found.pooling, found.normalize) == (task.describe()["pooling"], True)
    assert (found.max_length, found.lower_case) == (9, False)
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 16


def measuring(root: Path, rows: list[dict[str, Any]], **trained: Any) -> Any:
    """A plan that measures a model of the task on rows."""
    folder = root / f"trained-{len(trained)}-{'-'.join(trained)}"
    if not folder.exists():
        save_folder(folder, "BertModel")
        settings = {"format": 1, "task": "sentence_embedding", "pooling": "mean", "max_length": 16, "normalize": True}
        (folder / "shardyard.json").write_text(json.dumps({**settings, **trained}))
    data = {"uri": str(write_rows(root / f"measured-{len(rows)}.jsonl", rows))}
    return ask(root, {"model_evaluation": {"data": data}, "model": {"uri": str(folder)}})


def test_parameters_and_single_texts_are_refused_with_what_a_model_takes(root: Path) -> None:
    measuring(root, rows_of("pairs", 24), temperature=0.1)
    both = pb.Instance(pair=pb.TextPair(text="the dog", text_pair="a cat"))
    request = pb.PredictRequest(instances=[pb.Instance(text="a dog"), both])
    request.zero_shot.labels.append("x")
    call = worker_pb2.PredictCall(folder=str(root / "trained-1-temperature"), request=request)
    found = worker_pb2.PredictReply.FromString(predict(call.SerializeToString())).violations
    assert [each.field for each in found] == ["zero_shot", "instances[0].text"]
    assert "which takes no parameters; leave `zero_shot` out" in found[0].message
    assert "get the vector of one text with Embed" in found[1].message


def test_a_model_is_measured_on_data_of_either_kind_in_any_range(root: Path) -> None:
    for trained in ({"temperature": 0.1}, {"lowest_score": 0.0, "highest_score": 5.0}):
        for kind in ("pairs", "scored"):
            result = measuring(root, rows_of(kind, 24 if kind == "pairs" else 25), **trained)
            assert not result.violations and result.plan.num_eval_samples in (24, 25)
    out = [{**SCORED, "score": at} for at in range(8)]
    message = measuring(root, out, lowest_score=0.0, highest_score=5.0).violations[0].message
    assert "the score 6 is not within 0 to 5" in message
    assert not measuring(root, [*out, SCORED], temperature=0.1).violations


def test_scores_of_an_open_range_keep_their_order() -> None:
    scores = np.asarray([2.0, 5.0, 3.5])
    assert ScoreRange(is_open=True).cosines(scores).tolist() == pytest.approx([0, 1, 0.5])
    assert ScoreRange(is_open=True).cosines(scores / 10).tolist() == pytest.approx([0.2, 0.5, 0.35])
    assert ScoreRange(0, 10).cosines(scores).tolist() == pytest.approx([0.2, 0.5, 0.35])


def test_adapters_and_frozen_layers_leave_less_to_train(root: Path) -> None:
    spec = embedding(root, rows_of("pairs", 12))
    numbers = [
        ask(root, {**spec, "fine_tuning": {"sentence_embedding": {}, **changes}}).plan.num_trainable_parameters
        for changes in ({}, {"freeze": {"layers": 1}}, {"lora": {"rank": 2}})
    ]
    assert numbers[0] > numbers[1] > numbers[2] > 0
