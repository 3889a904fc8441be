"""What a plan has read or tokenised is not read again, by another plan or by the job; what has changed is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.plan_requests import ask, cache_of, filled, fine_tuning, pretraining, where
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.ingredients import prepare


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return filled(tmp_path)


def test_a_changed_file_is_planned_again_and_an_unchanged_one_is_remembered(root: Path) -> None:
    first = ask(root, fine_tuning())
    # What is remembered is not looked into again: the tokens are not missed.
    shutil.rmtree(cache_of(root))
    assert ask(root, fine_tuning()) == first
    assert not cache_of(root).exists()
    with (root / "reviews.csv").open("a") as file:
        file.write("a new dog,good\n")
    assert ask(root, fine_tuning()).plan.num_train_samples == first.plan.num_train_samples + 1


CACHED: list[tuple[str, dict[str, Any]]] = [
    ("labels", fine_tuning()),
    ("given labels", fine_tuning(fine_tuning={"text_classification": {"labels": ["good", "bad"]}})),
    ("labels of both", fine_tuning(eval_data={"uri": "ROOT/reviews.csv"})),
    ("several labels", fine_tuning(fine_tuning={"text_classification": {"problem": "PROBLEM_MULTI_LABEL"}})),
    ("lines", pretraining()),
    ("a tokenizer of which nothing is said", pretraining(tokenizer={"train": {}})),
    ("characters", pretraining(tokenizer={"train": {"algorithm": "ALGORITHM_CHARACTERS"}})),
]


@pytest.mark.parametrize("spec", [row[1] for row in CACHED], ids=[row[0] for row in CACHED])
def test_a_job_tokenises_nothing_that_its_plan_has_tokenised(root: Path, spec: dict[str, Any]) -> None:
    result = ask(root, spec)
    assert not result.violations
    cached = sorted(cache_of(root).glob("*/*"))
    assert cached
    task = prepare(result.plan.resolved_spec, where(root))
    assert task.train.num_samples == result.plan.num_train_samples
    assert sorted(cache_of(root).glob("*/*")) == cached


def test_labels_in_another_order_are_other_classes(root: Path) -> None:
    found = ask(root, fine_tuning(evaluation={"holdout": 0.5})).plan.resolved_spec
    assert list(found.fine_tuning.text_classification.labels) == ["bad", "good"]
    samples = [SampleRef(0, i) for i in range(8)]
    first = prepare(found, where(root)).train.micro_batch(samples).inputs["labels"]
    found.fine_tuning.text_classification.labels[:] = ["good", "bad"]
    other = prepare(found, where(root)).train.micro_batch(samples).inputs["labels"]
    assert other.tolist() == (1 - first).tolist()
