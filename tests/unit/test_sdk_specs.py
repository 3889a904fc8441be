"""Specs: typed, as plain data, as files; what is read, and every error message."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shardyard._parse import draft_job, duration_s
from shardyard._sources import Source, classify
from shardyard._sync.resources import Dataset, Model
from shardyard.errors import InvalidArgument
from shardyard.spec_sources import Adapter, Architecture, Pretrained, TensorflowCheckpoint
from shardyard.specfile import parse_spec
from shardyard.specs import (
    CausalLm,
    Checkpoints,
    Data,
    EvaluationPolicy,
    FeatureExtraction,
    JobSpec,
    MaskedLm,
    Optimization,
    Parallelism,
    Resources,
    Retry,
    TextClassification,
    TrainedTokenizer,
)
from shardyard.v1 import dataset_service_pb2, model_service_pb2, spec_pb2


def spec_of(spec: dict[str, Any] | JobSpec) -> spec_pb2.JobSpec:
    data = spec.to_dict() if isinstance(spec, JobSpec) else spec
    return draft_job({"job": {"spec": data}}, base=Path("/nowhere"), project="default").job.spec


def complaints(data: Any) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        draft_job(data, base=Path("/nowhere"), project="default")
    return {violation.field: violation.message for violation in caught.value.violations}


def test_a_typed_spec_fills_every_field() -> None:
    spec = spec_of(
        JobSpec(
            TextClassification(
                problem="multi_label",
                labels=("a", "b"),
                pooling="cls",
                label_smoothing=0.0,
                max_length=64,
                label_columns=["a", "c"],
            ),
            model=Pretrained("hub:owner/bert@v1", dropout=0.0),
            train_data=Data("server:/d", text="t", label="l", path="a.csv", format="csv", header=False, delimiter=";"),
            eval_data="dataset:d-1",
            tokenizer="model:tok",
            optimization=Optimization(
                epochs=2, global_batch_size=32, learning_rate=0.0, schedule="cosine", warmup_steps=0, seed=0, clip=0.0
            ),
            parallelism=Parallelism(zero_stage=0, compile=False),
            resources=Resources(workers=2),
            checkpoints=Checkpoints(every=5),
            evaluation=EvaluationPolicy(holdout=0.0),
            retry=Retry(max=0),
            max_run_time=timedelta(hours=2),
        )
    )
    task = spec.fine_tuning.text_classification
    assert task.problem == spec_pb2.TextClassification.PROBLEM_MULTI_LABEL
    assert (list(task.labels), task.pooling, task.HasField("label_smoothing")) == (["a", "b"], 2, True)
    assert (task.max_length, list(task.label_columns)) == (64, ["a", "c"])
    assert (spec.model.hub.id, spec.model.hub.revision, spec.model.HasField("dropout")) == ("owner/bert", "v1", True)
    assert (spec.train_data.uri, spec.train_data.delimiter, spec.train_data.HasField("header")) == ("/d", ";", True)
    assert dict(spec.train_data.columns) == {"text": "t", "label": "l"}
    assert spec.eval_data.dataset == "projects/default/datasets/d-1"
    assert spec.tokenizer.model == "projects/default/models/tok"
    assert spec.optimization.HasField("learning_rate") and spec.optimization.HasField("seed")
    assert spec.optimization.WhichOneof("warmup") == "warmup_steps"
    assert spec.parallelism.HasField("zero_stage") and spec.retry.HasField("max")
    assert spec.max_run_time.seconds == 7200


@pytest.mark.parametrize(
    ("task", "which"),
    [
        (CausalLm(), ("pretraining", "causal_lm")),
        (MaskedLm(sequence_length=128, whole_word=True), ("pretraining", "masked_lm")),
        (TextClassification(), ("fine_tuning", "text_classification")),
    ],
)
def test_an_empty_task_is_still_the_task(task: Any, which: tuple[str, str]) -> None:
    spec = spec_of(JobSpec(task))
    assert spec.WhichOneof("task") == which[0]
    inner = getattr(spec, which[0])
    assert inner.HasField(which[1])


def test_fresh_models_and_trained_tokenizers_are_typed_too() -> None:
    spec = spec_of(
        JobSpec(
            CausalLm(sequence_length=64),
            model=Architecture("gpt2", {"n_layer": 4, "tie": True}, dropout=0.0),
            tokenizer=TrainedTokenizer("characters"),
        )
    )
    assert spec.model.architecture.overrides["n_layer"] == 4
    assert spec.tokenizer.train.algorithm == spec_pb2.TrainedTokenizer.ALGORITHM_CHARACTERS


def test_a_checkpoint_is_a_path_on_the_server() -> None:
    made = spec_of(JobSpec(CausalLm(), model=TensorflowCheckpoint("/data/bert_model.ckpt", dropout=0.0)))
    assert made.model.checkpoint.uri == "/data/bert_model.ckpt" and made.model.dropout == 0.0
    for written in ("server:/data/model.ckpt", {"uri": "server:/data/model.ckpt"}, {"uri": "/data/model.ckpt"}):
        draft = draft_job({"job": {"spec": {"model": {"checkpoint": written}}}}, base=Path(), project="p")
        assert draft.job.spec.model.checkpoint.uri == "/data/model.ckpt" and not draft.uploads


def test_an_adapter_names_its_folder_and_its_base(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    made = spec_of(JobSpec(CausalLm(), model=Adapter("server:/lora", "hub:me/llama@v2", dropout=0.0))).model
    assert made.adapter.folder.uri == "/lora" and made.dropout == 0.0
    assert (made.adapter.base.hub.id, made.adapter.base.hub.revision) == ("me/llama", "v2")
    written = {"adapter": {"folder": "lora", "base": "model:mine"}}
    draft = draft_job({"job": {"spec": {"model": written}}}, base=tmp_path, project="p")
    (upload,) = draft.uploads
    assert (upload.field, upload.path, upload.collection) == (
        "job.spec.model.adapter.folder", tmp_path / "lora", "datasets",
    )  # fmt: skip
    assert draft.job.spec.model.adapter.base.model == "projects/p/models/mine"
    with pytest.raises(InvalidArgument, match="an adapter is named"):
        draft_job({"job": {"spec": {"model": {"adapter": {"folder": "model:x"}}}}}, base=tmp_path, project="p")


def test_feature_extraction_takes_data_as_a_string() -> None:
    spec = spec_of(JobSpec(FeatureExtraction("server:/texts.csv", output="last_hidden_state"), model="hub:bert"))
    assert spec.feature_extraction.data.uri == "/texts.csv"
    assert spec.feature_extraction.output == spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE


def test_models_and_data_sets_of_a_client_are_taken_themselves() -> None:
    connection: Any = None
    data = Dataset(connection, dataset_service_pb2.Dataset(name="projects/p/datasets/d"))
    model = Model(connection, model_service_pb2.Model(name="projects/p/models/m"))
    spec = spec_of(JobSpec(CausalLm(), model=model, train_data=data, eval_data=Data(data, text="t"), tokenizer=model))
    assert (spec.model.model, spec.tokenizer.model) == (model.name, model.name)
    assert (spec.train_data.dataset, spec.eval_data.dataset) == (data.name, data.name)
    dropped = spec_of(JobSpec(CausalLm(), model=Pretrained(model, dropout=0.0), train_data=data))
    assert dropped.model.model == model.name
    extracts = spec_of(JobSpec(FeatureExtraction(data), model=model))
    assert extracts.feature_extraction.data.dataset == data.name


def test_a_model_given_as_data_is_refused_with_the_names_that_are_meant() -> None:
    connection: Any = None
    model = Model(connection, model_service_pb2.Model(name="projects/p/models/m"))
    said = complaints({"job": {"spec": JobSpec(CausalLm(), model=model, train_data=model).to_dict()}})
    assert "projects/{project}/datasets/{id}" in said["job.spec.train_data"]


@pytest.mark.parametrize("value", ["mean", "MEAN", "POOLING_MEAN", "pooling_mean"])
def test_short_and_prefixed_enum_values_are_read(value: str) -> None:
    spec = spec_of({"fine_tuning": {"text_classification": {"pooling": value}}})
    assert spec.fine_tuning.text_classification.pooling == spec_pb2.POOLING_MEAN


def test_camel_case_names_are_read() -> None:
    spec = spec_of({"fineTuning": {"textClassification": {"maxLength": 64}}, "maxRunTime": "90s"})
    assert (spec.fine_tuning.text_classification.max_length, spec.max_run_time.seconds) == (64, 90)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2h", 7200), ("1h30m", 5400), ("1.5s", 1.5), ("250ms", 0.25), ("3d", 259200), (60, 60)],
)
def test_durations_are_read(text: Any, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["soon", "2 fortnights", "h2", "", "nan"])
def test_a_text_that_is_not_a_duration_is_refused(text: str) -> None:
    assert "not a duration" in complaints({"job": {"spec": {"max_run_time": text}}})["job.spec.max_run_time"]


@pytest.mark.parametrize(
    ("data", "field", "words"),
    [
        ({"job": {"spec": {"optimisation": {}}}}, "job.spec.optimisation", "did you mean `optimization`?"),
        ({"job": {"sepc": {}}}, "job.sepc", "did you mean `spec`?"),
        ({"spec": {}, "job": {}}, "spec", "write it under `job:`"),
        ({"nonsense": 1, "job": {}}, "nonsense", "there are job_id and job"),
        ({}, "job", "required"),
        ({"job": {"priority": "hgih"}}, "job.priority", "did you mean `high`?"),
        ({"job": {"labels": ["a"]}}, "job.labels", "names and values are needed"),
        (
            {"job": {"spec": {"train_data": {"uri": "server:/d", "columns": {"labels": ["a", "b"]}}}}},
            "job.spec.train_data.columns.labels",
            "text is wanted",
        ),
        ({"job": {"spec": 3}}, "job.spec", "is given, but fields are needed"),
        ({"job": {"create_time": "now"}}, "job.create_time", "set by the service"),
        ({"job": {"spec": {"optimization": {"max_steps": 1.5}}}}, "job.spec.optimization.max_steps", "whole number"),
        ({"job": {"spec": {"optimization": {"max_steps": True}}}}, "job.spec.optimization.max_steps", "whole number"),
        (
            {"job": {"spec": {"optimization": {"global_batch_size": 2**31}}}},
            "job.spec.optimization.global_batch_size",
            "2147483647",
        ),
        ({"job": {"spec": {"optimization": {"clip": "lots"}}}}, "job.spec.optimization.clip", "a number is wanted"),
        ({"job": {"spec": {"parallelism": {"compile": "perhaps"}}}}, "job.spec.parallelism.compile", "true or false"),
        (
            {"job": {"spec": {"fine_tuning": {"text_classification": {"labels": "a"}}}}},
            "job.spec.fine_tuning.text_classification.labels",
            "a list is needed",
        ),
        (
            {"job": {"spec": {"optimization": {"epochs": 1, "max_steps": 2}}}},
            "job.spec.optimization.max_steps",
            "`epochs` is given as well",
        ),
        ({"job": {"spec": {"pretraining": {}, "fine_tuning": {}}}}, "job.spec.fine_tuning", "exactly one"),
        (
            {"job": {"spec": {"model": {"checkpoint": "bert/model.ckpt"}}}},
            "job.spec.model.checkpoint",
            "an absolute path on the server is needed",
        ),
        (
            {"job": {"spec": {"model": {"architecture": {"overrides": 4}}}}},
            "job.spec.model.architecture.overrides",
            "names and values",
        ),
        ({"job": {"spec": {"optimization": {"max_steps": 10**310}}}}, "job.spec.optimization.max_steps", "to 922337"),
        ({"job": {"spec": {"optimization": {"clip": "9" * 310}}}}, "job.spec.optimization.clip", "at most 1.8e308"),
        ({"job": {"spec": {"max_run_time": 10**310}}}, "job.spec.max_run_time", "not a duration"),
        (
            {"job": {"spec": {"model": {"architecture": {"overrides": {"n_layer": 10**310}}}}}},
            "job.spec.model.architecture.overrides",
            "too large",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_field_and_the_rule(data: Any, field: str, words: str) -> None:
    assert words in complaints(data)[field]


def test_all_complaints_come_at_once() -> None:
    found = complaints({"job": {"priority": "x", "spec": {"optimization": {"clip": "x", "seeds": 1}, "retry": 1}}})
    assert sorted(found) == [
        "job.priority",
        "job.spec.optimization.clip",
        "job.spec.optimization.seeds",
        "job.spec.retry",
    ]


@pytest.mark.parametrize(
    ("kind", "text", "source"),
    [
        ("data", "server:/data/x", Source("uri", "/data/x")),
        ("model", "hub:owner/name@rev", Source("hub", "owner/name@rev")),
        ("model", "owner/name", Source("hub", "owner/name")),
        ("model", "model:m", Source("model", "projects/p/models/m")),
        ("model", "projects/o/models/m", Source("model", "projects/o/models/m")),
        ("data", "dataset:d", Source("dataset", "projects/p/datasets/d")),
        ("tokenizer", "dataset:d", Source("dataset", "projects/p/datasets/d")),
        ("data", "s3://lake/a", Source("uri", "s3://lake/a")),
        ("model", "s3://lake/bert/", Source("uri", "s3://lake/bert/")),
    ],
)
def test_a_string_means_a_source(kind: Any, text: str, source: Source) -> None:
    assert classify(kind, text, base=Path("/nowhere"), project="p") == source


def test_what_exists_here_wins_over_the_hub(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    assert classify("model", "bert", base=tmp_path, project="p") == Source("local", str(tmp_path / "bert"))


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("data", "revews.csv", "did you mean `reviews.csv`?"),
        ("data", "owner/name", "no such file or folder"),
        ("model", "./bert", "no such folder"),
        ("data", "server:relative", "an absolute path must follow"),
        ("model", "hub:a/b/c", "must follow `hub:`"),
        ("data", "projects/p/models/m", "a data is named"),
        ("model", "dataset:d", "a model is named"),
        ("data", "gs://bucket/x", "only files here"),
        ("data", "http://169.254.169.254/", "only files here"),
    ],
)
def test_a_string_that_means_nothing_says_why(kind: Any, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("a")
    found = classify(kind, text, base=tmp_path, project="p")
    assert isinstance(found, str) and words in found


SPEC = """\
job_id: mine
job:
  labels: {team: 007}
  spec:
    fine_tuning:
      text_classification:
        labels: [no, yes, 1]
    model: hub:bert
    optimization:
      learning_rate: 1e-4
      max_steps: 10
    max_run_time: 90s
