"""What each request names: the resource or the project that it is about."""

from __future__ import annotations

from operator import attrgetter
from typing import Final

from google.protobuf.message import Message

NAMES: Final[dict[str, tuple[str, str]]] = {
    "CreateJobRequest": ("parent", "project"),
    "GetJobRequest": ("name", "job"),
    "ListJobsRequest": ("parent", "project"),
    "UpdateJobRequest": ("job.name", "job"),
    "DeleteJobRequest": ("name", "job"),
    "PlanJobRequest": ("parent", "project"),
    "WaitJobRequest": ("name", "job"),
    "CancelJobRequest": ("name", "job"),
    "PauseJobRequest": ("name", "job"),
    "ResumeJobRequest": ("name", "job"),
    "WatchJobRequest": ("name", "job"),
    "BatchCreateJobsRequest": ("parent", "project"),
    "BatchCancelJobsRequest": ("parent", "project"),
    "ListAttemptsRequest": ("parent", "job"),
    "ListEventsRequest": ("parent", "project"),
    "WatchEventsRequest": ("parent", "project"),
    "CreateWebhookRequest": ("parent", "project"),
    "GetWebhookRequest": ("name", "webhook"),
    "ListWebhooksRequest": ("parent", "project"),
    "UpdateWebhookRequest": ("webhook.name", "webhook"),
    "DeleteWebhookRequest": ("name", "webhook"),
    "RotateWebhookSecretRequest": ("name", "webhook"),
    "TestWebhookRequest": ("name", "webhook"),
    "ListDeliveriesRequest": ("parent", "webhook"),
    "TailLogsRequest": ("name", "job"),
    "QueryMetricsRequest": ("name", "job"),
    "WatchMetricsRequest": ("name", "job"),
    "GetCheckpointRequest": ("name", "checkpoint"),
    "ListCheckpointsRequest": ("parent", "job"),
    "GetModelRequest": ("name", "model"),
    "ListModelsRequest": ("parent", "project"),
    "DeleteModelRequest": ("name", "model"),
    "DownloadModelRequest": ("name", "model"),
    "PredictRequest": ("model", "model"),
    "EmbedRequest": ("model", "model"),
    "ExplainPredictionRequest": ("model", "model"),
    "ExportModelRequest": ("model", "model"),
    "CopyModelRequest": ("name", "model"),
    "RecommendModelsRequest": ("parent", "project"),
    "GetDatasetRequest": ("name", "dataset"),
    "ListDatasetsRequest": ("parent", "project"),
    "DeleteDatasetRequest": ("name", "dataset"),
    "DownloadDatasetRequest": ("name", "dataset"),
    "RevokeTokenRequest": ("name", "token"),
    "CreateRoleBindingRequest": ("parent", "any_project"),
    "ListRoleBindingsRequest": ("parent", "any_project"),
    "DeleteRoleBindingRequest": ("name", "binding"),
    "ListEntriesRequest": ("parent", "any_project"),
}
"""Which field of each request holds which kind of name; `job.name` is the name in its job."""

_UPLOADS: Final = {"CreateModelRequest": "models", "CreateDatasetRequest": "datasets"}


def resource_of(request: Message) -> str:
    """The name in a request, which says the project that the caller needs a right in; empty if it names none.

    Of an upload it is in the header, and the chunks after it name nothing.
    """
    kind = request.DESCRIPTOR.name
    if not request.DESCRIPTOR.full_name.startswith("shardyard.v1."):
        return ""
    if kind in _UPLOADS:
        header = getattr(request, "header")  # noqa: B009 - A field of both messages.
        return f"{header.parent}/{_UPLOADS[kind]}/{header.resource_id}" if header.parent else ""
    return named(request, NAMES[kind][0]) if kind in NAMES else ""


def named(request: Message, field: str) -> str:
    """The name in a field of NAMES."""
    return str(attrgetter(field)(request))
