"""Who may what, through the wire: every method by every role, in its own project and in another one; whose jobs may be
changed; what a token's scopes take away; what ends when rights end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, message_factory
from google.protobuf.descriptor import MethodDescriptor

from helpers.guarded import Guarded, guarded, metadata
from helpers.service import PARENT, Failure, create, failure_of, refused
from helpers.uploads import header, messages, whole
from shardyard.v1 import audit_service_pb2 as audit
from shardyard.v1 import auth_service_pb2 as auth
from shardyard.v1 import checkpoint_service_pb2 as checkpoints
from shardyard.v1 import dataset_service_pb2 as datasets
from shardyard.v1 import job_pb2, server_service_pb2
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import webhook_service_pb2 as webhooks
from shardyard_coordinator.serve.app import descriptors
from shardyard_coordinator.serve.limits import Limits

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
    async with guarded(tmp_path_factory.mktemp("access"), limits=Limits(max_project_jobs=40)) as running:
        yield running


@pytest.fixture(scope="module")
async def alice(service: Guarded) -> str:
    """A submitter of `default`, whose data set and job others meet."""
    token = await service.member("alice", "submitter")
    files = {"a.txt": b"hello\n"}
    await service.service.datasets.CreateDataset(
        messages(header("corpus", files), *whole(files)), metadata=metadata(token)
    )
    await service.service.jobs.CreateJob(submission("story"), metadata=metadata(token))
    return token


def submission(job_id: str, project: str = "default", **fields: Any) -> jobs.CreateJobRequest:
    request = create(job_id, **fields)
    request.parent = f"projects/{project}"
    request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
    return request


def a_webhook(webhook_id: str, parent: str = PARENT) -> webhooks.CreateWebhookRequest:
    """A webhook that sends nothing: it is disabled."""
    wanted = webhooks.Webhook(url="https://93.184.216.34/hook", disabled=True)
    return webhooks.CreateWebhookRequest(parent=parent, webhook_id=webhook_id, webhook=wanted)


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
        made.CopyFrom(a_webhook("none", parent))
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


async def test_what_is_denied_is_denied_alike_whether_it_exists_or_not(service: Guarded, alice: str) -> None:
    stranger = await service.member("mallory", "submitter", "other")
    calls = service.service.jobs
    for method, kind in ((calls.GetJob, jobs.GetJobRequest), (calls.CancelJob, jobs.CancelJobRequest)):
        texts = set()
        for name in (f"{PARENT}/jobs/story", f"{PARENT}/jobs/none", "projects/nowhere/jobs/none"):
            failure = await refused(method(kind(name=name), metadata=metadata(stranger)))
            assert (failure.code, failure.reason) == (DENIED, "ACCESS_DENIED")
            texts.add(failure.message.replace("nowhere", "default"))
        assert len(texts) == 1
    # Who has no role at all learns nothing either, before a request is read.
    nobody = await service.token("nobody")
    failure = await refused(service.service.jobs.ListJobs(jobs.ListJobsRequest(parent="no"), metadata=metadata(nobody)))
    assert failure.code is DENIED


async def test_only_its_maker_and_admins_change_a_thing(service: Guarded, alice: str) -> None:
    bob, boss = await service.member("bob", "submitter"), await service.member("boss", "admin")
    calls, name = service.service.jobs, f"{PARENT}/jobs/own"
    await calls.CreateJob(submission("own"), metadata=metadata(alice))
    for method, request in (
        (calls.CancelJob, jobs.CancelJobRequest(name=name)),
        (calls.CancelJob, jobs.CancelJobRequest(name=name, lost=True)),
        (calls.PauseJob, jobs.PauseJobRequest(name=name)),
        (calls.ResumeJob, jobs.ResumeJobRequest(name=name)),
        (calls.UpdateJob, jobs.UpdateJobRequest(job=job_pb2.Job(name=name, display_name="mine"))),
        (calls.BatchCancelJobs, jobs.BatchCancelJobsRequest(parent=PARENT, names=[name])),
        (calls.DeleteJob, jobs.DeleteJobRequest(name=name)),
        (service.service.datasets.DeleteDataset, datasets.DeleteDatasetRequest(name=f"{PARENT}/datasets/corpus")),
    ):
        failure = await refused(method(request, metadata=metadata(bob)))
        assert (failure.code, failure.reason) == (DENIED, "ACCESS_DENIED")
        assert "was made by alice" in failure.message
    assert (await calls.PauseJob(jobs.PauseJobRequest(name=name), metadata=metadata(alice))).creator == "alice"
    await calls.CancelJob(jobs.CancelJobRequest(name=name), metadata=metadata(boss))
    await calls.DeleteJob(jobs.DeleteJobRequest(name=name), metadata=metadata(alice))


async def test_only_its_maker_and_admins_change_a_webhook_and_each_change_is_recorded(
    service: Guarded, alice: str
) -> None:
    bob, calls, name = await service.member("bob", "submitter"), service.service.webhooks, f"{PARENT}/webhooks/hook"
    assert (await calls.CreateWebhook(a_webhook("hook"), metadata=metadata(alice))).secret
    change = webhooks.UpdateWebhookRequest(webhook=webhooks.Webhook(name=name, disabled=True))
    change.update_mask.paths.append("disabled")
    changes = (
        (calls.UpdateWebhook, change),
        (calls.RotateWebhookSecret, webhooks.RotateWebhookSecretRequest(name=name)),
        (calls.DeleteWebhook, webhooks.DeleteWebhookRequest(name=name)),
    )
    for method, request in (*changes, (calls.TestWebhook, webhooks.TestWebhookRequest(name=name))):
        failure = await refused(method(request, metadata=metadata(bob)))
        assert (failure.code, failure.reason) == (DENIED, "ACCESS_DENIED")
        assert "was made by alice" in failure.message
    assert not (await calls.GetWebhook(webhooks.GetWebhookRequest(name=name), metadata=metadata(bob))).secret
    for method, request in changes:
        await method(request, metadata=metadata(alice))
    listing = audit.ListEntriesRequest(parent=PARENT, resource=name)
    entries = (await service.service.audit.ListEntries(listing, metadata=metadata(service.admin))).entries
    made = [each.method.rpartition("/")[2] for each in entries if each.principal == "alice"]
    assert made == ["DeleteWebhook", "RotateWebhookSecret", "UpdateWebhook", "CreateWebhook"]


async def test_another_one_cannot_go_on_with_an_upload(service: Guarded, alice: str) -> None:
    bob = await service.member("bob", "submitter")
    call = service.service.datasets.CreateDataset(metadata=metadata(alice))
    top = header("shared", {"a": b"xy"})
    await call.write(datasets.CreateDatasetRequest(header=top))
    await call.write(datasets.CreateDatasetRequest(chunk=whole({"a": b"x"})[0]))
    await call.done_writing()
    with pytest.raises(grpc.RpcError):
        await call
    mine = messages(top, *whole({"a": b"xy"}))
    failure = await refused(service.service.datasets.CreateDataset(mine, metadata=metadata(bob)))
    assert failure.reason == "DATASET_EXISTS"


async def test_a_job_cannot_read_what_its_submitter_may_not(service: Guarded, alice: str) -> None:
    outsider = await service.member("outsider", "submitter", "other")
    request = submission("thief", "other")
    failure = await refused(service.service.jobs.CreateJob(request, metadata=metadata(outsider)))
    assert (failure.code, failure.reason) == (DENIED, "ACCESS_DENIED")
    assert list(failure.violations) == ["job.spec.train_data.dataset"]
    # Looking is not reading: what may be seen may not be trained on.
    await service.grant("outsider", "viewer")
    assert (await refused(service.service.jobs.CreateJob(request, metadata=metadata(outsider)))).code is DENIED
    await service.grant("outsider", "submitter")
    made = await service.service.jobs.CreateJob(request, metadata=metadata(outsider))
    assert made.creator == "outsider"


async def test_scopes_narrow_a_token_and_never_widen_it(service: Guarded, alice: str) -> None:
    reads = await service.token("alice", scopes=[auth.Grant(role=auth.ROLE_VIEWER)])
    elsewhere = await service.token("alice", scopes=[auth.Grant(role=auth.ROLE_SUBMITTER, project="projects/other")])
    wide = await service.token("alice", scopes=[auth.Grant(role=auth.ROLE_ADMIN)])
    calls, listed = service.service.jobs, jobs.ListJobsRequest(parent=PARENT)
    assert (await calls.ListJobs(listed, metadata=metadata(reads))).jobs
    assert (await refused(calls.CreateJob(submission("no"), metadata=metadata(reads)))).code is DENIED
    assert (await refused(calls.ListJobs(listed, metadata=metadata(elsewhere)))).code is DENIED
    narrowed = await service.token("admin", scopes=[auth.Grant(role=auth.ROLE_OPERATOR)])
    more = auth.CreateTokenRequest(principal="admin")
    assert (await refused(service.service.auth.CreateToken(more, metadata=metadata(narrowed)))).code is DENIED
    granting = auth.CreateRoleBindingRequest(parent=PARENT, member="alice", role=auth.ROLE_ADMIN)
    assert (await refused(service.service.auth.CreateRoleBinding(granting, metadata=metadata(wide)))).code is DENIED
    who = await service.service.auth.GetIdentity(auth.GetIdentityRequest(), metadata=metadata(reads))
    assert [(each.role, each.project) for each in who.scopes] == [(auth.ROLE_VIEWER, "projects/-")]
    assert [(each.role, each.project) for each in who.roles] == [(auth.ROLE_SUBMITTER, PARENT)]


async def test_an_admin_of_a_project_gives_roles_there_and_nowhere_else(service: Guarded) -> None:
    boss = await service.member("boss", "admin")
    calls = service.service.auth

    def given(project: str) -> auth.CreateRoleBindingRequest:
        return auth.CreateRoleBindingRequest(parent=f"projects/{project}", member="dave", role=auth.ROLE_VIEWER)

    made = await calls.CreateRoleBinding(given("default"), metadata=metadata(boss))
    assert (await calls.CreateRoleBinding(given("default"), metadata=metadata(boss))).name == made.name
    for project in ("other", "-"):
        assert (await refused(calls.CreateRoleBinding(given(project), metadata=metadata(boss)))).code is DENIED
    await service.grant("erin", "viewer", "other")
    seen = await calls.ListRoleBindings(auth.ListRoleBindingsRequest(parent="projects/-"), metadata=metadata(boss))
    assert {binding.name.split("/")[1] for binding in seen.role_bindings} == {"default"}
    await calls.DeleteRoleBinding(auth.DeleteRoleBindingRequest(name=made.name), metadata=metadata(boss))
    again = auth.DeleteRoleBindingRequest(name=made.name)
    assert (await refused(calls.DeleteRoleBinding(again, metadata=metadata(boss)))).reason == "ROLE_BINDING_NOT_FOUND"


async def test_a_watch_ends_when_its_token_or_its_role_does_and_others_go_on(service: Guarded, alice: str) -> None:
    revoked, withdrawn = [await service.member(name, "viewer") for name in ("eve", "frank")]
    short = await service.token("alice", ttl=duration_pb2.Duration(seconds=100))
    story = jobs.WatchJobRequest(name=f"{PARENT}/jobs/story")
    watching = {
        token: service.service.jobs.WatchJob(story, metadata=metadata(token))
        for token in (revoked, withdrawn, short, alice)
    }
    for call in watching.values():
        await asyncio.wait_for(call.read(), 20)
    listed = await service.service.auth.ListTokens(auth.ListTokensRequest(), metadata=metadata(service.admin))
    [name] = [token.name for token in listed.tokens if token.principal == "eve"]
    await service.service.auth.RevokeToken(auth.RevokeTokenRequest(name=name), metadata=metadata(service.admin))
    binding = await service.grant("frank", "viewer")
    await service.service.auth.DeleteRoleBinding(
        auth.DeleteRoleBindingRequest(name=binding.name), metadata=metadata(service.admin)
    )
    service.service.clock.advance(101)
    ends = {
        revoked: (UNKNOWN, "CREDENTIALS_EXPIRED"),
        short: (UNKNOWN, "CREDENTIALS_EXPIRED"),
        withdrawn: (DENIED, "ACCESS_DENIED"),
    }
    for token, end in ends.items():
        failure = await refused(asyncio.wait_for(_to_its_end(watching[token]), 20))
        assert (failure.code, failure.reason) == end
    assert await asyncio.wait_for(watching[alice].read(), 20) is not grpc.aio.EOF  # Its heartbeat.
    watching[alice].cancel()
    listing = jobs.ListJobsRequest(parent=PARENT)
    failure = await refused(service.service.jobs.ListJobs(listing, metadata=metadata(revoked)))
    assert failure.reason == "CREDENTIALS_EXPIRED" and "revoked" in failure.message


async def _to_its_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_project_has_so_many_jobs_and_a_caller_so_many_submits(service: Guarded, alice: str) -> None:
    filler = await service.member("filler", "submitter", "other")
    await service.grant("filler", "submitter")
    accepted = 0
    while True:
        request = submission(f"f{accepted}", "other", request_id=f"6f1c1c4e-9d1b-4a53-9d3e-2f4c8f1f{accepted:04x}")
        try:
            await service.service.jobs.CreateJob(request, metadata=metadata(filler))
        except grpc.RpcError as error:
            failure = failure_of(error)
            break
        accepted += 1
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert 30 < accepted <= 40
    batch = jobs.BatchCreateJobsRequest(parent="projects/other", requests=[submission("g0", "other")])
    failure = await refused(service.service.jobs.BatchCreateJobs(batch, metadata=metadata(filler)))
    assert failure.reason == "QUOTA_EXCEEDED" and list(failure.violations) == ["requests[0]"]
    retried = submission("f0", "other", request_id="6f1c1c4e-9d1b-4a53-9d3e-2f4c8f1f0000")
    assert (await service.service.jobs.CreateJob(retried, metadata=metadata(filler))).name.endswith("/f0")
    reasons = []
    for _ in range(250):
        request.request_id = ""
        reasons.append((await refused(service.service.jobs.CreateJob(request, metadata=metadata(filler)))).reason)
    assert reasons[-1] == "RATE_LIMITED" and "QUOTA_EXCEEDED" in reasons
    await service.service.jobs.CreateJob(submission("mine"), metadata=metadata(alice))


async def test_the_service_is_described_to_whoever_has_a_role(service: Guarded, alice: str) -> None:
    request = server_service_pb2.GetServerInfoRequest()
    info = await service.service.server.GetServerInfo(request, metadata=metadata(alice))
    assert info.limits["max_project_jobs"] == 40 and not info.warnings
