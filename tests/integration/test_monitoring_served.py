"""A service as its operator sees it: metrics, log lines, traces and telemetry of a job, and what strangers send."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator

import grpc
import pytest

import shardyard
from helpers.watched import CALLER, PRIVATE, TOKEN, TRACE, Watched, watched
from shardyard.v1 import job_service_pb2, job_service_pb2_grpc
from shardyard_coordinator.monitoring.admin import MAX_CONNECTIONS
from shardyard_coordinator.monitoring.families import FAMILIES, Kind

NEEDS_GPUS = {"shardyard_gpu_utilization_ratio", "shardyard_gpu_memory_used_bytes", "shardyard_gpu_memory_bytes"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("watched")) as made:
        yield made


def test_the_job_is_counted_from_its_call_to_its_end(service: Watched) -> None:
    assert service.job.state == "succeeded"
    found = service.samples()
    assert found["shardyard_jobs", ("SUCCEEDED",)] == 1 and found["shardyard_jobs", ("QUEUED",)] == 0
    assert found["shardyard_jobs_created_total", ()] == found["shardyard_jobs_ended_total", ("SUCCEEDED",)] == 1
    assert found["shardyard_attempts_ended_total", ("none",)] == 1 and found["shardyard_attempts_live", ()] == 0
    assert found["shardyard_grpc_calls_total", ("shardyard.v1.JobService/CreateJob", "OK")] == 1
    assert found["shardyard_grpc_call_duration_seconds_count", ("shardyard.v1.JobService/CreateJob",)] == 1
    assert found["shardyard_job_state_seconds_count", ("QUEUED",)] == 1
    assert 0 < found["shardyard_job_state_seconds_sum", ("PREPARING",)] < 300
    assert found["shardyard_events_total", ("STATE",)] >= 4
    assert found["shardyard_writer_operations_total", ()] >= found["shardyard_writer_commits_total", ()] > 3
    assert found["shardyard_resources", ("models",)] == 1 and found["shardyard_resource_bytes", ("models",)] > 1000
    assert found["shardyard_storage_available", ()] == found["shardyard_cluster_connected", ()] == 1
    assert found["shardyard_slots", ()] == found["shardyard_slots_free", ()] > 0
    assert found["shardyard_loop_lag_seconds_count", ()] > 0 and found["shardyard_census_age_seconds", ()] < 30
    assert found["process_resident_memory_bytes", ()] > 1e6


def test_the_page_has_every_metric_and_nothing_of_a_user(service: Watched) -> None:
    _, text = service.get("/metrics")
    there = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    wanted = {family.name: family.kind.value for family in FAMILIES if family.name not in NEEDS_GPUS}
    assert {name: there.get(name) for name in wanted} == wanted
    for private in (PRIVATE, TOKEN, service.job.uid, "jobs/watched", str(service.folder)):
        assert private not in text


def test_calls_that_no_service_has_are_one_series(service: Watched) -> None:
    with grpc.insecure_channel(service.service.address) as channel:
        for number in range(30):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/made.up/Number{number}")(b"", timeout=20)
    found = service.samples()
    methods = {labels[0] for name, labels in found if name == "shardyard_grpc_calls_total"}
    assert found["shardyard_grpc_calls_total", ("unknown", "UNIMPLEMENTED")] >= 30
    assert found["shardyard_refusals_total", ("METHOD_UNKNOWN",)] >= 30
    assert len([method for method in methods if "made" in method]) == 0


def test_open_watches_are_shown_until_they_end(service: Watched) -> None:
    watches = "shardyard.v1.JobService/WatchJob"
    with grpc.insecure_channel(service.service.address) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        request = job_service_pb2.WatchJobRequest(name="projects/default/jobs/never")
        with pytest.raises(grpc.RpcError):
            next(stub.WatchJob(request, timeout=20))
        stream = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=60)
        next(stream)
        assert service.samples()["shardyard_grpc_calls_open", ("grpc.health.v1.Health/Watch",)] == 1
        stream.cancel()
        until = time.monotonic() + 20
        while service.samples()["shardyard_grpc_calls_open", ("grpc.health.v1.Health/Watch",)] and (
            time.monotonic() < until
        ):
            time.sleep(0.2)
    found = service.samples()
    assert found["shardyard_grpc_calls_total", ("grpc.health.v1.Health/Watch", "CANCELLED")] == 1
    assert found["shardyard_grpc_calls_total", (watches, "NOT_FOUND")] == 1


def test_the_admin_port_takes_no_commands_and_survives_what_is_sent_to_it(service: Watched) -> None:
    assert service.get("/healthz") == (200, "ok\n") and service.get("/readyz") == (200, "ok\n")
    assert service.get("/metrics", "POST")[0] == 405 and service.get("/shutdown")[0] == 404
    assert service.get("/metrics", "HEAD") == (200, "")
    host, _, port = service.admin.rpartition(":")
    for garbage in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET /" + b"a" * 100_000, b"GET\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=20) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(garbage)
            answer = raw.recv(4096)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 5):  # They send nothing, and keep their connection.
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
        with shardyard.Client(service.service.address) as client:
            assert client.job("watched").get().state == "succeeded"
    until = time.monotonic() + 30
    while service.get("/healthz")[0] != 200 and time.monotonic() < until:
        time.sleep(0.2)
    assert service.get("/healthz")[0] == 200


def test_a_probe_asks_the_services_own_health(service: Watched) -> None:
    asked = service.service.run("shardyard", "health", "--json")
    assert asked.returncode == 0 and json.loads(asked.stdout) == {"serving": True}
    host, _, port = service.admin.rpartition(":")
    for address in (f"{host}:9", f"{host}:{port}"):  # Nothing listens there; something that is no gRPC does.
        asked = service.service.run("shardyard", "health", "--timeout", "5", "--address", address)
        assert asked.returncode == 1 and asked.stderr.startswith("error: ")


def test_every_line_of_the_log_is_one_object_with_its_call_or_its_job(service: Watched) -> None:
    calls = [line for line in service.log() if line["event"] == "call ended"]
    [created] = [line for line in calls if line["method"].endswith("/CreateJob")]
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]+", created["request_id"]) and created["code"] == "OK"
    assert created["trace_id"] == TRACE and created["duration_ms"] > 0 and created["level"] == "info"
    assert len({line["request_id"] for line in calls}) == len(calls)
    states = [line for line in service.log() if line["event"] == "the job's state has changed"]
    assert [line["state"] for line in states][:2] == ["QUEUED", "PREPARING"] and states[-1]["state"] == "SUCCEEDED"
    assert {line["job_uid"] for line in states} == {service.job.uid}
    ended = [line for line in service.log() if line["event"] == "an attempt has ended"]
    assert [(line["attempt"], line["cause"]) for line in ended] == [(1, "none")]


def test_the_log_has_no_secret_and_nothing_of_a_user(service: Watched) -> None:
    newline = 'x"}\n{"event": "forged", "level": "error"}'
    with grpc.insecure_channel(service.service.address) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        for name in (f"projects/default/jobs/{PRIVATE}", f"projects/default/jobs/{newline}", TOKEN):
            with pytest.raises(grpc.RpcError):
                stub.GetJob(job_service_pb2.GetJobRequest(name=name), metadata=(("x-secret", TOKEN),), timeout=20)
    text = (service.service.folder / "serve.log").read_text(encoding="utf-8")
    for private in (PRIVATE, TOKEN, "forged", str(service.folder)):
        assert private not in text
    refused = [line for line in service.log() if line.get("reason")]
    assert {"JOB_NOT_FOUND"} <= {line["reason"] for line in refused}


def test_what_a_rank_uses_is_a_metric_of_the_job(service: Watched) -> None:
    with shardyard.Client(service.service.address) as client:
        found = client.job("watched").metrics()
    assert {"system/cpu_percent/0", "system/rss_bytes/0"} <= found.keys()
    memory = [point.value for point in found["system/rss_bytes/0"].points]
    assert all(10e6 < value < 100e9 for value in memory) and memory
    assert all(0 <= point.value < 100 * 1024 for point in found["system/cpu_percent/0"].points)
    shown = service.service.run("shardyard", "metrics", "watched", "system/rss_bytes/0")
    assert shown.returncode == 0 and "system/rss_bytes/0" in shown.stdout


def test_the_trace_of_the_caller_goes_on_to_the_first_steps(service: Watched) -> None:
    collector = service.collector
    call = collector.wait_for("shardyard.v1.JobService/CreateJob")
    assert (call.trace_id, call.parent) == (TRACE, CALLER) and not call.is_error
    assert call.attributes["rpc.method"] == "CreateJob" and call.attributes["rpc.grpc.status_code"] == 0
    attempt = collector.wait_for("attempt")
    for name, parent in (
        ("plan", call),
        ("commit", call),
        ("queue", call),
        ("launch", attempt),
        ("first steps", attempt),
    ):
        span = collector.wait_for(name)
        assert (span.trace_id, span.parent) == (TRACE, parent.span_id), name
        assert parent.start_ns <= span.start_ns + 1_000_000_000 and span.start_ns <= span.end_ns, name
    phases = [span for span in collector.spans if span.name.startswith("phase: ")]
    assert {"phase: tokenizing", "phase: loading model"} <= {span.name for span in phases}
    assert {span.parent for span in phases} == {attempt.span_id}
    assert attempt.attributes["shardyard.job_uid"] == service.job.uid and not attempt.is_error
    assert service.job.traceparent == f"00-{TRACE}-{call.span_id}-01"
    with shardyard.Client(service.service.address) as client:
        assert f"trace {TRACE}" in "\n".join(line.text for line in client.job("watched").logs(tail=1000))


def test_spans_end_when_a_call_is_refused_or_its_caller_leaves(service: Watched) -> None:
    with grpc.insecure_channel(service.service.address) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.ListAttempts(job_service_pb2.ListAttemptsRequest(parent="projects/default/jobs/never"), timeout=20)
        waiting = stub.WaitJob.future(
            job_service_pb2.WaitJobRequest(name="projects/default/jobs/watched"),
            metadata=(("traceparent", "00-" + "0" * 32 + "-zz-01"),),
            timeout=60,
        )
        waiting.result()
        for text in ("", "00-" + "0" * 32 + f"-{CALLER}-01", "99-x", "x" * 4000):
            stub.ListJobs(
                job_service_pb2.ListJobsRequest(parent="projects/default"),
                metadata=(("traceparent", text),),
                timeout=20,
            )
    refused = service.collector.wait_for("shardyard.v1.JobService/ListAttempts")
    assert refused.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0] and refused.parent == ""
    service.collector.wait_for("shardyard.v1.JobService/ListJobs")
    for span in service.collector.named("shardyard.v1.JobService/ListJobs"):
        assert span.parent == "" and int(span.trace_id, 16) and span.trace_id != TRACE


def test_every_metric_says_what_it_is() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family.name.startswith("shardyard_") and family.meaning.endswith("."), family.name
        assert (family.kind is Kind.COUNTER) == family.name.endswith("_total"), family.name
        assert not {"job", "job_uid", "model", "user", "principal", "project", "node"} & set(family.labels)
