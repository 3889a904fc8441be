"""A real gRPC server on port 0 that plays back a script: events, cut streams, rich errors, uploads, downloads.

Every test sets what the service is to do in plain attributes and reads what it was asked from `requests`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf import empty_pb2

from helpers.script import UID, Failure, Script, ScriptedServicer
from helpers.scripted_files import Datasets, Models
from shardyard.v1 import (
    checkpoint_service_pb2,
    checkpoint_service_pb2_grpc,
    dataset_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    log_service_pb2,
    log_service_pb2_grpc,
    metric_service_pb2,
    metric_service_pb2_grpc,
    model_service_pb2_grpc,
    plan_pb2,
    server_service_pb2,
    server_service_pb2_grpc,
)


class Jobs(ScriptedServicer, job_service_pb2_grpc.JobServiceServicer):
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


class Logs(ScriptedServicer, log_service_pb2_grpc.LogServiceServicer):
    async def TailLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.begin("TailLogs", request, context)
        start = int(request.cursor or 0)
        cut = self.script.log_cuts.pop(0) if self.script.log_cuts else None
        for index in range(start, len(self.script.log_lines)):
            if cut is not None and index - start >= cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")
            yield log_service_pb2.TailLogsResponse(lines=[self.script.log_lines[index]], cursor=str(index + 1))


class Metrics(ScriptedServicer, metric_service_pb2_grpc.MetricServiceServicer):
    async def QueryMetrics(self, request: Any, context: Any) -> Any:
        await self.begin("QueryMetrics", request, context)
        return metric_service_pb2.QueryMetricsResponse(series=self.script.series, max_points=1000)

    async def WatchMetrics(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.begin("WatchMetrics", request, context)
        yield metric_service_pb2.WatchMetricsResponse(series=self.script.series, cursor="1")


class Checkpoints(ScriptedServicer, checkpoint_service_pb2_grpc.CheckpointServiceServicer):
    async def GetCheckpoint(self, request: Any, context: Any) -> Any:
        await self.begin("GetCheckpoint", request, context)
        return checkpoint_service_pb2.Checkpoint(name=request.name, step=10)

    async def ListCheckpoints(self, request: Any, context: Any) -> Any:
        await self.begin("ListCheckpoints", request, context)
        found = checkpoint_service_pb2.Checkpoint(name=f"{request.parent}/checkpoints/e1-s10", step=10)
        return checkpoint_service_pb2.ListCheckpointsResponse(checkpoints=[found])


class Server(ScriptedServicer, server_service_pb2_grpc.ServerServiceServicer):
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
