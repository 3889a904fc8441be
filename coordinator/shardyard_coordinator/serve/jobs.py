"""JobService: a thin layer over submit, watch and the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

from google.protobuf import empty_pb2
from sqlalchemy import Connection

from shardyard.v1 import job_pb2, plan_pb2
from shardyard.v1 import job_service_pb2 as pb
from shardyard_coordinator.control import intentions
from shardyard_coordinator.domain.records import AttemptRecord, JobRecord
from shardyard_coordinator.serve.batch import Batches
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.fanout import Fanout
from shardyard_coordinator.serve.filters import parse_filter, parse_order
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.submit import Submitter
from shardyard_coordinator.serve.tokens import MAX_PAGE_BYTES, Pages
from shardyard_coordinator.serve.updating import update_job
from shardyard_coordinator.serve.watch import Watcher
from shardyard_coordinator.store import attempts, encode, jobs, listing

MAX_WAIT_S = 60.0


class JobService:
    """Submitting, following and stopping jobs."""

    full_name = "shardyard.v1.JobService"

    def __init__(self, parts: Parts, submitter: Submitter, watcher: Watcher, fanout: Fanout) -> None:
        self._parts = parts
        self._submitter = submitter
        self._batches = Batches(parts, submitter)
        self._watcher = watcher
        self._fanout = fanout

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {
            "CreateJob": self._submitter.create,
            "GetJob": self.get,
            "ListJobs": self.list,
            "UpdateJob": self.update,
            "DeleteJob": self.delete,
            "PlanJob": self.plan,
            "WaitJob": self.wait,
            "CancelJob": self.cancel,
            "PauseJob": self.pause,
            "ResumeJob": self.resume,
            "WatchJob": self._watcher.watch,
            "BatchCreateJobs": self._batches.create,
            "BatchCancelJobs": self._batches.cancel,
            "ListAttempts": self.list_attempts,
        }

    async def get(self, request: pb.GetJobRequest, _call: Call) -> job_pb2.Job:
        """Returns one job."""
        return encode.job_to_proto(await self._job(request.name))

    async def plan(self, request: pb.PlanJobRequest, call: Call) -> plan_pb2.JobPlan:
        """Plans a job; changes nothing."""
        return await self._submitter.plan(request, call)

    async def list(self, request: pb.ListJobsRequest, _call: Call) -> pb.ListJobsResponse:
        """Lists a page of jobs, which ends at its count or at 1 MiB."""
        project = self._parts.name("project", request.parent).project
        conditions = parse_filter(request.filter)
        order_by, desc = parse_order(request.order_by)
        pages = Pages(self._parts.tokens, "jobs", request)
        after = pages.after()
        full = request.view == pb.JOB_VIEW_FULL
        found = await self._parts.store.read_many(
            lambda conn: listing.list_jobs(
                conn,
                project,
                conditions=conditions,
                order_by=order_by,
                desc=desc,
                after=None if after is None else (after[0], after[1]),
                limit=pages.size + 1,
                full=full,
                max_bytes=MAX_PAGE_BYTES,
            )
        )
        page, token = pages.fill(
            found, lambda job: encode.job_to_proto(job, full=full), lambda job: listing.order_key(job, order_by)
        )
        return pb.ListJobsResponse(jobs=page, next_page_token=token)

    async def update(self, request: pb.UpdateJobRequest, call: Call) -> job_pb2.Job:
        """Changes the fields of the mask; returns the job after the change."""
        name, now_us = self._parts.name("job", request.job.name), self._parts.clock.now_us()
        operation = partial(
            update_job, project=name.project, job_id=name.id, request=request, actor=call.actor, now_us=now_us
        )
        store = self._parts.store
        job = await (store.read(operation) if request.validate_only else store.write(operation, call.actor))
        self._parts.trace.point("update.recorded")
        return encode.job_to_proto(job)

    async def delete(self, request: pb.DeleteJobRequest, call: Call) -> empty_pb2.Empty:
        """Deletes a job that has ended."""
        name, now_us = self._parts.name("job", request.name), self._parts.clock.now_us()
        await self._parts.store.write(
            lambda conn: jobs.delete_job(conn, name.project, name.id, request.etag, actor=call.actor, now_us=now_us),
            call.actor,
        )
        self._parts.trace.point("delete.recorded")
        return empty_pb2.Empty()

    async def cancel(self, request: pb.CancelJobRequest, call: Call) -> job_pb2.Job:
        """Records the request; the attempt's follower carries it out. With `lost` the job ends at once."""
        wish = intentions.declare_lost if request.lost else jobs.request_cancel
        return await self._wish(wish, request, call, "cancel.recorded")

    async def pause(self, request: pb.PauseJobRequest, call: Call) -> job_pb2.Job:
        """Records the request, as `cancel` does."""
        return await self._wish(intentions.request_pause, request, call, "pause.recorded")

    async def resume(self, request: pb.ResumeJobRequest, call: Call) -> job_pb2.Job:
        """Queues a paused job again."""
        return await self._wish(intentions.request_resume, request, call, "resume.recorded")

    async def _wish(
        self,
        record: Callable[..., JobRecord],
        request: pb.CancelJobRequest | pb.PauseJobRequest | pb.ResumeJobRequest,
        call: Call,
        point: str,
    ) -> job_pb2.Job:
        name, now_us = self._parts.name("job", request.name), self._parts.clock.now_us()
        job = await self._parts.store.write(
            lambda conn: record(conn, name.project, name.id, request.etag, actor=call.actor, now_us=now_us), call.actor
        )
        self._parts.trace.point(point)
        return encode.job_to_proto(job)

    async def wait(self, request: pb.WaitJobRequest, call: Call) -> job_pb2.Job:
        """Returns the job when it has ended, or its current state after the timeout or when the service stops."""
        loop = asyncio.get_running_loop()
        timeout_s = request.timeout.seconds + request.timeout.nanos / 1e9 if request.HasField("timeout") else MAX_WAIT_S
        until = loop.time() + min(timeout_s, MAX_WAIT_S)
        if call.deadline_s is not None:
            until = min(until, call.deadline_s - 0.5)
        job = await self._job(request.name)
        uid = job.uid
        while True:
            with self._fanout.interest(uid) as waiter:
                current = await self._parts.store.read(lambda conn: jobs.get_job_by_uid(conn, uid))
                job = current or job
                if job.state.is_terminal or loop.time() >= until or self._fanout.draining:
                    return encode.job_to_proto(job)
                await self._fanout.changed(waiter, until - loop.time())

    async def list_attempts(self, request: pb.ListAttemptsRequest, _call: Call) -> pb.ListAttemptsResponse:
        """Lists a job's attempts, the oldest first."""
        name = self._parts.name("job", request.parent)
        pages = Pages(self._parts.tokens, "attempts", request)
        after = pages.after() or 0

        def query(conn: Connection) -> tuple[JobRecord, list[AttemptRecord]]:
            job = jobs.get_job(conn, name.project, name.id)
            return job, attempts.list_attempts(conn, job.uid, after_epoch=after, limit=pages.size + 1)

        job, found = await self._parts.store.read_many(query)
        page, token = pages.fill(
            found, lambda attempt: encode.attempt_to_proto(job, attempt), lambda attempt: attempt.epoch
        )
        return pb.ListAttemptsResponse(attempts=page, next_page_token=token)

    async def _job(self, name: str) -> JobRecord:
        parsed = self._parts.name("job", name)
        return await self._parts.store.read(lambda conn: jobs.get_job(conn, parsed.project, parsed.id))
