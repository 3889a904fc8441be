"""A real gRPC server on port 0 that plays back a script: events, cut streams, rich errors, uploads, downloads.

Every test sets what the service is to do in plain attributes and reads what it was asked from `requests`.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import grpc
import grpc.aio
from google.protobuf import any_pb2, empty_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from shardyard.v1 import (
    checkpoint_service_pb2,
    checkpoint_service_pb2_grpc,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    log_service_pb2,
    log_service_pb2_grpc,
    metric_service_pb2,
    metric_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    plan_pb2,
    server_service_pb2,
    server_service_pb2_grpc,
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
    announced: dict[str, bytes] = field(default_factory=dict)  # Files that Get tells of as others than are sent.
    download_cuts: list[int] = field(default_factory=list)
    corrupt_downloads: int = 0
    upload_cuts: list[int] = field(default_factory=list)  # Bytes that a CreateDataset call takes before it is cut.
    on_upload_cut: Callable[[], Any] = lambda: None
    uploads: dict[str, dict[str, bytearray]] = field(default_factory=dict)
    headers: dict[str, transfer_pb2.UploadHeader] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    predict: Callable[[model_service_pb2.Instance], model_service_pb2.Prediction] | None = None
    most_instances: int = 10_000
    launcher: str = "local"
    requests: list[tuple[str, Any]] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def asked(self, method: str) -> list[Any]:
        """The requests of one method, in order."""
        return [request for name, request in self.requests if name == method]


class _Service:
    """What all scripted servicers share."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def begin(self, method: str, request: Any, context: Any) -> None:
        """Note the call, and fail it where the script says so."""
        self.script.requests.append((method, request))
        self.script.metadata.append(dict(context.invocation_metadata() or ()))
        failures = self.script.failures.get(method)
        if failures:
            await context.abort_with_status(failures.pop(0).status())


