"""What a plan says of the metric by which evaluations are compared, of early stopping and of the best step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.plan_requests import ask, extraction, filled, fine_tuning, places, planned, pretraining, where
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare

SCORES = {
    "fine_tuning": {"text_classification": {"problem": "PROBLEM_REGRESSION"}},
    "train_data": {"uri": "ROOT/s.csv"},
}
SEVERAL = {
    "fine_tuning": {"text_classification": {"problem": "PROBLEM_MULTI_LABEL", "label_columns": ["a", "b"]}},
    "train_data": {"uri": "ROOT/m.csv"},
}
TASKS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "classes": (fine_tuning(), {"loss", "accuracy", "f1_macro", "mcc"}),
    "scores": (fine_tuning(**SCORES), {"loss", "pearson", "spearman", "mse"}),
    "several labels": (fine_tuning(**SEVERAL), {"loss", "f1_micro", "f1_macro"}),
    "next tokens": (pretraining(), {"loss", "perplexity", "bits_per_byte"}),
    "masked tokens": (
        {
            **pretraining(pretraining={"masked_lm": {"sequence_length": 16}}, model={"uri": "ROOT/bert"}),
            "tokenizer": {"uri": "ROOT/bert"},
        },
        {"loss", "masked_accuracy"},
    ),
}
LESS_IS_BETTER = {"loss", "mse", "perplexity", "bits_per_byte"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = filled(tmp_path)
    texts = [f"the dog {index}" for index in range(40)]
    (root / "s.csv").write_text("text,label\n" + "".join(f"{text},{i / 7:.2f}\n" for i, text in enumerate(texts)))
    (root / "m.csv").write_text("text,a,b\n" + "".join(f"{text},{i % 2},{i % 3 % 2}\n" for i, text in enumerate(texts)))
    return root


@pytest.mark.parametrize(("spec", "names"), TASKS.values(), ids=TASKS)
def test_a_plan_lists_the_metrics_that_evaluations_have(root: Path, spec: dict[str, Any], names: set[str]) -> None:
    result = ask(root, spec)
    assert not result.violations
    found = {each.name: each.higher_is_better for each in result.plan.metrics}
    assert set(found) == names and result.plan.metrics[0].name == "loss"
    assert {name for name, higher in found.items() if not higher} == names & LESS_IS_BETTER
    assert result.plan.resolved_spec.evaluation.metric == "loss"
    task = prepare(result.plan.resolved_spec, where(root))
    assert task.eval is not None
    metrics, batch = task.metrics(), task.eval.micro_batch([SampleRef(0, 0), SampleRef(0, 1)])
    with torch.no_grad():
        metrics.update(batch, build_module(task, result.plan.resolved_spec).eval()(**batch.inputs, return_outputs=True))
    assert set(found) <= set(metrics.compute([metrics.part()]))


def test_the_defaults_of_early_stopping_are_filled_in_and_planned_again_the_same(root: Path) -> None:
    evaluation = {"every": 1, "metric": "accuracy", "select_best": True, "early_stopping": {}}
    first = ask(root, fine_tuning(evaluation=evaluation))
    resolved = first.plan.resolved_spec.evaluation
    assert (resolved.early_stopping.patience, resolved.early_stopping.min_delta) == (3, 0)
    assert (resolved.metric, resolved.select_best) == ("accuracy", True)
    assert planned(root, first.plan.resolved_spec) == first


def test_an_unknown_metric_is_refused_with_those_that_there_are(root: Path) -> None:
    (violation,) = ask(root, fine_tuning(evaluation={"metric": "acuracy"})).violations
    assert (violation.field, violation.reason) == ("spec.evaluation.metric", "SPEC_INVALID")
    assert violation.message == (
        "'acuracy' is not a metric of this text_classification, which has loss, accuracy, f1_macro, mcc; "
        "did you mean accuracy?"
    )
    assert violation.metadata["supported"] == "loss, accuracy, f1_macro, mcc"
    of_scores = fine_tuning(**SCORES, evaluation={"metric": "accuracy"})
    assert "which has loss, pearson, spearman, mse" in ask(root, of_scores).violations[0].message


def test_without_evaluations_there_is_nothing_to_choose_by(root: Path) -> None:
    evaluation = {"holdout": 0, "metric": "loss", "select_best": True, "early_stopping": {"patience": 2}}
    result = ask(root, fine_tuning(evaluation=evaluation))
    assert places(result) == [
        (f"spec.evaluation.{name}", "SPEC_INVALID") for name in ("metric", "select_best", "early_stopping")
    ]
    assert not ask(root, fine_tuning(evaluation={"holdout": 0})).plan.metrics
    assert places(ask(root, extraction(evaluation={"select_best": True}))) == [("spec.evaluation", "SPEC_INVALID")]


@pytest.mark.parametrize(("every", "patience", "is_told"), [(5, 2, True), (5, 1, False), (14, 1, True), (4, 2, False)])
def test_a_patience_that_cannot_run_out_is_warned_of(root: Path, every: int, patience: int, is_told: bool) -> None:
    evaluation = {"every": every, "early_stopping": {"patience": patience}}
    plan = ask(root, fine_tuning(evaluation=evaluation)).plan
    assert plan.total_steps == 14
    assert ("NEVER_STOPS_EARLY" in [warning.reason for warning in plan.warnings]) == is_told