"""


def test_yaml_scalars_are_read_by_the_type_of_their_field() -> None:
    draft = parse_spec(SPEC, Path("spec.yaml")).draft(project="default")
    spec = draft.job.spec
    assert draft.job_id == "mine"
    assert list(spec.fine_tuning.text_classification.labels) == ["no", "yes", "1"]
    assert spec.optimization.learning_rate == 1e-4
    assert dict(draft.job.labels) == {"team": "007"}


def test_a_column_without_a_name_is_one_not_given() -> None:
    data = {"uri": "server:/d", "columns": {"text": "t", "label": None}}
    assert dict(spec_of({"train_data": data}).train_data.columns) == {"text": "t"}


def test_a_complaint_names_the_line() -> None:
    text = SPEC.replace("learning_rate", "lerning_rate").replace("90s", "soon")
    with pytest.raises(InvalidArgument) as caught:
        parse_spec(text, Path("spec.yaml")).draft(project="default")
    assert [str(violation).rsplit(" ", 1)[1] for violation in caught.value.violations] == [
        "(spec.yaml:10)",
        "(spec.yaml:12)",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("job: [", "is not YAML"),
        ("- a", "must hold `job:`"),
        ("", "must hold `job:`"),
        ("job: !!python/object/apply:os.system ['true']", "means nothing here"),
        ("job: {spec: {}}\njob: {spec: {}}", "given twice"),
        ("job: {? [a] : b}", "a name is wanted"),
        ("job: " + "{a: " * 200 + "1" + "}" * 200, "too deeply nested"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\n"
            "d: &d [*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d]",
            "too large",
        ),
        ("job: {a: \x07}", "is not YAML"),
    ],
)
def test_a_file_of_another_form_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parse_spec(text, Path("spec.yaml")).draft(project="default")