class Jobs(_Service, job_service_pb2_grpc.JobServiceServicer):
    async def CreateJob(self, request: Any, context: Any) -> Any:
        await self.begin("CreateJob", request, context)
        job = job_pb2.Job()
        job.CopyFrom(request.job)
        job.name = f"{request.parent}/jobs/{request.job_id or 'made-12345678'}"
        job.uid, job.state = UID, job_pb2.STATE_QUEUED
        if not request.validate_only:
            self.script.job.CopyFrom(job)
            self.script.job.state = self.script.state_after_create
        return job

    async def PlanJob(self, request: Any, context: Any) -> Any:
        await self.begin("PlanJob", request, context)
        plan = plan_pb2.JobPlan(num_parameters=22_700_000, total_steps=10, slots=2, deepspeed_config_json="{}")
        plan.resolved_spec.CopyFrom(request.job.spec)
        plan.batch.global_batch_size = 32
        plan.memory.verdict = plan_pb2.MEMORY_VERDICT_FITS
        return plan

    async def GetJob(self, request: Any, context: Any) -> Any:
        await self.begin("GetJob", request, context)
        if request.name != self.script.job.name:
            missing = Failure(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", f"there is no job {request.name}")
            await context.abort_with_status(missing.status())
        return self.script.job

    async def WaitJob(self, request: Any, context: Any) -> Any:
        await self.begin("WaitJob", request, context)
        return self.script.job

    async def CancelJob(self, request: Any, context: Any) -> Any:
        await self.begin("CancelJob", request, context)
        self.script.job.state = job_pb2.STATE_CANCELLING
        return self.script.job

    async def PauseJob(self, request: Any, context: Any) -> Any:
        await self.begin("PauseJob", request, context)
        self.script.job.state = job_pb2.STATE_PAUSING
        return self.script.job

    async def ResumeJob(self, request: Any, context: Any) -> Any:
        await self.begin("ResumeJob", request, context)
        self.script.job.state = job_pb2.STATE_QUEUED
        return self.script.job

    async def DeleteJob(self, request: Any, context: Any) -> Any:
        await self.begin("DeleteJob", request, context)
        return empty_pb2.Empty()

    async def ListJobs(self, request: Any, context: Any) -> Any:
        await self.begin("ListJobs", request, context)
        start = int(request.page_token or 0)
        end = start + self.script.page_size
        token = str(end) if end < len(self.script.jobs) else ""
        return job_service_pb2.ListJobsResponse(jobs=self.script.jobs[start:end], next_page_token=token)

    async def ListAttempts(self, request: Any, context: Any) -> Any:
        await self.begin("ListAttempts", request, context)
        attempt = job_pb2.Attempt(name=f"{request.parent}/attempts/1", state=job_pb2.Attempt.STATE_ENDED, workers=2)
        return job_service_pb2.ListAttemptsResponse(attempts=[attempt])

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.begin("WatchJob", request, context)
        script = self.script
        cut = script.cuts.pop(0) if script.cuts else None
        start = max(request.after_sequence - script.overlap, 0) + script.skip_once
        script.skip_once = 0
        left = script.events[start:]
        sent = 0
        while left and (cut is None or sent < cut):
            count = script.batch if cut is None else min(script.batch, cut - sent)
            batch, left = left[:count], left[count:]
            sent += len(batch)
            wanted = [event for event in batch if not request.kinds or _kind(event) in request.kinds]
            yield job_service_pb2.WatchJobResponse(
                after_sequence=batch[0].sequence - 1,
                events=wanted,
                last_sequence=batch[-1].sequence,
                job_uid=UID,
            )
        if script.hold:
            await asyncio.Event().wait()
        if cut is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")


class Logs(_Service, log_service_pb2_grpc.LogServiceServicer):
    async def TailLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.begin("TailLogs", request, context)
        start = int(request.cursor or 0)
        cut = self.script.log_cuts.pop(0) if self.script.log_cuts else None
        for index in range(start, len(self.script.log_lines)):
            if cut is not None and index - start >= cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")
            yield log_service_pb2.TailLogsResponse(lines=[self.script.log_lines[index]], cursor=str(index + 1))


class Metrics(_Service, metric_service_pb2_grpc.MetricServiceServicer):
    async def QueryMetrics(self, request: Any, context: Any) -> Any:
        await self.begin("QueryMetrics", request, context)
        return metric_service_pb2.QueryMetricsResponse(series=self.script.series, max_points=1000)

    async def WatchMetrics(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.begin("WatchMetrics", request, context)
        yield metric_service_pb2.WatchMetricsResponse(series=self.script.series, cursor="1")


class Checkpoints(_Service, checkpoint_service_pb2_grpc.CheckpointServiceServicer):
    async def GetCheckpoint(self, request: Any, context: Any) -> Any:
        await self.begin("GetCheckpoint", request, context)
        return checkpoint_service_pb2.Checkpoint(name=request.name, step=10)

    async def ListCheckpoints(self, request: Any, context: Any) -> Any:
        await self.begin("ListCheckpoints", request, context)
        found = checkpoint_service_pb2.Checkpoint(name=f"{request.parent}/checkpoints/e1-s10", step=10)
        return checkpoint_service_pb2.ListCheckpointsResponse(checkpoints=[found])


class _Files(_Service):
    """Uploads and downloads, the same for models and data sets."""

    async def receive(self, method: str, messages: Any, context: Any, kind: Any) -> Any:
        """Take an upload, or as much of it as the script allows."""
        script = self.script
        header, taken, limit = None, 0, script.upload_cuts.pop(0) if script.upload_cuts else None
        async for message in messages:
            if header is None:
                header = message.header
                await self.begin(method, header, context)
                script.headers[header.resource_id] = header
                stored = script.uploads.setdefault(header.resource_id, {f.path: bytearray() for f in header.files})
                continue
            chunk = message.chunk
            body = stored[header.files[chunk.file_index].path]
            assert chunk.offset == len(body), "a chunk that does not follow"
            assert google_crc32c.value(chunk.data) == chunk.crc32c
            body += chunk.data
            taken += len(chunk.data)
            if limit is not None and taken >= limit:
                script.on_upload_cut()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")
        script.ready.add(header.resource_id)
        return self.resource(f"{header.parent}/{self.collection}/{header.resource_id}", kind)

    def resource(self, name: str, kind: Any) -> Any:
        """The model or data set of that name as it is."""
        resource_id = name.rsplit("/", 1)[-1]
        made = kind(name=name, uid=UID)
        made.state = kind.STATE_READY if resource_id in self.script.ready else kind.STATE_UPLOADING
        for path, body in self.script.uploads.get(resource_id, {}).items():
            made.files.add(path=path, committed_bytes=len(body))
        for path, sent in self.script.files.items():
            data = self.script.announced.get(path, sent)
            made.files.add(path=path, size_bytes=len(data), sha256=_sha256(data), committed_bytes=len(data))
        return made

    async def get(self, method: str, request: Any, context: Any, kind: Any) -> Any:
        """Answer a Get."""
        await self.begin(method, request, context)
        resource_id = request.name.rsplit("/", 1)[-1]
        if resource_id not in self.script.ready and resource_id not in self.script.uploads:
            missing = Failure(grpc.StatusCode.NOT_FOUND, self.missing, f"there is no {request.name}")
            await context.abort_with_status(missing.status())
        return self.resource(request.name, kind)

    async def send(self, method: str, request: Any, context: Any, kind: Any) -> AsyncIterator[Any]:
        """Send a file in chunks of 4 bytes, cut and damaged as the script says."""
        await self.begin(method, request, context)
        script = self.script
        data = script.files[request.path]
        cut = script.download_cuts.pop(0) if script.download_cuts else None
        for offset in range(request.offset, len(data), 4):
            if cut is not None and offset - request.offset >= cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")
            part = data[offset : offset + 4]
            crc32c = google_crc32c.value(part)
            if script.corrupt_downloads:
                script.corrupt_downloads -= 1
                crc32c ^= 1
            yield kind(chunk=transfer_pb2.DownloadChunk(offset=offset, data=part, crc32c=crc32c))

    collection = ""
    missing = ""


class Datasets(_Files, dataset_service_pb2_grpc.DatasetServiceServicer):
    collection = "datasets"
    missing = "DATASET_NOT_FOUND"

    async def CreateDataset(self, request_iterator: Any, context: Any) -> Any:
        return await self.receive("CreateDataset", request_iterator, context, dataset_service_pb2.Dataset)

    async def GetDataset(self, request: Any, context: Any) -> Any:
        return await self.get("GetDataset", request, context, dataset_service_pb2.Dataset)

    async def ListDatasets(self, request: Any, context: Any) -> Any:
        await self.begin("ListDatasets", request, context)
        found = [dataset_service_pb2.Dataset(name=f"{request.parent}/datasets/{name}") for name in self.script.ready]
        return dataset_service_pb2.ListDatasetsResponse(datasets=found)

    async def DeleteDataset(self, request: Any, context: Any) -> Any:
        await self.begin("DeleteDataset", request, context)
        return empty_pb2.Empty()

    async def DownloadDataset(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self.send(
            "DownloadDataset", request, context, dataset_service_pb2.DownloadDatasetResponse
        ):
            yield message


class Models(_Files, model_service_pb2_grpc.ModelServiceServicer):
    collection = "models"
    missing = "MODEL_NOT_FOUND"

    async def CreateModel(self, request_iterator: Any, context: Any) -> Any:
        return await self.receive("CreateModel", request_iterator, context, model_service_pb2.Model)

    async def GetModel(self, request: Any, context: Any) -> Any:
        return await self.get("GetModel", request, context, model_service_pb2.Model)

    async def ListModels(self, request: Any, context: Any) -> Any:
        await self.begin("ListModels", request, context)
        found = [model_service_pb2.Model(name=f"{request.parent}/models/{name}") for name in self.script.ready]
        return model_service_pb2.ListModelsResponse(models=found)

    async def DeleteModel(self, request: Any, context: Any) -> Any:
        await self.begin("DeleteModel", request, context)
        return empty_pb2.Empty()

    async def DownloadModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self.send("DownloadModel", request, context, model_service_pb2.DownloadModelResponse):
            yield message

    async def Predict(self, request: Any, context: Any) -> Any:
        await self.begin("Predict", request, context)
        await self._refuse_many(request, context)
        answer = self.script.predict or (lambda _: model_service_pb2.Prediction())
        return model_service_pb2.PredictResponse(predictions=[answer(instance) for instance in request.instances])

    async def Embed(self, request: Any, context: Any) -> Any:
        await self.begin("Embed", request, context)
        await self._refuse_many(request, context)
        found = [
            model_service_pb2.Embedding(shape=[2], values=[float(len(instance.text)), 1.0])
            for instance in request.instances
        ]
        return model_service_pb2.EmbedResponse(embeddings=found)

    async def _refuse_many(self, request: Any, context: Any) -> None:
        if len(request.instances) > self.script.most_instances:
            many = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "RESPONSE_TOO_LARGE", "over 3 MiB")
            await context.abort_with_status(many.status())


class Server(_Service, server_service_pb2_grpc.ServerServiceServicer):
    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        await self.begin("GetServerInfo", request, context)
        info = server_service_pb2.ServerInfo(version="0.1.0", store_id=UID, tasks=["text_classification"])
        info.cluster.state = server_service_pb2.ClusterInfo.STATE_CONNECTED
        info.cluster.slots = 2
        info.cluster.launcher = self.script.launcher
        return info


@contextmanager
def serving(script: Script, *, port: int = 0) -> Iterator[str]:
    """The service's address while it runs, in a thread with a loop of its own: clients of both kinds may block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server, bound = asyncio.run_coroutine_threadsafe(_start(script, port), loop).result(10)
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _start(script: Script, port: int) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    job_service_pb2_grpc.add_JobServiceServicer_to_server(Jobs(script), server)
    log_service_pb2_grpc.add_LogServiceServicer_to_server(Logs(script), server)
    metric_service_pb2_grpc.add_MetricServiceServicer_to_server(Metrics(script), server)
    checkpoint_service_pb2_grpc.add_CheckpointServiceServicer_to_server(Checkpoints(script), server)
    dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server(Datasets(script), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(Models(script), server)
    server_service_pb2_grpc.add_ServerServiceServicer_to_server(Server(script), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, bound


def a_story(steps: int = 6) -> list[job_pb2.JobEvent]:
    """The events of a job that went well, with `steps` of progress."""
    events = [job_pb2.JobEvent(state=job_pb2.StateChanged(to=job_pb2.STATE_QUEUED))]
    before = job_pb2.STATE_QUEUED
    for after in (job_pb2.STATE_PREPARING, job_pb2.STATE_RUNNING):
        events.append(job_pb2.JobEvent(state=job_pb2.StateChanged(**{"from": before, "to": after})))
        before = after
    for step in range(1, steps + 1):
        progress = job_pb2.Progress(step=step, total_steps=steps, loss=1 / step, tokens_per_s=100.0 * step)
        events.append(job_pb2.JobEvent(progress=progress, attempt=1))
    for after in (job_pb2.STATE_FINALIZING, job_pb2.STATE_SUCCEEDED):
        events.append(job_pb2.JobEvent(state=job_pb2.StateChanged(**{"from": before, "to": after})))
        before = after
    for index, event in enumerate(events):
        event.sequence, event.id = index + 1, f"{UID}-{index + 1}"
        event.time.FromSeconds(1_700_000_000 + index)
    return events


def a_job(name: str = "projects/default/jobs/story", state: int = job_pb2.STATE_RUNNING) -> job_pb2.Job:
    """A job as the service would have it."""
    return job_pb2.Job(name=name, uid=UID, state=state)


def _kind(event: job_pb2.JobEvent) -> int:
    name = str(event.WhichOneof("payload")).removesuffix("_changed").upper()
    return int(job_service_pb2.EventKind.Value(f"EVENT_KIND_{name}"))


def _sha256(data: bytes) -> str:

    return hashlib.sha256(data).hexdigest()
