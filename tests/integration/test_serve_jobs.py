"""JobService over a real server and store."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from helpers.scripted_compute import ScriptedCompute
from helpers.service import PARENT, Service, a_spec, create, refused, serving
from helpers.service import plan as take_as_it_is
from shardyard.v1 import job_pb2, server_service_pb2
from shardyard.v1 import job_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.tokens import Pages, Tokens


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    data = tmp_path / "data"
    data.mkdir()
    (data / "corpus.txt").write_text("to be or not to be\n" * 10)
    async with serving(tmp_path, data_roots=(str(data),)) as running:
        yield running


def a_job(service: Service, **changes: object) -> job_pb2.Job:
    return a_spec(**{"spec__train_data__uri": service.parts.data_roots[0] + "/corpus.txt", **changes})


async def test_a_job_is_accepted_and_read_back(service: Service) -> None:
    made = await service.jobs.CreateJob(create("first", a_job(service, display_name="mine")))
    assert made.name == f"{PARENT}/jobs/first" and made.state == job_pb2.STATE_QUEUED
    assert made.display_name == "mine" and made.last_event_sequence == 1 and len(made.uid) == 32
    assert made.resolved_spec.resources.workers == 1
    assert await service.jobs.GetJob(pb.GetJobRequest(name=made.name)) == made


async def test_an_id_is_made_from_the_task(service: Service) -> None:
    made = await service.jobs.CreateJob(create(job=a_job(service)))
    assert made.name.startswith(f"{PARENT}/jobs/causal-lm-")


async def test_a_hundred_calls_with_one_request_id_make_one_job(service: Service) -> None:
    request = create(job=a_job(service), request_id=str(uuid.uuid4()))
    made = await asyncio.gather(*(service.jobs.CreateJob(request) for _ in range(100)))
    assert len({job.uid for job in made}) == 1
    same = create(job=a_job(service), request_id=request.request_id.upper())
    assert (await service.jobs.CreateJob(same)).uid == made[0].uid
    listed = await service.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT))
    assert len(listed.jobs) == 1
    other = create(job=a_job(service, display_name="another"), request_id=request.request_id)
    failure = await refused(service.jobs.CreateJob(other))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")


async def all_pages(service: Service, size: int, **fields: object) -> list[str]:
    names: list[str] = []
    token = ""
    while True:
        page = await service.jobs.ListJobs(
            pb.ListJobsRequest(parent=PARENT, page_size=size, page_token=token, **fields)  # type: ignore[arg-type]
        )
        assert len(page.jobs) <= size
        names += [job.name.rsplit("/", 1)[1] for job in page.jobs]
        token = page.next_page_token
        if not token:
            return names


@pytest.fixture
async def ten(service: Service) -> Service:
    for at in range(10):
        changes = {"display_name": f"job {9 - at}", "priority": 1 + at % 4}
        request = create(f"j{at}", a_job(service, **changes))
        request.job.labels["team"] = "red" if at % 2 else "blue"
        await service.jobs.CreateJob(request)
        service.clock.advance(1)
    return service


@pytest.mark.parametrize("size", [1, 3, 10, 50])
async def test_pages_cover_every_job_once(ten: Service, size: int) -> None:
    assert await all_pages(ten, size) == [f"j{at}" for at in reversed(range(10))]
    assert await all_pages(ten, size, order_by="display_name") == [f"j{at}" for at in reversed(range(10))]
    assert await all_pages(ten, size, order_by="create_time") == [f"j{at}" for at in range(10)]
    by_priority = await all_pages(ten, size, order_by="priority desc")
    assert sorted(by_priority) == [f"j{at}" for at in range(10)]
    assert by_priority[:2] == ["j7", "j3"]


async def test_jobs_that_come_later_do_not_shift_pages(ten: Service) -> None:
    first = await ten.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, page_size=4))
    await ten.jobs.CreateJob(create("late", a_job(ten)))
    rest = await ten.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, page_size=100, page_token=first.next_page_token))
    assert [job.name.rsplit("/", 1)[1] for job in rest.jobs] == [f"j{at}" for at in reversed(range(6))]


@pytest.mark.parametrize(
    "changes",
    [{"filter": "state = QUEUED"}, {"order_by": "priority"}, {"parent": "projects/other"}, {"view": pb.JOB_VIEW_FULL}],
)
async def test_a_page_token_of_another_list_is_refused(ten: Service, changes: dict[str, object]) -> None:
    first = await ten.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, page_size=4))
    request = pb.ListJobsRequest(parent=PARENT, page_token=first.next_page_token)
    request.MergeFrom(pb.ListJobsRequest(**changes))  # type: ignore[arg-type]
    failure = await refused(ten.jobs.ListJobs(request))
    assert failure.reason == "PAGE_TOKEN_INVALID"
    other = await refused(
        ten.jobs.ListAttempts(pb.ListAttemptsRequest(parent=f"{PARENT}/jobs/j1", page_token=first.next_page_token))
    )
    assert other.reason == "PAGE_TOKEN_INVALID"


async def test_a_forged_page_token_is_refused(ten: Service) -> None:
    first = await ten.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, page_size=4))
    token = first.next_page_token
    for at in range(0, len(token), 5):
        forged = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
        failure = await refused(ten.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, page_token=forged)))
        assert failure.reason == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 10),
        ("state = QUEUED", 10),
        ("state = STATE_QUEUED", 10),
        ("state != queued", 0),
        ("labels.team = red", 5),
        ("labels.team : *", 10),
        ("labels.team != red AND priority >= normal", 2),
        ('display_name = "job 3"', 1),
        ("display_name : job", 10),
        ("display_name : 'job'", None),
        ("priority = critical", 2),
        ("priority > high", 2),
        ("task = causal_lm", 10),
        ("task : causal", 10),
        ("task = causal-lm", None),
        ("queue = queues/default", 10),
        ("create_time >= 2023-11-14T22:13:25Z", 5),
        ("end_time < 2100-01-01T00:00:00Z", 0),
        ("creator = local  AND  state = QUEUED", 10),
        ("state = QUEUED OR state = RUNNING", None),
        ("state > QUEUED", None),
        ("create_time > yesterday", None),
        ("state = QUEUED AND", None),
        ("AND state = QUEUED", None),
        ("uid = 1", None),
        ("labels. = x", None),
        (f"annotations.{'k' * 256} = x", 0),
        (f"annotations.{'k' * 257} = x", None),
        (" AND ".join(["state = QUEUED"] * 40), None),
    ],
)
async def test_filters_choose_jobs_or_say_what_is_wrong(ten: Service, text: str, expected: int | None) -> None:
    if expected is None:
        failure = await refused(ten.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, filter=text)))
        assert failure.reason == "FILTER_INVALID" and "column" in failure.metadata
    else:
        found = await all_pages(ten, 50, filter=text)
        assert len(found) == expected


async def test_a_list_shows_specs_only_when_asked(ten: Service) -> None:
    basic = await ten.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, page_size=1))
    full = await ten.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, page_size=1, view=pb.JOB_VIEW_FULL))
    assert not basic.jobs[0].HasField("spec") and full.jobs[0].spec.optimization.max_steps == 4


async def test_a_page_ends_at_a_mebibyte(service: Service) -> None:
    for at in range(30):
        request = create(f"j{at}", a_job(service))
        request.job.annotations["note"] = "x" * 60_000
        await service.jobs.CreateJob(request)
    page = await service.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, view=pb.JOB_VIEW_FULL))
    assert 10 < len(page.jobs) < 30 and page.ByteSize() < 1024 * 1024 + 1000
    assert len(await all_pages(service, 1000, view=pb.JOB_VIEW_FULL)) == 30


async def test_a_plan_is_made_once_and_kept(service: Service) -> None:
    for _ in range(3):
        await service.jobs.CreateJob(create(job=a_job(service)))
    plan = await service.jobs.PlanJob(pb.PlanJobRequest(parent=PARENT, job=a_job(service)))
    assert plan.total_steps == 4 and len(service.compute.calls) == 1
    Path(service.parts.data_roots[0], "corpus.txt").write_text("other\n")
    await service.jobs.CreateJob(create(job=a_job(service)))
    assert len(service.compute.calls) == 2


async def test_without_a_worker_nothing_is_accepted_but_what_is_known(service: Service) -> None:
    request = create("first", a_job(service), request_id=str(uuid.uuid4()))
    service.compute.available = False
    failure = await refused(service.jobs.CreateJob(request))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "INSPECTION_UNAVAILABLE")
    assert failure.retry_after_s
    assert not (await service.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT))).jobs
    service.compute.available = True
    made = await service.jobs.CreateJob(request)
    service.compute.available = False
    Path(service.parts.data_roots[0], "corpus.txt").unlink()
    assert (await service.jobs.CreateJob(request)).uid == made.uid


async def test_a_caller_in_a_hurry_ends_neither_the_worker_nor_the_question_of_others(service: Service) -> None:
    service.compute.answer_after(2.0)
    hurried = service.jobs.CreateJob(create("hurried", a_job(service)), timeout=1.5)
    patient = service.jobs.CreateJob(create("patient", a_job(service)), timeout=20)
    assert (await refused(hurried)).reason == "INSPECTION_UNAVAILABLE"
    assert (await patient).state == job_pb2.STATE_QUEUED
    assert service.compute.limits_s == [30.0]


async def test_what_is_only_tried_is_refused_as_it_would_be_for_good(service: Service) -> None:
    sent = create("first", a_job(service), request_id=str(uuid.uuid4()))
    tried = pb.CreateJobRequest()
    tried.CopyFrom(sent)
    tried.validate_only = True
    assert (await service.jobs.CreateJob(tried)).name == f"{PARENT}/jobs/first"
    assert not (await service.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT))).jobs
    await service.jobs.CreateJob(sent)
    assert (await service.jobs.CreateJob(tried)).name == f"{PARENT}/jobs/first"
    tried.job.display_name = "another"
    assert (await refused(service.jobs.CreateJob(tried))).reason == "REQUEST_ID_REUSED"
    tried.request_id = str(uuid.uuid4())
    assert (await refused(service.jobs.CreateJob(tried))).reason == "JOB_EXISTS"


@pytest.mark.parametrize(
    ("reasons", "code", "reason"),
    [
        (["DATA_INVALID"], grpc.StatusCode.INVALID_ARGUMENT, "DATA_INVALID"),
        (["DATA_INVALID", "OBJECTIVE_UNSUPPORTED"], grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"),
        (["DATA_INVALID", "HUB_UNREACHABLE"], grpc.StatusCode.UNAVAILABLE, "HUB_UNREACHABLE"),
        (["MODEL_NOT_FOUND"], grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        (["A_REASON_OF_TOMORROW"], grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"),
    ],
)
async def test_errors_that_the_planner_finds_are_reported(
    tmp_path: Path, reasons: list[str], code: grpc.StatusCode, reason: str
) -> None:
    def plan(_request: bytes) -> bytes:
        wrong = [
            worker_pb2.Violation(field=f"spec.f{at}", reason=each, message="a: b; c", metadata={"line": "7"})
            for at, each in enumerate(reasons)
        ]
        return worker_pb2.PlanResult(violations=wrong).SerializeToString()

    (tmp_path / "corpus.txt").write_text("x\n")
    answers = {"shardyard_trainer.planning.plan:plan": plan}
    async with serving(tmp_path, answers=answers, data_roots=(str(tmp_path),)) as service:
        failure = await refused(service.jobs.CreateJob(create(job=a_job(service))))
        assert (failure.code, failure.reason, failure.metadata["line"]) == (code, reason, "7")
        if code is not grpc.StatusCode.UNAVAILABLE:
            assert list(failure.violations) == [f"job.spec.f{at}" for at in range(len(reasons))]


async def test_warnings_of_the_plan_are_in_the_jobs_log_from_the_start(tmp_path: Path) -> None:
    def plan(request: bytes) -> bytes:
        result = worker_pb2.PlanResult.FromString(take_as_it_is(request))
        result.plan.warnings.add(reason="NEW_HEAD", message="a new one is started", field="spec.model.uri")
        return result.SerializeToString()

    (tmp_path / "corpus.txt").write_text("x\n")
    async with serving(
        tmp_path, answers={"shardyard_trainer.planning.plan:plan": plan}, data_roots=(str(tmp_path),)
    ) as service:
        made = await service.jobs.CreateJob(create("first", a_job(service)))
        assert made.last_event_sequence == 2
        await service.jobs.CancelJob(pb.CancelJobRequest(name=made.name))
        responses = [response async for response in service.jobs.WatchJob(pb.WatchJobRequest(name=made.name))]
        events = [event for response in responses for event in response.events]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert (events[1].warning.reason, events[1].warning.field) == ("NEW_HEAD", "spec.model.uri")


@pytest.mark.parametrize("character", ["x", "é", "中", "😀"])
@pytest.mark.parametrize("count", [1, 40])
async def test_a_long_refusal_in_any_script_reaches_the_caller(tmp_path: Path, character: str, count: int) -> None:
    def plan(_request: bytes) -> bytes:
        long = {"field": "spec.f", "reason": "DATA_INVALID", "message": character * 1000}
        wrong = [worker_pb2.Violation(**long, metadata={"file": character * 300, "value": character * 300})] * count
        return worker_pb2.PlanResult(violations=wrong).SerializeToString()

    (tmp_path / "corpus.txt").write_text("x\n")
    async with serving(
        tmp_path, answers={"shardyard_trainer.planning.plan:plan": plan}, data_roots=(str(tmp_path),)
    ) as service:
        failure = await refused(service.jobs.CreateJob(create(job=a_job(service))))
        assert failure.reason == "DATA_INVALID" and failure.metadata["violations_total"] == str(count)
        assert failure.violations["job.spec.f"].startswith(character * 100)


async def test_the_service_describes_itself(service: Service) -> None:
    info = await service.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    assert info.store_id == service.store.store_id and info.limits["max_message_bytes"] == 4 * 1024 * 1024
    assert info.cluster.state == server_service_pb2.ClusterInfo.STATE_CONNECTED
    assert (info.cluster.slots, info.cluster.nodes, info.cluster.launcher) == (8, 1, "scripted")


async def test_health_and_reflection_are_served(service: Service) -> None:
    stub = health_pb2_grpc.HealthStub(service.channel)
    request = health_pb2.HealthCheckRequest(service="shardyard.v1.JobService")
    assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    watching = stub.Watch(request)
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
    service.app.health.set_serving(False)
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    failure = await refused(stub.Check(health_pb2.HealthCheckRequest(service="nope")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "SERVICE_NOT_FOUND")
    info = reflection_pb2_grpc.ServerReflectionStub(service.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    names = [each.name for each in (await info.read()).list_services_response.service]
    assert "shardyard.v1.JobService" in names and "grpc.health.v1.Health" in names


async def test_calls_at_once_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_unary=0)) as service:
        failure = await refused(service.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT)))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert failure.retry_after_s


class SlowCompute(ScriptedCompute):
    async def _call(self, function: str, request: bytes, limit_s: float) -> bytes:
        await asyncio.sleep(60)
        raise AssertionError


async def test_a_call_that_takes_too_long_says_so(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x\n")
    slow = serving(tmp_path, limits=Limits(unary_timeout_s=0.05), compute=SlowCompute({}), data_roots=(str(tmp_path),))
    async with slow as service:
        failure = await refused(service.jobs.CreateJob(create(job=a_job(service))))
        assert (failure.code, failure.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


async def test_waiting_ends_when_the_service_does(service: Service) -> None:
    await service.jobs.CreateJob(create("first", a_job(service)))
    waiting = asyncio.ensure_future(service.jobs.WaitJob(pb.WaitJobRequest(name=f"{PARENT}/jobs/first")))
    await asyncio.sleep(0.05)
    await asyncio.wait_for(service.app.stop(10), 5)
    assert (await waiting).state == job_pb2.STATE_QUEUED


async def test_those_who_wait_hold_up_no_other_call(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x\n")
    async with serving(tmp_path, limits=Limits(max_unary=1), data_roots=(str(tmp_path),)) as service:
        made = await service.jobs.CreateJob(create("first", a_job(service)))
        waiting = [asyncio.ensure_future(service.jobs.WaitJob(pb.WaitJobRequest(name=made.name))) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert (await service.jobs.GetJob(pb.GetJobRequest(name=made.name))).uid == made.uid
        await service.jobs.CancelJob(pb.CancelJobRequest(name=made.name))
        assert {(await each).state for each in waiting} == {job_pb2.STATE_CANCELLED}


@pytest.mark.parametrize(("sizes", "expected"), [([400, 400, 400], 2), ([2000, 1], 1), ([1], 1), ([], 0)])
def test_every_page_ends_at_a_mebibyte_but_holds_one(sizes: list[int], expected: int) -> None:
    pages = Pages(Tokens(b"x"), "attempts", pb.ListAttemptsRequest(page_size=1000))
    page, token = pages.fill(
        sizes, lambda size: job_pb2.Attempt(failure=job_pb2.FailureReport(log_tail="x" * size * 1024)), lambda size: 1
    )
    assert (len(page), bool(token)) == (expected, expected < len(sizes))


async def test_a_call_without_a_message_affects_no_other_call(service: Service) -> None:
    path = "/shardyard.v1.JobService/GetJob"
    call = service.channel.stream_unary(path)(iter([]), timeout=2)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    assert raised.value.code() not in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL)
    assert (await service.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT))) is not None
