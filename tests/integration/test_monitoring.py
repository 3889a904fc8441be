"""A service as its operator sees it: metrics, log lines and traces of a job that ran, and what strangers send."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from helpers.service import PARENT
from helpers.stores import SQLITE, kind
from helpers.watched import CALLER, PRIVATE, TOKEN, TRACE, Watched, watched
from shardyard.v1 import job_service_pb2
from shardyard_coordinator.monitoring.admin import MAX_CONNECTIONS
from shardyard_coordinator.monitoring.families import FAMILIES, STORE_BYTES, Kind

NEEDS_GPUS = {"shardyard_gpu_utilization_ratio", "shardyard_gpu_memory_used_bytes", "shardyard_gpu_memory_bytes"}
WATCH, HEALTH = "shardyard.v1.JobService/WatchJob", "grpc.health.v1.Health/Watch"


@pytest_asyncio.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    async with watched(tmp_path_factory.mktemp("watched")) as made:
        yield made


async def test_the_job_is_counted_from_its_call_to_its_end(service: Watched) -> None:
    found = await service.samples()
    assert found["shardyard_jobs", ("SUCCEEDED",)] == 1 and found["shardyard_jobs", ("QUEUED",)] == 0
    assert found["shardyard_jobs_created_total", ()] == found["shardyard_jobs_ended_total", ("SUCCEEDED",)] == 1
    assert found["shardyard_jobs_ended_total", ("FAILED",)] == found["shardyard_refusals_total", ("INTERNAL",)] == 0
    assert found["shardyard_attempts_ended_total", ("none",)] == 1 and found["shardyard_attempts_live", ()] == 0
    assert found["shardyard_grpc_calls_total", ("shardyard.v1.JobService/CreateJob", "OK")] == 1
    assert found["shardyard_grpc_call_duration_seconds_count", ("shardyard.v1.JobService/CreateJob",)] == 1
    for state in ("QUEUED", "PREPARING", "RUNNING", "FINALIZING"):
        assert found["shardyard_job_state_seconds_count", (state,)] == 1
        assert 0 <= found["shardyard_job_state_seconds_sum", (state,)] < 300
    assert found["shardyard_events_total", ("STATE",)] == 5
    assert found["shardyard_writer_operations_total", ()] >= found["shardyard_writer_commits_total", ()] > 3
    assert found["shardyard_resources", ("models",)] == 1 and found["shardyard_queue_oldest_seconds", ()] == 0
    assert found["shardyard_storage_available", ()] == found["shardyard_cluster_connected", ()] == 1
    assert found["shardyard_slots", ()] == found["shardyard_slots_free", ()] == 8
    assert found["shardyard_census_age_seconds", ()] < 60 and found["process_resident_memory_bytes", ()] > 1e6


async def test_the_page_has_every_metric_and_nothing_of_a_user(service: Watched) -> None:
    _, text = await service.get("/metrics")
    there = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    left_out = NEEDS_GPUS if kind() == SQLITE else {*NEEDS_GPUS, STORE_BYTES.name}
    wanted = {family.name: family.kind.value for family in FAMILIES if family.name not in left_out}
    assert {name: there.get(name) for name in wanted} == wanted
    for private in (PRIVATE, TOKEN, service.job.uid, str(service.folder)):
        assert private not in text


async def test_calls_that_no_service_has_are_one_series(service: Watched) -> None:
    for number in range(30):
        with pytest.raises(grpc.aio.AioRpcError):
            await service.service.channel.unary_unary(f"/made.up/Number{number}")(b"")
    found = await service.samples()
    assert found["shardyard_grpc_calls_total", ("unknown", "UNIMPLEMENTED")] == 30
    assert found["shardyard_refusals_total", ("METHOD_UNKNOWN",)] == 30
    assert not [labels for name, labels in found if "made.up" in str(labels)]


async def test_streams_are_shown_until_they_end_and_a_refused_one_by_its_code(service: Watched) -> None:
    stream = service.service.channel.unary_stream(f"/{HEALTH}")(b"")
    await stream.read()
    assert (await service.samples())["shardyard_grpc_calls_open", (HEALTH,)] == 1
    stream.cancel()
    while (await service.samples())["shardyard_grpc_calls_open", (HEALTH,)]:
        await asyncio.sleep(0.05)
    with pytest.raises(grpc.aio.AioRpcError):
        await service.service.jobs.WatchJob(job_service_pb2.WatchJobRequest(name=f"{PARENT}/jobs/never")).read()
    found = await service.samples()
    assert found["shardyard_grpc_calls_total", (HEALTH, "CANCELLED")] == 1
    assert found["shardyard_grpc_calls_total", (WATCH, "NOT_FOUND")] == 1
    assert ("shardyard_grpc_call_duration_seconds_count", (WATCH,)) not in found


async def test_the_admin_port_takes_no_commands_and_survives_what_is_sent_to_it(service: Watched) -> None:
    assert await service.get("/healthz") == await service.get("/readyz?verbose") == (200, "ok\n")
    assert (await service.get("/metrics", "POST"))[0] == 405 and (await service.get("/shutdown"))[0] == 404
    assert await service.get("/metrics", "HEAD") == (200, "")
    for garbage in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET /" + b"a" * 100_000, b"GET\r\n\r\n", b"\r\n\r\n"):
        answer = await service.raw(garbage)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    host, _, port = service.monitor.address.rpartition(":")
    # They send nothing, and keep their connections.
    held = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CONNECTIONS)]
    status, first = (await service.get("/healthz"))[0], held[0][0]
    # On a slow machine their five seconds may be over already: then they were closed.
    assert status in (0, 503) or first.at_eof() or first.exception() is not None
    job = await service.service.jobs.GetJob(job_service_pb2.GetJobRequest(name=service.job.name))
    assert job.uid == service.job.uid
    for _, writer in held:
        writer.close()
    while (await service.get("/healthz"))[0] != 200:
        await asyncio.sleep(0.05)


async def test_readiness_is_that_of_the_services_health(service: Watched) -> None:
    service.service.app.health.set_serving(False)
    try:
        assert await service.get("/readyz") == (503, "not serving\n") and (await service.get("/healthz"))[0] == 200
        assert (await service.samples())["shardyard_serving", ()] == 0
    finally:
        service.service.app.health.set_serving(True)
    assert (await service.samples())["shardyard_serving", ()] == 1


async def test_every_line_of_the_log_is_one_object_with_its_call_or_its_job(service: Watched) -> None:
    calls = [line for line in service.log() if line["event"] == "call ended"]
    [created] = [line for line in calls if line["method"].endswith("/CreateJob")]
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]+", created["request_id"]) and created["code"] == "OK"
    assert created["trace_id"] == TRACE and created["duration_ms"] > 0 and created["level"] == "info"
    assert len({line["request_id"] for line in calls}) == len(calls)
    states = [line for line in service.log() if line["event"] == "the job's state has changed"]
    assert [line["state"] for line in states] == ["QUEUED", "PREPARING", "RUNNING", "FINALIZING", "SUCCEEDED"]
    assert {line["job_uid"] for line in states} == {service.job.uid}
    ended = [line for line in service.log() if line["event"] == "an attempt has ended"]
    assert [(line["attempt"], line["cause"]) for line in ended] == [(1, "none")]


async def test_the_log_has_no_secret_and_nothing_of_a_user(service: Watched) -> None:
    newline = 'x"}\n{"event": "forged", "level": "error"}'
    for name in (f"{PARENT}/jobs/{PRIVATE}-2", f"{PARENT}/jobs/{newline}", TOKEN):
        with pytest.raises(grpc.aio.AioRpcError):
            await service.service.jobs.GetJob(
                job_service_pb2.GetJobRequest(name=name), metadata=(("x-secret", TOKEN), ("x-bin", b"\xff"))
            )
    text = service.stream.getvalue()
    for private in (PRIVATE, TOKEN, "forged", str(service.folder)):
        assert private not in text
    assert {"JOB_NOT_FOUND"} <= {line["reason"] for line in service.log() if line.get("reason")}


async def test_the_trace_of_the_caller_continues_to_the_first_steps(service: Watched) -> None:
    collector = service.collector
    call = await collector.wait_for("shardyard.v1.JobService/CreateJob")
    assert (call.trace_id, call.parent) == (TRACE, CALLER) and not call.is_error
    assert call.attributes["rpc.method"] == "CreateJob" and call.attributes["rpc.grpc.status_code"] == 0
    attempt = await collector.wait_for("attempt")
    for name, parent in (
        ("plan", call),
        ("commit", call),
        ("queue", call),
        ("launch", attempt),
        ("phase: loading model", attempt),
        ("first steps", attempt),
    ):
        span = await collector.wait_for(name)
        assert (span.trace_id, span.parent) == (TRACE, parent.span_id), name
        assert span.start_ns <= span.end_ns, name
    assert attempt.parent == call.span_id and not attempt.is_error
    assert attempt.attributes["shardyard.job_uid"] == service.job.uid
    job = await service.service.jobs.GetJob(job_service_pb2.GetJobRequest(name=service.job.name))
    assert job.traceparent == f"00-{TRACE}-{call.span_id}-01"
    assert next(iter(service.core.launcher.gangs.values())).spec.traceparent == job.traceparent


async def test_spans_end_when_a_call_is_refused_or_its_caller_leaves(service: Watched) -> None:
    jobs, collector = service.service.jobs, service.collector
    with pytest.raises(grpc.aio.AioRpcError):
        await jobs.ListAttempts(job_service_pb2.ListAttemptsRequest(parent=f"{PARENT}/jobs/never"))
    refused = await collector.wait_for("shardyard.v1.JobService/ListAttempts")
    assert refused.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0] and not refused.is_error
    watch = jobs.WatchJob(job_service_pb2.WatchJobRequest(name=service.job.name, after_sequence=0))
    await watch.read()
    watch.cancel()
    left = await collector.wait_for(WATCH)
    assert left.attributes["rpc.method"] == "WatchJob" and left.end_ns >= left.start_ns


@pytest.mark.parametrize(
    "text", ["", "00-" + "0" * 32 + f"-{CALLER}-01", f"99-{TRACE}-{CALLER}-01", f"00-{TRACE}-{CALLER}-01-x", "x" * 4000]
)
async def test_what_is_not_a_traceparent_begins_a_trace_of_its_own(service: Watched, text: str) -> None:
    before = len(service.collector.named("shardyard.v1.JobService/ListJobs"))
    request = job_service_pb2.ListJobsRequest(parent=PARENT)
    await service.service.jobs.ListJobs(request, metadata=(("traceparent", text),))
    while len(service.collector.named("shardyard.v1.JobService/ListJobs")) == before:
        await asyncio.sleep(0.05)
    span = service.collector.named("shardyard.v1.JobService/ListJobs")[-1]
    assert span.parent == "" and int(span.trace_id, 16) and span.trace_id != TRACE


async def test_a_jobs_own_traceparent_is_not_taken_from_its_caller(service: Watched) -> None:
    request = job_service_pb2.CreateJobRequest(parent=PARENT, job_id="own", validate_only=True)
    request.job.CopyFrom(await service.service.jobs.GetJob(job_service_pb2.GetJobRequest(name=service.job.name)))
    request.job.traceparent = "forged"
    with contextlib.suppress(grpc.aio.AioRpcError):  # What was submitted may not name fields that the server assigns.
        assert (await service.service.jobs.CreateJob(request)).traceparent == ""


async def test_the_probe_of_the_command_line_asks_the_services_health(service: Watched) -> None:
    answer = await service.service.channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
    assert answer == b"\x08\x01"  # What the SDK's `is_serving` compares with, without generated code.


def test_every_metric_says_what_it_is() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family.name.startswith("shardyard_") and family.meaning.endswith("."), family.name
        assert (family.kind is Kind.COUNTER) == family.name.endswith("_total"), family.name
        assert not {"job", "job_uid", "model", "user", "principal", "project", "node"} & set(family.labels)
