"""Who may what, through the wire: whose jobs may be changed; what a token's scopes take away; what ends with rights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from helpers.guarded import Guarded, guarded, metadata
from helpers.service import PARENT, create, create_webhook, failure_of, refused
from helpers.uploads import header, messages, whole
from shardyard.v1 import audit_service_pb2 as audit
from shardyard.v1 import auth_service_pb2 as auth
from shardyard.v1 import dataset_service_pb2 as datasets
from shardyard.v1 import job_pb2, server_service_pb2
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import webhook_service_pb2 as webhooks
from shardyard_coordinator.serve.limits import Limits

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED


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
    assert (await calls.CreateWebhook(create_webhook("hook"), metadata=metadata(alice))).secret
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
