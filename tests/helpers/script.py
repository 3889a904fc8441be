"""What a scripted service has, does and was asked; what all its servicers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from shardyard.v1 import (
    job_pb2,
    log_service_pb2,
    metric_service_pb2,
    model_service_pb2,
    transfer_pb2,
)

UID = "0123456789abcdef0123456789abcdef"


@dataclass
class Failure:
    """What a call is answered with instead of its answer."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "scripted"
    metadata: dict[str, str] = field(default_factory=dict)
    violations: list[tuple[str, str, str]] = field(default_factory=list)
    retry_after_s: float | None = None

    def status(self) -> Any:
        """As a google.rpc.Status for `abort_with_status`."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        details: list[Any] = []
        if self.reason:
            info = error_details_pb2.ErrorInfo(reason=self.reason, domain="shardyard.dev", metadata=self.metadata)
            details.append(info)
        if self.violations:
            request = error_details_pb2.BadRequest()
            for name, words, reason in self.violations:
                request.field_violations.add(field=name, description=words, reason=reason)
            details.append(request)
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(round(self.retry_after_s * 1000))
            details.append(retry)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return rpc_status.to_status(status)


@dataclass
class Script:
    """What the service has and does. `failures[method]` are used up one a call, before anything else."""

    job: job_pb2.Job = field(default_factory=job_pb2.Job)
    events: list[job_pb2.JobEvent] = field(default_factory=list)
    # One entry a WatchJob call: how many events are sent before the stream is cut; None: to the end.
    cuts: list[int | None] = field(default_factory=list)
    overlap: int = 0  # Events sent again after a reconnect, before the cursor.
    skip_once: int = 0  # Events that one WatchJob call leaves out: a gap.
    batch: int = 3
    hold: bool = False  # A watch stays open after the last event.
    state_after_create: int = job_pb2.STATE_QUEUED
    failures: dict[str, list[Failure]] = field(default_factory=dict)
    jobs: list[job_pb2.Job] = field(default_factory=list)
    page_size: int = 2
    log_lines: list[log_service_pb2.LogLine] = field(default_factory=list)
    log_cuts: list[int] = field(default_factory=list)
    series: list[metric_service_pb2.MetricSeries] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, bytes] = field(default_factory=dict)  # Files that Get reports with other content than is sent.
    download_cuts: list[int] = field(default_factory=list)
    corrupt_downloads: int = 0
    chunk_bytes: int = 4  # Of a file that is sent.
    upload_cuts: list[int] = field(default_factory=list)  # Bytes that a CreateDataset call takes before it is cut.
    on_upload_cut: Callable[[], Any] = lambda: None
    uploads: dict[str, dict[str, bytearray]] = field(default_factory=dict)
    headers: dict[str, transfer_pb2.UploadHeader] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    predict: Callable[[model_service_pb2.Instance], model_service_pb2.Prediction] | None = None
    explain: model_service_pb2.Explanation | None = None
    most_instances: int = 10_000
    inputs: tuple[str, ...] = ()  # What `Predict` takes of every model.
    task: str = ""  # Of every model.
    launcher: str = "local"
    requests: list[tuple[str, Any]] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def asked(self, method: str) -> list[Any]:
        """The requests of one method, in order."""
        return [request for name, request in self.requests if name == method]


class ScriptedServicer:
    """What all scripted servicers share."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def begin(self, method: str, request: Any, context: Any) -> None:
        """Note the call, and fail it if the script says so."""
        self.script.requests.append((method, request))
        self.script.metadata.append(dict(context.invocation_metadata() or ()))
        failures = self.script.failures.get(method)
        if failures:
            await context.abort_with_status(failures.pop(0).status())
