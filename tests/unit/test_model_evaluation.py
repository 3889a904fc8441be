"""Measuring a model: its own task as it was trained, planned and run without training; what does not fit is refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format

from helpers.measured import TRAINED, Recorder, write_measured
from helpers.plan_requests import ask, places, where
from helpers.tiny_folders import save_folder
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.evaluation import micro_batch_size
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.tasks.model_evaluation import prepare_evaluation
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.evaluate import evaluate
from shardyard_trainer.training.evaluating import WholeModel, run
from shardyard_trainer.training.export import export_model
from shardyard_trainer.training.gang import Gang

GANG = Gang(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    write_measured(folder)
    return folder


@functools.cache
def exported(root: Path, name: str) -> tuple[dict[str, float], spec_pb2.JobSpec]:
    """The numbers of a training of the task that has made no step, whose model is then in `root / name`; its spec."""
    spec = json_format.Parse(json.dumps(TRAINED[name]).replace("ROOT", str(root)), spec_pb2.JobSpec())
    prepared = prepare(spec, where(root))
    module = build_module(prepared, spec).eval()
    attempt = worker_pb2.AttemptSpec(epoch=1, spec=spec, locations=where(root))
    export_model(module, module.state_dict(), prepared, attempt, {}, folder=root / name)
    context = Context(attempt=attempt, gang=GANG, reporter=Recorder(), trace=lambda name: None)
    model = WholeModel(module, GANG, in_halves=False)
    return evaluate(context, model, prepared, step=0, micro_batch_size=5, is_final=True), spec


def evaluation_of(name: str, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"model_evaluation": {"data": data}, "model": {"uri": f"ROOT/{name}"}, **changes}


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_has_the_numbers_of_its_trainings_last_evaluation(root: Path, name: str) -> None:
    numbers, trained = exported(root, name)
    data = TRAINED[name].get("eval_data", TRAINED[name]["train_data"])
    seed = {"optimization": {"seed": trained.optimization.seed}} if trained.optimization.seed else {}
    result = ask(root, evaluation_of(name, data, **seed))
    assert not result.violations, result.violations
    plan = result.plan
    assert plan.output == plan_pb2.JOB_OUTPUT_METRICS and plan.num_train_samples == 0 and plan.num_eval_samples > 0
    again = ask(root, json_format.MessageToDict(plan.resolved_spec, preserving_proto_field_name=True))
    assert again.plan == plan
    found = prepare_evaluation(plan.resolved_spec, where(root))
    reporter = Recorder()
    context = Context(attempt=worker_pb2.AttemptSpec(), gang=GANG, reporter=reporter, trace=lambda name: None)
    model = WholeModel(build_module(found.task, found.spec), GANG, in_halves=False)
    run(context, found.task, model, micro_batch_size=micro_batch_size(plan.resolved_spec, found))
    assert reporter.kinds()[-2:] == ["finished", "exported"] and not reporter.events[-1].exported.path
    assert reporter.evaluation().is_final and reporter.evaluation().num_samples == plan.num_eval_samples
    assert dict(reporter.evaluation().metrics) == pytest.approx(numbers, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """A folder with a model of each task that has labels, and data that does not go with it."""
    labelled = ("text_classification", "token_classification", "image_classification")
    for name in (*labelled, "recommendation", "recommendation_of_two", "causal_lm"):
        exported(root, name)
    (root / "other.csv").write_text("text,label\nthe dog,good\nthe cat,awful\n")
    (root / "one.csv").write_text("text,label\nthe dog,good\nthe cat,good\n")
    (root / "plain.csv").write_text("text,stars\nthe dog,3\nthe cat,4\n")
    (root / "broken.csv").write_text("text,label\nthe dog,good\nthe cat,\n")
    (root / "short.txt").write_text("the dog\n")
    # Three interactions, of which two can be evaluated: one is left, with nothing behind it to learn.
    (root / "few.csv").write_text("user,item,time\nu1,i1,1\nu1,i2,2\nu1,i3,3\n")
    rows = [{"tokens": ["the", "dog"], "tags": ["O", "B-ORG"]}, {"tokens": ["a"], "tags": ["B-PER"]}]
    (root / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [f"u{user},{item}" for user in range(3) for item in ("i1", "stranger", "i2")]
    (root / "other_histories.csv").write_text("user,item\n" + "\n".join(rows) + "\n")
    shutil.copytree(root / "new_pictures", root / "other_pictures")
    (root / "other_pictures" / "rose").rename(root / "other_pictures" / "tulip")
    shutil.copytree(root / "text_classification", root / "edited")
    described = json.loads((root / "edited" / "shardyard.json").read_text())
    (root / "edited" / "shardyard.json").write_text(json.dumps({**described, "max_length": 10**6}))
    return root


NEW = {"uri": "ROOT/new.csv"}
INVALID, MISMATCH = "SPEC_INVALID", "LABEL_MISMATCH"
REFUSED: list[tuple[str, dict[str, Any], list[tuple[str, str]], str]] = [
    ("a fresh model", evaluation_of("", NEW, model={"architecture": {"model_type": "bert"}}),
     [("model.architecture", INVALID)], "name a trained one"),
    ("a bare backbone", evaluation_of("bare", NEW), [("model.uri", "TASK_MISMATCH")], "fine-tune the model first"),
    ("other classes", evaluation_of("text_classification", {"uri": "ROOT/other.csv"}),
     [("model_evaluation.data", MISMATCH)], "2 labels (bad, good), the data 2 (awful, good), of which the model does"),
    ("other tags", evaluation_of("token_classification", {"uri": "ROOT/other.jsonl"}),
     [("model_evaluation.data", MISMATCH)], "does not know B-ORG"),
    ("other pictures", evaluation_of("image_classification", {"uri": "ROOT/other_pictures"}),
     [("model_evaluation.data", MISMATCH)], "does not know tulip"),
    ("other items", evaluation_of("recommendation", {"uri": "ROOT/other_histories.csv"}),
     [("model_evaluation.data", "DATA_INVALID")], "not in the catalogue of the model (stranger)"),
    ("numbers for labels", evaluation_of("text_classification", {"uri": "ROOT/plain.csv"}),
     [("model_evaluation.data", MISMATCH)], "does not know 3, 4"),
    ("a bad row", evaluation_of("text_classification", {"uri": "ROOT/broken.csv"}),
     [("model_evaluation.data", "DATA_INVALID")], "broken.csv, line 3"),
    ("a role of another task", evaluation_of("text_classification", {**NEW, "columns": {"tokens": "text"}}),
     [("model_evaluation.data.columns", INVALID)], "text, text_pair, label"),
    ("no data there", evaluation_of("text_classification", {"uri": "ROOT/nothing.csv"}),
     [("model_evaluation.data.uri", "PATH_NOT_ALLOWED")], ""),
    ("a length that the model does not have", evaluation_of("edited", NEW), [("model", INVALID)], "1,000,000"),
    ("settings of a training",
     evaluation_of("text_classification", NEW, train_data=NEW, eval_data=NEW, tokenizer={"uri": "ROOT/bert"},
                   checkpoints={"every": 1}, evaluation={"every": 1}, parallelism={"zero_stage": 1},
                   optimization={"epochs": 2, "learning_rate": 0.1, "seed": 3}),
     [*((name, INVALID) for name in
        ("train_data", "eval_data", "tokenizer", "checkpoints", "evaluation", "parallelism")),
      ("optimization.epochs", INVALID), ("optimization.learning_rate", INVALID)], "leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "expected", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_measured_is_refused_with_the_next_step(
    trained: Path, spec: dict[str, Any], expected: list[tuple[str, str]], words: str
) -> None:
    result = ask(trained, spec)
    assert sorted(places(result)) == sorted((f"spec.{field}", reason) for field, reason in expected)
    assert words in " ".join(each.message for each in result.violations)


@pytest.mark.parametrize(
    ("name", "data", "number"),
    [("text_classification", "one.csv", 2), ("causal_lm", "short.txt", 1), ("recommendation_of_two", "few.csv", 2)],
)
def test_data_that_would_not_do_for_a_training_is_measured(trained: Path, name: str, data: str, number: int) -> None:
    result = ask(trained, evaluation_of(name, {"uri": f"ROOT/{data}"}))
    assert not result.violations, result.violations
    assert result.plan.num_eval_samples == number and not result.plan.warnings


def test_a_head_without_names_is_measured_by_the_order_of_the_datas_labels(root: Path) -> None:
    save_folder(root / "unnamed", "BertForSequenceClassification")
    result = ask(root, evaluation_of("unnamed", NEW))
    assert not result.violations, result.violations
    assert list(result.plan.labels) == ["bad", "good"]
    (root / "three.csv").write_text("text,label\nthe dog,good\nthe cat,bad\na film,fair\n")
    result = ask(root, evaluation_of("unnamed", {"uri": "ROOT/three.csv"}))
    assert places(result) == [("spec.model_evaluation.data", MISMATCH)]


def test_a_model_that_no_worker_can_hold_is_refused(root: Path) -> None:
    result = ask(root, evaluation_of("gpt2", {"uri": "ROOT/new.txt"}), {"memory_bytes": 10_000, "cpus": 1})
    assert places(result) == [("spec.model", "MODEL_DOES_NOT_FIT")]
    assert "larger workers" in result.violations[0].message


def test_an_evaluation_that_is_stopped_leaves_no_numbers(root: Path) -> None:
    spec = ask(root, evaluation_of("gpt2", {"uri": "ROOT/new.txt"}, optimization={"micro_batch_size": 1}))
    found = prepare_evaluation(spec.plan.resolved_spec, where(root))
    reporter = Recorder(stop_after=2)
    context = Context(attempt=worker_pb2.AttemptSpec(), gang=GANG, reporter=reporter, trace=lambda name: None)
    run(
        context, found.task, WholeModel(build_module(found.task, found.spec), GANG, in_halves=False), micro_batch_size=1
    )
    assert reporter.kinds() == ["phase", "progress", "canary", "progress", "stopped"]
    progress = reporter.events[-2].progress
    assert (progress.step, progress.total_steps) == (2, spec.plan.total_steps) and progress.tokens > 0


def numbers_of(root: Path, spec: dict[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation, as a rank computes them."""
    result = ask(root, spec)
    assert not result.violations, result.violations
    resolved = result.plan.resolved_spec
    found = prepare_evaluation(resolved, where(root))
    reporter = Recorder()
    context = Context(attempt=worker_pb2.AttemptSpec(), gang=GANG, reporter=reporter, trace=lambda name: None)
    model = WholeModel(build_module(found.task, found.spec), GANG, in_halves=False)
    run(context, found.task, model, micro_batch_size=micro_batch_size(resolved, found))
    return dict(reporter.evaluation().metrics)


