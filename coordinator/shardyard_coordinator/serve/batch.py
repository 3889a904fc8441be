"""BatchCreateJobs and BatchCancelJobs: all of a batch, or none of it.

A batch of jobs is planned first, as many at a time as the compute processes take, and then accepted in one transaction.
So a caller never has to find out which part of a batch exists: a refusal names every job that is in the way, and a
repeated call with the same request ids returns the same jobs.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from functools import partial

from sqlalchemy import Connection

from shardyard.v1 import job_service_pb2 as pb
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Code
from shardyard_coordinator.domain.records import JobRecord, NewJob
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.submit import Submitter
from shardyard_coordinator.store import encode, jobs, submissions
from shardyard_coordinator.store.submissions import Submission

# So many plans of one batch are asked for at a time: other callers' are asked for between them.
_AT_ONCE = 4


class Batches:
    """Accepts and cancels many jobs at once."""

    def __init__(self, parts: Parts, submitter: Submitter) -> None:
        self._parts = parts
        self._submitter = submitter

    async def create(self, request: pb.BatchCreateJobsRequest, call: Call) -> pb.BatchCreateJobsResponse:
        """Accepts all jobs durably and returns them; with `validate_only` only returns what they would be."""
        self._submitter.check_rate(call, len(request.requests))
        self._parts.name("project", request.parent)
        for each in request.requests:
            each.parent = request.parent
        turns = asyncio.Semaphore(_AT_ONCE)
        found = await asyncio.gather(*(self._prepare(each, call, turns) for each in request.requests))
        new = [each for each in found if not isinstance(each, Refused)]
        if refusals := {at: each for at, each in enumerate(found) if isinstance(each, Refused)}:
            raise together(refusals)
        if request.requests[0].validate_only:
            previews = [
                await self._submitter.preview(each, made, call)
                for each, made in zip(request.requests, new, strict=True)
                if isinstance(made, NewJob)
            ]
            return pb.BatchCreateJobsResponse(jobs=previews)
        self._parts.trace.point("batch.planned")
        size = sum(len(each.spec) + len(each.plan) for each in new)
        with self._parts.spans.span("commit", call.traceparent):
            accepted = await self._parts.store.write(partial(self._insert, new=new, call=call), call.actor, size)
        return pb.BatchCreateJobsResponse(jobs=[encode.job_to_proto(job) for job in accepted])

    async def _prepare(
        self, request: pb.CreateJobRequest, call: Call, turns: asyncio.Semaphore
    ) -> NewJob | JobRecord | Refused:
        """The job to insert, the one that this request has made before, or why it is refused."""
        try:
            async with turns:
                return await self._submitter.prepare(request, call)
        except Refused as refused:
            return refused.fresh_copy()

    def _insert(self, conn: Connection, new: Sequence[NewJob | JobRecord], call: Call) -> list[JobRecord]:
        """All of them in the caller's transaction, which the first refusal undoes."""
        fresh = {at: Submission(each, call.actor) for at, each in enumerate(new) if isinstance(each, NewJob)}
        if full := self._submitter.without_room(conn, list(fresh.values())):
            places = list(fresh)
            raise together({places[at]: refused for at, refused in full.items()})
        accepted: list[JobRecord] = []
        for at, each in enumerate(new):
            if isinstance(each, JobRecord):
                accepted.append(each)
                continue
            try:
                accepted.append(submissions.create_job(conn, each, call.actor, self._parts.clock.now_us()).job)
            except Refused as refused:
                raise together({at: refused}) from None
        return accepted

    async def cancel(self, request: pb.BatchCancelJobsRequest, call: Call) -> pb.BatchCancelJobsResponse:
        """Records all requests in one transaction; a job that has ended stays as it is."""
        project, now_us = self._parts.name("project", request.parent).project, self._parts.clock.now_us()
        ids = [self._parts.name("job", name).id for name in request.names]

        def operation(conn: Connection) -> list[JobRecord]:
            refusals: dict[int, Refused] = {}
            found: list[JobRecord] = []
            for at, job_id in enumerate(ids):
                try:
                    found.append(jobs.own_job(conn, project, job_id, call.actor))
                except Refused as refused:
                    refusals[at] = refused
            if refusals:
                raise together(refusals, "names")
            cancel = partial(jobs.request_cancel, conn, project, etag="", actor=call.actor, now_us=now_us)
            return [job if job.state.is_terminal else cancel(job_id=job.job_id) for job in found]

        cancelled = await self._parts.store.write(operation, call.actor)
        self._parts.trace.point("cancel.recorded")
        return pb.BatchCancelJobsResponse(jobs=[encode.job_to_proto(job, full=False) for job in cancelled])


def together(refusals: dict[int, Refused], field: str = "requests") -> Refused:
    """The refusals of single items as one, each under its index; a temporary one outweighs those that stay."""
    for at, each in refusals.items():
        if each.code is Code.UNAVAILABLE:
            text = f"{field}[{at}]: {each.message}"
            return Refused(each.reason, text, metadata=each.metadata, retry_after_s=each.retry_after_s or 1.0)
    return refused_fields([one for at, each in refusals.items() for one in _indexed(each, f"{field}[{at}]")])


def _indexed(refused: Refused, item: str) -> list[FieldViolation]:
    if not refused.violations:
        return [FieldViolation(item, refused.message, refused.reason, refused.metadata)]
    return [dataclasses.replace(each, field=f"{item}.{each.field}") for each in refused.violations]
