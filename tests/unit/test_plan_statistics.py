"""What a plan says of its data: lengths, classes, and evaluation samples that are trained on too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.plan_requests import ask, filled, fine_tuning, pretraining
from helpers.small_pictures import write_folders
from shardyard.worker.v1 import worker_pb2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("statistics"))


def texts(root: Path, name: str, rows: list[tuple[str, str]]) -> dict[str, str]:
    (root / name).write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows)]) + "\n")
    return {"uri": f"ROOT/{name}"}


def counted(result: worker_pb2.PlanResult) -> dict[str, int]:
    assert not result.violations, result.violations
    return {each.label: each.count for each in result.plan.train_stats.classes}


def test_lengths_and_classes_of_texts(root: Path) -> None:
    rows = [("the dog " * (1 + at % 10), "many" if at % 4 else "few") for at in range(100)]
    plan = ask(root, fine_tuning(train_data=texts(root, "long.csv", rows), evaluation={"holdout": 0})).plan
    lengths = plan.train_stats.lengths
    # Two words each time, and two tokens that frame them.
    assert (lengths.p50, lengths.p90, lengths.p99, lengths.longest) == (12, 20, 22, 22)
    assert [(each.label, each.count) for each in plan.train_stats.classes] == [("many", 75), ("few", 25)]
    assert not plan.HasField("num_shared_samples"), "nothing is evaluated"


def test_classes_of_several_labels_words_and_pictures(root: Path) -> None:
    several = texts(root, "several.csv", [("the dog", "a|b"), ("a cat", "b"), ("my film", "c|b")] * 5)
    wanted = {"text_classification": {"problem": "PROBLEM_MULTI_LABEL"}}
    none = {"holdout": 0}
    assert counted(ask(root, fine_tuning(fine_tuning=wanted, train_data=several, evaluation=none))) == {
        "b": 15, "a": 5, "c": 5,
    }  # fmt: skip
    (root / "words.conll").write_text("Anna B-PER\nmet O\nRome B-LOC\n\n" * 6)
    tags = fine_tuning(
        fine_tuning={"token_classification": {}}, train_data={"uri": "ROOT/words.conll"}, evaluation=none
    )
    assert counted(ask(root, tags)) == {"B-LOC": 6, "B-PER": 6, "O": 6, "I-LOC": 0, "I-PER": 0}
    write_folders(root / "flowers", 6)
    vit = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pictures = fine_tuning(
        fine_tuning={"image_classification": {"image_size": 8}},
        model={"architecture": {"model_type": "vit", "overrides": {**vit, "intermediate_size": 16}}},
        train_data={"uri": "ROOT/flowers"},
        evaluation=none,
    )
    result = ask(root, pictures)
    assert set(counted(result).values()) == {6}
    assert not result.plan.train_stats.HasField("lengths")


def test_evaluation_samples_that_are_trained_on_are_counted_and_warned_of(root: Path) -> None:
    train = texts(
        root, "train.csv", [(f"the dog is {'very ' * at} good", "yes") for at in range(8)] + [("bad", "no")] * 2
    )
    both = texts(root, "both.csv", [("the dog is  good", "yes"), ("a cat", "no"), ("bad", "yes"), ("my film", "no")])
    plan = ask(root, fine_tuning(train_data=train, eval_data=both)).plan
    assert plan.num_shared_samples == 2, "whatever their labels are"
    (warning,) = [each for each in plan.warnings if each.reason == "EVALUATED_ON_TRAINED"]
    assert warning.field == "spec.eval_data"
    assert warning.message.startswith("2 of 4 evaluation samples are in the training data too")
    apart = texts(root, "apart.csv", [("a cat", "no"), ("my film", "yes")])
    plan = ask(root, fine_tuning(train_data=train, eval_data=apart)).plan
    assert plan.num_shared_samples == 0
    assert "EVALUATED_ON_TRAINED" not in [each.reason for each in plan.warnings]


def test_rows_that_repeat_are_seen_on_both_sides_of_a_holdout(root: Path) -> None:
    repeated = texts(root, "repeated.csv", [("the dog is good", "yes"), ("the cat is bad", "no")] * 20)
    plan = ask(root, fine_tuning(train_data=repeated)).plan
    assert plan.num_shared_samples == plan.num_eval_samples > 0
    (warning,) = [each for each in plan.warnings if each.reason == "EVALUATED_ON_TRAINED"]
    assert warning.field == "spec.train_data"


def test_packed_sequences_are_neither_long_nor_compared(root: Path) -> None:
    spec: dict[str, Any] = pretraining(model={"uri": "ROOT/gpt2"})
    del spec["tokenizer"]
    plan = ask(root, {**spec, "pretraining": {"causal_lm": {"sequence_length": 16}}}).plan
    assert plan.total_steps == 40
    assert not plan.train_stats.HasField("lengths") and not plan.train_stats.classes
    assert not plan.HasField("num_shared_samples")
