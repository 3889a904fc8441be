"""What `import shardyard` offers, and what it costs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from google.protobuf.message import Message

import shardyard
from helpers.command import modules_after
from shardyard import types
from shardyard._parse import draft_job
from shardyard._requests import PredictParameters
from shardyard.cli import flags
from shardyard.cli.asking import predict
from shardyard.specs import Task
from shardyard.task_paths import task_paths
from shardyard.v1 import (
    audit_service_pb2,
    auth_service_pb2,
    checkpoint_service_pb2,
    choosing_pb2,
    dataset_service_pb2,
    event_service_pb2,
    explanation_pb2,
    job_pb2,
    log_service_pb2,
    metric_service_pb2,
    model_service_pb2,
    plan_pb2,
    server_service_pb2,
    spec_pb2,
    transfer_pb2,
    webhook_service_pb2,
)

ROOT = Path(__file__).resolve().parents[2]

NAMES = [
    "Aborted",
    "Access",
    "Adapter",
    "AlreadyExists",
    "Answer",
    "Architecture",
    "AsyncAccess",
    "AsyncClient",
    "AsyncDataset",
    "AsyncJob",
    "AsyncModel",
    "AsyncWebhook",
    "Cancelled",
    "CausalLm",
    "Checkpoints",
    "Client",
    "Data",
    "DataLoss",
    "Dataset",
    "DeadlineExceeded",
    "Delivery",
    "Distillation",
    "EarlyStopping",
    "Embedding",
    "Entity",
    "EvaluationPolicy",
    "Event",
    "Explanation",
    "ExportPolicy",
    "FailedPrecondition",
    "FeatureExtraction",
    "Freeze",
    "Image",
    "ImageClassification",
    "Instruction",
    "Internal",
    "InvalidArgument",
    "Items",
    "Job",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobInfo",
    "JobSpec",
    "Lora",
    "MaskedImage",
    "MaskedItem",
    "MaskedLm",
    "Model",
    "ModelCopy",
    "ModelEvaluation",
    "ModelExport",
    "ModelRecommendation",
    "NotFound",
    "Optimization",
    "OutOfRange",
    "Parallelism",
    "PermissionDenied",
    "Plan",
    "Prediction",
    "Preference",
    "Pretrained",
    "ProjectEvent",
    "Question",
    "QuestionAnswering",
    "RankedItem",
    "Recommendation",
    "RecommendedModels",
    "RequestError",
    "Reranking",
    "ResourceExhausted",
    "Resources",
    "Retry",
    "SentenceEmbedding",
    "ShardyardError",
    "SpanCorruption",
    "Summarization",
    "Tag",
    "TensorflowCheckpoint",
    "TextClassification",
    "TokenClassification",
    "TorchHub",
    "TrainedTokenizer",
    "Translation",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Violation",
    "Webhook",
    "WebhookInfo",
    "Words",
    "read_webhook",
]

MIRRORED: dict[type, type[Message]] = {
    types.Progress: job_pb2.Progress,
    types.Evaluation: job_pb2.Evaluation,
    types.Condition: job_pb2.Condition,
    types.PendingInfo: job_pb2.PendingInfo,
    types.FailureReport: job_pb2.FailureReport,
    types.ResourceUsage: job_pb2.ResourceUsage,
    types.JobInfo: job_pb2.Job,
    types.Attempt: job_pb2.Attempt,
    types.Checkpoint: checkpoint_service_pb2.Checkpoint,
    types.StateChanged: job_pb2.StateChanged,
    types.CheckpointChanged: job_pb2.CheckpointChanged,
    types.Warning: job_pb2.Warning,
    types.ModelRegistered: job_pb2.ModelRegistered,
    types.DatasetRegistered: job_pb2.DatasetRegistered,
    types.PhaseStarted: job_pb2.PhaseStarted,
    types.CanaryPassed: job_pb2.CanaryPassed,
    types.JobDeleted: job_pb2.JobDeleted,
    types.JobUpdated: job_pb2.JobUpdated,
    types.ProjectEvent: event_service_pb2.ProjectEvent,
    types.WebhookInfo: webhook_service_pb2.Webhook,
    types.Delivery: webhook_service_pb2.Delivery,
    types.BatchPlan: plan_pb2.BatchPlan,
    types.MemoryPlan: plan_pb2.MemoryPlan,
    types.Plan: plan_pb2.JobPlan,
    types.RecommendedModels: choosing_pb2.RecommendModelsResponse,
    types.ModelRecommendation: choosing_pb2.ModelRecommendation,
    types.PublishedScore: choosing_pb2.PublishedScore,
    types.RankingPoints: choosing_pb2.RankingPoints,
    types.LeftOut: choosing_pb2.LeftOut,
    types.ChoosingAssumptions: choosing_pb2.ChoosingAssumptions,
    types.LogLine: log_service_pb2.LogLine,
    types.MetricPoint: metric_service_pb2.MetricPoint,
    types.MetricSeries: metric_service_pb2.MetricSeries,
    types.StoredFile: transfer_pb2.StoredFile,
    types.ModelInfo: model_service_pb2.Model,
    types.ExportedFormat: model_service_pb2.ModelExport,
    types.DatasetInfo: dataset_service_pb2.Dataset,
    types.ClusterInfo: server_service_pb2.ClusterInfo,
    types.StorageInfo: server_service_pb2.StorageInfo,
    types.ServerInfo: server_service_pb2.ServerInfo,
    types.Grant: auth_service_pb2.Grant,
    types.Identity: auth_service_pb2.Identity,
    types.Token: auth_service_pb2.Token,
    types.RoleBinding: auth_service_pb2.RoleBinding,
    types.AuditEntry: audit_service_pb2.AuditEntry,
    types.TokenCandidate: model_service_pb2.TokenCandidate,
    types.Embedding: model_service_pb2.Embedding,
    types.Attribution: explanation_pb2.Attribution,
    types.Regions: explanation_pb2.Regions,
    types.Explanation: model_service_pb2.Explanation,
    shardyard.CausalLm: spec_pb2.CausalLm,
    shardyard.MaskedLm: spec_pb2.MaskedLm,
    shardyard.MaskedImage: spec_pb2.MaskedImage,
    shardyard.MaskedItem: spec_pb2.MaskedItem,
    shardyard.TextClassification: spec_pb2.TextClassification,
    shardyard.TokenClassification: spec_pb2.TokenClassification,
    shardyard.Recommendation: spec_pb2.Recommendation,
    shardyard.QuestionAnswering: spec_pb2.QuestionAnswering,
    shardyard.Answer: model_service_pb2.Answer,
    types.AnswerCandidate: model_service_pb2.AnswerCandidate,
    shardyard.RankedItem: model_service_pb2.RankedItem,
    shardyard.ImageClassification: spec_pb2.ImageClassification,
    shardyard.Instruction: spec_pb2.Instruction,
    shardyard.Preference: spec_pb2.Preference,
    shardyard.SentenceEmbedding: spec_pb2.SentenceEmbedding,
    shardyard.Reranking: spec_pb2.Reranking,
    shardyard.FeatureExtraction: spec_pb2.FeatureExtraction,
    shardyard.ModelEvaluation: spec_pb2.ModelEvaluation,
    shardyard.ModelExport: spec_pb2.FormatExport,
    shardyard.ModelCopy: spec_pb2.ModelCopy,
    shardyard.SpanCorruption: spec_pb2.SpanCorruption,
    shardyard.Summarization: spec_pb2.Summarization,
    shardyard.Translation: spec_pb2.Translation,
    shardyard.TrainedTokenizer: spec_pb2.TrainedTokenizer,
    shardyard.Optimization: spec_pb2.Optimization,
    shardyard.Parallelism: spec_pb2.Parallelism,
    shardyard.Checkpoints: spec_pb2.CheckpointPolicy,
    shardyard.EvaluationPolicy: spec_pb2.EvaluationPolicy,
    shardyard.ExportPolicy: spec_pb2.ExportPolicy,
    shardyard.Lora: spec_pb2.Lora,
    shardyard.Freeze: spec_pb2.Freeze,
    shardyard.EarlyStopping: spec_pb2.EarlyStopping,
    types.EvaluationMetric: plan_pb2.EvaluationMetric,
    shardyard.Retry: spec_pb2.RetryPolicy,
    shardyard.Resources: spec_pb2.Resources,
}


def test_the_public_names_are_these() -> None:
    assert sorted(shardyard.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_can_be_had_and_is_explained(name: str) -> None:
    value = getattr(shardyard, name)
    assert value.__doc__ and value.__name__ == name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = shardyard.Nope


@pytest.mark.parametrize(("kind", "message"), MIRRORED.items(), ids=lambda value: value.__name__)
def test_a_dataclass_has_every_field_of_its_message(kind: type, message: type[Message]) -> None:
    ours = {field.name.replace("from_state", "from") for field in dataclasses.fields(kind)}
    assert ours == set(message.DESCRIPTOR.fields_by_name)


def test_every_task_of_the_contract_has_a_class_and_a_flag() -> None:
    wanted = list(task_paths())
    assert ("pretraining", "masked_lm") in wanted and ("feature_extraction",) in wanted
    assert sorted(flags.TASKS) == sorted(path[-1].replace("_", "-") for path in wanted)
    for kind in get_args(Task):
        needed = {"data": "server:/d", "uri": "s3://lake/models"}
        made = kind(*(needed[field.name] for field in dataclasses.fields(kind) if field.name in needed))
        spec = draft_job({"job": {"spec": shardyard.JobSpec(made).to_dict()}}, base=ROOT, project="p").job.spec
        (path,) = [path for path in wanted if path[-1].replace("_", "").casefold() == kind.__name__.casefold()]
        for name in path:
            assert spec.HasField(name)
            spec = getattr(spec, name)
        assert isinstance(spec, MIRRORED[kind])


def test_every_output_and_parameter_of_a_prediction_can_be_had() -> None:
    ours = {field.name.replace("text", "generated_text") for field in dataclasses.fields(types.Prediction)}
    for field in model_service_pb2.Prediction.DESCRIPTOR.oneofs_by_name["output"].fields:
        is_flat = field.message_type and field.name not in ours
        assert ours >= (set(field.message_type.fields_by_name) if is_flat else {field.name})
    oneof = model_service_pb2.PredictRequest.DESCRIPTOR.oneofs_by_name["parameters"]
    wanted = {name for member in oneof.fields for name in member.message_type.fields_by_name}
    assert set(PredictParameters.__annotations__) == wanted <= {*inspect.signature(predict).parameters}


def test_every_kind_of_event_is_read() -> None:
    from shardyard._convert import read_event

    for field in job_pb2.JobEvent.DESCRIPTOR.oneofs_by_name["payload"].fields:
        event = job_pb2.JobEvent(sequence=1)
        getattr(event, field.name).SetInParent()
        made = read_event(event)
        assert made.kind == field.name and made.data is not None
        assert str(made).strip()


def test_every_name_is_also_there_for_type_checkers() -> None:
    tree = ast.parse(Path(shardyard.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(imported) == NAMES


def test_importing_the_package_or_its_messages_brings_no_grpc() -> None:
    assert "grpc" not in modules_after("import shardyard")
    assert "grpc" not in modules_after("from shardyard.v1 import job_pb2")


def test_the_client_brings_nothing_of_the_service_or_of_training() -> None:
    found = modules_after("import shardyard; shardyard.Client; shardyard.AsyncClient")
    assert not found & {"torch", "ray", "sqlalchemy", "typer", "rich", "yaml", "shardyard_coordinator"}


def test_the_help_text_waits_for_none_of_the_heavy_packages() -> None:
    code = "import sys; from shardyard.cli.app import run; run(['--help'])"
    assert not modules_after(code) & {"grpc", "torch", "ray", "google.protobuf"}


def test_the_sync_twin_is_what_the_async_source_gives() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "client/generate_sync.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
