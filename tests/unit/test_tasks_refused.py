"""Specs that no task is built from: each is refused by the field, with what is allowed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import small_specs
from helpers.small_specs import causal_spec, classification_spec, locations, masked_spec, write_corpus, write_labelled
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare


def refused(tmp_path: Path, spec: spec_pb2.JobSpec) -> SpecError:
    with pytest.raises(SpecError) as caught:
        task = prepare(spec, locations(tmp_path))
        build_module(task, spec)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "field", "reason", "message"),
    [
        (
            {"model": small_specs.architecture("bert")},
            "spec.pretraining.causal_lm",
            "OBJECTIVE_UNSUPPORTED",
            "masked_lm",
        ),
        ({"model": small_specs.architecture("t5")}, "spec.model.architecture.overrides", "SPEC_INVALID", "no such"),
        ({"model": {"architecture": {"modelType": "gtp2"}}}, "model_type", "SPEC_INVALID", "did you mean gpt2?"),
        ({"model": small_specs.architecture("gpt2", n_layers=3)}, "overrides.n_layers", "SPEC_INVALID", "n_layer?"),
        ({"model": small_specs.architecture("gpt2", n_layer=2.5)}, "overrides.n_layer", "SPEC_INVALID", "2.5"),
        ({"model": small_specs.architecture("gpt2", n_layer="2")}, "overrides.n_layer", "SPEC_INVALID", "int"),
        ({"model": small_specs.architecture("gpt2", n_layer=0)}, "overrides.n_layer", "SPEC_INVALID", "at least 1"),
        ({"model": small_specs.architecture("gpt2", n_layer=10**6)}, "n_layer", "MODEL_DOES_NOT_FIT", "1,000,000"),
        ({"model": small_specs.architecture("gpt2", n_embd=100, n_head=3)}, "overrides", "SPEC_INVALID", "divi"),
        ({"model": small_specs.architecture("gpt2", vocab_size=17)}, "overrides.vocab_size", "SPEC_INVALID", "17"),
        ({"model": small_specs.architecture("gpt2", n_positions=16)}, "sequence_length", "SPEC_INVALID", "16 tokens"),
        ({"model": {}}, "spec.model", "SPEC_INVALID", "no model"),
        ({"model": {"model": "projects/p/models/m"}}, "spec.model.model", "MODEL_NOT_FOUND", "projects/p/models/m"),
        ({"tokenizer": {}}, "spec.tokenizer", "TOKENIZER_MISSING", "train"),
        ({"tokenizer": {"train": {"vocabSize": 100}}}, "spec.tokenizer.train.vocab_size", "SPEC_INVALID", "259"),
        ({"pretraining": {"causalLm": {"sequenceLength": 4}}}, "sequence_length", "SPEC_INVALID", "too small"),
        (
            {"pretraining": {"causalLm": {"sequenceLength": 30000}}},
            "spec.train_data",
            "DATA_INVALID",
            "less than one",
        ),
        ({"trainData": {}}, "spec.train_data", "SPEC_INVALID", "no source"),
        ({"pretraining": {}}, "spec.pretraining", "SPEC_INVALID", "no training task"),
    ],
)
def test_a_bad_pretraining_spec_is_refused(
    tmp_path: Path, changes: dict[str, Any], field: str, reason: str, message: str
) -> None:
    error = refused(tmp_path, causal_spec(write_corpus(tmp_path), **changes))
    assert error.field.endswith(field) or field in error.field
    assert error.reason == reason
    assert message in error.message or message in str([other.message for other in error.all()])


def test_masked_lm_on_gpt2_names_what_is_supported(tmp_path: Path) -> None:
    error = refused(tmp_path, masked_spec(write_corpus(tmp_path), "gpt2"))
    assert (error.reason, error.metadata) == ("OBJECTIVE_UNSUPPORTED", {"supported": "causal_lm"})
    assert error.message == (
        "masked_lm cannot train a model of the type gpt2; train it with causal_lm, or use another model"
    )


def test_what_is_wrong_with_model_and_data_is_said_at_once(tmp_path: Path) -> None:
    spec = causal_spec(tmp_path / "nothing.txt", model={"architecture": {"modelType": "nope"}})
    assert [error.field for error in refused(tmp_path, spec).all()] == [
        "spec.model.architecture.model_type",
        "spec.train_data.uri",
    ]


@pytest.mark.parametrize(
    ("rows", "classify", "message", "line"),
    [
        ([("x", "maybe")] * 5, {}, "one label: maybe", 0),
        ([("x", "a"), ("y", "b"), ("z", "maybe")], {"labels": ["a", "b"]}, "'maybe' is none of: a, b", 4),
        ([("x", "1.5"), ("y", "high")], {"problem": "PROBLEM_REGRESSION"}, "finite number", 3),
        ([("x", "1.5"), ("y", "nan")], {"problem": "PROBLEM_REGRESSION"}, "finite number", 3),
        ([("x", "a"), ("y", "")], {}, "label is missing", 3),
        ([("x", "a"), ("y", "b"), ("z", "NaN")], {}, "label 'NaN': the label is missing", 4),
        ([("x", "a"), ("y", "<NA>"), ("z", "b")], {"labels": ["a", "b"]}, "label is missing", 3),
        ([("x", "a|b"), ("y", "nan")], {"problem": "PROBLEM_MULTI_LABEL"}, "label is missing", 3),
    ],
)
def test_a_bad_label_is_refused_with_its_line(
    tmp_path: Path, rows: list[tuple[str, str]], classify: dict[str, Any], message: str, line: int
) -> None:
    spec = classification_spec(write_labelled(tmp_path / "a.csv", rows), classify=classify)
    error = refused(tmp_path, spec)
    assert (error.reason, error.metadata.get("line", "0")) == ("DATA_INVALID", str(line))
    assert message in error.message
    assert error.field == "spec.train_data"


@pytest.mark.parametrize(
    ("labels", "place"),
    [(["a", "a"], ""), (["a"], ""), (["a", " "], "[1]"), (["x" * 1025, "a"], "[0]"), (["a", "b\0"], "[1]")],
)
def test_bad_label_names_are_refused(tmp_path: Path, labels: list[str], place: str) -> None:
    error = refused(tmp_path, classification_spec(write_labelled(tmp_path / "a.csv"), classify={"labels": labels}))
    assert error.field == f"spec.fine_tuning.text_classification.labels{place}"


def test_a_label_that_only_the_evaluation_has_is_refused_there(tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "a.csv")
    held = write_labelled(tmp_path / "b.csv", [("x", "good"), ("y", "goood")])
    error = refused(tmp_path, classification_spec(train, evalData={"uri": str(held)}))
    assert (error.field, error.metadata["line"], error.metadata["value"]) == ("spec.eval_data", "3", "goood")
    assert "did you mean good?" in error.message
