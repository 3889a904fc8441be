"""A service whose metrics, log lines and traces are looked at: real parts over a scripted launcher, one whole job."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from helpers.core import Core, running_core
from helpers.scripted_launcher import ScriptedLauncher, whole_run
from helpers.service import Service, create, serving_store
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.launch.claim import claim_of
from shardyard_coordinator.monitoring.logs import JsonLines
from shardyard_coordinator.monitoring.monitor import Monitor
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.app import make_door
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.protection import Authentication
from shardyard_coordinator.settings import Settings

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
PRIVATE = "zanzibar"
"""A word of the user's: the job's id, and in its label, its display name and its data."""

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
        found = [each for one in request.resource_spans for scope in one.scope_spans for each in scope.spans]
        self.spans += [
            Span(
                each.name,
                each.trace_id.hex(),
                each.span_id.hex(),
                each.parent_span_id.hex(),
                each.start_time_unix_nano,
                each.end_time_unix_nano,
                each.status.code == 2,
                {one.key: one.value.string_value or one.value.int_value for one in each.attributes},
            )
            for each in found
        ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """The spans of a name."""
        return [span for span in self.spans if span.name == name]

    async def wait_for(self, name: str) -> Span:
        """The first span of that name, which arrives with a batch."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                while not self.named(name):
                    await asyncio.sleep(0.05)
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


@contextlib.contextmanager
def logging_json() -> Iterator[io.StringIO]:
    """What the service logs as JSON, at the level `info`."""
    stream, log = io.StringIO(), logging.getLogger("shardyard_coordinator")
    handler, before = logging.StreamHandler(stream), log.level
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield stream
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@dataclass
class Watched:
    """The service, its job, and where its numbers are."""

    service: Service
    core: Core
    monitor: Monitor
    collector: Collector
    stream: io.StringIO
    folder: Path
    job: JobRecord

    async def raw(self, request: bytes) -> bytes:
        """What the admin port answers to these bytes; empty if it closes without a word."""
        host, _, port = self.monitor.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        answer = b""
        with contextlib.suppress(ConnectionError):
            writer.write(request)
            await writer.drain()
            answer = await reader.read()
        writer.close()
        return answer

    async def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Status and body of a path of the admin port; status 0 if it closes without a word."""
        head, _, body = (await self.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).partition(b"\r\n\r\n")
        return int(head.split()[1]) if head else 0, body.decode()

    async def samples(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """(name, label values) → value, now; a code comes last."""
        status, text = await self.get("/metrics")
        assert status == 200
        found = [each for family in text_string_to_metric_families(text) for each in family.samples]
        return {
            (each.name, tuple(each.labels[label] for label in sorted(each.labels, key="code".__eq__))): each.value
            for each in found
        }

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log."""
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@contextlib.asynccontextmanager
async def watched(folder: Path, **settings: str) -> AsyncIterator[Watched]:
    """A service with everything of monitoring on, and one job that has succeeded, as part of a caller's trace."""
    launcher = ScriptedLauncher(script=whole_run)
    with collecting() as (collector, endpoint), logging_json() as stream:
        async with contextlib.AsyncExitStack() as stack:
            core = await stack.enter_async_context(running_core(folder, launcher))
            made = {"admin_listen": "127.0.0.1:0", "otlp_endpoint": endpoint, **settings}
            monitor = Monitor(Settings(state_dir=folder, **made), core.clock)  # type: ignore[arg-type]
            stack.push_async_callback(monitor.close)
            limits = Limits()
            door = make_door(limits, Access(Authentication(), core.clock), monitor.observer)
            await monitor.start(door.health)
            port = await door.start("127.0.0.1:0")
            claim = claim_of(folder / "storage", core.store.store_id)
            monitor.open(core.store, launcher, core.loop.cluster_slots, claim, core.collector.starts)
            serving = serving_store(
                core.store,
                folder,
                clock=core.clock,
                launcher=launcher,
                limits=limits,
                data_roots=(str(folder),),
                door=(door, port),
                spans=monitor.spans,
            )
            service = await stack.enter_async_context(serving)
            data = folder / f"{PRIVATE}.txt"
            data.write_text(f"{PRIVATE}\n", encoding="utf-8")
            request = create(PRIVATE)
            request.job.spec.train_data.uri = str(data)
            request.job.labels["who"] = request.job.display_name = f"{PRIVATE} {TOKEN}"
            job = await service.jobs.CreateJob(request, metadata=(("traceparent", f"00-{TRACE}-{CALLER}-01"),))
            ended = await core.until(job.uid, JobState.SUCCEEDED, timeout_s=120)
            yield Watched(service, core, monitor, collector, stream, folder, ended)
