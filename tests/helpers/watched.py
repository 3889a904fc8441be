"""A service whose metrics, log lines and traces are looked at, after one small job has run on it."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

import shardyard
from helpers.served import Served, free_port, served
from helpers.workplace import fill
from shardyard._requests import JobOptions, make_draft
from shardyard.v1 import job_service_pb2, job_service_pb2_grpc

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
PRIVATE = "zanzibar"
"""A word of the user's: in a file's name, in the data, in a label and in the display name."""

TOKEN = "hf_" + "Q7" * 12


@dataclass
class Span:
    """A span as the collector got it."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    start_ns: int
    end_ns: int
    is_error: bool
    attributes: Mapping[str, Any]


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """A collector that keeps all spans."""

    spans: list[Span] = field(default_factory=list)

    def Export(self, request: Any, _context: Any) -> Any:
        """Takes a batch."""
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for each in scope.spans:
                    values = {one.key: one.value.string_value or one.value.int_value for one in each.attributes}
                    self.spans.append(
                        Span(
                            each.name,
                            each.trace_id.hex(),
                            each.span_id.hex(),
                            each.parent_span_id.hex(),
                            each.start_time_unix_nano,
                            each.end_time_unix_nano,
                            each.status.code == 2,
                            values,
                        )
                    )
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """The spans of a name."""
        return [span for span in self.spans if span.name == name]

    def wait_for(self, name: str, *, seconds: float = 30.0) -> Span:
        """The first span of that name."""
        until = time.monotonic() + seconds
        while not self.named(name) and time.monotonic() < until:
            time.sleep(0.1)
        found = self.named(name)
        assert found, f"no span {name}; there are {sorted({span.name for span in self.spans})}"
        return found[0]


@contextlib.contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector, and its endpoint."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@dataclass
class Watched:
    """The service, its job, and where its numbers are."""

    service: Served
    admin: str
    collector: Collector
    folder: Path
    job: shardyard.types.JobInfo

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Status and body of a path of the admin port."""
        connection = http.client.HTTPConnection(self.admin, timeout=30)
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def samples(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """(name, label values) → value, now."""
        status, text = self.get("/metrics")
        assert status == 200
        return {
            (sample.name, tuple(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def log(self) -> list[dict[str, Any]]:
        """The lines of the service's log, apart from what it prints for people."""
        text = (self.service.folder / "serve.log").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def run_job(address: str, folder: Path) -> shardyard.types.JobInfo:
    """Runs a classification on the folder's files, as part of a caller's trace; returns how it ended."""
    data = folder / f"{PRIVATE}.csv"
    rows = (folder / "reviews.csv").read_text(encoding="utf-8").replace("good", PRIVATE)
    data.write_text(rows, encoding="utf-8")
    spec = shardyard.JobSpec(
        shardyard.TextClassification(max_length=32),
        model=f"server:{folder / 'bert'}",
        train_data=f"server:{data}",
        optimization=shardyard.Optimization(max_steps=6, learning_rate=1e-3, global_batch_size=8),
    )
    draft = make_draft(spec, {}, JobOptions("watched", f"{PRIVATE} {TOKEN}"), project="default")
    request = job_service_pb2.CreateJobRequest(parent="projects/default", job_id="watched", job=draft.job)
    request.job.labels["who"] = PRIVATE
    with grpc.insecure_channel(address) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        stub.CreateJob(request, metadata=(("traceparent", f"00-{TRACE}-{CALLER}-01"),), timeout=120)
    with shardyard.Client(address) as client:
        return client.job("watched").wait(timeout=300)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    """A service with everything of monitoring on, and one job that has ended."""
    place = folder / "files"
    place.mkdir()
    fill(place)
    admin = f"127.0.0.1:{free_port()}"
    with collecting() as (collector, endpoint):
        options = ("--admin-listen", admin, "--otlp-endpoint", endpoint, "--log-format", "json", "--log-level", "info")
        faster = {"OTEL_BSP_SCHEDULE_DELAY": "200"}
        with served(folder / "service", "local", *options, "--data-root", str(place), environment=faster) as service:
            job = run_job(service.address, place)
            yield Watched(service, admin, collector, place, job)
