"""Every method by every role, through the wire, in its own project and in another one; and without a token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor

from helpers.guarded import Guarded, guarded, metadata
from helpers.service import Failure, create, create_webhook, failure_of
from helpers.uploads import header
from shardyard.v1 import auth_service_pb2 as auth
from shardyard.v1 import checkpoint_service_pb2 as checkpoints
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import webhook_service_pb2 as webhooks
from shardyard_coordinator.serve.app import descriptors

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED
VIEWERS = {"viewer", "submitter", "operator", "admin"}
SUBMITTERS = {"submitter", "admin"}
AUDITORS = {"operator", "admin"}
ADMINS = {"admin"}
NOBODY: set[str] = set()
# The design's table, written down again: which roles may call which method in their own project.
MAY = {
    **dict.fromkeys(
        [
            "GetJob",
            "ListJobs",
            "WaitJob",
            "WatchJob",
            "ListAttempts",
            "TailLogs",
            "QueryMetrics",
            "WatchMetrics",
            "GetCheckpoint",
            "ListCheckpoints",
            "GetModel",
            "ListModels",
            "GetDataset",
            "ListDatasets",
            "ListEvents",
            "WatchEvents",
            "GetWebhook",
            "ListWebhooks",
            "ListDeliveries",
            "GetServerInfo",
        ],
        VIEWERS,
    ),
    **dict.fromkeys(
        [
            "CreateJob",
            "UpdateJob",
            "DeleteJob",
            "PlanJob",
            "CancelJob",
            "PauseJob",
            "ResumeJob",
            "BatchCreateJobs",
            "BatchCancelJobs",
            "CreateWebhook",
            "UpdateWebhook",
            "DeleteWebhook",
            "RotateWebhookSecret",
            "TestWebhook",
            "CreateModel",
            "DeleteModel",
            "DownloadModel",
            "Predict",
            "Embed",
            "ExplainPrediction",
            "ExportModel",
            "CopyModel",
            "RecommendModels",
            "CreateDataset",
            "DeleteDataset",
            "DownloadDataset",
        ],
        SUBMITTERS,
    ),
    "ListEntries": AUDITORS,
    **dict.fromkeys(["CreateRoleBinding", "ListRoleBindings", "DeleteRoleBinding"], ADMINS),
    # Of the whole service: a role in one project is not enough.
    **dict.fromkeys(["CreateToken", "ListTokens", "RevokeToken"], NOBODY),
    "GetIdentity": VIEWERS,
}
OURS = [method for service in descriptors() if service.full_name.startswith("shardyard.") for method in service.methods]
EVERYWHERE = {"GetServerInfo", "GetIdentity"}
"""They name no project."""


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path_factory.mktemp("methods")) as running:
        yield running


def a_request(method: MethodDescriptor, project: str) -> Any:
    """A request that passes every rule, about a thing of the project that is not there."""
    made: Any = message_factory.GetMessageClass(method.input_type)()
    parent = f"projects/{project}"
    kind = method.containing_service.name.removesuffix("Service").lower()
    fields = method.input_type.fields_by_name
    names = {"job": "jobs/none", "log": "jobs/none", "metric": "jobs/none", "checkpoint": "jobs/none"}
    name = f"{parent}/{names.get(kind, f'{kind}s/none')}"
    if method.client_streaming:
        made.header.CopyFrom(header("none", {"a": b"x"}))
        made.header.parent = parent
    elif method.name in ("CreateJob", "PlanJob"):
        made.CopyFrom(type(made)(parent=parent, job=create().job))
    elif isinstance(made, checkpoints.GetCheckpointRequest):
        made.name = f"{name}/checkpoints/e1-s1"
    elif "parent" in fields:
        made.parent = name if method.name in ("ListAttempts", "ListCheckpoints", "ListDeliveries") else parent
    for field in ("name", "model"):
        if field in fields and not getattr(made, field):
            setattr(made, field, name)
    if isinstance(made, jobs.UpdateJobRequest):
        made.job.CopyFrom(type(made.job)(name=name, display_name="a"))
    if isinstance(made, jobs.BatchCreateJobsRequest):
        made.requests.add(job=create().job, validate_only=True)
    if isinstance(made, jobs.BatchCancelJobsRequest):
        made.names.append(name)
    if isinstance(made, webhooks.CreateWebhookRequest):
        made.CopyFrom(create_webhook("none", parent))
    if isinstance(made, webhooks.UpdateWebhookRequest):
        made.webhook.CopyFrom(webhooks.Webhook(name=name, disabled=True))
        made.update_mask.paths.append("disabled")
    if "path" in fields:
        made.path = "a"
    if method.name in ("Predict", "Embed"):
        made.instances.add().text = "a"
    if method.name == "ExplainPrediction":
        made.instance.text = "a"
    if method.name == "ExportModel":
        made.format = 1
    if method.name == "CopyModel":
        made.uri = "s3://lake/models"
    if method.name == "RecommendModels":
        made.task = "text_classification"
    if method.name == "WaitJob":
        made.timeout.FromSeconds(0)
    if isinstance(made, auth.CreateTokenRequest):
        made.principal = "carol"
    if isinstance(made, auth.RevokeTokenRequest):
        made.name = "tokens/aaaaaaaaaaaa"
    if isinstance(made, auth.CreateRoleBindingRequest):
        made.member, made.role = "carol", auth.ROLE_VIEWER
    if isinstance(made, auth.DeleteRoleBindingRequest):
        made.name = f"{parent}/roleBindings/b-none"
    return made


async def answer(service: Guarded, method: MethodDescriptor, request: Any, token: str) -> Failure | None:
    """What a call fails with; None if it is answered."""
    channel, path = service.service.channel, f"/{method.containing_service.full_name}/{method.name}"
    reads = message_factory.GetMessageClass(method.output_type).FromString
    shape = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    stub = getattr(channel, shape)(
        path, request_serializer=type(request).SerializeToString, response_deserializer=reads
    )
    call = stub([request] if method.client_streaming else request, metadata=metadata(token), timeout=20)
    try:
        if method.server_streaming:
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.RpcError as error:
        return failure_of(error)
    return None


@pytest.mark.parametrize("role", ["viewer", "submitter", "operator", "admin"])
async def test_every_method_asks_for_its_role_in_the_project_that_it_names(service: Guarded, role: str) -> None:
    token = await service.member(f"the-{role}", role)
    wrong = []
    assert {method.name for method in OURS} == set(MAY)
    for method in OURS:
        for project in ("default", "other"):
            failure = await answer(service, method, a_request(method, project), token)
            is_denied = failure is not None and failure.code is DENIED
            may = role in MAY[method.name] and (project == "default" or method.name in EVERYWHERE)
            if is_denied == may:
                wrong.append(f"{method.name} in {project}: {failure}")
            if is_denied:
                assert failure is not None and failure.reason == "ACCESS_DENIED"
    assert wrong == []


async def test_without_a_token_only_health_and_reflection_answer(service: Guarded) -> None:
    for method in OURS:
        channel, path = service.service.channel, f"/{method.containing_service.full_name}/{method.name}"
        call = channel.stream_stream(path)([a_request(method, "default").SerializeToString()], timeout=20)
        try:
            await call.read()
        except grpc.RpcError as error:
            failure = failure_of(error)
        assert (failure.code, failure.reason) == (UNKNOWN, "CREDENTIALS_MISSING"), method.name