@pytest.mark.parametrize("name", ["text_classification", "token_classification", "recommendation", "causal_lm"])
def test_numbers_do_not_depend_on_how_many_samples_are_computed_at_once(trained: Path, name: str) -> None:
    data = TRAINED[name].get("eval_data", TRAINED[name]["train_data"])
    found = [
        numbers_of(trained, evaluation_of(name, data, optimization={"micro_batch_size": size})) for size in (1, 7, 64)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


LIKE: dict[str, tuple[dict[str, Any], str]] = {
    "classes in an order of one's own": (
        {"labels": ["good", "fair", "bad"]}, "text,label\nthe dog,good\nthe cat,fair\na film,bad\nmy dog,good\n"
    ),
    "classes smoothed in training": (
        {"label_smoothing": 0.3}, "text,label\nthe dog,good\nthe cat,fair\na film,bad\nmy dog,good\n"
    ),
    "several labels and a separator": (
        {"problem": "PROBLEM_MULTI_LABEL", "label_separator": " / "},
        "text,label\nthe dog,good / big\nthe cat,bad\na film,good\nmy dog,\n",
    ),
    "several labels in columns": (
        {"problem": "PROBLEM_MULTI_LABEL", "label_columns": ["good", "big"]},
        "text,big,good,new\nthe dog,1,1,0\nthe cat,0,0,1\na film,0,1,0\nmy dog,1,0,1\n",
    ),
    "numbers": ({"problem": "PROBLEM_REGRESSION"}, "text,label\nthe dog,0.5\nthe cat,1\na film,2.25\nmy dog,3\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE)
def test_labels_are_read_as_in_the_training(root: Path, tmp_path: Path, name: str) -> None:
    settings, rows = LIKE[name]
    shutil.copytree(root / "bare", tmp_path / "bare")
    (tmp_path / "a.csv").write_text(rows)
    spec = json_format.ParseDict(
        {
            "fine_tuning": {"text_classification": {"max_length": 12, **settings}},
            "model": {"uri": str(tmp_path / "bare")},
            "train_data": {"uri": str(tmp_path / "a.csv")},
            "eval_data": {"uri": str(tmp_path / "a.csv")},
        },
        spec_pb2.JobSpec(),
    )
    prepared = prepare(spec, where(tmp_path))
    module = build_module(prepared, spec).eval()
    attempt = worker_pb2.AttemptSpec(epoch=1, spec=spec, locations=where(tmp_path))
    export_model(module, module.state_dict(), prepared, attempt, {}, folder=tmp_path / "made")
    context = Context(attempt=attempt, gang=GANG, reporter=Recorder(), trace=lambda name: None)
    model = WholeModel(module, GANG, in_halves=False)
    numbers = evaluate(context, model, prepared, step=0, micro_batch_size=4, is_final=True)
    found = numbers_of(tmp_path, evaluation_of("made", {"uri": "ROOT/a.csv"}))
    assert found == pytest.approx(numbers, rel=1e-6, abs=1e-6)


def test_a_class_without_pictures_takes_no_other_classs_place(trained: Path) -> None:
    shutil.copytree(trained / "new_pictures", trained / "fewer_pictures")
    shutil.rmtree(trained / "fewer_pictures" / "daisy")
    plan = ask(trained, evaluation_of("image_classification", {"uri": "ROOT/fewer_pictures"})).plan
    assert list(plan.labels) == ["daisy", "rose", "violet"] and plan.num_eval_samples == 6


def test_rows_that_may_be_left_out_are_reported_once(trained: Path) -> None:
    spec = evaluation_of("text_classification", {"uri": "ROOT/broken.csv", "max_bad_rows_share": 0.6})
    result = ask(trained, spec)
    assert not result.violations and result.plan.num_eval_samples == 1
    assert [(each.reason, each.field) for each in result.plan.warnings] == [
        ("BAD_ROWS_LEFT_OUT", "spec.model_evaluation.data")
    ]
